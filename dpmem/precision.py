"""Autocast around forward, and the global-norm clip that rides with the optimizer's step."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dpmem.config import Precision
from dpmem.local_gradients import LocalGradients
from dpmem.reducer import Reducer
from dpmem_kernels import grad_scale_

# torch.nn.utils.clip_grad_norm_ adds the same, so that both clip to the same coefficient.
_NORM_EPSILON = 1e-6

# What the statistics kernels read; complex64 as pairs of float32.
_CLIPPABLE = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)

# Which optimizers clip at their step, and for whom.
_CLIPS: "weakref.WeakKeyDictionary[torch.optim.Optimizer, _Hook]" = weakref.WeakKeyDictionary()


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The context forward runs in."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def upcast_outputs(outputs: Any) -> Any:
    """`outputs` with bf16 tensors as fp32, so that losses are computed in full precision.

    Sees what torch's pytree sees: tuples, lists, dicts, named tuples and registered classes such
    as transformers' ModelOutput. Other containers pass through unchanged.
    """

    def upcast(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor

    return tree_map_only(Tensor, upcast, outputs)


def check_clippable(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Can `optimizer`'s step clip the gradients of `model`?

    Raises ValueError where it holds others than the model's parameters, or not all of those that
    require gradients, or clips for another wrapper already; TypeError for parameters whose
    gradients the kernels cannot read.
    """
    _check_holds(optimizer, list(model.named_parameters()))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in _CLIPPABLE:
            raise TypeError(
                "gradients that are clipped must be float32, bfloat16, float16 or complex64; "
                f"parameter {name!r} is {parameter.dtype}; convert it, or use "
                "torch.nn.utils.clip_grad_norm_ yourself"
            )
    hook = _CLIPS.get(optimizer)
    if hook is not None and hook.clip() is not None:
        raise ValueError(
            "an optimizer's step clips once; this one does so for another wrapped model; delete "
            "that wrapper first, or make a new optimizer"
        )


def _check_holds(
    optimizer: torch.optim.Optimizer, parameters: Sequence[tuple[str, nn.Parameter]]
) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    strangers = len(held - {id(parameter) for _, parameter in parameters})
    if strangers:
        raise ValueError(
            "max_grad_norm clips the gradients of the wrapped model, so the optimizer must "
            f"hold only its parameters; {strangers} belong to no part of the model; give them "
            "an optimizer of their own"
        )
    absent = [name for name, p in parameters if p.requires_grad and id(p) not in held]
    if absent:
        raise ValueError(
            "max_grad_norm clips at the optimizer's step, so the optimizer must hold every "
            f"parameter that requires a gradient; {len(absent)} are not in it, such as "
            f"{absent[0]!r}; add_param_group them, or with several optimizers call "
            "torch.nn.utils.clip_grad_norm_ yourself"
        )


class GradientClip:
    """Clips the global 2-norm of all gradients just before `optimizer` steps.

    Same coefficient as torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)), computed
    and applied on the device; where it is 1, no gradient is touched. Like that function it turns
    gradients of a non-finite norm into non-finite ones, it does not hide them.

    Parameters may be frozen and unfrozen, and added to the optimizer, between steps.

    Ranks need not talk: after the all-reduce they hold the same bits, and the sums are taken in an
    order that does not depend on threads.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        gradients: LocalGradients | Reducer,
        max_norm: float,
    ) -> None:
        self._parameters = list(model.named_parameters())
        self._checked: object = None
        self._gradients = gradients
        self._max_norm = max_norm
        self.norm: Tensor | None = None
        if optimizer in _CLIPS:
            _CLIPS[optimizer].handle.remove()
        _CLIPS[optimizer] = _Hook(self, optimizer)

    def before_step(
        self, optimizer: torch.optim.Optimizer, closure: Callable[[], float] | None
    ) -> None:
        """Clip.

        Raises RuntimeError where a closure would compute the gradients afterwards, ValueError where
        the optimizer no longer holds just the parameters that are clipped.
        """
        if closure is not None:
            raise RuntimeError(
                "max_grad_norm clips before the step, and a closure would compute the gradients "
                "inside it, unclipped; call backward() yourself and step() without a closure"
            )
        now = (
            [len(group["params"]) for group in optimizer.param_groups],
            [parameter.requires_grad for _, parameter in self._parameters],
        )
        if now != self._checked:
            _check_holds(optimizer, self._parameters)
            self._checked = now
        with torch.no_grad():
            stats = self._gradients.stats()
            if not stats:
                self.norm = None
                return
            squares = torch.stack([part.sum_of_squares.double() for part in stats])
            norm = squares.sum().sqrt().float()
            coefficient = (self._max_norm / (norm + _NORM_EPSILON)).clamp(max=1.0)
            grad_scale_(self._gradients.gradients(), coefficient)
            self.norm = norm


class _Hook:
    """An optimizer's step pre-hook: the optimizer may outlive the wrapper, and does not keep it."""

    def __init__(self, clip: GradientClip, optimizer: torch.optim.Optimizer) -> None:
        self.clip = weakref.ref(clip)
        self.handle = optimizer.register_step_pre_hook(self)

    def __call__(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        clip = self.clip()
        if clip is None:
            raise RuntimeError(
                "this optimizer's step was to clip the gradients of a wrapped model, which is "
                "gone; train through the model that wrap returned, or wrap again"
            )
        clip.before_step(optimizer, kwargs.get("closure") or (args[1] if len(args) > 1 else None))
