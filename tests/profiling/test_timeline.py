"""replay() against a naive replay, on random changes."""

import random

import pytest

from dpmem_profiling.record import Category
from dpmem_profiling.timeline import replay
from dpmem_profiling.tracker import Change

KINDS: tuple[Category, ...] = ("parameter", "activation", "temporary")


def kind(number: int) -> Category:
    return KINDS[number % 3]


def random_changes(seed: int, count: int) -> tuple[dict[int, int], list[Change]]:
    rng = random.Random(seed)
    start = {number: rng.randrange(1, 1000) for number in range(5)}
    live, changes = dict(start), []
    for event in range(count):
        if rng.random() < 0.01:
            changes.append(Change(event + 1.0, rng.choice(["forward", "backward"]), None, 0))
        elif live and rng.random() < 0.5:
            number = rng.choice(list(live))
            changes.append(Change(event + 1.0, "forward", number, -live.pop(number)))
        else:
            live[100 + event] = rng.randrange(1, 1000)
            changes.append(Change(event + 1.0, "forward", 100 + event, live[100 + event]))
    return start, changes


@pytest.mark.parametrize("count", [0, 1, 50, 5000])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_a_naive_replay(seed: int, count: int) -> None:
    start, changes = random_changes(seed, count)
    live, peak, peak_live = dict(start), sum(start.values()), dict(start)
    own_peaks = dict.fromkeys(KINDS, 0)
    phase_peaks: dict[str, int] = {}
    for change in [None, *changes]:
        if change is not None and change.storage is not None:
            live[change.storage] = live.get(change.storage, 0) + change.delta_bytes
        if sum(live.values()) > peak:
            peak, peak_live = sum(live.values()), dict(live)
        phase = (change.phase if change is not None else None) or "outside"
        phase_peaks[phase] = max(phase_peaks.get(phase, 0), sum(live.values()))
        for name in KINDS:
            own = sum(size for number, size in live.items() if kind(number) == name)
            own_peaks[name] = max(own_peaks[name], own)

    replayed = replay(start, changes, kind, start_s=0.0)
    assert replayed.peak_bytes == peak == sum(replayed.at_peak.values())
    assert replayed.live_at_peak == {number: size for number, size in peak_live.items() if size}
    assert replayed.peak_by_category == {name: size for name, size in own_peaks.items() if size}
    assert replayed.peak_by_phase == phase_peaks
    assert len(replayed.points) <= 400
    events = [point.event for point in replayed.points]
    assert events == sorted(set(events))
    assert events[0] == 0
    assert events[-1] == count
    edges = {event for event, change in enumerate(changes, 1) if change.storage is None}
    assert edges <= set(events)
    assert max(sum(point.live_bytes.values()) for point in replayed.points) == peak
    assert sum(replayed.points[-1].live_bytes.values()) == sum(live.values())


def test_the_documented_example() -> None:
    changes = [Change(1.5, "forward", 1, 5), Change(2.0, "backward", 1, -5)]
    replayed = replay({0: 10}, changes, kind, start_s=1.0)
    assert replayed.peak_bytes == 15
    assert replayed.at_peak == {"parameter": 10, "activation": 5}
    assert [(point.time_s, point.phase) for point in replayed.points] == [
        (0.0, None),
        (0.5, "forward"),
        (1.0, "backward"),
    ]
