"""Saved-tensor hooks that keep activations small between forward and backward.

autograd hands every tensor it saves to `pack` and asks for it back in backward through `unpack`.
In between, the store holds what the policy allows: codes of 8, 4 or 2 bits, bits of masks, or the
tensor itself. One storage is compressed once, whichever views of it are saved, and every view is
restored with its own strides. The rounding noise is counter based and keyed by (seed, tensor,
forward, rank): torch's random state is neither read from nor moved.
"""

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from dpmem.activations.policy import COMPRESSIBLE_DTYPES, Policy
from dpmem_kernels import Noise, Quantized, dequantize, pack_mask, quantize, unpack_mask


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
        self.bits = pack_mask(flat if flat.dtype == torch.bool else flat > 0)
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


class _CurrentFunction(TorchFunctionMode):
    """Knows which torch function is running, and on what."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None
        self.first_argument: object = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        previous = self.name, self.first_argument
        self.name = getattr(func, "__name__", None)
        self.first_argument = args[0] if args else None
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.name, self.first_argument = previous


class ActivationStore:
    """Context manager: what autograd saves inside is stored as `policy` says.

    One instance serves a model for its life; each `with` is one forward and draws fresh noise.
    `seed` and `rank` key the noise, so that ranks and runs differ where they should.

    Raises RuntimeError on entering where other saved-tensor hooks are active: torch runs only the
    innermost ones, so inside torch.utils.checkpoint these would switch recomputation off.
    """

    def __init__(self, model: nn.Module, policy: Policy, *, seed: int, rank: int = 0) -> None:
        self._model, self._policy = model, policy
        self._seed, self._rank = seed, rank
        self._forward = 0
        self._stream = 0
        self._function = _CurrentFunction()
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._kept_storages: set[int] = set()
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
        self._kept_storages = {
            tensor.untyped_storage()._cdata
            for tensor in (*self._model.parameters(), *self._model.buffers())
        }
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._function.__enter__()
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
        self._function.__exit__(kind, value, traceback)
        self._hooks = None
        self._seen.clear()

    def _pack(self, tensor: Tensor) -> _Exact | _View:
        if tensor.numel() < self._policy.minimum_numel or type(tensor) is not Tensor:
            return _Exact(tensor)
        if tensor.layout != torch.strided or self._belongs_to_model(tensor):
            return _Exact(tensor)
        role = self._policy.role(tensor, self._function.name, self._function.first_argument)
        if tensor.dtype == torch.bool or (role == "sign" and tensor.dtype in COMPRESSIBLE_DTYPES):
            return self._compress(tensor, None)
        bits = self._policy.bits(role)
        if bits is None or tensor.dtype not in COMPRESSIBLE_DTYPES:
            return _Exact(tensor)
        return self._compress(tensor, bits)

    def _compress(self, tensor: Tensor, bits: int | None) -> _View:
        """Store `tensor`'s whole storage where it is all one tensor, else the tensor alone."""
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        storage = tensor.untyped_storage()
        numel = storage.nbytes() // tensor.dtype.itemsize
        shared = base.numel() == numel and base.dtype == tensor.dtype
        if not shared:
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

    def _belongs_to_model(self, tensor: Tensor) -> bool:
        """True for parameters, buffers, their views, and autocast's copies of them."""
        if tensor.untyped_storage()._cdata in self._kept_storages:
            return True
        node = tensor.grad_fn
        while node is not None and type(node).__name__ in _CAST_OR_VIEW_NODES:
            node = node.next_functions[0][0]
        return node is not None and type(node).__name__ == "AccumulateGrad"


# What stands between a parameter and the low-precision copy that autocast multiplies with.
_CAST_OR_VIEW_NODES = {"ToCopyBackward0", "TBackward0", "TransposeBackward0", "ViewBackward0"}


def _unpack(packed: _Exact | _View) -> Tensor:
    return packed.restore()
