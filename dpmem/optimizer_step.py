"""Between backward and the optimizer's update: unscale, clip, skip, as one device scalar.

A step pre-hook reads the gradients' statistics (taken while each bucket was warm), computes one
factor on the device, and multiplies gradients by it in one pass; where it is exactly 1 nothing
moves. torch's fused optimizers divide by loss scale and clip themselves, so that pass is theirs
(docs/decisions/0005).
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from dpmem.local_gradients import LocalGradients
from dpmem.optimizer_hook import OptimizerHook
from dpmem.reducer import Reducer
from dpmem.scaling import LossScaler, rescaled
from dpmem_kernels import grad_scale_

# torch.nn.utils.clip_grad_norm_ adds the same, so that both clip to the same coefficient.
_NORM_EPSILON = 1e-6

# What the statistics kernels read; complex64 as pairs of float32.
_CLIPPABLE = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)

_HOOKS: "weakref.WeakKeyDictionary[Optimizer, OptimizerHook]" = weakref.WeakKeyDictionary()
# Those whose gradients are scaled: no optimizer may update with them unseen.
_SCALING: "weakref.WeakSet[GradientStep]" = weakref.WeakSet()


def check_clippable(optimizer: Optimizer, model: nn.Module) -> None:
    """Can `optimizer`'s step clip the gradients of `model`?

    Raises ValueError where it holds others than the model's parameters, or not all of those that
    require gradients, or clips for another wrapper already, or evaluates more than once a step;
    TypeError for parameters whose gradients the kernels cannot read.
    """
    named = list(model.named_parameters())
    _check_holds_only(optimizer, named, "max_grad_norm clips")
    _check_holds_all(optimizer, named)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in _CLIPPABLE:
            raise TypeError(
                "gradients that are clipped must be float32, bfloat16, float16 or complex64; "
                f"parameter {name!r} is {parameter.dtype}; convert it, or use "
                "torch.nn.utils.clip_grad_norm_ yourself"
            )
    _check_free(optimizer)


def check_scalable(optimizer: Optimizer | None, model: nn.Module) -> None:
    """Can the gradients of `model` be scaled for fp16, and `optimizer`, if any, unscale them?

    Raises ValueError for an optimizer that also holds others than the model's parameters, serves
    another wrapper or evaluates more than once a step; TypeError for parameters that are not
    float32 or bfloat16: fp16 gradients have no room to be unscaled in.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                "precision='fp16' computes in fp16 and keeps parameters in float32 or bfloat16; "
                f"parameter {name!r} is {parameter.dtype}; convert the model with .float()"
            )
    if optimizer is not None:
        named = list(model.named_parameters())
        _check_holds_only(optimizer, named, "precision='fp16' unscales")
        _check_free(optimizer)


