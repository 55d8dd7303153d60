"""PYTORCH_ALLOC_CONF: what it may say, and the two rules of size that follow from it.

Sources  c10/core/AllocatorConfig.{h,cpp} (`AcceleratorAllocatorConfig`) and
         c10/cuda/CUDAAllocatorConfig.{h,cpp} (`CUDAAllocatorConfig`), PyTorch 2.13;
         c10/cuda/CUDACachingAllocator.cpp: `round_size`, `roundup_power2_next_division`,
         `get_allocation_size`
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

MIB = 2**20
MIN_BLOCK_BYTES = 512  # kMinBlockSize: every block is a multiple of it
SMALL_BYTES = MIB  # kSmallSize: the largest request that the small pool serves
SMALL_SEGMENT_BYTES = 2 * MIB  # kSmallBuffer
MIN_LARGE_BYTES = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own size
ROUND_LARGE_BYTES = 2 * MIB  # kRoundLarge

N_INTERVALS = 16  # kRoundUpPowerOfTwoIntervals: from 1 MiB to 64 GiB, one per power of two

# Keys of PyTorch that move no byte of device memory.
_WITHOUT_EFFECT = frozenset(
    {
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
    }
)


@dataclass(frozen=True)
class AllocatorSettings:
    """The settings of the caching allocator that decide where bytes go. Defaults are PyTorch's.

    Attributes:
        expandable_segments: grow one mapping per stream and pool instead of calling cudaMalloc.
        max_split_size_bytes: blocks of at least this size are never split; None: all may be.
        max_non_split_rounding_bytes: how much larger than asked such a block may be; None: the
            size of a large segment.
        large_segment_size_bytes: what requests between 1 and 10 MiB take from the device.
        roundup_power2_divisions: 16 numbers, for sizes from 1 MiB (and all below), 2 MiB, 4 MiB …
            32 GiB (and all above): steps between two powers of two to round to; 0 and 1: none.
        garbage_collection_threshold: of the allowed memory; None: no garbage collection. PyTorch
            collects only where `per_process_memory_fraction` is below 1.
        per_process_memory_fraction: of the device's memory, what the allocator may reserve.

    Raises ValueError for what PyTorch or the device refuses.
    """

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    max_non_split_rounding_bytes: int | None = None
    large_segment_size_bytes: int = 20 * MIB
    roundup_power2_divisions: tuple[int, ...] = (0,) * N_INTERVALS
    garbage_collection_threshold: float | None = None
    per_process_memory_fraction: float = 1.0

    def __post_init__(self) -> None:
        large = self.large_segment_size_bytes
        if large <= MIN_LARGE_BYTES:
            raise ValueError(f"large_segment_size_mb must be above 10; received {large // MIB}")
        if self.expandable_segments and large % SMALL_SEGMENT_BYTES:
            raise ValueError(
                f"large_segment_size_mb must be even with expandable_segments, as the device maps "
                f"2 MiB at a time; received {large // MIB}"
            )
        for name, size_bytes in (
            ("max_split_size_mb", self.max_split_size_bytes),
            ("max_non_split_rounding_mb", self.max_non_split_rounding_bytes),
        ):
            if size_bytes is not None and size_bytes // MIB < large // MIB:
                raise ValueError(
                    f"{name} must be at least large_segment_size_mb, {large // MIB}; "
                    f"received {size_bytes // MIB}"
                )
        divisions = self.roundup_power2_divisions
        if len(divisions) != N_INTERVALS or any(d < 0 or d & (d - 1) for d in divisions):
            raise ValueError(
                f"roundup_power2_divisions must be {N_INTERVALS} powers of two or zeros; "
                f"received {divisions}"
            )
        threshold = self.garbage_collection_threshold
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(
                f"garbage_collection_threshold must be above 0 and below 1; received {threshold}"
            )
        fraction = self.per_process_memory_fraction
        if not 0 < fraction <= 1:
            raise ValueError(
                f"per_process_memory_fraction must be above 0 and at most 1; received {fraction}"
            )

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Read the text of PYTORCH_ALLOC_CONF, such as "expandable_segments:True".

        Keys that concern pinned memory and locks are read and have no effect here. Raises
        ValueError for unknown keys, for values PyTorch refuses, and for what the model does not
        cover: `backend:cudaMallocAsync`, `throw_on_cudamalloc_oom:True`.
        """
        given: dict[str, object] = {}
        # Commas between brackets separate the intervals of one value.
        for item in re.split(r",(?![^\[]*\])", "".join(text.split())):
            if not item:
                continue
            key, colon, value = item.partition(":")
            if not colon or not value:
                raise ValueError(f"a setting is written key:value; received {item!r} in {text!r}")
            if key in _WITHOUT_EFFECT:
                continue
            if key in _OTHER_KEYS:
                if value != _OTHER_KEYS[key]:
                    raise ValueError(f"the allocator model does not cover {item}; leave it out")
                continue
            if key not in _READERS:
                known = ", ".join(sorted({*_READERS, *_OTHER_KEYS, *_WITHOUT_EFFECT}))
                raise ValueError(f"unknown allocator setting {key!r}; known: {known}")
            field, read = _READERS[key]
            if field in given:
                raise ValueError(f"{key} must be given once; received {text!r}")
            try:
                given[field] = read(value)
            except ValueError as error:
                raise ValueError(f"{key}: {error}; received {value!r}") from error
        return cls(**given)  # type: ignore[arg-type]

    def block_bytes(self, request_bytes: int) -> int:
        """The size of the block that serves a request of at least 1 byte (`round_size`).

        A multiple of 512 bytes; 1200 bytes take 1536. With 4 divisions 5 MiB + 1 take 6 MiB: the
        steps between 4 and 8 MiB are 5, 6 and 7 MiB. Requests of at most 512 bytes per division
        are rounded as ever.
        """
        log2 = request_bytes.bit_length() - 1
        divisions = self.roundup_power2_divisions[min(max(log2 - 20, 0), N_INTERVALS - 1)]
        step = MIN_BLOCK_BYTES
        if divisions > 1 and request_bytes > MIN_BLOCK_BYTES * divisions:
            step = (1 << log2) // divisions
        return -(-request_bytes // step) * step

    def segment_bytes(self, block_bytes: int) -> int:
        """What cudaMalloc is asked for when no block is free (`get_allocation_size`)."""
        if block_bytes <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        if block_bytes < MIN_LARGE_BYTES:
            return self.large_segment_size_bytes
        return -(-block_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


def _read_bool(value: str) -> bool:
    if value not in ("True", "False"):
        raise ValueError("expected True or False")
    return value == "True"


def _read_int(value: str) -> int:
    if not re.fullmatch(r"[0-9]+", value):
        raise ValueError("expected a whole number")
    return int(value)


def _read_mib(value: str) -> int:
    return _read_int(value) * MIB


def _read_float(value: str) -> float:
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", value):
        raise ValueError("expected a number such as 0.8")
    return float(value)


def _read_power_of_two(value: str) -> int:
    number = _read_int(value)
    if number < 1 or number & (number - 1):
        raise ValueError("expected a power of two")
    return number


def _read_divisions(value: str) -> tuple[int, ...]:
    """`4`, or a list such as `[256:1,512:2,>:4]` of sizes in MiB and their divisions.

    The first size counts for all below it, `>` for all above the last; sizes in between that are
    not named are not rounded (`parseRoundUpPower2Divisions`).
    """
    if not value.startswith("["):
        return (_read_power_of_two(value),) * N_INTERVALS
    if not value.endswith("]"):
        raise ValueError("expected a closing bracket")
    divisions = [0] * N_INTERVALS
    last: int | None = None
    for item in filter(None, value[1:-1].split(",")):
        size_mib, _, text = item.partition(":")
        number = 0 if text == "0" else _read_power_of_two(text)
        if size_mib == ">":
            above = (last or 0) + 1
            divisions[above:] = [number] * (N_INTERVALS - above)
            continue
        index = min(_read_power_of_two(size_mib).bit_length() - 1, N_INTERVALS - 1)
        if last is None:
            divisions[:index] = [number] * index
        divisions[index] = number
        last = index
    return tuple(divisions)


_READERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "expandable_segments": ("expandable_segments", _read_bool),
    "garbage_collection_threshold": ("garbage_collection_threshold", _read_float),
    "large_segment_size_mb": ("large_segment_size_bytes", _read_mib),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _read_mib),
    "max_split_size_mb": ("max_split_size_bytes", _read_mib),
    "per_process_memory_fraction": ("per_process_memory_fraction", _read_float),
    "roundup_power2_divisions": ("roundup_power2_divisions", _read_divisions),
}
# Keys with the one value under which the model holds.
_OTHER_KEYS = {"backend": "native", "throw_on_cudamalloc_oom": "False"}
