"""Saved-tensor hooks that keep activations small between forward and backward.

autograd hands every tensor it saves to `pack` and asks for it back in backward through `unpack`.
In between, the store holds what the policy allows: codes of 8, 4 or 2 bits, bits of masks, or the
tensor itself. One storage is kept once, in the most exact form that any of its uses needs, and
every view is restored with its own strides. The rounding noise is counter based and keyed by (seed,
tensor, forward, rank): torch's random state is neither read from nor moved.
"""

import math
import weakref
from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from dpmem.activations.calls import storage_key
from dpmem.activations.forms import (
    Bools,
    Codes,
    Copied,
    Exact,
    Form,
    Kept,
    OnDevice,
    PoolOffsets,
    Positive,
    Recomputed,
    ShapeOnly,
    Tensors,
    TwoValued,
)
from dpmem.activations.offload import HostMemory
from dpmem.activations.policy import COMPRESSIBLE_DTYPES, Policy
from dpmem.activations.roles import PoolGeometry, Use, use_of
from dpmem.activations.tracker import CallTracker
from dpmem_kernels import Noise

_LARGEST_WINDOW = 1 << 16


class _Slot:
    """What is kept of one storage, in one version of it.

    values   its values, in the most exact form that was needed
    sign     where they are positive: codes could not tell for values near zero
    """

    __slots__ = ("dtype", "reference", "sign", "values", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Keeps the address from being reused, so that an entry never answers for a later storage.
        self.reference = StorageWeakRef(tensor.untyped_storage())
        self.version, self.dtype = tensor._version, tensor.dtype
        self.values: Form | Exact | Recomputed | None = None
        self.sign: Form | None = None

    @property
    def bits(self) -> int:
        """Bits a value is kept in; 0: none is."""
        return 0 if self.values is None else self.values.bits

    def restore(self) -> Tensor:
        """A tensor over the whole storage."""
        assert self.values is not None
        return self.values.restore()

    def restore_sign(self) -> Tensor:
        """A tensor over the whole storage whose values are positive where its are."""
        return self.restore() if self.sign is None else self.sign.restore()


class _View:
    """The shape a saved tensor has within what is kept."""

    __slots__ = ("_form", "_of_sign", "_source")

    def __init__(self, source: _Slot | Form, tensor: Tensor, *, of_sign: bool = False) -> None:
        self._source, self._of_sign = source, of_sign
        if isinstance(source, _Slot):
            self._form = tensor.shape, tensor.stride(), int(tensor.storage_offset())
        else:
            self._form = tensor.shape, torch.empty(tensor.shape, device="meta").stride(), 0

    def restore(self) -> Tensor:
        source = self._source
        if self._of_sign:
            assert isinstance(source, _Slot)
            return source.restore_sign().as_strided(*self._form)
        return source.restore().as_strided(*self._form)


Packed = Exact | ShapeOnly | _View


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
        self._least_numel = max(1, policy.minimum_numel)
        self._tracker = CallTracker(model, self._least_numel)
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._host = HostMemory() if policy.offload else None
        self._slots: dict[int, _Slot] = {}
        self._alive: weakref.WeakSet[Form] = weakref.WeakSet()

    def compressed_tensors(self) -> list[Tensor]:
        """What the store made and holds now: on the device, or on the host where it offloads."""
        return [tensor for form in self._alive for tensor in form.kept.tensors()]

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
        if self._host is not None:
            self._host.begin_forward()
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
        self._slots.clear()
        if self._host is not None:
            self._host.end_forward()

    def _pack(self, tensor: Tensor) -> Packed:
        # Subclasses, nested tensors and what has no storage (sparse, vmap) pass through.
        if type(tensor) is not Tensor and type(tensor) is not FakeTensor:
            return Exact(tensor)
        if tensor.numel() < self._least_numel or tensor.is_nested or storage_key(tensor) is None:
            return Exact(tensor)
        # Expanded from a small storage, it has no more values than that.
        if _numel_of_storage(tensor) < self._least_numel or tensor.is_conj() or tensor.is_neg():
            return Exact(tensor)
        if self._tracker.owns(tensor):
            return Exact(tensor)
        return self._store(tensor, use_of(tensor, self._tracker.call))

    def _store(self, tensor: Tensor, use: Use) -> Packed:
        """`tensor`, an activation, as the policy has it for this use."""
        if use.role == "shape":
            return ShapeOnly(tensor)
        if tensor.dtype == torch.bool:
            return self._keep(tensor, 1, lambda flat: Bools(flat, self._wait))
        if use.role == "pool_index" and tensor.dtype == torch.int64:
            return self._pool_index(tensor)
        if tensor.dtype in COMPRESSIBLE_DTYPES:
            if use.role == "sign":
                return self._sign(tensor)
            if use.role == "mask":
                return self._keep(tensor, 1, lambda flat: TwoValued(flat, self._wait))
            bits = self._policy.bits(use)
            if bits is not None:
                return self._keep(tensor, bits, lambda flat: self._codes(flat, bits))
        return self._exact(tensor)

    def _keep(self, tensor: Tensor, bits: int, make: Callable[[Tensor], Form]) -> Packed:
        """Keep `bits` of each value: the whole storage where it is one tensor, else this alone."""
        slot = self._slot_of(tensor)
        if slot is None:
            if tensor.numel() > _numel_of_storage(tensor):
                # Expanded from part of a storage: codes of every repetition could be larger.
                return Exact(tensor)
            return _View(self._track(make(tensor.detach().contiguous().view(-1))), tensor)
        if slot.bits < bits and not self._derive(slot, tensor, bits):
            slot.values = self._track(make(_flat(tensor)))
        return _View(slot, tensor)

    def _exact(self, tensor: Tensor) -> Packed:
        bits = 8 * tensor.dtype.itemsize
        if self._policy.offload:
            return self._keep(tensor, bits, lambda flat: Copied(flat, self._wait))
        slot = self._slot_of(tensor)
        if slot is None:
            return Exact(tensor)
        if slot.bits < bits:
            if not self._derive(slot, tensor, bits):
                slot.values = Exact(tensor)
            slot.sign = None
        return _View(slot, tensor)

    def _sign(self, tensor: Tensor) -> Packed:
        slot = self._slot_of(tensor)
        if slot is None:
            return self._keep(tensor, 1, lambda flat: Positive(flat, self._wait))
        if slot.sign is None and slot.bits < 8 * tensor.dtype.itemsize:
            slot.sign = self._track(Positive(_flat(tensor), self._wait))
        return _View(slot, tensor, of_sign=True)

    def _pool_index(self, tensor: Tensor) -> Packed:
        assert self._tracker.call is not None
        geometry = PoolGeometry.of(self._tracker.call)
        slot = self._slot_of(tensor)
        if slot is None or math.prod(geometry.kernel) > _LARGEST_WINDOW:
            return self._exact(tensor)
        if slot.bits == 0:
            slot.values = self._track(PoolOffsets(tensor.detach(), geometry, self._wait))
        return _View(slot, tensor)

    def _codes(self, flat: Tensor, bits: int) -> Form:
        noise = Noise(self._seed, self._stream, self._forward, self._rank)
        self._stream += 1
        return Codes(flat, bits, self._policy.group_size, noise, self._wait)

    def _derive(self, slot: _Slot, tensor: Tensor, bits: int) -> bool:
        """Let `slot` be computed again from another one, kept at `bits` or more, if it can."""
        derivation = self._tracker.derivation(tensor)
        if derivation is None:
            return False
        source = self._slots.get(derivation.source_key)
        if source is None or source.version != derivation.source_version:
            return False
        if source.bits < max(bits, derivation.least_bits):
            return False
        slot.values = Recomputed(source, derivation.recompute, tensor)
        return True

    def _slot_of(self, tensor: Tensor) -> _Slot | None:
        """The slot of the tensor's storage; None where that is not one tensor from end to end."""
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        if base.numel() != _numel_of_storage(tensor) or base.dtype != tensor.dtype:
            return None
        key = tensor.untyped_storage()._cdata
        slot = self._slots.get(key)
        if slot is None or slot.version != tensor._version or slot.dtype != tensor.dtype:
            slot = self._slots[key] = _Slot(tensor)
        return slot

    def _track(self, form: Form) -> Form:
        self._alive.add(form)
        return form

    def _wait(self, tensors: Tensors) -> Kept:
        return OnDevice(tensors) if self._host is None else self._host(tensors)


def _flat(tensor: Tensor) -> Tensor:
    """The tensor's whole storage, in memory order."""
    return tensor.detach().as_strided((_numel_of_storage(tensor),), (1,), 0)


def _numel_of_storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.dtype.itemsize


def _unpack(packed: Packed) -> Tensor:
    return packed.restore()
