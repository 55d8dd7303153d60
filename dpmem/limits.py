"""Search within a limit and a margin that the probes themselves may correct.

What a machine has free is an estimate of what a step may take. Memory may run out below it, in
fragments; the allocator keeps more than the tensors need; and others take their part meanwhile. All
of that is known only after probes, so the search runs again over what it has tried, until limit and
margin are those that its own probes ask for. No batch is tried twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from dpmem_profiling import BatchSizeResult, NvmlUnavailable, format_bytes, nvml, search
from dpmem_profiling.tried import Tried

# Kept free at least: what allocators round up and fragment.
MARGIN_FRACTION = 0.02


def search_within(
    tried: Tried,
    limit_bytes: int,
    *,
    safety: float | None,
    caching_allocator: bool,
    drift_bytes: Callable[[], int],
    max_batch: int,
    forecast: Callable[[int], float] | None = None,
) -> BatchSizeResult:
    """Search for the largest batch within `limit_bytes`, or less where memory runs out before.

    safety             the fraction of the limit to keep free. None: MARGIN_FRACTION of it, or what
                       a caching allocator held beyond the tensors at any probe, the larger of the
                       two, and the drift on top
    caching_allocator  the probes' reserved bytes are those of one
    drift_bytes        asked after every search: how much more of the device others hold than before
    forecast           as for `search`
    """
    limit, notes, lost_bytes = limit_bytes, [], 0

    def margin_bytes(limit: int) -> int:
        if safety is not None:
            return int(limit * safety)
        gaps = [
            probe.reserved_bytes - probe.allocated_bytes
            for probe in tried.probes.values()
            if probe.reserved_bytes is not None and probe.allocated_bytes is not None
        ]
        gap_bytes = max(gaps, default=0) if caching_allocator else 0
        return min(max(int(limit * MARGIN_FRACTION), gap_bytes) + lost_bytes, limit - 1)

    kept = margin_bytes(limit)
    while True:
        result = search(
            tried,
            limit_bytes=limit,
            margin_bytes=kept,
            max_batch=max_batch,
            forecast=forecast,
        )
        lost_bytes = max(lost_bytes, drift_bytes())
        known = (limit, kept)
        ran_out_at = ran_out_below_limit(result)
        # A lower limit that leaves no batch at all says that what ran out is not in the peaks.
        if ran_out_at is not None and ran_out_at - margin_bytes(ran_out_at) >= result.curve[0][1]:
            limit = min(limit, ran_out_at)
        kept = margin_bytes(limit)
        if (limit, kept) == known:
            break
    if limit != limit_bytes:
        notes.append(
            f"memory ran out below {format_bytes(limit_bytes)}, which looked free: the limit is "
            f"{format_bytes(limit)}, the most that a batch took which fit"
        )
    if lost_bytes:
        added = "the margin holds it" if safety is None else "safety= was given, so no margin does"
        notes.append(
            f"during the search others (processes, CUDA's libraries) took "
            f"{format_bytes(lost_bytes)} more of the device; {added}"
        )
    return tried.completing(replace(result, notes=tuple(notes)))


def ran_out_below_limit(result: BatchSizeResult) -> int | None:
    """The highest peak that fit, where the next batch tried ran out of memory early; else None.

    Early: the line through the last two peaks has it within the limit.
    """
    fitting = result.largest_fitting
    above = [probe for probe in result.probes if probe.batch > (fitting or 0)]
    if fitting is None or not above:
        return None
    failed = min(above, key=lambda probe: probe.batch)
    stopped_at_limit = failed.outcome == "oom" and failed.peak_bytes is not None
    if failed.outcome not in ("oom", "retry") or stopped_at_limit:
        return None
    points = [point for point in result.curve if point[0] <= fitting]
    batch, peak_bytes = points[-1]
    before, peak_before_bytes = points[-2] if len(points) > 1 else (0, peak_bytes)
    slope = (peak_bytes - peak_before_bytes) / (batch - before)
    if peak_bytes + slope * (failed.batch - batch) > result.limit_bytes:
        return None
    return max(size_bytes for _, size_bytes in points)


def outside_bytes(device: torch.device) -> int | None:
    """Bytes of a GPU in use by others than this process's allocator: processes, contexts, drivers.

    By NVML, which takes no context; None on the CPU, and where NVML does not say.
    """
    if device.type != "cuda":
        return None
    try:
        seen = nvml.visible_devices()
    except (NvmlUnavailable, ValueError):
        return None
    used_bytes = seen[device.index or 0].used_bytes
    return None if used_bytes is None else used_bytes - torch.cuda.memory_reserved(device)


class Drift:
    """How much more of `device` others came to hold since this was made, at most; 0 if unknown."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start_bytes = outside_bytes(device)
        self.most_bytes = 0

    def sample(self) -> None:
        now_bytes = outside_bytes(self._device)
        if now_bytes is not None and self._start_bytes is not None:
            self.most_bytes = max(self.most_bytes, now_bytes - self._start_bytes)
