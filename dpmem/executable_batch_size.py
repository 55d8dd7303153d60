"""For people who come from Accelerate: run a function at a batch size that fits.

Same name, signature and semantics as `accelerate.utils.find_executable_batch_size` (Accelerate
1.x, src/accelerate/utils/memory.py). It is a retry, not a search: it answers with any batch that
ran, leaves the failed run's model as it is, and knows no margin. `dpmem.find_batch_size` does more.
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch

from dpmem.failures import is_out_of_memory

_ACCELERATES_WORDS = (
    " out of memory.",
    "MPS backend out of memory",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",
    "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed",
)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Callable[..., Any]:
    """Call `function(batch_size, ...)`, with nine tenths of the batch whenever memory runs out.

    starting_batch_size   the first that is tried; the one that ran is tried first in later calls
    reduce_batch_size_fn  () -> the next batch size, in place of nine tenths

    Usable as `@find_executable_batch_size` and as `@find_executable_batch_size(...)`. Unlike
    Accelerate's, it holds no tensor of the failed attempt while it makes the next one, and the
    decorated function keeps its name.

    Raises TypeError where the caller passes a batch size of their own, RuntimeError where the batch
    reaches zero, and whatever else `function` raises.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    batch_size = starting_batch_size
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal batch_size
        if len(names) < len(args) + 1:
            passed = ", ".join(
                f"{name}={value}" for name, value in zip(names[1:], args[1:], strict=False)
            )
            raise TypeError(
                f"Batch size was passed into `{function.__name__}` as the first argument when "
                f"called. Remove this as the decorator already does so: "
                f"`{function.__name__}({passed})`"
            )
        _release()
        while batch_size > 0:
            try:
                return function(batch_size, *args, **kwargs)
            except Exception as error:
                if not _calls_for_less(error):
                    raise
            # Here the exception is gone, and with it the frames that held the attempt's tensors.
            _release()
            if reduce_batch_size_fn is None:
                batch_size = int(batch_size * 0.9)
            else:
                batch_size = reduce_batch_size_fn()
        raise RuntimeError("No executable batch size found, reached zero.")

    return run


def _calls_for_less(error: Exception) -> bool:
    """What Accelerate takes for memory, which is more than torch's own words for it."""
    return is_out_of_memory(error) or (
        isinstance(error, RuntimeError)
        and len(error.args) == 1
        and any(words in str(error.args[0]) for words in _ACCELERATES_WORDS)
    )


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
