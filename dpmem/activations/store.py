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
from contextlib import ExitStack
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
from dpmem.activations.slots import Packed, Saved, Slot, View
from dpmem.activations.tracker import FIRST_PRUNING, CallTracker
from dpmem_kernels import Noise

_LARGEST_WINDOW = 1 << 16
Small = tuple[Tensor, int]
_PLAIN = frozenset((Tensor, nn.Parameter, FakeTensor))


class ActivationStore:
    """Context manager: what autograd saves inside is stored as `policy` says.

    One instance serves a model for its life; each `with` is one forward and draws fresh noise.
    `seed` and `rank` key the noise, so that ranks and runs differ where they should. With a byte
    budget `agree` makes the ranks of a data-parallel model choose alike; None: there is one.
    `forwards` numbers the forwards, where stores share that; None: from 1. `rank` is asked on
    entering: the process group may be made after the store.

    Raises RuntimeError on entering where other saved-tensor hooks are active: torch runs only the
    innermost ones, so inside torch.utils.checkpoint these would switch recomputation off. Raises
    NotImplementedError where compiled code runs inside, and for models whose functions cannot be
    seen: TorchScript but for frozen parts, and torch.nn.DataParallel on several devices inside.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        *,
        seed: int,
        rank: Callable[[], int] = lambda: 0,
        agree: Agree | None = None,
        forwards: Iterator[int] | None = None,
    ) -> None:
        check_visible(model)
        self._policy = policy
        self._seed, self._rank = seed, 0
        self._current_rank = rank
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
        self._slots: dict[int, weakref.ref[Slot]] = {}
        self._slots_before_pruning = FIRST_PRUNING
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
        with ExitStack() as undo:
            # These may refuse: before anything is set that only leaving sets back.
            compiled_code.refuse()
            undo.callback(compiled_code.allow)
            if self._planner is not None:
                self._planner.begin()
                self.reader = self._planner.reader
            undo.pop_all()
        self._tracker.refresh()
        self._forward, self._rank = next(self._forwards), self._current_rank()
        self._stream = self._number = 0
        if self._host is not None:
            self._host.begin_forward()
        unpack = _unpack
        self._tracker.watch = None
        if self.reader is not None:
            self._tracker.watch = self.reader.arm
            unpack = partial(_unpack_and_read, self.reader)
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
        if self._host is not None:
            self._host.end_forward()
        saved = self.log
        if self._planner is not None:
            # Whatever became of this forward, the next one starts its own.
            self.log = []
        if isinstance(value, RuntimeError) and "fail_on_recompile" in str(value):
            raise NotImplementedError(COMPILED) from value
        if self._planner is not None and kind is None:
            assert saved is not None
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
        if small or _numel_of_storage(tensor) < self._least_numel:
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
                return self._coded(tensor, bits)
        return self._exact(tensor)

    def _coded(self, tensor: Tensor, bits: int) -> Packed:
        """`bits` of each value, or as many more as the budget allows."""
        if self._planner is not None:
            exact_bits = 8 * tensor.dtype.itemsize
            slot = self._slot_of(tensor)
            if slot is not None and slot.values is None and self._derive(slot, tensor, bits):
                return View(slot, tensor, slot.number)
            number = self._number if slot is None else slot.number
            numel = tensor.numel() if slot is None else _numel_of_storage(tensor)
            bits = self._planner.bits(number, numel, exact_bits, bits)
            if bits == exact_bits:
                return self._exact(tensor)
        return self._keep(tensor, bits, lambda flat: self._codes(flat, bits))

    def _keep(self, tensor: Tensor, bits: int, make: Callable[[Tensor], Form]) -> Packed:
        """Keep `bits` of each value: the whole storage where it is one tensor, else this alone."""
        slot = self._slot_of(tensor)
        if slot is None:
            if tensor.numel() > _numel_of_storage(tensor):
                # Expanded from part of a storage: codes of every repetition could be larger.
                return Exact(tensor)
            form = self._track(make(tensor.detach().contiguous().view(-1)))
            return View(form, tensor, self._number)
        if slot.bits < bits and not self._derive(slot, tensor, bits):
            slot.values = self._track(make(_flat(tensor)))
        return View(slot, tensor, slot.number)

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
        return View(slot, tensor, slot.number)

    def _sign(self, tensor: Tensor) -> Packed:
        slot = self._slot_of(tensor)
        if slot is None:
            return self._keep(tensor, 1, lambda flat: Positive(flat, self._wait))
        if slot.sign is None and slot.bits < 8 * tensor.dtype.itemsize:
            slot.sign = self._track(Positive(_flat(tensor), self._wait))
        return View(slot, tensor, slot.number, of_sign=True)

    def _pool_index(self, tensor: Tensor) -> Packed:
        assert self._tracker.call is not None
        geometry = PoolGeometry.of(self._tracker.call)
        slot = self._slot_of(tensor)
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
        if derivation is None:
            return False
        kept = self._slots.get(derivation.source_key)
        source = None if kept is None else kept()
        if source is None or source.version != derivation.source_version:
            return False
        if source.bits < max(bits, derivation.least_bits):
            return False
        # What is not affine saved its argument, and its own backward is mostly the next where the
        # function that saves its result takes nothing else: the argument is held until then.
        again = not derivation.affine and self._tracker.all_from(derivation.source_key)
        slot.values = Recomputed(source, derivation.recompute, tensor, again=again)
        return True

    def _slot_of(self, tensor: Tensor) -> Slot | None:
        """The slot of the tensor's storage; None where that is not one tensor from end to end."""
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        if base.numel() != _numel_of_storage(tensor) or base.dtype != tensor.dtype:
            return None
        key, storage = self._tracker.name(tensor)
        kept = self._slots.get(key)
        slot = None if kept is None else kept()
        if slot is None or slot.version != tensor._version or slot.dtype != tensor.dtype:
            slot = Slot(tensor, self._number, storage)
            self._slots[key] = weakref.ref(slot)
            if len(self._slots) > self._slots_before_pruning:
                self._prune()
        return slot

    def _prune(self) -> None:
        """Forget slots that are gone, of storages that live, too, and what the tracker can."""
        self._tracker.prune()
        self._slots = {key: kept for key, kept in self._slots.items() if kept() is not None}
        self._slots_before_pruning = max(FIRST_PRUNING, 2 * len(self._slots))

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


def _unpack(packed: Packed | Small) -> Tensor:
    return unchanged(*packed) if isinstance(packed, tuple) else packed.restore()


def _unpack_and_read(reader: GradientReader, packed: Packed | Small) -> Tensor:
    return packed.restore_and_read(reader) if isinstance(packed, View) else _unpack(packed)
