"""`dpmem.estimate` and `dpmem estimate`: what a step takes on GPUs that are not here."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import click
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._C import _distributed_c10d as c10d
from torch.optim import Optimizer

from dpmem.ddp_rule import bucket_tensors, by_rule
from dpmem.jobs import is_one_of_many, owned_tensors
from dpmem.targets import load_job
from dpmem.terminal import as_json, bytes_or_unknown, finding, run_job
from dpmem.traced_offload import host_is_elsewhere
from dpmem.traced_sharding import sharding_without_data
from dpmem_profiling import Category, Estimate, Forecast, Job, format_bytes
from dpmem_profiling.gpus import GPUS
from dpmem_profiling.gpus import gpu as gpu_named
from dpmem_profiling.job import ZeroGrad

Wrap = Callable[[nn.Module, Optimizer | None], tuple[nn.Module, Optimizer | None]]


def estimate(
    job: Job,
    *,
    batch_size: int,
    gpu: str,
    wrap: Wrap | None = None,
    zero_grad: ZeroGrad | None = None,
    world_size: int = 1,
) -> Estimate:
    """What one training step of `job` takes on a GPU that need not be here.

    batch_size  samples per rank in the step
    gpu         its name in the table, such as "a100-40gb"; `dpmem estimate` lists them
    wrap        in place of the job's own: functools.partial(dpmem.wrap, activations="4bit")
    zero_grad   in place of the job's own
    world_size  data-parallel ranks, each with such a GPU; the figures are one rank's

    Runs the job's own code on tensors without data: seconds, next to no memory, and no GPU. NCCL's
    buffers are not counted. DistributedDataParallel's memory follows a rule (dpmem/ddp_rule.py);
    fully_shard runs as it is, FullyShardedDataParallel is refused.

    Raises ValueError for an unknown GPU, InvalidJob and Untraceable, both ValueErrors, where a
    factory of the job breaks its promise or its step needs data; and whatever the job raises.
    """
    known = gpu_named(gpu)
    if wrap is not None:
        job = replace(job, wrap=wrap)
    if zero_grad is not None:
        job = replace(job, zero_grad=zero_grad)
    return forecast_of(job, world_size).estimate(batch_size, known)


def forecast_of(job: Job, world_size: int = 1) -> Forecast:
    """Forecasts of `job` as dpmem sees it: the wrapper's memory by its name, and its ranks."""
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1; received {world_size}")
    if job.wrap is not None and is_one_of_many():
        raise ValueError(
            "a forecast of a wrapped job must not speak to other ranks, which do not make it; "
            "received one in a process group of several: forecast before init_process_group, or in "
            "another process"
        )
    return Forecast(job, owned=_owned, around=lambda: _among(world_size))


def _owned(model: nn.Module) -> Mapping[Category, Iterable[Tensor]]:
    return owned_tensors(model) or {"bucket": bucket_tensors(model)}


@contextmanager
def _among(world_size: int) -> Iterator[None]:
    """So many ranks, as far as a step's code sees."""
    ranks = nullcontext() if world_size == 1 else _ranks_without_peers(world_size)
    with ranks, by_rule(), host_is_elsewhere():
        yield


@contextmanager
def _ranks_without_peers(world_size: int) -> Iterator[None]:
    """A process group of which this is rank 0 and the others do not exist."""
    # Importing it registers the backend.
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    if dist.is_initialized():
        raise ValueError(
            "a forecast for several ranks makes a process group of its own; received one that is "
            "already there: forecast before init_process_group, or in another process"
        )

    # Objects travel as the bytes of tensors, and fake tensors have none.
    def all_say_the_same(gathered: list[Any], mine: Any, group: Any = None) -> None:
        gathered[:] = [mine] * len(gathered)

    dist.init_process_group("fake", rank=0, world_size=world_size, store=c10d.HashStore())
    try:
        objects = mock.patch.object(dist, "all_gather_object", all_say_the_same)
        with objects, sharding_without_data():
            yield
    finally:
        dist.destroy_process_group()


@click.command("estimate")
@click.argument("target")
@click.option("--batch", type=click.IntRange(min=1), required=True, help="Samples in the step.")
@click.option("--gpu", "gpu_names", multiple=True, help="A name; may be repeated. [all]")
@as_json
def estimate_command(target: str, batch: int, gpu_names: tuple[str, ...], as_json: bool) -> int:
    """Predict the peak of a step of TARGET, and its largest batch, on GPUs that are not here."""
    gpus = [gpu_named(name) for name in gpu_names or GPUS]
    job = load_job(target)

    def run() -> list[Estimate]:
        forecast = forecast_of(job)
        return [forecast.estimate(batch, gpu) for gpu in gpus]

    estimates = run_job(target, run)
    if as_json:
        click.echo(json.dumps([estimate.to_json() for estimate in estimates], indent=2))
    else:
        console = Console()
        console.print(_table(estimates, batch))
        for note in dict.fromkeys(note for estimate in estimates for note in estimate.notes):
            console.print(f"note: {note}")
    if any(estimate.fits for estimate in estimates):
        return 0
    smallest_bytes = min(estimate.total_bytes for estimate in estimates)
    return finding(
        f"batch {batch} fits none of these GPUs: it takes {format_bytes(smallest_bytes)}; "
        "what would help: a smaller batch, activations='4bit', a larger GPU"
    )


def _table(estimates: list[Estimate], batch: int) -> Table:
    table = Table(title=f"One step at batch {batch}, predicted", title_justify="left")
    table.add_column("GPU", no_wrap=True)
    for heading in ("reserved", "context", "total", "at most", "fits", "largest batch"):
        table.add_column(heading, justify="right")
    for row in estimates:
        table.add_row(
            row.gpu,
            format_bytes(row.peak_reserved_bytes),
            bytes_or_unknown(row.outside_torch_bytes),
            format_bytes(row.total_bytes),
            format_bytes(row.high_bytes),
            "yes" if row.fits else "no",
            _largest(row.largest_batch),
        )
    return table


def _largest(batch: int | None) -> str:
    return "unknown" if batch is None else str(batch or "none")
