"""Two pieces of work timed in turns, so that a noisy machine disturbs both alike."""

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Paired:
    """How long `ours` takes as a multiple of `theirs`: the median pair, and its 95% interval."""

    ratio: float
    ratio_low: float
    ratio_high: float
    ours_ms: float
    theirs_ms: float
    pairs: int


def compare(ours: Work, theirs: Work, *, pairs: int, device: torch.device) -> Paired:
    """Run both `pairs` times, alternating which goes first, after one warm-up of each.

    The interval is that of the median, from order statistics: it assumes no distribution.
    `ours_ms` and `theirs_ms` are medians too, and need not divide to `ratio`.
    """
    seconds = _cuda_seconds if device.type == "cuda" else _host_seconds
    seconds(ours), seconds(theirs)
    ours_s, theirs_s = [], []
    for turn in range(pairs):
        if turn % 2:
            theirs_s.append(seconds(theirs))
            ours_s.append(seconds(ours))
        else:
            ours_s.append(seconds(ours))
            theirs_s.append(seconds(theirs))
    ratios = sorted(a / b for a, b in zip(ours_s, theirs_s, strict=True))
    # The binomial's normal approximation: ranks between which the median lies in 95 of 100 cases.
    reach = 1.96 * math.sqrt(pairs) / 2
    low, high = max(0, math.floor(pairs / 2 - reach)), min(pairs - 1, math.ceil(pairs / 2 + reach))
    return Paired(
        ratio=statistics.median(ratios),
        ratio_low=ratios[low],
        ratio_high=ratios[high],
        ours_ms=1e3 * statistics.median(ours_s),
        theirs_ms=1e3 * statistics.median(theirs_s),
        pairs=pairs,
    )


def _host_seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cuda_seconds(work: Work) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def recycle_host_memory() -> None:
    """Make glibc keep freed memory, whatever its size, as torch's CUDA allocator does.

    As it comes it returns blocks above 32 MiB to the system at once, so that an op which allocates
    its result is timed by the page faults of that result.
    """
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3
    for option in (trim_threshold, mmap_threshold):
        if libc.mallopt(option, 2**30) != 1:
            raise RuntimeError("mallopt refused; the table needs glibc's allocator")


def copy_bandwidth_bytes_s(device: torch.device, *, size_bytes: int = 2**28) -> float:
    """Bytes read and written per second by the fastest of ten copies of `size_bytes`."""
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _cuda_seconds if device.type == "cuda" else _host_seconds
    return 2 * size_bytes / min(seconds(lambda: target.copy_(source)) for _ in range(10))
