"""`wrap` and `compress`: the calls that change a model."""

import itertools
import os
import weakref
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from dpmem.activations.policy import Policy
from dpmem.activations.store import ActivationStore
from dpmem.config import Activations, Offload, Precision, Shard, WrapConfig
from dpmem.data_parallel import DataParallel
from dpmem.optimizer_step import check_clippable, check_scalable

_forwards: weakref.WeakKeyDictionary[nn.Module, Iterator[int]] = weakref.WeakKeyDictionary()


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    precision: Precision = "fp32",
    activations: Activations | Policy | None = None,
    max_grad_norm: float | None = None,
    shard: Shard = "none",
    offload: Offload = "none",
    process_group: dist.ProcessGroup | None = None,
    wire_dtype: torch.dtype | None = None,
) -> "tuple[DataParallel, torch.optim.Optimizer | None]":
    """Make `model` data parallel and small; the training loop does not change.

    model          on its device already; its parameters are broadcast from rank 0
    optimizer      the one that updates it; needed where max_grad_norm is given
    precision      "fp32"; "bf16" or "fp16": forward under autocast, outputs that torch's pytree
                   sees returned as fp32. "fp16" scales the loss inside (`LossScaler`): gradients
                   take the scale on at the outputs and lose it at the inputs and at the step. Until
                   then `.grad`, and what autograd.grad returns for parameters, carry it:
                   `unscale_()` takes it off at once. A part of the loss that does not come from
                   outputs (a penalty on weights) goes through `scale()`. Steps whose gradients are
                   not finite are skipped. An optimizer that steps on such a model is taken care of
                   whether it was given here or not
    activations    "lossless", "8bit", "4bit", "2bit", "offload", "4bit+offload" (any bits), a
                   byte budget such as "6GiB", or a `Policy`: how activations are stored between
                   forward and backward, of calls of the returned model; None leaves them to
                   autograd
    max_grad_norm  clip the global 2-norm of the gradients to this before each step
    shard, offload "none" in this version
    process_group  ranks to average over; default: all. Under torchrun the default group is
                   initialised here if it is not yet (nccl for a model on CUDA, gloo otherwise);
                   without torchrun and without a group, world size is 1.
    wire_dtype     what gradients travel as: torch.bfloat16 halves float32's traffic, and their sum
                   is rounded; None: as they are

    Returns the wrapped model and the same optimizer, hooked.

    Raises ValueError for unknown or contradictory options, TypeError for parameters that cannot be
    clipped or averaged, NotImplementedError for values this version does not have, RuntimeError
    where ranks hold different models.

    Example:
        model, optimizer = dpmem.wrap(model, optimizer, activations="4bit", max_grad_norm=1.0)
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    """
    config = WrapConfig(precision, activations, max_grad_norm, shard, offload)
    if config.max_grad_norm is not None and optimizer is None:
        raise ValueError(
            "max_grad_norm is applied at the optimizer's step, so wrap needs the optimizer; "
            "received none; call wrap(model, optimizer, max_grad_norm=...)"
        )
    if config.precision == "fp16":
        check_scalable(optimizer, model)
    if optimizer is not None and config.max_grad_norm is not None:
        check_clippable(optimizer, model)
    if process_group is None:
        _initialise_from_torchrun(model)
    wrapped = DataParallel(model, process_group=process_group, wire_dtype=wire_dtype)
    wrapped.configure(config, optimizer)
    return wrapped, optimizer


def compress(model: nn.Module, policy: Activations | Policy, *, seed: int = 0) -> ActivationStore:
    """A context in which what autograd saves of `model` is stored compressed.

    For training loops that do not use `wrap`. Backward may run outside the context. Each forward of
    a model draws fresh noise, on every rank its own. Make the context once and enter it for every
    forward: a byte budget needs that, because it learns from one forward for the next.

    policy   a preset's name, a byte budget such as "6GiB", or a `Policy`
    seed     keys the rounding noise, with the rank and the number of the forward. Forwards are
             counted for each model: in one process the same seed given again draws fresh noise; a
             new process with the same seed repeats that of the first

    Raises ValueError for an unknown preset; NotImplementedError for trained TorchScript;
    on entering, RuntimeError inside other saved-tensor hooks and where a budget cannot be met,
    NotImplementedError for compiled code.

    Example:
        compressed = dpmem.compress(model, "4bit")
        for inputs, targets in loader:
            with compressed:
                loss = loss_fn(model(inputs), targets)
            loss.backward()
    """
    resolved = WrapConfig(activations=policy).policy
    if resolved is None:
        raise ValueError("compress needs a policy; received None; use a preset such as '4bit'")
    # One count a model: a context that is made anew at every step would repeat its noise.
    forwards = _forwards.setdefault(model, itertools.count(1))
    return ActivationStore(model, resolved, seed=seed, rank=_rank, forwards=forwards)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _initialise_from_torchrun(model: nn.Module) -> None:
    """Join the group that torchrun describes, where nobody has yet."""
    if not dist.is_available() or dist.is_initialized():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    devices = {parameter.device.type for parameter in model.parameters()}
    dist.init_process_group("nccl" if "cuda" in devices else "gloo")
