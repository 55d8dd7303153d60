"""Put a training run back as it was, bit for bit and object for object.

A run's state is spread over objects that hold one another: a scheduler its optimizer, an optimizer
its parameters, a module its hooks. One walk over them remembers every container's contents and
every tensor's bits; the walk back puts both into the very objects, so nobody's reference goes stale
and what was not there before (an optimizer's state before its first step) is not there again.

Bits are kept in host memory, so a model on a GPU needs no second copy there.
"""

from __future__ import annotations

import random
import signal
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dpmem.reducer import Reducer

# Their attributes are a run's state; of other objects' attributes nothing is known. dpmem's own
# (a wrapper's loss scale) are known, too.
_STATEFUL = (nn.Module, Optimizer, LRScheduler, GradScaler)


@contextmanager
def undisturbed(objects: Iterable[Any]) -> Iterator[Callable[[], None]]:
    """After the block, `objects` and torch's, Python's and NumPy's random states are as before it.

    So they are, within the block, after a call of what the block is given.

    objects  modules, optimizers, schedulers, scalers, generators, or anything whose attributes hold
             its state; what those hold of these kinds is found through them

    Kept are: parameters, buffers, gradients (also that there are none), hooks, train and eval
    flags and every other attribute, optimizer state, parameter groups, learning rates and loss
    scale. This holds after any exception, too. A Ctrl-C that comes while the state is put back
    waits until all of it is. What no object here holds cannot be put back: an iterator that the
    block advances, what an object of an unknown kind keeps in its attributes, unless it is given.
    A file mapped into memory (np.memmap) is not copied, and not put back. Nor is how far a wrapper
    is with its averages, on which other ranks rely: what a step that failed left open is completed
    by the next forward, of the block or after it.
    """
    memory = _Memory()
    for held in objects:
        memory.keep(held, explicitly=True)
    memory.keep_random_states()

    def put_back() -> None:
        with _interrupts_postponed():
            memory.restore()

    try:
        yield put_back
    finally:
        put_back()


