"""From a list of gains and losses to a peak and what was in it.

Everything here is arithmetic on `Change`s: it neither knows nor cares whether they were measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from dpmem_profiling.record import Category, TensorAtPeak, TimelinePoint
from dpmem_profiling.tracker import Change, StorageInfo

MAX_POINTS = 400
TENSORS_AT_PEAK = 20
# What of a step is in none of its phases.
OUTSIDE = "outside"


@dataclass(frozen=True)
class Replay:
    """What one pass over a step's changes finds. `live_at_peak`: storage number -> bytes."""

    peak_bytes: int
    at_peak: Mapping[Category, int]
    peak_by_category: Mapping[Category, int]
    peak_by_phase: Mapping[str, int]
    live_at_peak: Mapping[int, int]
    points: tuple[TimelinePoint, ...]


def replay(
    live_at_start: Mapping[int, int],
    changes: Sequence[Change],
    category_of: Callable[[int], Category],
    *,
    start_s: float,
    max_points: int = MAX_POINTS,
) -> Replay:
    """Replay `changes` on top of the storages (number -> bytes) that are live at `start_s`.

    The points are thinned to at most `max_points`, keeping the start, the end, the peak, every
    phase edge (even where these alone are more), and of each stretch between the highest point.

    A worked example: 10 B of parameters at the start, an activation of +5 B and its -5 B give the
    totals 10, 15, 10, hence a peak of 15 B at event 1 made of 10 B parameter and 5 B activation.
    """
    start_bytes = sum(live_at_start.values())
    totals = list(accumulate((change.delta_bytes for change in changes), initial=start_bytes))
    peak_event = max(range(len(totals)), key=totals.__getitem__)
    kept = _thin(totals, changes, peak_event, max_points)

    live: Counter[Category] = Counter()
    for number, size_bytes in live_at_start.items():
        live[category_of(number)] += size_bytes
    own_peaks = Counter(live)
    phase_peaks: dict[str, int] = {}
    points = []
    at_peak: Mapping[Category, int] = {}
    phase = None
    time_s = 0.0
    for event in range(len(totals)):
        if event:
            change = changes[event - 1]
            phase, time_s = change.phase, change.time_s - start_s
            if change.storage is not None:
                category = category_of(change.storage)
                live[category] += change.delta_bytes
                own_peaks[category] = max(own_peaks[category], live[category])
        # At an edge, too: what a phase finds when it begins counts for it.
        name = OUTSIDE if phase is None else phase
        phase_peaks[name] = max(phase_peaks.get(name, 0), totals[event])
        if event in kept:
            points.append(TimelinePoint(event, time_s, phase, _held(live)))
        if event == peak_event:
            at_peak = _held(live)
    return Replay(
        peak_bytes=totals[peak_event],
        at_peak=at_peak,
        peak_by_category=_held(own_peaks),
        peak_by_phase=phase_peaks,
        live_at_peak=_live_after(live_at_start, changes[:peak_event]),
        points=tuple(points),
    )


def largest_at_peak(
    replayed: Replay, storages: Sequence[StorageInfo], category_of: Callable[[int], Category]
) -> tuple[TensorAtPeak, ...]:
    """The largest storages that were live at the peak, largest first."""
    by_size = sorted(replayed.live_at_peak.items(), key=lambda item: -item[1])
    return tuple(
        TensorAtPeak(
            size_bytes=size_bytes,
            shape=storages[number].shape,
            dtype=storages[number].dtype,
            category=category_of(number),
            module=storages[number].module,
            op=storages[number].op,
        )
        for number, size_bytes in by_size[:TENSORS_AT_PEAK]
    )


def _held(live: Mapping[Category, int]) -> dict[Category, int]:
    return {category: size_bytes for category, size_bytes in live.items() if size_bytes}


def _live_after(live_at_start: Mapping[int, int], changes: Sequence[Change]) -> dict[int, int]:
    live = Counter(live_at_start)
    for change in changes:
        if change.storage is not None:
            live[change.storage] += change.delta_bytes
    return {number: size_bytes for number, size_bytes in live.items() if size_bytes}


def _thin(
    totals: Sequence[int], changes: Sequence[Change], peak_event: int, max_points: int
) -> set[int]:
    edges = {event for event, change in enumerate(changes, 1) if change.storage is None}
    kept = edges | {0, peak_event, len(totals) - 1}
    room = max_points - len(kept)
    rest = [event for event in range(len(totals)) if event not in kept]
    if room <= 0:
        return kept
    stretch = -(-len(rest) // room)
    for first in range(0, len(rest), max(stretch, 1)):
        kept.add(max(rest[first : first + stretch], key=totals.__getitem__))
    return kept
