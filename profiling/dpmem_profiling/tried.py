"""The probes of one search or several: each batch is tried once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dpmem_profiling.record import BatchSizeResult, Probe


class Tried:
    """A probe that remembers: what was tried is not tried again. `on_probe` hears of the first."""

    def __init__(
        self, probe: Callable[[int], Probe], on_probe: Callable[[Probe], None] | None = None
    ) -> None:
        self._probe = probe
        self._on_probe = on_probe
        self.probes: dict[int, Probe] = {}

    def __call__(self, batch: int) -> Probe:
        if batch not in self.probes:
            self.probes[batch] = self._probe(batch)
            if self._on_probe is not None:
                self._on_probe(self.probes[batch])
        return self.probes[batch]

    def completing(self, result: BatchSizeResult) -> BatchSizeResult:
        """`result` with all probes there were, also those of earlier searches."""
        probes = tuple(self.probes.values())
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
    rates = rounded.samples_per_second()
    return replace(rounded, fastest=max(rates, key=lambda batch: rates[batch], default=None))
