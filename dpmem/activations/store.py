"""Saved-tensor hooks that keep activations small between forward and backward.

autograd hands every tensor it saves to `pack` and asks for it back in backward through `unpack`.
In between, the store holds what the policy allows: codes of 8, 4 or 2 bits, bits of masks, or the
tensor itself. One storage is kept once, in the most exact form that any of its uses needs, and
every view is restored with its own strides. The rounding noise is counter based and keyed by (seed,
tensor, forward, rank): torch's random state is neither read from nor moved.
"""

import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from dpmem.activations.budget import Agree, Planner
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
    unchanged,
)
from dpmem.activations.offload import HostMemory
from dpmem.activations.policy import COMPRESSIBLE_DTYPES, Policy
from dpmem.activations.refusals import COMPILED, check_visible, compiled_code
from dpmem.activations.roles import FOREIGN, MODEL, SMALL, PoolGeometry, Use, use_of
from dpmem.activations.sensitivity import GradientReader
from dpmem.activations.slots import (
    Layout,
    Packed,
    Saved,
    Slot,
    View,
    layout_of,
    numel_of_storage,
)
from dpmem.activations.tracker import CallTracker
from dpmem_kernels import Noise

_LARGEST_WINDOW = 1 << 16
_FIRST_PRUNING = 4096
Small = tuple[Tensor, int]
Place = tuple[int, Layout | None]
"""A storage and where in it; None: all of it."""
_PLAIN = frozenset((Tensor, nn.Parameter, FakeTensor))


