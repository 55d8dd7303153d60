"""What people do with a Job: measure it, find its batch size, report on it."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dpmem.wrapper import DataParallel
from dpmem_profiling import (
    BatchSizeResult,
    Category,
    Job,
    MemoryLimitExceeded,
    MemoryRecord,
    Probe,
    ReportFiles,
    format_bytes,
    measure,
    search,
    write_report,
)

# Kept free of the limit: what allocators round up and fragment. Replaced by measured figures
# where the forecast has them.
MARGIN_FRACTION = 0.02


def owned_tensors(model: nn.Module) -> Mapping[Category, Iterable[Tensor]]:
    """The memory dpmem's wrapper holds in `model`, by category; empty for other models."""
    return model.owned_tensors() if isinstance(model, DataParallel) else {}


def measure_job(
    job: Job, batch_size: int, *, device: torch.device | None = None, world_size: int = 1
) -> MemoryRecord:
    """Run three steps of `job` on `device` (CUDA where there is one) and record the third's bytes.

    Raises ValueError where the job's batch function ignores its size.
    """
    return measure(
        job,
        batch_size,
        device=device or default_device(),
        owned=owned_tensors,
        world_size=world_size,
    )


def default_device() -> torch.device:
    """CUDA where torch sees one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def find_batch_size(
    job: Job,
    *,
    budget_bytes: int | None = None,
    device: torch.device | None = None,
    on_probe: Callable[[Probe], None] | None = None,
) -> BatchSizeResult:
    """The largest batch of `job` whose training step stays within memory, by a few real steps.

    budget_bytes  tensor bytes a step may hold. Needed on the CPU, where memory is shared with
                  everything else; on CUDA the default is what the device has free now.
    on_probe      told of every batch tried

    Every probe builds the job anew and runs it under the limit: a step that would exceed it is
    stopped there, before the machine is. 2% of the limit stay free for `largest_safe`.

    Raises ValueError for a budget that is not positive, for a missing budget on the CPU, and where
    the job's batch function ignores its size.
    """
    device = device or default_device()
    if budget_bytes is None:
        if device.type != "cuda":
            raise ValueError(
                "on the CPU memory is shared, so a budget must be stated; received none; "
                "pass budget_bytes (--budget 8GiB)"
            )
        budget_bytes = torch.cuda.mem_get_info(device)[0]
    if budget_bytes <= 0:
        raise ValueError(f"a budget must be positive; received {budget_bytes} bytes")

    def probe(batch: int) -> Probe:
        try:
            # One step to make the optimizer's state and the buckets, one to record, one to time.
            record = measure(
                job,
                batch,
                device=device,
                warmup_steps=1,
                owned=owned_tensors,
                limit_bytes=budget_bytes,
            )
        except MemoryLimitExceeded as error:
            # At least this much: the step was stopped as it crossed the limit.
            return Probe(batch, "oom", allocated_bytes=error.live_bytes)
        except torch.OutOfMemoryError:
            return Probe(batch, "oom")
        return Probe(
            batch,
            "fits",
            allocated_bytes=record.peak_allocated_bytes,
            reserved_bytes=record.peak_reserved_bytes,
            device_bytes=record.device_bytes,
            seconds=record.step_s,
            peak_by_phase=record.peak_by_phase,
        )

    margin_bytes = int(budget_bytes * MARGIN_FRACTION)
    return search(probe, limit_bytes=budget_bytes, margin_bytes=margin_bytes, on_probe=on_probe)


def explain_too_small(job: Job, result: BatchSizeResult, device: torch.device | None = None) -> str:
    """Why not even one sample fits: by how much, what takes the room, and what would help.

    Runs the job at batch 1 without the limit, to know.
    """
    record = measure_job(job, 1, device=device)
    usable = result.limit_bytes - result.margin_bytes
    # Weights, buffers and optimizer states stay; gradients come with the first backward.
    own_bytes = sum(record.persistent_bytes.values()) + max(
        record.peak_by_category.get("gradient", 0), record.peak_by_category.get("bucket", 0)
    )
    largest = sorted(record.at_peak.items(), key=lambda item: -item[1])[:3]
    causes = ", ".join(f"{category} {format_bytes(size)}" for category, size in largest)
    if own_bytes > usable:
        what, needed = "the model's own size", own_bytes
        remedy = "a smaller model, an optimizer with less state, or a larger budget"
    else:
        what, needed = "one sample's step", record.peak_allocated_bytes
        remedy = "activations='2bit', shorter or smaller samples, or a larger budget"
    return (
        f"does not fit: the budget of {format_bytes(result.limit_bytes)}, "
        f"{format_bytes(result.margin_bytes)} of it kept free, is below {what}, "
        f"{format_bytes(needed)}, by {format_bytes(needed - usable)}; "
        f"largest at batch 1: {causes}; what would help: {remedy}"
    )


def report(
    job: Job,
    *,
    batch_size: int,
    out: str | Path,
    device: torch.device | None = None,
) -> ReportFiles:
    """Measure one step of `job` and write where its bytes go: HTML, PNG and JSON in `out`.

    Raises ValueError where the job's batch function ignores its size, OSError where `out` cannot
    be written; nothing is left half-written.
    """
    record = measure_job(job, batch_size, device=device)
    return write_report([record], Path(out), title=job.name or "Where the bytes go")
