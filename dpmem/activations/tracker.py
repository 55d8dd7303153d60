"""Follows the torch functions of a forward: which runs, what is the model's, what is arithmetic.

What is the model's stays exact, frozen or trained: parameters, buffers, and every result of a torch
function whose tensors are all of the model (a transposed, cast, weight-normed or dequantized
weight), with the copies that autocast makes of any of these. Not recognized, and so stored as
activations are: weights made by a custom autograd.Function or in a C++ extension, which no torch
function mode sees, and weights mixed with a tensor that is not the model's, a constant made in the
forward included.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from dpmem.activations.calls import FunctionCall, storage_key, tensors_in

# Element by element and exactly repeatable; beside a matrix product they cost little. On one core
# gelu takes 1.2 ns a value and silu 1.0, where 4 bits and back take 1.8.
_SUMS = frozenset(("add", "sub", "neg", "rsub", "__radd__", "__rsub__"))
_PRODUCTS = frozenset(("mul", "__rmul__"))
_ARITHMETIC = _SUMS | _PRODUCTS | {"div", "pow", "tanh", "gelu", "silu"}
_OPTIONS = frozenset(("approximate", "inplace"))
_NONLINEAR_BITS = 8


class Derivation(NamedTuple):
    """A storage that is arithmetic on one other, value by value in memory order."""

    result: StorageWeakRef
    """Keeps the address from being reused."""
    result_version: int
    source: StorageWeakRef
    """Likewise: the source may die long before its result, and another storage take its place."""
    source_version: int
    recompute: Callable[[Tensor], Tensor]
    """The values, in memory order, from the source's, flat."""
    affine: bool

    @property
    def source_key(self) -> int:
        return int(self.source.cdata)

    @property
    def least_bits(self) -> int:
        """Bits of the source from which the noise leaves the result's mean alone."""
        return 0 if self.affine else _NONLINEAR_BITS


