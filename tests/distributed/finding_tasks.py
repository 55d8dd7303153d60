"""What ranks that search together run, in a module of its own: children import it."""

import time
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dpmem
from dpmem import finder

CPU = torch.device("cpu")


def model() -> nn.Module:
    return nn.Linear(16, 16)


def batch(n: int) -> Tensor:
    return torch.randn(n, 16)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def data_parallel(model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    return DistributedDataParallel(model), optimizer


def runs_out_on_rank_1(model: nn.Module, x: Tensor) -> Tensor:
    """As rank 0 goes on to average gradients, and waits."""
    if dist.get_rank() == 1 and len(x) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return loss(model, x)


JOB = dpmem.Job(model=model, batch=batch, loss=loss, optimizer=adam)


def find_with_options(rank: int, **options: list[Any]) -> Any:
    """What each rank finds with options of its own."""
    own = {name: values[rank] for name, values in options.items()}
    found = dpmem.find_batch_size(
        JOB, device=CPU, budget_bytes=100_000, across_ranks=True, timeout_s=20, **own
    )
    return found.largest_safe


def find_with_a_slow_rank(rank: int) -> dpmem.BatchSizeResult:
    """Rank 1's steps take longer than asked for from batch 4 on."""

    def slow_on_rank_1(model: nn.Module, x: Tensor) -> Tensor:
        time.sleep(0.3 if rank == 1 and len(x) > 3 else 0)
        return loss(model, x)

    job = dpmem.Job(model=model, batch=batch, loss=slow_on_rank_1, optimizer=adam)
    return dpmem.find_batch_size(
        job,
        device=CPU,
        budget_bytes=100_000,
        across_ranks=True,
        max_step_s=0.25,
        max_batch=8,
        timeout_s=20,
    )


def find_where_an_allocator_retries(rank: int) -> dpmem.BatchSizeResult:
    """Rank 1's allocator asks again from batch 4 on; rank 0 holds more."""
    measured_probe = finder.measured_probe

    def probed(job: dpmem.Job, n: int, *rest: Any) -> dpmem.Probe:
        done = measured_probe(job, n, *rest)
        if rank == 0:
            assert done.allocated_bytes is not None
            return replace(done, allocated_bytes=done.allocated_bytes + 1000)
        return replace(done, outcome="retry" if n > 3 else "fits")

    with patch.object(finder, "measured_probe", probed):
        return dpmem.find_batch_size(
            JOB, device=CPU, budget_bytes=100_000, across_ranks=True, max_batch=8, timeout_s=20
        )


def find_with_a_silent_rank(rank: int) -> Any:
    """Rank 1 says nothing for longer than the others wait."""

    def late_on_rank_1(n: int) -> Tensor:
        time.sleep(3 if rank == 1 else 0)
        return batch(n)

    job = dpmem.Job(model=model, batch=late_on_rank_1, loss=loss, optimizer=adam)
    return dpmem.find_batch_size(
        job, device=CPU, budget_bytes=100_000, across_ranks=True, timeout_s=1
    )


def fails_on_rank_1(model: nn.Module, x: Tensor, where: str) -> Tensor:
    """In the backward, where it is to be there, from batch 4 on."""

    def fail(_: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if dist.get_rank() == 1 and len(x) > 3 and where == "backward":
        x.requires_grad_().register_hook(fail)
    return loss(model, x)


class FailsInForward(nn.Linear):
    """Until `heals`, on rank 1 alone, from batch 4 on."""

    heals = False

    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() == 1 and len(x) > 3 and not self.heals:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)


def find_on_a_live_wrapper(rank: int, where: str, search: bool) -> tuple[Any, list[float]]:
    """The safe batch, and the losses of three steps before and three after the search."""
    torch.manual_seed(0)
    inner = FailsInForward(16, 16)
    wrapped, optimizer = dpmem.wrap(inner, torch.optim.Adam(inner.parameters(), 0.01))

    def train(steps: int) -> list[float]:
        losses = []
        for step in range(steps):
            x = torch.full((2, 16), float(rank + step + 1))
            value = loss(wrapped, x)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        return losses

    inner.heals = where != "forward"
    losses = train(3)
    found = None
    if search:
        found = dpmem.find_batch_size(
            (wrapped, optimizer),
            batch=batch,
            loss=lambda model, x: fails_on_rank_1(model, x, where),
            device=CPU,
            budget_bytes=1 << 20,
            across_ranks=True,
            max_batch=8,
            timeout_s=20,
        ).largest_fitting
    inner.heals = True
    return found, losses + train(3)


def find_in_children(rank: int) -> tuple[dpmem.BatchSizeResult, float]:
    """What is found where rank 1 runs out of memory and rank 0 waits; and that ranks go on."""
    job = dpmem.Job(
        model=model, batch=batch, loss=runs_out_on_rank_1, optimizer=adam, wrap=data_parallel
    )
    found = dpmem.find_batch_size(
        job, device=CPU, budget_bytes=100_000, across_ranks=True, isolate=True, max_batch=2
    )
    total = torch.ones(1)
    dist.all_reduce(total)
    return found, total.item()
