"""Saved-tensor hooks that keep activations small between forward and backward.

autograd hands every tensor it saves to `pack` and asks for it back in backward through `unpack`.
In between, the store holds what the policy allows: codes of 8, 4 or 2 bits, bits of masks, or the
tensor itself. One storage is compressed once, whichever views of it are saved, and every view is
restored with its own strides. The rounding noise is counter based and keyed by (seed, tensor,
forward, rank): torch's random state is neither read from nor moved.

What is the model's stays exact, frozen or trained: parameters, buffers, and every result of a torch
function whose tensors are all of the model (a transposed, cast, weight-normed or dequantized
weight), with the copies that autocast makes of any of these. Not recognized, and so stored as
activations are: weights made by a custom autograd.Function or in a C++ extension, which no torch
function mode sees, and weights mixed with a tensor that is not the model's, a constant made in the
forward included.
"""

import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from dpmem.activations.policy import (
    COMPRESSIBLE_DTYPES,
    FunctionCall,
    Policy,
    storage_key,
    tensors_in,
)
from dpmem_kernels import (
    Noise,
    Quantized,
    dequantize,
    pack_mask,
    pack_positive,
    quantize,
    unpack_mask,
)


class _Exact:
    """A tensor kept as it is: a parameter, an index, a small or unknown thing."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached: a tensor that reached its own graph node from here would never be freed.
        self.tensor = tensor.detach()
        self.version = tensor._version

    def restore(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor saved for backward must not change before it is used; one of shape "
                f"{tuple(self.tensor.shape)} is at version {self.tensor._version}, saved at "
                f"version {self.version}; replace the in-place operation by one that makes a new "
                "tensor"
            )
        return self.tensor


class _Codes:
    """A flat run of values as `bits`-wide codes, restored once for all views alive together."""

    def __init__(self, flat: Tensor, bits: int, group_size: int, noise: Noise) -> None:
        self.quantized: Quantized = quantize(flat, bits, noise=noise, group_size=group_size)
        self.numel, self.dtype = flat.numel(), flat.dtype
        self.bits, self.group_size = bits, group_size
        # By storage, not by tensor: autograd keeps a restored view's storage, not its base.
        self._restored: StorageWeakRef | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.quantized)

    def restore(self) -> Tensor:
        if self._restored is not None:
            storage = torch.UntypedStorage._new_with_weak_ptr(self._restored.cdata)
            if storage is not None:
                flat = torch.empty(0, dtype=self.dtype, device=storage.device)
                return flat.set_(storage, 0, (self.numel,), (1,))
        flat = dequantize(
            self.quantized, self.numel, self.dtype, self.bits, group_size=self.group_size
        )
        self._restored = StorageWeakRef(flat.untyped_storage())
        return flat


class _Bits:
    """A mask: bool values, or where a ReLU's output is positive, as one bit each."""

    def __init__(self, flat: Tensor) -> None:
        self.bits = pack_mask(flat) if flat.dtype == torch.bool else pack_positive(flat)
        self.numel, self.dtype = flat.numel(), flat.dtype

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.bits,)

    def restore(self) -> Tensor:
        return unpack_mask(self.bits, self.numel).to(self.dtype)


class _View:
    """The shape a saved tensor has within what was compressed."""

    __slots__ = ("offset", "shape", "source", "strides")

    def __init__(
        self, source: _Codes | _Bits, shape: torch.Size, strides: tuple[int, ...], offset: int
    ) -> None:
        self.source, self.shape, self.strides, self.offset = source, shape, strides, offset

    def restore(self) -> Tensor:
        return self.source.restore().as_strided(self.shape, self.strides, self.offset)


