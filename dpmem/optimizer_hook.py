"""An optimizer's step, hooked: it clips, unscales or is skipped.

Multiplying gradients is a pass of our own, unless the optimizer is one of torch's fused ones: these
divide in the pass of their update, and skip without the host knowing (docs/decisions/0005).
"""

import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from dpmem.optimizer_step import GradientStep


# torch's own fused optimizers write gradients back wherever they are given something to divide by.
# So a step that may clip updates twice, without and with the divisor, and flags on the device let
# one of the two do nothing. Of others it is not known whether their step stands being called twice.
_STEPS_TWICE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


class OptimizerHook:
    """One optimizer's step hooks: it may outlive the wrapper, and does not keep it."""

    def __init__(self, step: "GradientStep", optimizer: Optimizer) -> None:
        self.step = weakref.ref(step)
        # The state of things in which the optimizer's parameters were checked.
        self._checked: object = None
        # The `found_inf` that the optimizer was told, with a `grad_scale`, and by this.
        self._told: Tensor | None = None
        # A second update of the same step, and what it is told: to divide by, to skip.
        self._otherwise: tuple[Callable[[Any], Any], Tensor, Tensor] | None = None
        self._skipped: list[tuple[nn.Parameter, Tensor]] = []
        post_hook = optimizer.register_step_post_hook(self._after)
        # First: those that users registered before must find the step complete.
        optimizer._optimizer_step_post_hooks.move_to_end(  # type: ignore[attr-defined]
            post_hook.id, last=False
        )
        self._handles = [optimizer.register_step_pre_hook(self._before), post_hook]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        step = self.step()
        if step is None:
            raise RuntimeError(
                "this optimizer's step was to clip or unscale the gradients of a wrapped model, "
                "which is gone; train through the model that wrap returned, or wrap again"
            )
        self._forget(optimizer)
        if "found_inf" in vars(optimizer):
            # The scaler removes them after a step that returns.
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
            raise ValueError(
                "gradients are clipped or unscaled once, at the optimizer's step; received a step "
                "by torch.amp.GradScaler, which leaves skipping and, without unscale_, unscaling "
                "to fused optimizers, and is refused with unscale_ as without; use "
                "precision='fp16' instead of a scaler of your own, or fused=False"
            )
        now = ([len(group["params"]) for group in optimizer.param_groups], step.trainable())
        if now != self._checked:
            step.check_holds(optimizer)
            self._checked = now
        step.is_stepping = True
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._finish(step, optimizer)
            return None
        calls = 0

        def once() -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise RuntimeError(
                    "a step that clips or unscales must evaluate its closure once; this optimizer "
                    "did so twice; use one that needs the gradients once a step"
                )
            loss = closure()
            self._finish(step, optimizer)
            return loss

        return (args[0], once, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    def _finish(self, step: "GradientStep", optimizer: Any) -> None:
        on_device = _takes_flags(optimizer) and not _is_new_to_some(optimizer)
        update = None if step.may_skip else _second_update(optimizer)
        may_defer = on_device and (step.may_skip or update is not None)
        deferred = may_defer and step.all_reach(optimizer)
        divisor, found_inf = step.finish(deferred=deferred)
        if found_inf is None:
            if divisor is not None:
                assert update is not None
                clips = (divisor != 1).float()
                self._tell(optimizer, None, clips)
                self._otherwise = update, divisor, 1 - clips
        elif on_device:
            self._tell(optimizer, divisor, found_inf)
        elif not (found_inf == 0).item():  # a forecast's tensors answer True: its steps are taken
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._skipped.append((parameter, parameter.grad))
                        parameter.grad = None

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            if self._otherwise is not None:
                update, divisor, skip = self._otherwise
                self._tell(optimizer, divisor, skip)
                with torch.no_grad():
                    update(optimizer)
        finally:
            step = self.step()
            if step is not None:
                step.is_stepping = False
                if self._told is not None:
                    step.done()
            for parameter, gradient in self._skipped:
                parameter.grad = gradient
            self._forget(optimizer)

    def _forget(self, optimizer: Any) -> None:
        """What was meant for one step: when it is over, and before the next, as it may raise."""
        self._skipped = []
        self._otherwise = None
        # What is known to be ours: the user may have put the optimizer back, and told it his own.
        if self._told is not None and vars(optimizer).get("found_inf") is self._told:
            del optimizer.grad_scale, optimizer.found_inf
        self._told = None

    def _tell(self, optimizer: Any, divisor: Tensor | None, skip: Tensor) -> None:
        optimizer.grad_scale, optimizer.found_inf = divisor, skip
        self._told = skip


def _takes_flags(optimizer: Optimizer) -> bool:
    """Does the update take `grad_scale` and `found_inf`?"""
    # torch's own mark. A loaded state dict, or a group added, may have taken `fused` back.
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused", True) for group in optimizer.param_groups
    )


def _second_update(optimizer: Optimizer) -> Callable[[Any], Any] | None:
    """What may be called once more in a step of `optimizer`: torch's own update, if it is.

    It is past the hooks, to which both updates are one step, and past what wraps them.
    """
    if type(optimizer) not in _STEPS_TWICE:
        return None
    update: Callable[[Any], Any] = inspect.unwrap(type(optimizer).step)
    # Somebody's function in its place may hide anything, the hooks as well.
    return update if update.__module__.startswith("torch.optim.") else None


def _is_new_to_some(optimizer: Optimizer) -> bool:
    """Is there a gradient of a parameter that the optimizer has no state of?

    A skipped step would give it some; torch's fused SGD would leave that uninitialised.
    """
    is_sgd = isinstance(optimizer, torch.optim.SGD)

    def is_new(parameter: Tensor) -> bool:
        state = optimizer.state.get(parameter)
        # torch's SGD may have been loaded with a momentum of None: one that is still to come.
        return not state or (is_sgd and state.get("momentum_buffer") is None)

    return any(
        parameter.grad is not None and is_new(parameter)
        for group in optimizer.param_groups
        if group.get("momentum") != 0  # torch's SGD keeps no state then
        for parameter in group["params"]
    )
