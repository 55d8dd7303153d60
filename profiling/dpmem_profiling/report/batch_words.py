"""What a batch-size search found, in words: the rows that a terminal and `print` show."""

from __future__ import annotations

from dpmem_profiling.record import BatchSizeResult, Probe
from dpmem_profiling.units import format_bytes

# One step each was timed: what is closer than this is the same.
SAME_SPEED = 0.02


def batch_size_rows(result: BatchSizeResult) -> list[tuple[str, str]]:
    """(what, its text), the answers first, then the probes in the order they were made."""
    kept = result.margin_bytes / result.limit_bytes
    rows = [
        ("largest safe batch", _number(result.largest_safe)),
        ("largest that fits", _number(result.largest_fitting)),
        ("fastest of those tried", speed_words(result)),
        ("peak at the safe batch", _size(result.peak_bytes)),
        ("limit", format_bytes(result.limit_bytes)),
        ("kept free", f"{format_bytes(result.margin_bytes)} ({kept:.1%})"),
        ("limited by", result.limited_by),
    ]
    if result.largest_safe is None:
        # Then the peak is that of the smallest batch.
        rows[3] = ("peak at the smallest batch", _size(result.peak_bytes))
    if result.multiple_of != 1:
        rows.insert(2, ("both are multiples of", str(result.multiple_of)))
    rows += [("note", note) for note in result.notes]
    if result.explanation is not None:
        rows.append(("why none", result.explanation))
    return rows + [(f"probe, batch {probe.batch}", _probe_detail(probe)) for probe in result.probes]


def batch_size_text(result: BatchSizeResult) -> str:
    """The rows as plain text, a line each."""
    rows = batch_size_rows(result)
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"{what:<{width}}  {text}" for what, text in rows)


def probe_words(probe: Probe) -> str:
    """A probe's outcome and its peak, without the reason of an error."""
    if probe.outcome == "error":
        return "error"
    return f"{probe.outcome}, {_size(probe.peak_bytes)}"


def speed_words(result: BatchSizeResult) -> str:
    """The fastest safe batch, and what that means for the choice of one."""
    rates = result.samples_per_second()
    if result.fastest is None:
        return "not known"
    best = rates[result.fastest]
    words = f"{result.fastest}, {best:.3g} samples/s"
    safe = result.largest_safe
    if safe is None or safe not in rates:
        return words
    as_fast = min(batch for batch, rate in rates.items() if rate >= best * (1 - SAME_SPEED))
    if as_fast == safe:
        return words
    if rates[safe] >= best * (1 - SAME_SPEED):
        return f"{words}; batch {as_fast} is as fast as {safe}, within {SAME_SPEED:.0%}"
    return (
        f"{words}; accumulation serves better than batch {safe}: "
        f"{as_fast} at a time is {rates[as_fast] / rates[safe] - 1:.0%} faster"
    )


def _probe_detail(probe: Probe) -> str:
    if probe.error is not None:
        return probe.error
    took = "" if probe.seconds is None else f", {probe.seconds:.3g} s a step"
    return f"{probe_words(probe)}{took}"


def _number(batch: int | None) -> str:
    return "none" if batch is None else str(batch)


def _size(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else format_bytes(size_bytes)
