"""What a training step is, said once: `Job`, and the plain loop that runs it.

A `Job` holds factories, never live objects, so whoever measures it decides when and where the model
comes to life, and nothing of it survives the measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

Phase = Literal["forward", "backward", "step", "zero_grad"]
ZeroGrad = Literal["start", "before_backward", "end"]


def _no_recorder(phase: Phase) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class StepContext:
    """What one training step works with.

    `recorder` is told of every phase; the default does nothing, so a step function runs the same
    whether or not somebody measures it.
    """

    model: nn.Module
    batch: Any
    optimizer: Optimizer | None
    device: torch.device
    recorder: Callable[[Phase], AbstractContextManager[None]] = _no_recorder

    def phase(self, name: Phase) -> AbstractContextManager[None]:
        """Mark what runs inside `with context.phase(name):` as that phase of the step.

        Raises ValueError for a name other than "forward", "backward", "step" or "zero_grad".
        """
        if name not in get_args(Phase):
            raise ValueError(f"phase must be one of {', '.join(get_args(Phase))}; got {name!r}")
        return self.recorder(name)


@dataclass(frozen=True)
class Job:
    """A training step as factories: model, batch, loss and optimizer.

    model          () -> nn.Module, on any device; it is moved and put in training mode
    batch          (n) -> a pytree of CPU tensors holding n samples
    loss           (model, batch) -> scalar tensor; None only where `step` is given
    optimizer      (parameters) -> Optimizer; None measures forward and backward alone
    step           the whole step, in place of loss, backward and optimizer.step()
    wrap           (model, optimizer) -> (model, optimizer), applied last: DistributedDataParallel,
                   functools.partial(dpmem.wrap, activations="4bit"), ...
    zero_grad      when gradients are dropped: "start" of the step, "before_backward" (after the
                   forward pass), or at the "end". It moves the peak.
    longest_batch  like `batch`, with samples as long as they ever get: what find_batch_size tries.
                   To measure it, dataclasses.replace(job, batch=job.longest_batch).
    name           what reports call it

    Raises TypeError where a field is not callable or both or neither of loss and step are given,
    ValueError for an unknown `zero_grad`.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    step: Callable[[StepContext], None] | None = None
    wrap: Callable[[nn.Module, Optimizer | None], tuple[nn.Module, Optimizer | None]] | None = None
    zero_grad: ZeroGrad = "end"
    longest_batch: Callable[[int], Any] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("model", "batch"):
            if not callable(getattr(self, field)):
                raise TypeError(
                    f"Job.{field} must be a callable that builds it; "
                    f"got {type(getattr(self, field)).__name__}. Pass a function or a lambda."
                )
        if isinstance(self.model, nn.Module):
            raise TypeError(
                "Job.model must build the model; got an nn.Module, which would be called as its "
                "forward. Pass `lambda: model_class(...)`."
            )
        for field in ("loss", "optimizer", "step", "wrap", "longest_batch"):
            value = getattr(self, field)
            if value is not None and not callable(value):
                raise TypeError(
                    f"Job.{field} must be a callable or None; got {type(value).__name__}"
                )
        if (self.loss is None) == (self.step is None):
            given = "neither" if self.loss is None else "both"
            raise TypeError(f"Job needs exactly one of loss and step; got {given}")
        if self.zero_grad not in get_args(ZeroGrad):
            raise ValueError(
                f"Job.zero_grad must be one of {', '.join(get_args(ZeroGrad))}; "
                f"got {self.zero_grad!r}"
            )
        if not isinstance(self.name, str):
            raise TypeError(f"Job.name must be a str; got {type(self.name).__name__}")


class InvalidJob(ValueError):  # noqa: N818 - reads as what it is
    """A factory of a job that does not return what it promises, at whatever batch size."""


class Built(NamedTuple):
    """A job come to life: the model on its device in training mode, and its optimizer."""

    model: nn.Module
    optimizer: Optimizer | None


def build(job: Job, device: torch.device) -> Built:
    """Build the job's model on `device` in training mode, then its optimizer, then wrap both.

    Raises InvalidJob where a factory returns something else than it promises.
    """
    return equip(job, build_model(job).to(device).train())


def build_model(job: Job) -> nn.Module:
    """The job's model, wherever its factory puts it. Raises InvalidJob where it is not one."""
    model = job.model()
    if not isinstance(model, nn.Module):
        raise InvalidJob(
            f"Job.model must return an nn.Module; got {type(model).__name__}. Return the model."
        )
    return model


def equip(job: Job, model: nn.Module) -> Built:
    """Give a model on its device the job's optimizer and wrapper.

    Raises InvalidJob where `wrap` returns something else than it promises.
    """
    optimizer = None if job.optimizer is None else job.optimizer(model.parameters())
    if job.wrap is None:
        return Built(model, optimizer)
    wrapped = job.wrap(model, optimizer)
    if not (isinstance(wrapped, tuple) and len(wrapped) == 2):
        raise InvalidJob(
            f"Job.wrap must return (model, optimizer); got {type(wrapped).__name__}. "
            "Return the optimizer it was given where it does not change it."
        )
    return Built(*wrapped)


def make_batch(job: Job, n: int, device: torch.device) -> Any:
    """Make a batch of `n` samples and move its tensors to `device`; the pytree keeps its shape.

    The first tensor's first dimension is taken for the number of samples: a batch function that
    ignores its argument would make every measurement the same. The other tensors are not looked at
    (some have no sample dimension).

    Raises InvalidJob where the batch holds no tensor or its first tensor has not n samples,
    ValueError for an n below 1.
    """
    if n < 1:
        raise ValueError(f"a batch needs at least one sample; got n={n}")
    batch = job.batch(n)
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not tensors:
        raise InvalidJob(
            f"Job.batch must return a pytree (dict, list, tuple, ...) of tensors; "
            f"got {type(batch).__name__} with none. A Hugging Face BatchEncoding: pass dict(it)."
        )
    shape = tuple(tensors[0].shape)
    if not shape or shape[0] != n:
        raise InvalidJob(
            f"Job.batch({n}) must return {n} samples along dimension 0 of its first tensor; "
            f"got shape {shape}. Use the argument as the batch size."
        )
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def run_step(job: Job, context: StepContext) -> None:
    """Run one training step: the job's own, or zero_grad, loss, backward and optimizer.step().

    Raises InvalidJob where the loss is not a scalar tensor.
    """
    if job.step is not None:
        job.step(context)
        return
    assert job.loss is not None, "Job holds exactly one of loss and step"
    if job.zero_grad == "start":
        _drop_gradients(context)
    with context.phase("forward"):
        loss = job.loss(context.model, context.batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InvalidJob(
                f"Job.loss must return a scalar tensor; got {got}. Reduce it, as by .mean()."
            )
    if job.zero_grad == "before_backward":
        _drop_gradients(context)
    with context.phase("backward"):
        loss.backward()
    if context.optimizer is not None:
        with context.phase("step"):
            context.optimizer.step()
    if job.zero_grad == "end":
        _drop_gradients(context)


def _drop_gradients(context: StepContext) -> None:
    with context.phase("zero_grad"):
        (context.model if context.optimizer is None else context.optimizer).zero_grad()