class _CallTracker(TorchFunctionMode):
    """Knows which torch function is running, and which tensors are the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.call: FunctionCall | None = None
        self._model = model
        self._held: set[int | None] = set()
        # What was computed from the model alone, by storage: in-place changes raise the version,
        # and the weak reference keeps the address from being reused.
        self._computed: dict[int | None, tuple[StorageWeakRef, int]] = {}

    def refresh(self) -> None:
        """Forget what was computed and is gone; read the model's parameters and buffers again."""
        held = (*self._model.parameters(), *self._model.buffers())
        self._held = {storage_key(tensor) for tensor in held} - {None}
        self._computed = {
            key: entry for key, entry in self._computed.items() if not entry[0].expired()
        }

    def holds(self, tensor: Tensor) -> bool:
        """True for parameters, buffers and their views."""
        return type(tensor) is nn.Parameter or storage_key(tensor) in self._held

    def owns(self, tensor: Tensor) -> bool:
        """True for these, for what was computed from them alone, and for copies of either."""
        if self._is_known(tensor):
            return True
        return self.call is not None and any(map(self._is_known, self.call.origins(tensor)))

    def _is_known(self, tensor: Tensor) -> bool:
        key = storage_key(tensor)
        if key in self._computed:
            return not tensor.is_inference() and self._computed[key][1] == tensor._version
        return key in self._held or type(tensor) is nn.Parameter

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
        call = FunctionCall(name, args, kwargs or {})
        # Asked before the call, which may change an argument in place.
        of_the_model = self._takes_only_the_models(call)
        previous, self.call = self.call, call
        try:
            result = func(*args, **call.kwargs)
        finally:
            self.call = previous
        if of_the_model:
            for tensor in tensors_in(result):
                self._add(tensor)
        return result

    def _takes_only_the_models(self, call: FunctionCall) -> bool:
        found = False
        for tensor in call.tensors():
            if not self._is_known(tensor):
                return False
            found = True
        return found

    def _add(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key is not None and key not in self._held and not tensor.is_inference():
            self._computed[key] = StorageWeakRef(tensor.untyped_storage()), tensor._version


class ActivationStore:
    """Context manager: what autograd saves inside is stored as `policy` says.

    One instance serves a model for its life; each `with` is one forward and draws fresh noise.
    `seed` and `rank` key the noise, so that ranks and runs differ where they should.

    Raises RuntimeError on entering where other saved-tensor hooks are active: torch runs only the
    innermost ones, so inside torch.utils.checkpoint these would switch recomputation off.
    """

    def __init__(self, model: nn.Module, policy: Policy, *, seed: int, rank: int = 0) -> None:
        self._policy = policy
        self._seed, self._rank = seed, rank
        self._forward = 0
        self._stream = 0
        self._tracker = _CallTracker(model)
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        # Compressed in this forward, by storage; the weak reference keeps the address from being
        # reused, so an entry never answers for a storage that came later.
        self._seen: dict[tuple[int, str], tuple[StorageWeakRef, int, torch.dtype, Any]] = {}
        self._alive: weakref.WeakSet[_Codes | _Bits] = weakref.WeakSet()

    def compressed_tensors(self) -> list[Tensor]:
        """What the store holds in compressed form now."""
        return [tensor for held in self._alive for tensor in held.tensors()]

    def __enter__(self) -> "ActivationStore":
        if self._hooks is not None:
            raise RuntimeError(
                "a model's activations must be compressed once; its store is already active; "
                "leave the outer context first"
            )
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            raise RuntimeError(
                "activation compression must be the outermost saved-tensor hooks; others are "
                "active (checkpoint, save_on_cpu or another compression), and torch runs only the "
                "innermost; put the checkpoint inside the compressed model, not around it"
            )
        self._forward += 1
        self._stream = 0
        self._tracker.refresh()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._tracker.__enter__()
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(kind, value, traceback)
        self._tracker.__exit__(kind, value, traceback)
        self._hooks = None
        self._seen.clear()

    def _pack(self, tensor: Tensor) -> _Exact | _View:
        smallest = max(1, self._policy.minimum_numel)
        if tensor.numel() < smallest or type(tensor) is not Tensor or tensor.is_nested:
            return _Exact(tensor)
        # Expanded from a small storage, it has no more values than that.
        if storage_key(tensor) is None or _numel_of_storage(tensor) < smallest:
            return _Exact(tensor)
        role = self._policy.role(tensor, self._tracker.call)
        if tensor.dtype == torch.bool or (role == "sign" and tensor.dtype in COMPRESSIBLE_DTYPES):
            return _Exact(tensor) if self._tracker.holds(tensor) else self._compress(tensor, None)
        bits = self._policy.bits(role)
        if bits is None or tensor.dtype not in COMPRESSIBLE_DTYPES or self._tracker.owns(tensor):
            return _Exact(tensor)
        return self._compress(tensor, bits)

    def _compress(self, tensor: Tensor, bits: int | None) -> _Exact | _View:
        """Store `tensor`'s whole storage where it is all one tensor, else the tensor alone."""
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        storage, numel = tensor.untyped_storage(), _numel_of_storage(tensor)
        shared = base.numel() == numel and base.dtype == tensor.dtype
        if not shared:
            if tensor.numel() > numel:
                # Expanded from part of a storage: codes of every repetition could be larger.
                return _Exact(tensor)
            held = self._hold(tensor.detach().contiguous().view(-1), bits)
            contiguous = torch.empty(tensor.shape, device="meta").stride()
            return _View(held, tensor.shape, contiguous, 0)
        key = (storage._cdata, "bits" if bits is None else "codes")
        form = tensor.shape, tensor.stride(), int(tensor.storage_offset())
        known = self._seen.get(key)
        if known is not None:
            reference, version, dtype, held = known
            same = not reference.expired() and version == tensor._version
            if same and dtype == tensor.dtype and (bits is None or held.bits >= bits):
                return _View(held, *form)
        held = self._hold(tensor.detach().as_strided((numel,), (1,), 0), bits)
        self._seen[key] = (StorageWeakRef(storage), tensor._version, tensor.dtype, held)
        return _View(held, *form)

    def _hold(self, flat: Tensor, bits: int | None) -> _Codes | _Bits:
        held: _Codes | _Bits
        if bits is None:
            held = _Bits(flat)
        else:
            noise = Noise(self._seed, self._stream, self._forward, self._rank)
            held = _Codes(flat, bits, self._policy.group_size, noise)
            self._stream += 1
        self._alive.add(held)
        return held


def _numel_of_storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.dtype.itemsize


def _unpack(packed: _Exact | _View) -> Tensor:
    return packed.restore()
