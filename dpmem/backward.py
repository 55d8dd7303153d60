"""The backward that runs: which one it is, of what kind, and when it ends."""

import sys
import weakref
from collections.abc import Callable

import torch
from torch.autograd.graph import _engine_run_backward

NO_BACKWARD = -1


def running_backward() -> int:
    """Autograd's number for the backward that runs on this thread; -1 where none does."""
    return torch._C._current_graph_task_id()


def is_whole_backward() -> bool:
    """Is it backward() of all leaves that ends on this thread, not autograd.grad() of some tensors?

    Autograd does not say, but the call that runs it is on the stack. On CUDA a backward ends on
    another thread, where this is False.
    """
    frame = sys._getframe()
    while frame.f_code is not _engine_run_backward.__code__:
        if frame.f_back is None:
            return False
        frame = frame.f_back
    *_, inputs = frame.f_locals["args"]
    return bool(frame.f_locals["kwargs"]["accumulate_grad"]) and not inputs


class AtTheEnd:
    """Calls `finish` when the backward that runs ends, or `raised` where it raises.

    Autograd holds it until then, and nobody else may: it is gone, uncalled, where the backward
    raised.
    """

    is_over = False

    def __init__(self, finish: Callable[[], None], raised: Callable[[], None]) -> None:
        self._finish = finish
        self._raised = weakref.finalize(self, raised)
        self._raised.atexit = False
        torch.autograd.Variable._execution_engine.queue_callback(self)

    def __call__(self) -> None:
        # An exception's traceback may hold on to this, for longer than the step that failed lasts.
        self.is_over = True
        try:
            self._finish()
        except BaseException:
            self._raised()
            raise
        self._raised.detach()
