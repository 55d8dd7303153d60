"""A run that is under way, or a step of one, as a job: its factories return what is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpmem.jobs import default_device
from dpmem_profiling import Job, StepContext

Target = Job | Callable[[int], None] | tuple[nn.Module, Optimizer | None]


def device_of(device: torch.device | str | None, held: Sequence[Any]) -> torch.device:
    """`device` with its index; where the held modules are, if any, for None."""
    modules = (module for module in held if isinstance(module, nn.Module))
    parameter = next((p for module in modules for p in module.parameters()), None)
    if device is None and parameter is not None:
        device = parameter.device
    device = default_device() if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def as_job(
    target: Target,
    batch: Callable[[int], Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    state: Sequence[Any],
) -> tuple[Job, list[Any]]:
    """The target as a job, and what of it lives already."""
    is_live = isinstance(target, tuple)
    if is_live != (batch is not None) or is_live != (loss is not None):
        raise TypeError(
            "batch= and loss= belong to a target (model, optimizer), and it needs both; "
            f"received {type(target).__name__} with batch={batch!r}, loss={loss!r}"
        )
    if isinstance(target, Job):
        return target, []
    if isinstance(target, tuple):
        assert batch is not None
        if not (
            len(target) == 2
            and isinstance(target[0], nn.Module)
            and isinstance(target[1], Optimizer | None)
        ):
            raise TypeError(
                "a run under way must be given as (model, optimizer), the optimizer None where "
                f"there is none; received ({', '.join(type(part).__name__ for part in target)})"
            )
        model, optimizer = target
        live = Job(
            model=lambda: model,
            optimizer=None if optimizer is None else (lambda parameters: optimizer),
            batch=batch,
            loss=loss,
        )
        return live, [model, optimizer]
    if isinstance(target, nn.Module) or not callable(target):
        raise TypeError(
            "find_batch_size needs a Job, (model, optimizer) or a function of the batch size; "
            f"received {type(target).__name__}"
        )
    step = target

    def run(context: StepContext) -> None:
        step(len(context.batch))

    models = [held for held in state if isinstance(held, nn.Module)]
    optimizers = [held for held in state if isinstance(held, Optimizer)]
    # The step makes its own batch: what a Job's would be holds nothing.
    own = Job(
        model=lambda: _AsTheyAre(models),
        optimizer=(lambda parameters: optimizers[0]) if optimizers else None,
        batch=lambda n: torch.empty(n, 0),
        step=run,
    )
    return own, []


class _AsTheyAre(nn.ModuleList):
    """Modules whose train and eval flags are the step's to set."""

    def train(self, mode: bool = True) -> _AsTheyAre:
        return self