class CallTracker(TorchFunctionMode):
    """Knows which torch function is running, and where tensors come from.

    `least_numel`: of smaller tensors no arithmetic is recorded.
    """

    def __init__(self, model: nn.Module, least_numel: int) -> None:
        super().__init__()
        self.call: FunctionCall | None = None
        self._model = model
        self._least_numel = least_numel
        self._held: set[int | None] = set()
        # What was computed from the model alone, by storage: in-place changes raise the version,
        # and the weak reference keeps the address from being reused.
        self._computed: dict[int | None, tuple[StorageWeakRef, int]] = {}
        self._derived: dict[int, Derivation] = {}
        self.watch: Callable[[FunctionCall, Any], None] | None = None
        """Told of every function and its result, after it ran."""

    def refresh(self) -> None:
        """Forget what was computed and is gone; read the model's parameters and buffers again."""
        self._held = _storages_of(self._model)
        self._computed = {
            key: entry for key, entry in self._computed.items() if not entry[0].expired()
        }
        self._derived.clear()

    def owns(self, tensor: Tensor) -> bool:
        """True for parameters, buffers, what was computed from them alone, and copies."""
        if self.holds(tensor):
            return True
        return self.call is not None and any(map(self.holds, self.call.origins(tensor)))

    def holds(self, tensor: Tensor) -> bool:
        """True for parameters, buffers and what was computed from them alone."""
        key = storage_key(tensor)
        if key in self._computed:
            return not tensor.is_inference() and self._computed[key][1] == tensor._version
        return key in self._held or type(tensor) is nn.Parameter

    def derivation(self, tensor: Tensor) -> Derivation | None:
        """How the tensor's storage comes from another one by arithmetic, if it does."""
        found = self._derived.get(tensor.untyped_storage()._cdata)
        return found if found is not None and found.result_version == tensor._version else None

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", None)
        if name == "__get__":
            # An attribute: most calls are these, they save nothing, and what is a tensor is a view.
            return func(*args)
        # At every function of a forward: the tuple's own constructor takes half the time.
        call: FunctionCall = tuple.__new__(FunctionCall, (name, args, kwargs or {}))
        # Asked before the call, which may change an argument in place. Most calls begin with an
        # activation.
        first = args[0] if args else None
        of_the_model = not (isinstance(first, Tensor) and not self.holds(first)) and (
            self._takes_only_the_models(call)
        )
        previous, self.call = self.call, call
        try:
            result = func(*args, **call.kwargs)
        finally:
            self.call = previous
        if self.watch is not None:
            self.watch(call, result)
        if of_the_model:
            for tensor in tensors_in(result):
                self._add(tensor)
        elif (
            name in _ARITHMETIC
            and isinstance(result, Tensor)
            and result.numel() >= self._least_numel
            and _OPTIONS.issuperset(call.kwargs)
        ):
            self._record(call, func, result)
        return result

    def _takes_only_the_models(self, call: FunctionCall) -> bool:
        tensors = list(call.tensors())
        return bool(tensors) and all(map(self.holds, tensors))

    def _add(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key is not None and key not in self._held and not tensor.is_inference():
            self._computed[key] = StorageWeakRef(tensor.untyped_storage()), tensor._version

    def _record(self, call: FunctionCall, func: Any, result: Tensor) -> None:
        """Remember `result` where it is arithmetic on one storage alone."""
        tensors = list(call.tensors())
        if not all(_is_like(tensor, result) for tensor in tensors):
            return
        operands = [self.derivation(tensor) or _itself(tensor) for tensor in tensors]
        first = operands[0]
        storage = result.untyped_storage()
        same = all(
            (operand.source_key, operand.source_version) == (first.source_key, first.source_version)
            for operand in operands
        )
        if storage._cdata == tensors[0].untyped_storage()._cdata:
            return
        known = call.name != "pow" or call.args[1] in (2, 3)
        if not same or not known or (call.name == "div" and not _is_by_number(call)):
            return
        plan = iter([operand.recompute for operand in operands])
        call_options = dict(call.kwargs)
        # Laid out as it was: on CPUs gelu has another kernel, of other last bits, where its input
        # is not contiguous.
        shape, strides = result.shape, result.stride()
        steps = [next(plan) if isinstance(value, Tensor) else value for value in call.args]
        affine = all(operand.affine for operand in operands) and (
            call.name in _SUMS or (len(tensors) == 1 and call.name in (*_PRODUCTS, "div"))
        )
        self._derived[storage._cdata] = Derivation(
            StorageWeakRef(storage),
            result._version,
            first.source,
            first.source_version,
            lambda flat: func(
                *(
                    step(flat).as_strided(shape, strides) if callable(step) else step
                    for step in steps
                ),
                **call_options,
            ),
            affine,
        )


def _itself(tensor: Tensor) -> Derivation:
    storage, version = StorageWeakRef(tensor.untyped_storage()), tensor._version
    return Derivation(storage, version, storage, version, _same, affine=True)


def _same(flat: Tensor) -> Tensor:
    return flat


def _storages_of(model: nn.Module) -> set[int | None]:
    """The storages of the model's parameters and buffers; at every forward, so without names."""
    storages = set()
    seen = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for held in (module._parameters, module._buffers):
            if held:
                storages.update([storage_key(one) for one in held.values() if one is not None])
        if module._modules:
            waiting += [child for child in module._modules.values() if child is not None]
    storages.discard(None)
    return storages


def _is_by_number(call: FunctionCall) -> bool:
    return isinstance(call.args[0], Tensor) and isinstance(call.args[1], int | float)


def _is_like(source: Tensor, result: Tensor) -> bool:
    """Whether both fill a storage of their own, value for value in the same order."""
    if (source.dtype, source.shape, source.stride()) != (
        result.dtype,
        result.shape,
        result.stride(),
    ):
        return False
    if storage_key(source) is None or source.is_inference() or source.is_sparse:
        return False
    size = result.numel() * result.dtype.itemsize
    return source.untyped_storage().nbytes() == size == result.untyped_storage().nbytes()
