"""A static model of time: is a kernel limited by memory, or by issuing its instructions?

Math     issue time      >= instructions / (units * lanes * clock)      per element
         bandwidth time  >= bytes / bandwidth                           per element
         issue_time_ratio = the first bound over the second, with the instructions of the hot path
         (machine_code.py) and the bytes that have to move (the floor)
Error    Each is a LOWER BOUND ON TIME, and their ratio a statement about bounds: nothing here was
         measured on a GPU. A ratio of at most 1 says that issuing instructions does not by itself
         keep a kernel from running at memory speed. It does not say that the kernel does: latency,
         busy execution units, caches and launches are not modelled, and peak bandwidth and clock
         are the vendors' figures.
Source   NVIDIA A100, H100 (SXM) and B200 and AMD MI300X data sheets for units and bandwidth. NVIDIA
         multiprocessors issue one instruction of 32 lanes per clock on each of four schedulers. An
         MI300X compute unit finishes one vector instruction of 64 lanes per clock on its four
         16-lane SIMDs; packed and dual issue, which would halve the time, are left out.

Example  14 instructions and 2.53 bytes on an H100: 14 / (132 * 128 * 1.7e9) = 0.487 ps over
         2.53 / 3.35e12 = 0.755 ps is 0.65
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """`units` multiprocessors or compute units, each of `lanes` thread-instructions per clock.

    `largest_ratio` is the bar for kernels that GPU launches on aligned data; None: there is none.
    """

    name: str
    units: int
    lanes: int
    clock_hz: float
    bandwidth_bytes_per_s: float
    largest_ratio: float | None


# One GPU for each compile target. Clocks are sustained ones, below the boost clock, on H100 and
# B200, the boost clock of A100 and the peak engine clock of MI300X.
GPUS = {
    "sm_80": Gpu("A100", 108, 128, 1.41e9, 2.04e12, largest_ratio=1.0),
    "sm_90": Gpu("H100", 132, 128, 1.7e9, 3.35e12, largest_ratio=1.0),
    "sm_100": Gpu("B200", 148, 128, 1.85e9, 8.0e12, largest_ratio=1.3),
    "gfx942": Gpu("MI300X", 304, 64, 2.1e9, 5.3e12, largest_ratio=None),
}


def issue_time_ratio(target: str, instructions: float, floor_bytes: float) -> float | None:
    """Lower bound on issue time over lower bound on bandwidth time, both per element.

    None for a target that stands for no GPU of the table.
    """
    gpu = GPUS.get(target)
    if gpu is None:
        return None
    issue_s = instructions / (gpu.units * gpu.lanes * gpu.clock_hz)
    return issue_s / (floor_bytes / gpu.bandwidth_bytes_per_s)