class _Memory:
    """What was found, as the calls that put it back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        # Kept alive: an id is an object's own only while it lives.
        self._seen: dict[int, Any] = {}

    def restore(self) -> None:
        with torch.no_grad(), ExitStack() as every:
            # One that raises does not keep the others from being put back. The first comes first.
            for undo in reversed(self._undo):
                every.callback(undo)

    def keep(self, value: Any, *, explicitly: bool = False) -> None:
        """Remember `value` and all state that can be reached from it."""
        # A list, not recursion: a schedule of modules may be deeper than Python's stack.
        pending = [(value, explicitly)]
        while pending:
            value, explicitly = pending.pop()
            if id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            pending += [(inner, False) for inner in self._keep_one(value, explicitly)]

    def keep_random_states(self) -> None:
        cpu, python = torch.get_rng_state(), random.getstate()
        self._undo.append(lambda: torch.set_rng_state(cpu))
        self._undo.append(lambda: random.setstate(python))
        if torch.cuda.is_available():
            devices = torch.cuda.get_rng_state_all()
            self._undo.append(lambda: torch.cuda.set_rng_state_all(devices))
        numpy_state = np.random.get_state()
        self._undo.append(lambda: np.random.set_state(numpy_state))

    def _keep_one(self, value: Any, explicitly: bool) -> list[Any]:
        """Remember one object; returns what it holds."""
        if isinstance(value, Tensor):
            return self._keep_tensor(value)
        if isinstance(value, dict):
            items = list(value.items())
            self._undo.append(lambda: _refill_dict(value, items))
            # Keys, too: an optimizer's state is kept under its parameters.
            return [inner for item in items for inner in item]
        if isinstance(value, list | deque):
            elements = list(value)
            self._undo.append(lambda: _refill_list(value, elements))
            return elements
        if isinstance(value, set):
            members = set(value)
            self._undo.append(lambda: _refill_set(value, members))
            return list(members)
        if isinstance(value, tuple):
            return list(value)
        if isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: _call(value.set_state, state))
        elif isinstance(value, random.Random):
            python_state = value.getstate()
            self._undo.append(lambda: value.setstate(python_state))
        elif isinstance(value, np.random.Generator):
            bits, bits_state = value.bit_generator, value.bit_generator.state
            self._undo.append(lambda: setattr(bits, "state", bits_state))
        elif isinstance(value, np.random.RandomState):
            legacy_state = value.get_state(legacy=False)
            self._undo.append(lambda: value.set_state(legacy_state))
        elif isinstance(value, np.memmap):
            # A file, as of a data set, and maybe larger than memory.
            return []
        elif isinstance(value, np.ndarray) and value.flags.writeable:
            array = value.copy()
            self._undo.append(lambda: np.copyto(value, array))
        elif isinstance(value, Reducer):
            # Other ranks know how far it is, and are not put back by this one.
            return value.own_state()
        elif not isinstance(value, type) and (explicitly or _is_stateful(value)):
            if not hasattr(value, "__dict__"):
                raise TypeError(
                    "what is to be put back must hold its state in attributes; received "
                    f"{type(value).__name__}; pass the object that holds it"
                )
            kind = type(value)
            self._undo.append(lambda: _set_class(value, kind))
            return [vars(value)]
        return []

    def _keep_tensor(self, tensor: Tensor) -> list[Any]:
        if not tensor.is_leaf:
            # Made by a graph, and kept by nobody's contract.
            return []
        kind, alias, gradient = type(tensor), tensor.data, tensor.grad
        # What is lazy, or meta, has no memory yet.
        memory = None if is_lazy(tensor) or tensor.is_meta else _once(alias)
        bits = None if memory is None else memory.to("cpu", copy=True)
        requires_grad = tensor.requires_grad

        def undo() -> None:
            if memory is not None and bits is not None:
                memory.copy_(bits)
            if not tensor.is_leaf:
                # Written into by what a graph made.
                tensor.detach_()
            # Somebody may have given the tensor other memory, as `module.to` does.
            tensor.data = alias
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
            tensor.grad = gradient
            # A lazy parameter becomes another kind as its shape is known.
            _set_class(tensor, kind)

        self._undo.append(undo)
        hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
        for name in hooks:
            if getattr(tensor, name, None) is None:
                self._undo.append(lambda name=name: _drop_hooks(tensor, name))  # type: ignore[misc]
        held = [getattr(tensor, name, None) for name in hooks]
        return [gradient, *held, vars(tensor)]


def _is_stateful(value: Any) -> bool:
    return isinstance(value, _STATEFUL) or (
        type(value).__module__.split(".")[0] == "dpmem" and hasattr(value, "__dict__")
    )


def _once(tensor: Tensor) -> Tensor:
    """The part of `tensor` that shows its memory once: what expands shows it many times."""
    if tensor.layout == torch.strided:
        for dimension, stride in enumerate(tensor.stride()):
            if stride == 0:
                tensor = tensor.narrow(dimension, 0, min(1, tensor.size(dimension)))
    return tensor


def _set_class(value: Any, kind: type) -> None:
    """A lazy module becomes another kind as well."""
    if type(value) is not kind:
        value.__class__ = kind


def _refill_dict(held: dict[Any, Any], items: list[tuple[Any, Any]]) -> None:
    held.clear()
    held.update(items)


def _refill_list(held: list[Any] | deque[Any], elements: list[Any]) -> None:
    held.clear()
    held.extend(elements)


def _refill_set(held: set[Any], members: set[Any]) -> None:
    held.clear()
    held.update(members)


def _call(function: Callable[[Any], Any], argument: Any) -> None:
    function(argument)


def _drop_hooks(tensor: Tensor, name: str) -> None:
    hooks: OrderedDict[int, Any] | None = getattr(tensor, name, None)
    if hooks is not None:
        hooks.clear()


@contextmanager
def _interrupts_postponed() -> Iterator[None]:
    """Ctrl-C within the block arrives at its end. Python tells the main thread alone of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if arrived and callable(handler):
        handler(*arrived[0])
