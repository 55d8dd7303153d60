"""The decorator of the CPU loops that torch code enters."""

import gc
from collections.abc import Callable
from typing import Any

import numba
from numba.core import event

_entered: set[Any] = set()


def loop(*, parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit into numba's cache, and nothing of who called first is kept.

    numba compiles on the first call. Some types it finds by trying, and an exception that it caught
    refers to its frame, and by that to the frames of all callers: their locals, a training step's
    among them, would live until Python's collector comes by.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(function, cache=True, parallel=parallel)
        _entered.add(dispatcher)
        return dispatcher

    return decorate


class _FreeFrames(event.Listener):
    """Collects while the callers still run: a frame that ended would have kept its locals."""

    def on_start(self, compiling: Any) -> None:
        pass

    def on_end(self, compiled: Any) -> None:
        if compiled.data["dispatcher"] in _entered:
            gc.collect()


event.register("numba:compile", _FreeFrames())
