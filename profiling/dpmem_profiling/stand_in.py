"""What fake tensors do otherwise than real ones, put right while a step is traced."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from dpmem_profiling.traced_sparse import SparseElements
from dpmem_profiling.tracker import MemoryTracker

_aten = torch.ops.aten
# What is False of every 1, and what is False where all that it is given is.
_FALSE = {
    _aten.isnan.default,
    _aten.isinf.default,
    _aten.isposinf.default,
    _aten.isneginf.default,
}
_FALSE_OF_FALSE = {
    _aten.any.default,
    _aten.any.dim,
    _aten.any.dims,
    _aten.all.default,
    _aten.all.dim,
    _aten.all.dims,
    _aten.logical_or.default,
    _aten.bitwise_or.Tensor,
    _aten.stack.default,
    _aten.cat.default,
}
# What multiplies in place by numbers: one tensor, or each of a list by its own.
_SCALES = _aten.mul_.Tensor
_SCALE_EACH = _aten._foreach_mul_.ScalarList


class StandIn(TorchDispatchMode):
    """Enter it last, above the tracker.

    `.item()`, which loops call to log a loss, is answered: 1, or True; `notes` says so. That a
    value is NaN or infinite is answered False, and to an optimizer what was scaled by a number is
    answered with it: NAdam divides by 1 - mu_product. What only changes values and allocates
    nothing is left out.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled while a step is traced, and torch's guard against it takes as long as
        # all that is done here.
        return False

    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__()
        self._tracker = tracker
        self._asked = 0
        self._false: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._scaled: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._sparse = SparseElements()
        self._optimizers = 0
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> StandIn:
        self._hooks = [
            register_optimizer_step_pre_hook(self._optimizer_begins),
            register_optimizer_step_post_hook(self._optimizer_ends),
        ]
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        for hook in self._hooks:
            hook.remove()

    def _optimizer_begins(self, *step: Any) -> None:
        self._optimizers += 1

    def _optimizer_ends(self, *step: Any) -> None:
        self._optimizers -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default:
            if self._tracker.phase != "step":
                # Optimizers read their own step counters.
                self._asked += 1
            dtype = args[0].dtype
            if dtype is torch.bool:
                return args[0] not in self._false
            if dtype.is_floating_point:
                return self._scaled.get(args[0], 1.0) if self._optimizers else 1.0
            return 1
        if func is _SCALES or func is _SCALE_EACH:
            self._scale(*(args if func is _SCALE_EACH else ([args[0]], [args[1]])))
        if _changes_lists_in_place(func):
            # Nothing to compute and nothing to allocate: a third of an optimizer step's time.
            return None
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.layout is torch.sparse_coo:
            result = self._sparse.with_elements(func, args, kwargs or {}, result)
        if func in _FALSE or (func in _FALSE_OF_FALSE and self._are_false(args)):
            self._false[result] = None
        return result

    def _scale(self, tensors: Any, factors: Any) -> None:
        for tensor, factor in zip(tensors, factors, strict=True):
            if tensor.dim() == 0 and isinstance(factor, float):
                self._scaled[tensor] = factor

    def _are_false(self, args: Any) -> bool:
        leaves = (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
        return all(leaf in self._false for leaf in leaves)

    def notes(self) -> tuple[str, ...]:
        """What a reader of the trace must know."""
        if not self._asked:
            return self._sparse.notes()
        return (
            *self._sparse.notes(),
            f"The steps asked {self._asked} times for a tensor's value (.item(), .numpy(), if) and "
            "were told 1 (True for a bool, but that nothing is NaN or infinite): if they decide by "
            "it, the forecast is of that decision.",
        )


@contextmanager
def as_with_data() -> Iterator[None]:
    """What decides by a tensor's type or value goes, inside the block, as it does with data.

    f"{loss:.3f}" and loss.numpy() ask for the value. GradScaler steps: it skips the step where it
    is told that it found an infinity, and then the optimizer's state would be missing.
    """

    def format_(tensor: Tensor, specification: str) -> str:
        if tensor.dim() == 0:
            return format(tensor.item(), specification)
        return object.__format__(tensor, specification)

    def numpy(tensor: Tensor, *, force: bool = False) -> Any:
        if tensor.numel() != 1:
            raise DataDependentOutputException(Tensor.numpy)  # type: ignore[arg-type]
        shape, dtype, value = tensor.shape, tensor.dtype, tensor.detach().item()
        with _disable_current_modes():
            known = torch.full(shape, value, dtype=dtype, requires_grad=tensor.requires_grad)
            return known.numpy(force=force)

    def step(scaler: Any, optimizer: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        return optimizer.step(*args, **kwargs)

    with (
        mock.patch.object(FakeTensor, "__format__", format_),
        mock.patch.object(FakeTensor, "numpy", numpy),
        mock.patch.object(torch.amp.GradScaler, "_maybe_opt_step", step),
    ):
        yield


@contextmanager
def copies_stay_fake() -> Iterator[None]:
    """Let copy.deepcopy copy fake tensors, as of layers that a model clones and of averaged models.

    torch's own copies their mode with them, and to an operator a tensor of another mode is new
    memory. It also looks where a fake tensor points to, which torch then warns of.
    """

    def deepcopy(tensor: FakeTensor, memo: dict[int, Any]) -> Any:
        memo[id(tensor.fake_mode)] = tensor.fake_mode
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            return Tensor.__deepcopy__(tensor, memo)

    with mock.patch.object(FakeTensor, "__deepcopy__", deepcopy):
        yield


@cache
def _changes_lists_in_place(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return name.startswith(("_foreach_", "_fused_")) and name.endswith("_")
