"""What people do with a Job: measure it, report on it; and what memory there is for that."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpmem.data_parallel import DataParallel
from dpmem.host import memory_bytes
from dpmem_profiling import (
    Category,
    Job,
    MemoryRecord,
    ReportFiles,
    format_bytes,
    measure,
    write_report,
)
from dpmem_profiling.extrapolate import Requests

# A step that takes less is timed again: others on the machine take milliseconds at a time.
TIMING_S = 0.1


def is_one_of_many() -> bool:
    """Is this process a rank beside others?"""
    return dist.is_initialized() and dist.get_world_size() > 1


def owned_tensors(model: nn.Module) -> Mapping[Category, Iterable[Tensor]]:
    """The memory dpmem's wrapper holds in `model`, by category; empty for other models."""
    return model.owned_tensors() if isinstance(model, DataParallel) else {}


def measure_job(
    job: Job, batch_size: int, *, device: torch.device | None = None, world_size: int = 1
) -> MemoryRecord:
    """Run three steps of `job` on `device` (CUDA where there is one) and record the third's bytes.

    Raises InvalidJob, a ValueError, where a factory of the job breaks its promise, such as a batch
    function that ignores its size; and whatever the job raises.
    """
    return measure(
        job,
        batch_size,
        device=device or default_device(),
        owned=owned_tensors,
        world_size=world_size,
    )


def default_device() -> torch.device:
    """CUDA's current device where torch sees one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # To ask makes a context, and before there is one it is the first.
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def device_memory_bytes(device: torch.device) -> tuple[int, int] | None:
    """Free and total bytes of `device`: a GPU's, or what this process may use of the host's.

    None where the host does not say (off Linux).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    return memory_bytes()


def checked_budget(budget_bytes: int | None, device: torch.device) -> int:
    """The budget of a search: what was asked for, or what a GPU has for this process now: what is
    free, and what torch holds already.

    Raises ValueError for a budget that is not positive or more than the machine has, and for none
    on the CPU: the kernel kills who takes more than the host has, and that may be who trains.
    """
    memory = device_memory_bytes(device)
    if budget_bytes is None:
        if device.type != "cuda":
            raise ValueError(
                "on the CPU memory is shared, so a budget must be stated; received none; "
                "pass budget_bytes (--budget 8GiB), or on Linux isolate=True (--isolate) to take "
                "what is free"
            )
        assert memory is not None
        return memory[0] + torch.cuda.memory_reserved(device)
    if not isinstance(budget_bytes, int | float):
        raise TypeError(
            f"budget_bytes must be a number of bytes; received {budget_bytes!r}; "
            "write 8GiB as 8 << 30"
        )
    if budget_bytes <= 0:
        raise ValueError(
            f"a budget must be positive; received {budget_bytes} bytes; state one as 8GiB"
        )
    if memory is not None and budget_bytes > memory[1]:
        raise ValueError(
            f"a budget must be within the {format_bytes(memory[1])} that this machine has; "
            f"received {format_bytes(budget_bytes)}; state a smaller one"
        )
    return budget_bytes


def report(
    job: Job,
    *,
    batch_size: int,
    out: str | Path,
    device: torch.device | None = None,
) -> ReportFiles:
    """Measure one step of `job` and write where its bytes go: HTML, PNG and JSON in `out`.

    Raises InvalidJob, a ValueError, where a factory of the job breaks its promise, such as a batch
    function that ignores its size; whatever the job raises; and OSError where `out` cannot be
    written. Nothing is left half-written.
    """
    record = measure_job(job, batch_size, device=device)
    return write_report([record], Path(out), title=job.name or "Where the bytes go")


def measure_within(
    job: Job,
    batch: int,
    device: torch.device,
    limit_bytes: int | None,
    on_requests: Callable[[Requests], None] | None = None,
) -> MemoryRecord:
    """What a probe measures. Raises MemoryLimitExceeded where a step exceeds the limit."""
    # One step to make the optimizer's state and the buckets, one to record, one or more to time.
    return measure(
        job,
        batch,
        device=device,
        warmup_steps=1,
        owned=owned_tensors,
        limit_bytes=limit_bytes,
        # Ranks take as many steps as each other.
        timing_s=0.0 if is_one_of_many() else TIMING_S,
        on_requests=on_requests,
    )
