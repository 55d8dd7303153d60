"""Loss scaling for fp16: the scale, how gradients take it on, and how they lose it again.

Inside the wrapped module gradients are those of `scale * loss`; outside they are what they would be
without a wrapper. They take the scale on where they enter, at the module's outputs, and lose it
where they leave, at inputs that require a gradient, so wrapped modules can follow each other.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_LEAVES_WITHOUT_TENSORS = (type(None), bool, int, float, complex, str, bytes, torch.dtype)


class LossScaler:
    """A dynamic loss scale with torch.amp.GradScaler's constants, kept on the device.

    Halves when a step finds an infinity or a NaN (that step is skipped), doubles after
    `growth_interval` steps in a row without. Ranks see the same reduced gradients, so they hold the
    same scale without talking about it.

    Source: torch.amp.GradScaler.
    """

    growth_factor = 2.0
    backoff_factor = 0.5
    growth_interval = 2000
    initial_scale = 2.0**16

    def __init__(
        self, device: torch.device, agree: Callable[[str, object], None] | None = None
    ) -> None:
        """`agree(what, value)` raises where ranks have different values; None for a single one."""
        self._device = device
        self._agree = agree
        self._scale: Tensor
        self._tracker: Tensor
        self._skipped: Tensor
        self._set(self.initial_scale, 0, 0)

    @property
    def scale(self) -> Tensor:
        """The current scale, an fp32 scalar on the device."""
        return self._scale

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped so far. Reading it waits for the device."""
        return int(self._skipped)

    def state_dict(self) -> dict[str, float | int]:
        """`scale`, `growth_tracker` (steps since it last changed) and `skipped_steps`, as numbers.

        Save it beside the model's and the optimizer's. Reading it waits for the device.
        """
        return {
            "scale": float(self._scale),
            "growth_tracker": int(self._tracker),
            "skipped_steps": int(self._skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; on several ranks all must call this, with the same state.

        Raises ValueError, and changes nothing, where the state is not one that `state_dict` can
        have returned; RuntimeError on every rank where ranks were given different ones.
        """
        problem = _problem(state, self.growth_interval)
        if self._agree is not None:
            self._agree("loss scaler's state", problem or dict(state))
        if problem:
            raise ValueError(f"{problem}; the checkpoint is damaged or not a LossScaler's")
        self.restore(state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a good `state`, without asking the other ranks."""
        self._set(float(state["scale"]), state["growth_tracker"], state["skipped_steps"])

    def tensors(self) -> list[Tensor]:
        """What there is to the state, on the device."""
        return [self._scale, self._tracker, self._skipped]

    def update(self, found_inf: Tensor) -> None:
        """Take in one step's flag: 1.0 on the device where it found an infinity or a NaN."""
        # New tensors: a graph made with create_graph=True may hold the old scale.
        self._scale, self._tracker = self._scale.clone(), self._tracker.clone()
        torch._amp_update_scale_(
            self._scale,
            self._tracker,
            found_inf,
            self.growth_factor,
            self.backoff_factor,
            self.growth_interval,
        )
        self._skipped = self._skipped + found_inf.to(torch.int32)

    def _set(self, scale: float, tracker: int, skipped: int) -> None:
        self._scale = torch.tensor(scale, dtype=torch.float32, device=self._device)
        self._tracker = torch.tensor(tracker, dtype=torch.int32, device=self._device)
        self._skipped = torch.tensor(skipped, dtype=torch.int32, device=self._device)


def scaled_outputs(outputs: Any, enter: Callable[[Tensor], Tensor]) -> Any:
    """`outputs` in fp32, every gradient that enters them passed through `enter`.

    An output is a new tensor even where it was fp32 already: the module may use its own one
    further, and gradients from there carry the scale already.

    Raises TypeError for outputs that hold differentiable tensors where torch's pytree sees none.
    """
    _refuse_hidden_tensors(outputs, "outputs")

    def cross(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        if not tensor.requires_grad or not torch.is_grad_enabled():
            return tensor.float() if half else tensor
        entered = tensor.float() if half else tensor.clone()
        entered.register_hook(enter)
        return entered

    return tree_map_only(Tensor, cross, outputs)


def scaled_inputs(inputs: Any, leave: Callable[[Tensor], Tensor]) -> Any:
    """`inputs`, every gradient that leaves through them passed through `leave`.

    Raises TypeError for inputs that hold differentiable tensors where torch's pytree sees none.
    """
    _refuse_hidden_tensors(inputs, "inputs")

    def cross(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        # A tensor of the module's own: the caller may use his elsewhere, and a view that the
        # module edits in place would lead gradients past the hook.
        own = tensor.clone()
        own.register_hook(leave)
        return own

    return tree_map_only(Tensor, cross, inputs)


def rescaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor`, for a gradient that crosses the module's boundary.

    Where it is differentiated again, what crosses back was multiplied once by this product's own
    derivative and once by the boundary in the other direction; the two cancel.
    """
    return _Crossing.apply(gradient, factor, True)


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, factor: Tensor, multiply: bool) -> Tensor:
        ctx.factor, ctx.multiply = factor, multiply
        # In fp32: half precision has no room for the scale.
        return (gradient.float() * factor).to(gradient.dtype) if multiply else gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Crossing.apply(gradients[0], ctx.factor, not ctx.multiply), None, None


def _refuse_hidden_tensors(tree: Any, what: str) -> None:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, (Tensor, *_LEAVES_WITHOUT_TENSORS)):
            continue
        if any(tensor.requires_grad for tensor in _tensors_in(leaf, set())):
            raise TypeError(
                f"with precision='fp16' the module's {what} must be something torch's pytree sees "
                "into, or their gradients would miss the loss scale; received tensors inside "
                f"{type(leaf).__name__}; return tuples, dicts or named tuples, or register the "
                "class with torch.export.register_dataclass"
            )


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors in attributes and containers of `value`, however deep. Leaves modules alone."""
    if isinstance(value, Tensor):
        yield value
        return
    skip = isinstance(value, (*_LEAVES_WITHOUT_TENSORS, torch.nn.Module, type))
    if skip or id(value) in seen:
        return
    seen.add(id(value))
    children = list(getattr(value, "__dict__", {}).values())
    children += [getattr(value, slot, None) for slot in getattr(type(value), "__slots__", ())]
    if isinstance(value, Mapping):
        children += value.values()
    elif isinstance(value, list | tuple | Set):
        children += value
    for child in children:
        yield from _tensors_in(child, seen)


def _problem(state: Mapping[str, Any], growth_interval: int) -> str | None:
    """What is wrong with a state, if anything."""
    if set(state) != {"scale", "growth_tracker", "skipped_steps"}:
        return (
            "a loss scaler's state must hold scale, growth_tracker and skipped_steps; received "
            f"{', '.join(map(str, state)) or 'nothing'}"
        )
    scale, tracker, skipped = state["scale"], state["growth_tracker"], state["skipped_steps"]
    if not (isinstance(scale, float) and math.isfinite(scale) and scale > 0):
        return f"scale must be a finite float above 0; received {scale!r}"
    if not (type(tracker) is int and 0 <= tracker < growth_interval):
        return f"growth_tracker must be an integer in [0, {growth_interval}); received {tracker!r}"
    if not (type(skipped) is int and skipped >= 0):
        return f"skipped_steps must be an integer of at least 0; received {skipped!r}"
    return None