class ActivationStore:
    """Context manager: what autograd saves inside is stored as `policy` says.

    One instance serves a model for its life; each `with` is one forward and draws fresh noise.
    `seed` and `rank` key the noise, so that ranks and runs differ where they should. With a byte
    budget `agree` makes the ranks of a data-parallel model choose alike; None: there is one.
    `forwards` numbers the forwards, where stores share that; None: from 1.

    Raises RuntimeError on entering where other saved-tensor hooks are active: torch runs only the
    innermost ones, so inside torch.utils.checkpoint these would switch recomputation off. Raises
    NotImplementedError where compiled code runs inside, and for models whose functions cannot be
    seen: TorchScript, and torch.nn.DataParallel on several devices.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        *,
        seed: int,
        rank: int = 0,
        agree: Agree | None = None,
        forwards: Iterator[int] | None = None,
    ) -> None:
        check_visible(model)
        self._policy = policy
        self._seed, self._rank = seed, rank
        self._forwards = itertools.count(1) if forwards is None else forwards
        self._forward = 0
        self._stream = 0
        self._least_numel = max(1, policy.minimum_numel)
        self._tracker = CallTracker(model, self._least_numel)
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self._host = HostMemory() if policy.offload else None
        self._planner: Planner | None = None
        if policy.budget_bytes is not None:
            self._planner = Planner(
                policy.budget_bytes, policy.group_size, policy.refresh_forwards, agree
            )
        # Weakly: what backward has used, or nobody can reach any more, is not kept from here.
        self._slots: dict[Place, weakref.ref[Slot]] = {}
        # Values of each storage of which parts are kept.
        self._parts: dict[int, int] = {}
        self._slots_before_pruning = _FIRST_PRUNING
        # Of the tensor that is packed now, from 1; a slot has that of its first.
        self._number = 0
        # Every saved tensor of this forward, where somebody asks.
        self.log: list[Saved] | None = None if self._planner is None else []
        self.module_name: str | None = None
        # Reads the next backward, where somebody asks without a budget.
        self.reader: GradientReader | None = None
        self._alive: weakref.WeakSet[Form] = weakref.WeakSet()

    def compressed_tensors(self) -> list[Tensor]:
        """What the store made and holds now: on the device, or on the host where it offloads."""
        return [tensor for form in self._alive for tensor in form.kept.tensors()]

    def __enter__(self) -> "ActivationStore":
        if torch.compiler.is_compiling():
            raise NotImplementedError(COMPILED)
        if self._hooks is not None:
            raise RuntimeError(
                "a model's activations must be compressed once; its store is already active; "
                "leave the outer context first"
            )
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            raise RuntimeError(
                "activation compression must be the outermost saved-tensor hooks; others are "
                "active (checkpoint, save_on_cpu or another compression), and torch runs only the "
                "innermost; put the checkpoint inside the compressed model, not around it; for two "
                "models make one compression, of nn.ModuleList([first, second])"
            )
        if self._planner is not None:
            # May refuse: before anything is switched that only leaving switches back.
            self._planner.begin()
            self.reader = self._planner.reader
        self._tracker.refresh()
        self._forward = next(self._forwards)
        self._stream = self._number = 0
        if self._host is not None:
            self._host.begin_forward()
        unpack = _unpack
        if self.reader is not None:
            self._tracker.watch = self.reader.arm
            unpack = partial(_unpack_and_read, self.reader)
        compiled_code.refuse()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, unpack)
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
        compiled_code.allow()
        self._hooks = None
        self._tracker.watch = None
        self._tracker.forget()
        self._slots.clear()
        self._parts.clear()
        if self._host is not None:
            self._host.end_forward()
        if isinstance(value, RuntimeError) and "fail_on_recompile" in str(value):
            raise NotImplementedError(COMPILED) from value
        if self._planner is not None:
            # Whatever became of this forward, the next one starts its own.
            saved, self.log = self.log, []
            assert saved is not None
            if kind is None:
                self._planner.end(saved)

    def _pack(self, tensor: Tensor) -> Packed | Small:
        self._number += 1
        if tensor.numel() < self._least_numel and type(tensor) in _PLAIN and self.log is None:
            # Small, as most are: no more is asked of it, and a tuple is made fastest. Detached: a
            # tensor that reached its own graph node from here would never be freed.
            return tensor if tensor.is_leaf else tensor.detach(), tensor._version
        use = self._use_of(tensor)
        passed = use is SMALL or use is MODEL or use is FOREIGN
        packed = Exact(tensor) if passed else self._store(tensor, use)
        if self.log is not None:
            name = None if self._tracker.call is None else self._tracker.call.name
            storage, size = None, tensor.numel() * tensor.dtype.itemsize
            if storage_key(tensor) is not None:
                storage = StorageWeakRef(tensor.untyped_storage())
                size = tensor.untyped_storage().nbytes()
            form = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            self.log.append(Saved(packed, use, name, self.module_name, form, storage, size))
        return packed

    def _use_of(self, tensor: Tensor) -> Use:
        if type(tensor) is not Tensor and type(tensor) is not FakeTensor:
            return MODEL if isinstance(tensor, nn.Parameter) else FOREIGN
        small = tensor.numel() < self._least_numel
        if storage_key(tensor) is None or tensor.is_nested:
            return FOREIGN
        # Expanded from a small storage, it has no more values than that.
        if small or numel_of_storage(tensor) < self._least_numel:
            return MODEL if self.log is not None and self._tracker.holds(tensor) else SMALL
        if self._tracker.holds(tensor):
            return MODEL
        call = self._tracker.call
        use = use_of(tensor, call)
        # A dropout's mask is nobody's, though what it was made beside may all be the model's.
        if call is not None and use.role != "mask" and self._tracker.made_copy(call, tensor):
            return MODEL
        return FOREIGN if tensor.is_conj() or tensor.is_neg() else use

    def _store(self, tensor: Tensor, use: Use) -> Packed:
        """`tensor`, an activation, as the policy has it for this use."""
        if use.role == "shape":
            return ShapeOnly(tensor)
        if tensor.numel() > numel_of_storage(tensor) and self._whole(tensor) is None:
            # Expanded from part of a storage: codes of every repetition could be larger.
            return Exact(tensor)
        if tensor.dtype == torch.bool:
            slot = self._slot_of(tensor, 1)
            return self._keep(tensor, slot, 1, lambda flat: Bools(flat, self._wait))
        if use.role == "pool_index" and tensor.dtype == torch.int64:
            return self._pool_index(tensor)
        if tensor.dtype in COMPRESSIBLE_DTYPES:
            if use.role == "sign":
                return self._sign(tensor)
            if use.role == "mask":
                slot = self._slot_of(tensor, 1)
                return self._keep(tensor, slot, 1, lambda flat: TwoValued(flat, self._wait))
            bits = self._policy.bits(use)
            if bits is not None:
                return self._coded(tensor, bits)
        return self._exact(tensor)

    def _coded(self, tensor: Tensor, bits: int) -> Packed:
        """`bits` of each value, or as many more as the budget allows."""
        slot = self._slot_of(tensor, bits)
        if self._planner is not None:
            exact_bits = 8 * tensor.dtype.itemsize
            if slot.values is None and self._derive(slot, tensor, bits):
                return View(slot, tensor, slot.number)
            bits = self._planner.bits(slot.number, slot.numel, exact_bits, bits)
            if bits == exact_bits:
                return self._exact(tensor)
        return self._keep(tensor, slot, bits, lambda flat: self._codes(flat, bits))

    def _keep(
        self, tensor: Tensor, slot: Slot, bits: int, make: Callable[[Tensor], Form]
    ) -> Packed:
        """Keep `bits` of each value of `slot`."""
        if slot.bits < bits and not self._derive(slot, tensor, bits):
            slot.values = self._track(make(slot.flat(tensor)))
        return View(slot, tensor, slot.number)

    def _exact(self, tensor: Tensor) -> Packed:
        bits = 8 * tensor.dtype.itemsize
        if self._policy.offload:
            slot = self._slot_of(tensor, bits)
            return self._keep(tensor, slot, bits, lambda flat: Copied(flat, self._wait))
        whole = self._whole(tensor)
        if whole is None:
            return Exact(tensor)
        if whole.bits < bits:
            if not self._derive(whole, tensor, bits):
                whole.values = Exact(tensor)
            whole.sign = None
        return View(whole, tensor, whole.number)

    def _sign(self, tensor: Tensor) -> Packed:
        slot = self._slot_of(tensor, 1)
        if slot.sign is None and slot.bits < 8 * tensor.dtype.itemsize:
            slot.sign = self._track(Positive(slot.flat(tensor), self._wait))
        return View(slot, tensor, slot.number, of_sign=True)

    def _pool_index(self, tensor: Tensor) -> Packed:
        assert self._tracker.call is not None
        geometry = PoolGeometry.of(self._tracker.call)
        slot = self._whole(tensor)
        if slot is None or math.prod(geometry.kernel) > _LARGEST_WINDOW:
            return self._exact(tensor)
        if slot.bits == 0:
            slot.values = self._track(PoolOffsets(tensor.detach(), geometry, self._wait))
        return View(slot, tensor, slot.number)

    def _codes(self, flat: Tensor, bits: int) -> Form:
        noise = Noise(self._seed, self._stream, self._forward, self._rank)
        self._stream += 1
        return Codes(flat, bits, self._policy.group_size, noise, self._wait)

    def _derive(self, slot: Slot, tensor: Tensor, bits: int) -> bool:
        """Let `slot` be computed again from another one, kept at `bits` or more, if it can."""
        derivation = self._tracker.derivation(tensor)
        if derivation is None or slot.is_part:
            return False
        source = self._slot_at((derivation.source_key, None))
        if source is None or source.version != derivation.source_version:
            return False
        if source.bits < max(bits, derivation.least_bits):
            return False
        slot.values = Recomputed(source, derivation.recompute, tensor)
        return True

    def _whole(self, tensor: Tensor) -> Slot | None:
        """The slot of the tensor's storage; None where that is not one tensor from end to end."""
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        if base.numel() != numel_of_storage(tensor) or base.dtype != tensor.dtype:
            return None
        return self._slot_for(tensor, (self._tracker.key_of(tensor), None))

    def _slot_of(self, tensor: Tensor, bits: int) -> Slot:
        """The slot of the tensor's storage, or of the tensor alone where it is a small part.

        A batch may be part of a data set. Parts are kept alone where `bits` of all the storage's
        values would take more than the part itself, until they add up to more than the storage.
        """
        whole = self._whole(tensor)
        if whole is not None and (
            bits * whole.numel <= 8 * tensor.dtype.itemsize * tensor.numel()
            or whole.values is not None
            or whole.sign is not None
            or self._tracker.derivation(tensor) is not None
        ):
            return whole
        key = self._tracker.key_of(tensor)
        place = key, layout_of(tensor)
        if whole is not None and self._slot_at(place) is None:
            together = self._parts.get(key, 0) + tensor.numel()
            if together > whole.numel:
                return whole
            self._parts[key] = together
        return self._slot_for(tensor, place)

    def _slot_for(self, tensor: Tensor, place: Place) -> Slot:
        slot = self._slot_at(place)
        if slot is None or slot.version != tensor._version or slot.dtype != tensor.dtype:
            slot = Slot(tensor, self._number, part=place[1] is not None)
            self._slots[place] = weakref.ref(slot)
            if len(self._slots) > self._slots_before_pruning:
                self._prune()
        return slot

    def _slot_at(self, place: Place) -> Slot | None:
        kept = self._slots.get(place)
        return None if kept is None else kept()

    def _prune(self) -> None:
        """Forget storages and slots that are gone: a context may stay open for many forwards."""
        keys = self._tracker.prune()
        self._slots = {place: kept for place, kept in self._slots.items() if place[0] in keys}
        self._parts = {key: numel for key, numel in self._parts.items() if key in keys}
        self._slots_before_pruning = max(_FIRST_PRUNING, 2 * len(self._slots))

    def _track(self, form: Form) -> Form:
        self._alive.add(form)
        return form

    def _wait(self, tensors: Tensors) -> Kept:
        return OnDevice(tensors) if self._host is None else self._host(tensors)


def _unpack(packed: Packed | Small) -> Tensor:
    return unchanged(*packed) if isinstance(packed, tuple) else packed.restore()


def _unpack_and_read(reader: GradientReader, packed: Packed | Small) -> Tensor:
    return packed.restore_and_read(reader) if isinstance(packed, View) else _unpack(packed)
