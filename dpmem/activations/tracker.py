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

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from dpmem.activations.calls import FunctionCall, storage_key, tensors_in

# Element by element and exactly repeatable; beside a matrix product they cost little. On one core
# gelu takes 1.2 ns a value and silu 1.0, where 4 bits and back take 1.8.
_SUMS = frozenset(("add", "sub", "neg", "rsub", "__radd__", "__rsub__"))
_SCALINGS = frozenset(("mul", "__rmul__", "div"))
_ARITHMETIC = _SUMS | _SCALINGS | {"pow", "tanh", "gelu", "silu"}
_OF_A_NUMBER = frozenset(("div", "pow"))
_OPTIONS = frozenset(("approximate", "inplace"))
_NONLINEAR_BITS = 8
_NO_OPTIONS: Mapping[str, Any] = {}
FIRST_PRUNING = 4096

Arguments = tuple[Any, ...]
Options = Mapping[str, Any]


class Derivation(NamedTuple):
    """A storage that is arithmetic on one other, value by value in memory order."""

    result_version: int
    source_key: int
    source_version: int
    recompute: Callable[[Tensor], Tensor]
    """The values, in memory order, from the source's, flat."""
    affine: bool

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
        self._running: tuple[str | None, Arguments, Options] | None = None
        self._model = model
        self._least_numel = least_numel
        self._held: set[int | None] = set()
        # What was computed from the model alone, by storage: in-place changes raise the version,
        # and the weak reference keeps the address from being reused.
        self._computed: dict[int | None, tuple[StorageWeakRef, int]] = {}
        self._derived: dict[int, Derivation] = {}
        self._keys: dict[int, StorageWeakRef] = {}
        self._known_before_pruning = FIRST_PRUNING
        self.watch: Callable[[FunctionCall, Any], None] | None = None
        """Told of every function and its result, after it ran."""

    @property
    def call(self) -> FunctionCall | None:
        """The torch function that runs. Made when asked for: of most functions nobody asks."""
        # The tuple's own constructor would take half as long again.
        return None if self._running is None else tuple.__new__(FunctionCall, self._running)

    def refresh(self) -> None:
        """Forget what was computed and is gone; read the model's parameters and buffers again."""
        self._held = _storages_of(self._model)
        if self._computed:
            self._forget_computed()

    def forget(self) -> None:
        """What came from what: the forward is over."""
        self._derived.clear()
        self._keys.clear()

    def prune(self) -> None:
        """Forget what can be of no use any more: a context may stay open for many forwards."""
        self._derived = {
            key: found for key, found in self._derived.items() if not self._keys[key].expired()
        }
        named = {found.source_key for found in self._derived.values()}.union(self._derived)
        self._keys = {key: storage for key, storage in self._keys.items() if key in named}
        self._forget_computed()
        known = len(self._keys) + len(self._computed)
        self._known_before_pruning = max(FIRST_PRUNING, 2 * known)

    def _forget_computed(self) -> None:
        self._computed = {
            key: entry for key, entry in self._computed.items() if not entry[0].expired()
        }

    def _prune_when_grown(self) -> None:
        """Where something was added, and not only by what is saved: evaluation saves nothing."""
        if len(self._keys) + len(self._computed) > self._known_before_pruning:
            self.prune()

    def name(self, tensor: Tensor) -> tuple[int, StorageWeakRef]:
        """A key of the tensor's storage, and what keeps it from becoming another storage's."""
        key = storage_key(tensor)
        assert key is not None
        storage = self._keys.get(key)
        if storage is None:
            # The address is not reused while this is there.
            storage = self._keys[key] = StorageWeakRef(tensor.untyped_storage())
        return key, storage

    def holds(self, tensor: Tensor) -> bool:
        """True for parameters, buffers and what was computed from them alone."""
        key = storage_key(tensor)
        if key in self._held:
            return True
        if key in self._computed:
            return not tensor.is_inference() and self._computed[key][1] == tensor._version
        return type(tensor) is Parameter

    def made_copy(self, call: FunctionCall, tensor: Tensor) -> bool:
        """True where `call` made `tensor`, which nobody holds, from what is the model's alone."""
        for argument in call.args:
            if argument is tensor:
                return False  # as most are
        # Most other ones are results of activations alone: to follow their graph takes longer.
        if not any(map(self.holds, call.tensors())):
            return False
        return any(map(self.holds, call.origins(tensor)))

    def derivation(self, tensor: Tensor) -> Derivation | None:
        """How the tensor's storage comes from another one by arithmetic, if it does."""
        key = storage_key(tensor)
        found = None if key is None else self._derived.get(key)
        return found if found is not None and found.result_version == tensor._version else None

    def all_from(self, source_key: int) -> bool:
        """Is every activation that the running function takes this storage, or arithmetic on it?"""
        call = self.call
        return call is not None and all(
            self.holds(tensor) or self._source_of(tensor) == source_key for tensor in call.tensors()
        )

    def _source_of(self, tensor: Tensor) -> int | None:
        found = self.derivation(tensor)
        return storage_key(tensor) if found is None else found.source_key

    def __torch_function__(
        self, func: Any, types: Any, args: Arguments = (), kwargs: Options | None = None
    ) -> Any:
        name = getattr(func, "__name__", None)
        if name == "__get__":
            # An attribute: most calls are these, they save nothing, and what is a tensor is a view.
            return func(*args)
        options = kwargs or _NO_OPTIONS
        # Asked before the call, which may change an argument in place. Most calls begin with an
        # activation.
        first = args[0] if args else None
        of_the_model = not (isinstance(first, Tensor) and not self.holds(first)) and (
            self._takes_only_the_models(args, options)
        )
        previous, self._running = self._running, (name, args, options)
        try:
            result = func(*args, **options)
        finally:
            self._running = previous
        if self.watch is not None:
            self.watch(FunctionCall(name, args, options), result)
        if of_the_model:
            for tensor in tensors_in(result):
                self._add(tensor)
        elif (
            name in _ARITHMETIC
            and isinstance(result, Tensor)
            and result.numel() >= self._least_numel
            and _OPTIONS.issuperset(options)
        ):
            self._record(func, name, args, options, result)
        return result

    def _takes_only_the_models(self, args: Arguments, options: Options) -> bool:
        tensors = list(tensors_in(*args, *options.values()))
        return bool(tensors) and all(map(self.holds, tensors))

    def _add(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key is not None and key not in self._held and not tensor.is_inference():
            self._computed[key] = StorageWeakRef(tensor.untyped_storage()), tensor._version
            self._prune_when_grown()

    def _record(
        self, func: Any, name: str, args: Arguments, options: Options, result: Tensor
    ) -> None:
        """Remember `result` where it is arithmetic on one storage alone."""
        tensors = [value for value in args if isinstance(value, Tensor)]
        if name in _OF_A_NUMBER and not _has_a_plain_number(name, args):
            return
        if not _fills_its_storage(result):
            return
        # Laid out as it was: on CPUs gelu has another kernel, of other last bits, where its input
        # is not contiguous.
        dtype, shape, strides = result.dtype, result.shape, result.stride()
        operands = []
        for tensor in tensors:
            if not (
                tensor.dtype == dtype
                and tensor.shape == shape
                and _fills_its_storage(tensor)
                and tensor.stride() == strides
            ):
                return
            operands.append(self.derivation(tensor) or self._itself(tensor))
        first = operands[0]
        if any(
            (operand.source_key, operand.source_version) != (first.source_key, first.source_version)
            for operand in operands[1:]
        ):
            return
        key, _ = self.name(result)
        if key == storage_key(tensors[0]):
            return
        plan = iter([operand.recompute for operand in operands])
        steps = [next(plan) if isinstance(value, Tensor) else value for value in args]
        affine = name in _SUMS or (len(tensors) == 1 and name in _SCALINGS)

        def recompute(flat: Tensor) -> Tensor:
            values = [
                step(flat).as_strided(shape, strides) if callable(step) else step for step in steps
            ]
            return func(*values, **options)

        self._derived[key] = Derivation(
            result._version,
            first.source_key,
            first.source_version,
            recompute,
            affine and all(operand.affine for operand in operands),
        )
        # Not before: the keys of its source and of itself are used from here on alone.
        self._prune_when_grown()

    def _itself(self, tensor: Tensor) -> Derivation:
        version = tensor._version
        return Derivation(version, self.name(tensor)[0], version, _same, affine=True)


def _same(flat: Tensor) -> Tensor:
    return flat


def _storages_of(model: nn.Module) -> set[int | None]:
    """The storages of the model's parameters and buffers; at every forward, so without names."""
    tensors: list[Tensor | None] = []
    waiting: list[nn.Module | None] = [model]
    seen: set[nn.Module] = set()
    for module in waiting:
        if module is None or module in seen:
            continue
        seen.add(module)
        if isinstance(module, torch.jit.ScriptModule):
            # A frozen part: its parameters are not in Python.
            tensors += [*module.parameters(), *module.buffers()]
            continue
        state = module.__dict__  # at once: an attribute takes a module longer to find
        if held := state["_parameters"]:
            tensors += held.values()
        if held := state["_buffers"]:
            tensors += held.values()
        if modules := state["_modules"]:
            waiting += modules.values()
    storages = {storage_key(tensor) for tensor in tensors if tensor is not None}
    storages.discard(None)
    return storages


def _has_a_plain_number(name: str, args: Arguments) -> bool:
    """Whether these divide a tensor by a number, or take its square or cube."""
    if not (isinstance(args[0], Tensor) and isinstance(args[1], int | float)):
        return False
    return name == "div" or args[1] in (2, 3)


def _fills_its_storage(tensor: Tensor) -> bool:
    """Whether its storage holds its values and nothing else."""
    if tensor.layout is not torch.strided or tensor.is_inference():
        return False
    size = tensor.numel() * tensor.dtype.itemsize
    return storage_key(tensor) is not None and tensor.untyped_storage().nbytes() == size
