"""Why not even the smallest batch fits: by how much, what takes the room, what would help."""

from __future__ import annotations

from dataclasses import replace

import torch

from dpmem.failures import is_out_of_memory
from dpmem.forecast import forecast_of
from dpmem.jobs import default_device, device_memory_bytes, measure_within
from dpmem.targets import describe
from dpmem_profiling import (
    BatchSizeResult,
    Job,
    MemoryLimitExceeded,
    MemoryRecord,
    format_bytes,
)
from dpmem_profiling.gpus import gpu as gpu_named

# Whose attention kernels a forecast takes; the step was about to run on another device.
_FORECAST_GPU = "a100-40gb"


def explain_too_small(job: Job, result: BatchSizeResult, device: torch.device | None = None) -> str:
    """Why no batch is safe: by how much, the three largest causes, what would make it fit.

    Runs the job at its smallest batch again, to know, with more than the budget where the machine
    can easily spare it: half of what it has free. What needs more than that is stopped, and the
    message then goes by a forecast, on tensors without data.
    """
    device = device or default_device()
    batch = next(probe.batch for probe in result.probes if probe.outcome != "error")
    step = "one sample's step" if batch == 1 else f"the step of the smallest batch, {batch}"
    usable_bytes = result.limit_bytes - result.margin_bytes
    budget = (
        f"does not fit: the budget of {format_bytes(result.limit_bytes)}, "
        f"{format_bytes(result.margin_bytes)} of it kept free, is below"
    )
    help_step = "what would help: activations='2bit', shorter or smaller samples, a larger budget"
    help_model = "what would help: a smaller model, an optimizer with less state, a larger budget"
    memory = device_memory_bytes(device)
    spare_bytes = 0 if memory is None else memory[0] // 2
    # The search may have counted more than the tensors: all that a process is.
    seen_bytes = result.peak_bytes or 0
    unknown = ""
    record: MemoryRecord | None
    try:
        record = measure_within(job, batch, device, max(result.limit_bytes, spare_bytes))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if isinstance(error, MemoryLimitExceeded):
            seen_bytes = max(seen_bytes, error.live_bytes)
        try:
            record = _forecast(job, batch, device)
        except Exception as problem:  # noqa: BLE001 - the job's own; that nothing fits stands
            record = None
            unknown = f"what takes the room is not known: its forecast {describe(problem)}"
    if record is None:
        needed_bytes, causes, own_bytes, how = seen_bytes, unknown, 0, "at least "
    else:
        needed_bytes = max(record.peak_reserved_bytes or record.peak_allocated_bytes, seen_bytes)
        how = "" if record.source == "measured" else "by forecast "
        largest = sorted(record.at_peak.items(), key=lambda item: -item[1])[:3]
        named = ", ".join(f"{category} {format_bytes(size)}" for category, size in largest)
        causes = f"largest at batch {batch}: {named}"
        # Weights, buffers and optimizer states stay; gradients come with the first backward.
        own_bytes = sum(record.persistent_bytes.values()) + max(
            record.peak_by_category.get("gradient", 0), record.peak_by_category.get("bucket", 0)
        )
    what, remedy = step, help_step
    if own_bytes > usable_bytes:
        what, remedy, needed_bytes = "the model's own size", help_model, own_bytes
    if needed_bytes <= usable_bytes:
        return f"{budget} {what}, which takes more than this machine could give; {causes}; {remedy}"
    return (
        f"{budget} {what}, {how}{format_bytes(needed_bytes)}, "
        f"by {how}{format_bytes(needed_bytes - usable_bytes)}; {causes}; {remedy}"
    )


def _forecast(job: Job, batch: int, device: torch.device) -> MemoryRecord:
    """What the step would take; on the CPU without what CUDA's libraries take for themselves."""
    record = forecast_of(job).record(batch, gpu_named(_FORECAST_GPU))
    if device.type == "cuda":
        return record
    at_peak, persistent = dict(record.at_peak), dict(record.persistent_bytes)
    at_peak.pop("workspace", None)
    persistent.pop("workspace", None)
    return replace(
        record,
        at_peak=at_peak,
        peak_allocated_bytes=sum(at_peak.values()),
        peak_reserved_bytes=None,
        persistent_bytes=persistent,
    )
