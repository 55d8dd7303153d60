"""The probes of one search or several: each batch is tried once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from dpmem_profiling.record import BatchSizeResult, Probe


class Tried:
    """A probe that remembers: what was tried is not tried again.

    on_try    hears of every batch before it is tried
    on_probe  hears what came of it
    """

    def __init__(
        self,
        probe: Callable[[int], Probe],
        on_probe: Callable[[Probe], None] | None = None,
        on_try: Callable[[int], None] | None = None,
    ) -> None:
        self._probe = probe
        self._on_probe = on_probe
        self._on_try = on_try
        self.probes: dict[int, Probe] = {}

    def __call__(self, batch: int) -> Probe:
        if batch not in self.probes:
            if self._on_try is not None:
                self._on_try(batch)
            self.probes[batch] = self._probe(batch)
            if self._on_probe is not None:
                self._on_probe(self.probes[batch].told())
        return self.probes[batch]

    def completing(self, result: BatchSizeResult) -> BatchSizeResult:
        """`result` with all probes there were, also those of earlier searches."""
        probes = tuple(done.told() for done in self.probes.values())
        curve = sorted(
            (done.batch, done.peak_bytes)
            for done in probes
            if done.outcome == "fits" and done.peak_bytes is not None
        )
        return replace(result, probes=probes, curve=tuple(curve))


def in_multiples(result: BatchSizeResult, tried: Tried, multiple_of: int) -> BatchSizeResult:
    """`result` with its answers rounded down to multiples of `multiple_of`, each of them tried.

    A multiple that turns out not to fit, as where the peak is no rising line, is passed over for
    the next one down. Raises ValueError for a multiple_of below 1.
    """
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1; received {multiple_of}")
    if multiple_of == 1 or result.largest_fitting is None:
        return replace(result, multiple_of=multiple_of)

    def largest(at_most: int | None, target_bytes: int) -> int | None:
        for batch in range((at_most or 0) // multiple_of * multiple_of, 0, -multiple_of):
            done = tried(batch)
            assert done.outcome != "fits" or done.peak_bytes is not None
            if done.outcome == "fits" and (done.peak_bytes or 0) <= target_bytes:
                return batch
        return None

    safe = largest(result.largest_safe, result.limit_bytes - result.margin_bytes)
    fitting = largest(result.largest_fitting, result.limit_bytes)
    limited_by, peak_bytes = result.limited_by, result.peak_bytes
    if safe is not None:
        peak_bytes = tried(safe).peak_bytes
        if safe != result.largest_safe:
            limited_by += f"; rounded down from {result.largest_safe}, no multiple of {multiple_of}"
    elif result.largest_safe is not None:
        peak_bytes = result.curve[0][1]
        limited_by = (
            f"no multiple of {multiple_of} is safe; without that condition "
            f"{result.largest_safe} is: {limited_by}"
        )
    rounded = tried.completing(
        replace(
            result,
            largest_fitting=fitting,
            largest_safe=safe,
            peak_bytes=peak_bytes,
            limited_by=limited_by,
            multiple_of=multiple_of,
        )
    )
    return _with_fastest(rounded)


def timed_between(result: BatchSizeResult, tried: Tried, more: int) -> BatchSizeResult:
    """`result` after so many more batches below the safe one, tried for the sake of their speed.

    Each lies in the middle of the widest gap between those tried so far, as a ratio: a step's time
    changes with the batch's order of magnitude. Fewer where no gap is left.
    """
    step, safe = result.multiple_of, result.largest_safe
    for _ in range(more if safe is not None else 0):
        known = [n // step for n in tried.probes if n % step == 0 and n <= (safe or 0)]
        # Half a step lies below all that can be tried.
        gaps = [(low, high) for low, high in pairwise([0.5, *sorted(known)]) if high - int(low) > 1]
        if not gaps:
            break
        low, high = max(gaps, key=lambda gap: gap[1] / gap[0])
        tried(step * min(max(round(math.sqrt(low * high)), int(low) + 1), int(high) - 1))
    return _with_fastest(tried.completing(result))


def _with_fastest(result: BatchSizeResult) -> BatchSizeResult:
    rates = result.samples_per_second()
    return replace(result, fastest=max(rates, key=lambda batch: rates[batch], default=None))