class GradientStep:
    """Unscales, measures and clips the gradients of one wrapped model before optimizers step.

    The coefficient is torch.nn.utils.clip_grad_norm_'s, min(1, max_norm / (norm + 1e-6)). With a
    scaler, a step whose gradients are not finite (or whose norm exceeds fp32) changes neither
    parameters nor optimizer state; without one, gradients of a non-finite norm become non-finite,
    they are not hidden.

    Parameters may be frozen and unfrozen, and added to the optimizer, between steps.

    Ranks need not talk: after the all-reduce they hold the same bits, and the sums are taken in an
    order that does not depend on threads.
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: LocalGradients | Reducer,
        max_norm: float | None,
        scaler: LossScaler | None,
    ) -> None:
        self._parameters = list(model.named_parameters())
        self._model = model
        self._gradients = gradients
        self._max_norm = max_norm
        self._scaler = scaler
        # True from the first gradient that enters scaled until they are unscaled.
        self._scaled = False
        # The flag of gradients that were unscaled and that the scaler has not heard of.
        self._unreported: Tensor | None = None
        # True within an optimizer's step, which may have optimizers of its own, as
        # ZeroRedundancyOptimizer has; and after one that raised.
        self.is_stepping = False
        self.norm: Tensor | None = None
        if scaler is not None:
            _SCALING.add(self)
            _watch_all_optimizers()

    def is_ready(self) -> bool:
        """Within an optimizer's step: may its own optimizers update with the gradients?

        Not where an update raised that was to unscale them, and another optimizer comes next.
        """
        return self.is_stepping and not self._scaled

    def attach(self, optimizer: Optimizer) -> None:
        """Hook `optimizer`'s steps."""
        if optimizer in _HOOKS:
            _HOOKS[optimizer].remove()
        _HOOKS[optimizer] = OptimizerHook(self, optimizer)

    def serves(self, optimizer: Optimizer) -> bool:
        """True where `optimizer` updates a parameter of the wrapped model."""
        return not _held(optimizer).isdisjoint(id(p) for _, p in self._parameters)

    def adopt(self, optimizer: Optimizer) -> None:
        """Hook an optimizer that `wrap` was not given. Raises what check_scalable raises."""
        check_scalable(optimizer, self._model)
        if self._max_norm is not None:
            check_clippable(optimizer, self._model)
        self.attach(optimizer)

    def check_holds(self, optimizer: Optimizer) -> None:
        """Does `optimizer` hold what it must, and nothing else?

        Raises ValueError where it holds others than the model's, or misses some that are clipped.
        """
        doing = "max_grad_norm clips" if self._scaler is None else "precision='fp16' unscales"
        _check_holds_only(optimizer, self._parameters, doing)
        if self._max_norm is not None:
            _check_holds_all(optimizer, self._parameters)

    def all_reach(self, optimizer: Optimizer) -> bool:
        """Is every gradient there is one of a parameter that `optimizer` holds?

        Frozen parameters may have one, and need not be in it.
        """
        held = _held(optimizer)
        return all(p.grad is None or id(p) in held for _, p in self._parameters)

    def trainable(self) -> list[bool]:
        """Which parameters require a gradient now."""
        return [parameter.requires_grad for _, parameter in self._parameters]

    def enter(self, gradient: Tensor) -> Tensor:
        """A gradient as it enters the module: times the scale."""
        assert self._scaler is not None
        self.is_stepping = False  # where a step raised
        if not self._scaled:
            self._report()
            # What was not set to None since the last step is added to, so it needs the new scale.
            with torch.no_grad():
                grad_scale_(self._gradients.gradients(), self._scaler.scale)
            self._scaled = True
        return rescaled(gradient, self._scaler.scale)

    def leave(self, gradient: Tensor) -> Tensor:
        """A gradient as it leaves through an input: without the scale."""
        assert self._scaler is not None
        return rescaled(gradient, self._inverse_scale())

    @torch.no_grad()
    def unscale_(self) -> None:
        """Unscale the gradients now, for people who look at them, and take their norm."""
        if self._scaled and self._measure() is not None:
            grad_scale_(self._gradients.gradients(), self._inverse_scale())
        self._scaled = False

    @property
    def may_skip(self) -> bool:
        """Is a step whose gradients are not finite skipped?"""
        return self._scaler is not None

    @torch.no_grad()
    def finish(self, *, deferred: bool) -> tuple[Tensor | None, Tensor | None]:
        """The gradients' last pass before an update: (what it is left to divide by, flag).

        Unless `deferred` to the update they are multiplied here, and there is nothing to divide by.
        The flag is 1.0 where the step is to be skipped, None where none is skipped. What is
        deferred must be told when it is `done`: until then the gradients are as they were.
        """
        found_inf = self._measure()
        if found_inf is None:
            self._scaled = False
            return None, None
        assert self.norm is not None
        factor = self._inverse_scale() if self._scaled else torch.ones_like(self.norm)
        if self._max_norm is not None:
            factor = factor * (self._max_norm / (self.norm + _NORM_EPSILON)).clamp(max=1.0)
        skip = found_inf if self.may_skip else None
        if deferred:
            return factor.reciprocal(), skip
        grad_scale_(self._gradients.gradients(), factor)
        self.done()
        return None, skip

    def done(self) -> None:
        """The gradients carry no scale any more, or are to be skipped."""
        self._scaled = False
        self._report()

    def _measure(self) -> Tensor | None:
        """Set the norm; 1.0 where a gradient is not finite, None where there is no gradient."""
        stats = self._gradients.stats()
        if not stats:
            self.norm = None
            return None
        squares = torch.stack([part.sum_of_squares.double() for part in stats])
        norm = squares.sum().sqrt().float()
        found_inf = torch.stack([part.found_inf for part in stats]).amax()
        if self._scaled:
            norm = norm * self._inverse_scale()
        self.norm = norm
        if self._scaler is not None:
            found_inf = torch.maximum(found_inf, (~norm.isfinite()).float())
            if self._scaled:
                self._unreported = found_inf
            elif self._unreported is not None:
                self._unreported = torch.maximum(found_inf, self._unreported)
        return found_inf

    def _report(self) -> None:
        if self._unreported is not None:
            assert self._scaler is not None
            self._scaler.update(self._unreported)
            self._unreported = None

    def _inverse_scale(self) -> Tensor:
        assert self._scaler is not None
        return self._scaler.scale.double().reciprocal().float()


def _watch_all_optimizers() -> None:
    """Once: see to it that no optimizer updates with gradients that carry a scale."""
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_adopt))


_watching: list[Any] = []


def _adopt(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if optimizer not in _HOOKS:
        for step in list(_SCALING):
            if step.serves(optimizer) and not step.is_ready():
                step.adopt(optimizer)


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


_Named = Sequence[tuple[str, nn.Parameter]]


def _check_holds_only(optimizer: Optimizer, parameters: _Named, doing: str) -> None:
    strangers = len(_held(optimizer) - {id(parameter) for _, parameter in parameters})
    if strangers:
        raise ValueError(
            f"{doing} the gradients of the wrapped model, so the optimizer must "
            f"hold only its parameters; {strangers} belong to no part of the model; give them "
            "an optimizer of their own"
        )


def _check_holds_all(optimizer: Optimizer, parameters: _Named) -> None:
    held = _held(optimizer)
    absent = [name for name, p in parameters if p.requires_grad and id(p) not in held]
    if absent:
        raise ValueError(
            "max_grad_norm clips at the optimizer's step, so the optimizer must hold every "
            f"parameter that requires a gradient; {len(absent)} are not in it, such as "
            f"{absent[0]!r}; add_param_group them, or with several optimizers call "
            "torch.nn.utils.clip_grad_norm_ yourself"
        )


def _check_free(optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(  # noqa: TRY004 - an optimizer it is, only not one for this
            "an optimizer whose gradients are clipped or unscaled at its step must evaluate once a "
            "step; received LBFGS, which evaluates its closure many times; use precision='fp32' or "
            "'bf16' and max_grad_norm=None with it"
        )
    hook = _HOOKS.get(optimizer)
    if hook is not None and hook.step() is not None:
        raise ValueError(
            "an optimizer's step clips or unscales once; this one does so for another wrapped "
            "model; delete that wrapper first, or make a new optimizer"
        )
