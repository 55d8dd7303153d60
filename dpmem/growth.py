"""What a job's memory should do: grow with the batch, and not from step to step."""

from __future__ import annotations

from dpmem_profiling import BatchSizeResult, InvalidJob, Probe, format_bytes

# Where forward is a phase of its own, its peak grows with every sample that a model computes on.
ENOUGH = 16
# Elsewhere an optimizer's own peak may hide small samples, though not this many.
ENOUGH_UNSEEN = 1 << 16
# Counters and metrics that a job keeps are smaller at any batch.
LEAST_LEAK_BYTES = 4096


def note_of_a_leak(result: BatchSizeResult) -> tuple[str, ...]:
    """A sentence where memory grew from step to step at every batch that ran; else nothing."""
    growth_bytes = {
        probe.batch: probe.growth_bytes for probe in result.probes if probe.growth_bytes is not None
    }
    if min(growth_bytes.values(), default=0) <= 0:
        return ()
    if max(growth_bytes.values()) < LEAST_LEAK_BYTES:
        return ()
    # At the answer, or at the batch nearest to it.
    answer = result.largest_safe or next(iter(growth_bytes))
    batch = min(growth_bytes, key=lambda batch: abs(batch - answer))
    grows = f"each step at batch {batch} leaves {format_bytes(growth_bytes[batch])} behind"
    until = ""
    if result.largest_safe is not None:
        room_bytes = result.limit_bytes - (result.peak_bytes or 0)
        until = f", which fills the limit in {room_bytes // growth_bytes[batch]:,} more"
    return (
        f"the job leaks: {grows}{until}; look for what it keeps of every step, such as outputs, or "
        "a metric with its graph, in a list (keep metric.item())",
    )


def refuse_a_constant_step(result: BatchSizeResult, *, makes_own_batch: bool) -> None:
    """Raise InvalidJob where the memory of the smallest and of a much larger batch is the same.

    makes_own_batch  the step is a function of the batch size; its batch is not seen, so a step that
                     makes one of the right size and never uses it passes

    A job's batch is seen. It may be the only thing that grows: then the step never uses it.
    """
    ran = sorted(
        (probe for probe in result.probes if probe.outcome == "fits" and probe.peak_by_phase),
        key=lambda probe: probe.batch,
    )
    if not ran:
        return
    first, last = ran[0], ran[-1]
    phases = last.peak_by_phase or {}
    enough = ENOUGH if "forward" in phases else ENOUGH_UNSEEN
    if last.batch < enough * first.batch:
        return
    batch_bytes = (last.batch_bytes or 0) - (first.batch_bytes or 0)
    if "forward" not in phases and batch_bytes > 0:
        # Nothing tells the batch's growth from that of what is computed from it.
        return
    if _growth_bytes(first, last) > max(batch_bytes, 0):
        return
    peak_bytes = max(phases.values())
    if makes_own_batch:
        raise InvalidJob(
            "a step must take more memory for more samples; received one that takes "
            f"{format_bytes(peak_bytes)} at batch {first.batch} and at {last.batch} alike; "
            "make the batch of the size that the step is called with, and train on it"
        )
    if batch_bytes <= 0:
        raise InvalidJob(
            "Job.batch must return more bytes for more samples; received "
            f"{format_bytes(last.batch_bytes or 0)} at batch {first.batch} and at {last.batch} "
            "alike, and a step that takes no more; use the argument as the batch size"
        )
    raise InvalidJob(
        f"a step must use its batch; from batch {first.batch} to {last.batch} the batch grew by "
        f"{format_bytes(batch_bytes)}, and nothing else of the step did; compute the loss from it"
    )


def _growth_bytes(first: Probe, last: Probe) -> int:
    """The most that any phase's peak grew."""
    before, after = first.peak_by_phase or {}, last.peak_by_phase or {}
    return max((size - before[name] for name, size in after.items() if name in before), default=0)
