"""How many threads a CPU loop may use.

Every loop that runs on several threads has a twin compiled without numba's threading layer. The
twins are two functions: numba's cache tells functions apart, but not the flags they were compiled
with.
"""

import os

import numba
import torch

# A thread pool does not survive fork(), and entering it in the child (a DataLoader's worker) would
# kill the child.
_threads_usable = True


def _forget_threads() -> None:
    global _threads_usable
    _threads_usable = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def threads_for(units: int) -> int:
    """torch's number of threads, and 1 for a single unit of work or in a forked child.

    Above 1 numba is told, and the caller may enter a parallel loop.
    """
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if threads == 1 or units <= 1 or not _threads_usable:
        return 1
    numba.set_num_threads(threads)
    return threads
