"""Every live tensor byte, while a program runs: `MemoryTracker`.

A `TorchDispatchMode` is shown every operator below autograd, in forward, backward and the
optimizer. The tracker notes each storage that an operator returns, once however many views share
it, and its death through a weak reference: it keeps nothing alive.

What it cannot see is scratch that one operator allocates and frees inside itself. That is next to
nothing for linear layers and attention; for wide convolutions on a CPU, where oneDNN repacks its
operands, the allocator's own peak was seen to be 1.45 times the tracker's.

Source: torch/utils/_python_dispatch.py; torch/distributed/_tools/mem_tracker.py uses the same two
signals.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves

from dpmem_profiling.units import format_bytes


class MemoryLimitExceeded(RuntimeError):  # noqa: N818 - the public name
    """The live tensors outgrew the limit that was set for a measurement."""

    def __init__(self, limit_bytes: int, live_bytes: int, during: str) -> None:
        # The bare arguments go to the base class so that the exception survives pickling.
        super().__init__(limit_bytes, live_bytes, during)
        self.limit_bytes = limit_bytes
        self.live_bytes = live_bytes
        self.during = during

    def __str__(self) -> str:
        return (
            f"live tensors must stay within {format_bytes(self.limit_bytes)} "
            f"({self.limit_bytes} bytes); got {format_bytes(self.live_bytes)} "
            f"({self.live_bytes} bytes) during {self.during}. Use a smaller batch."
        )


class Change(NamedTuple):
    """Bytes gained (+) or lost (-) by one storage; storage None marks the edge of a phase.

    `phase` is the phase in force from this moment on.
    """

    time_s: float
    phase: str | None
    storage: int | None
    delta_bytes: int


@dataclass(slots=True)
class StorageInfo:
    """One storage, described by the first tensor seen on it; `size_bytes` is its current size."""

    size_bytes: int
    shape: tuple[int, ...]
    dtype: str
    phase: str | None
    module: str | None
    op: str | None


class Scratch(NamedTuple):
    """What an operator allocates beside its results: it stays, passes when the operator returns,
    follows the results and is given back at once, does so while kernels are tried, or passes and
    need not have been there.

    Where kernels are tried, the allocator's cache is emptied, and the best one takes as much again.
    """

    size_bytes: int
    what: Literal["stays", "passes", "follows", "is tried", "is possible"]


# (operator, arguments, result) -> its scratch
ScratchOf = Callable[[Any, Any, Any], Iterable[Scratch]]


class MemoryTracker(TorchDispatchMode):
    """Record every storage on `device` from `with tracker:` to its end.

    Storages are numbered in order of appearance: `storages[i]` describes number i and `changes`
    holds what happened to them. Sizes are rounded up to `block_bytes`, the granularity of the
    device's allocator. Set `stage`, and `module_names` (id of a module -> its path), for good
    descriptions.

    Inside the block any operator raises MemoryLimitExceeded when the live bytes are more than
    `limit_bytes`. `scratch` tells of memory that operators take for themselves, where that is
    known; its numbers are in `workspaces`. What is only possible is no change: `possible` has its
    bytes, beside the number of changes before it; `emptied` has that number for each time when the
    allocator's cache is emptied. Fake tensors count where `fakes` is set; where
    tensors are real, somebody works out a shape with them.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        block_bytes: int,
        limit_bytes: int | None = None,
        scratch: ScratchOf | None = None,
        fakes: bool = False,
    ) -> None:
        super().__init__()
        self.device = device
        self.block_bytes = block_bytes
        self.limit_bytes = limit_bytes
        self.scratch = scratch
        self.fakes = fakes
        self.workspaces: set[int] = set()
        self.possible: list[tuple[int, int]] = []
        self.emptied: list[int] = []
        self.storages: list[StorageInfo] = []
        self.changes: list[Change] = []
        self.live_bytes = 0
        self.phase: str | None = None
        self.stage = ""
        self.module_names: dict[int, str] = {}
        self._running: list[str | None] = []
        # Keyed by the id of the storage's Python object, which lives exactly as long as the storage
        # does; the weak reference tells a new object at an old address from the old one.
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._undo = ExitStack()
        self._paused = False

    def __enter__(self) -> MemoryTracker:
        for handle in (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ):
            self._undo.callback(handle.remove)
        self._undo.enter_context(self._watching_resize())
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._undo.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            # The subclass (DTensor, ...) runs first; the operators on its parts come back here.
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        scratch = () if self.scratch is None else tuple(self.scratch(func, args, result))
        passing = self._take(scratch, func)
        before: set[int] | None = None
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            if self._is_new(leaf):
                # Lists of hundreds of tensors are looked through once.
                before = _storages_of((args, kwargs)) if before is None else before
                if id(leaf.untyped_storage()) in before:
                    # A view of memory from before the tracker, such as a data set's.
                    continue
            self._see(leaf, func)
        for size_bytes, what in scratch:
            if what == "is possible":
                self.possible.append((len(self.changes), size_bytes))
            if what == "is tried":
                self._pass(size_bytes, func)
                self.emptied.append(len(self.changes))
            if what in ("is tried", "follows"):
                self._pass(size_bytes, func)
        for number in passing:
            self._resize(number, 0)
        self._check_limit(func)
        return result

    def _take(self, scratch: Iterable[Scratch], func: Any) -> list[int]:
        """Register what an operator takes beside its results; return what it gives back after."""
        passing = []
        for size_bytes, what in scratch:
            if what in ("stays", "passes"):
                number = self._workspace(size_bytes, func)
                if what == "passes":
                    passing.append(number)
        return passing

    def _pass(self, size_bytes: int, func: Any) -> None:
        if size_bytes:
            self._resize(self._workspace(size_bytes, func), 0)

    def _workspace(self, size_bytes: int, func: Any) -> int:
        number = len(self.storages)
        self.storages.append(
            StorageInfo(
                size_bytes=0,
                shape=(size_bytes,),
                dtype="uint8",
                phase=self.phase,
                module=self._running[-1] if self._running else None,
                op=str(func.overloadpacket),
            )
        )
        self.workspaces.add(number)
        self._resize(number, size_bytes)
        return number

    def see(self, tensor: Tensor) -> list[int]:
        """Take note of a tensor that no tracked operator made; return its storages' numbers."""
        return self._see(tensor, None)

    def live(self) -> dict[int, int]:
        """The live storages' numbers and bytes, right now."""
        return {number: self.storages[number].size_bytes for _, number in self._live.values()}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block, what comes to life is not this device's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @contextmanager
    def in_phase(self, phase: str | None) -> Iterator[None]:
        """Call what happens inside the block `phase`; the phase before it returns afterwards."""
        outer = self.phase
        self._mark(phase)
        try:
            yield
        finally:
            self._mark(outer)

    def _mark(self, phase: str | None) -> None:
        self.phase = phase
        self.changes.append(Change(perf_counter(), phase, None, 0))

    def _is_new(self, result: Tensor) -> bool:
        """True of a plain tensor whose storage has no number."""
        if is_traceable_wrapper_subclass(result) or result.layout is not torch.strided:
            return False
        storage = result.untyped_storage()
        entry = self._live.get(id(storage))
        return entry is None or entry[0]() is not storage

    def _see(self, tensor: Tensor, func: Any) -> list[int]:
        numbers = []
        for part in _parts(tensor):
            is_fake = isinstance(part, FakeTensor)
            # Not the storage's: a fake tensor's is on the meta device. Nor a fake one's `device`,
            # which is an operator to every mode.
            device = part.fake_device if isinstance(part, FakeTensor) else part.device
            if device != self.device or is_fake != self.fakes:
                continue
            storage = part.untyped_storage()
            entry = self._live.get(id(storage))
            if entry is not None and entry[0]() is storage:
                number = entry[1]
            else:
                number = self._register(storage, part, func)
            self._resize(number, storage.nbytes())
            numbers.append(number)
        return numbers

    def _register(self, storage: torch.UntypedStorage, tensor: Tensor, func: Any) -> int:
        number = len(self.storages)
        self.storages.append(
            StorageInfo(
                size_bytes=0,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                phase=self.phase,
                module=self._running[-1] if self._running else None,
                op=None if func is None else str(func.overloadpacket),
            )
        )
        key = id(storage)

        def died(reference: weakref.ref[torch.UntypedStorage]) -> None:
            self._resize(number, 0)
            if self._live[key][0] is reference:
                del self._live[key]

        self._live[key] = (weakref.ref(storage, died), number)
        return number

    def _resize(self, number: int, n_bytes: int) -> None:
        info = self.storages[number]
        size_bytes = -(-n_bytes // self.block_bytes) * self.block_bytes
        delta_bytes = size_bytes - info.size_bytes
        if delta_bytes:
            info.size_bytes = size_bytes
            self.live_bytes += delta_bytes
            self.changes.append(Change(perf_counter(), self.phase, number, delta_bytes))

    def _check_limit(self, func: Any) -> None:
        if self.limit_bytes is None or self.live_bytes <= self.limit_bytes:
            return
        where = [self.stage, self.phase, self._running[-1] if self._running else None]
        during = ", ".join(part for part in where if part)
        raise MemoryLimitExceeded(
            self.limit_bytes, self.live_bytes, f"{during} ({func.overloadpacket})"
        )

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._running.append(self.module_names.get(id(module)))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    @contextmanager
    def _watching_resize(self) -> Iterator[None]:
        """See `storage.resize_()`, which frees and regrows storages without an operator."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:
            result = original(storage, *args, **kwargs)
            entry = self._live.get(id(storage))
            if entry is not None and entry[0]() is storage:
                self._resize(entry[1], storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]


def _storages_of(arguments: Any) -> set[int]:
    """The ids of the storages' Python objects, which live as long as the arguments."""
    return {
        id(leaf.untyped_storage())
        for leaf in tree_leaves(arguments)
        if isinstance(leaf, Tensor)
        and leaf.layout is torch.strided
        and not is_traceable_wrapper_subclass(leaf)
    }


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's bytes: itself, or the parts of a subclass or sparse one."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            # A DTensor's mesh is among them.
            part = getattr(tensor, name)
            if isinstance(part, Tensor):
                yield from _parts(part)
    elif tensor.layout is torch.sparse_coo:
        yield tensor._indices()
        yield tensor._values()
    else:
        yield tensor
