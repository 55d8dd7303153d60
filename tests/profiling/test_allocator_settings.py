"""The allocator's settings, beside torch's own reading of the same text."""

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpmem_profiling import AllocatorSettings

MIB = 2**20
# c10::CachingAllocator::AcceleratorAllocatorConfig::roundup_power2_divisions(size_t)
DIVISIONS = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig24roundup_power2_divisionsEm"


def test_reads_what_people_write() -> None:
    read = AllocatorSettings.parse(
        " expandable_segments:True, max_split_size_mb:128,garbage_collection_threshold:0.8,"
        "large_segment_size_mb:40,max_non_split_rounding_mb:64,per_process_memory_fraction:0.5,"
        "roundup_power2_divisions:[2:1,4:2,>:8],pinned_use_background_threads:True,backend:native,"
    )
    assert read == AllocatorSettings(
        expandable_segments=True,
        max_split_size_bytes=128 * MIB,
        garbage_collection_threshold=0.8,
        large_segment_size_bytes=40 * MIB,
        max_non_split_rounding_bytes=64 * MIB,
        per_process_memory_fraction=0.5,
        roundup_power2_divisions=(1, 1, 2, *[8] * 13),
    )
    assert AllocatorSettings.parse("") == AllocatorSettings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_split_mb:64", "unknown allocator setting 'max_split_mb'; known: backend"),
        ("max_split_size_mb", "written key:value; received 'max_split_size_mb'"),
        ("max_split_size_mb:", "written key:value"),
        ("max_split_size_mb:19", "max_split_size_mb must be at least large_segment_size_mb, 20"),
        ("max_split_size_mb:30,large_segment_size_mb:40", "at least large_segment_size_mb, 40"),
        ("max_split_size_mb:64x", "expected a whole number; received '64x'"),
        ("max_split_size_mb:64,max_split_size_mb:32", "max_split_size_mb must be given once"),
        ("max_non_split_rounding_mb:10", "max_non_split_rounding_mb must be at least"),
        ("large_segment_size_mb:10", "large_segment_size_mb must be above 10; received 10"),
        ("large_segment_size_mb:21,expandable_segments:True", "must be even with expandable_segm"),
        ("expandable_segments:true", "expected True or False; received 'true'"),
        ("garbage_collection_threshold:1", "must be above 0 and below 1; received 1"),
        ("garbage_collection_threshold:nan", "expected a number such as 0.8"),
        ("per_process_memory_fraction:1.5", "at most 1; received 1.5"),
        ("roundup_power2_divisions:3", "expected a power of two; received '3'"),
        ("roundup_power2_divisions:[3:2]", "expected a power of two"),
        ("roundup_power2_divisions:[64:3]", "expected a power of two"),
        ("roundup_power2_divisions:[64:4", "expected a closing bracket"),
        ("roundup_power2_divisions:[64]", "expected a whole number"),
        ("backend:cudaMallocAsync", "does not cover backend:cudaMallocAsync"),
        ("throw_on_cudamalloc_oom:True", "does not cover throw_on_cudamalloc_oom:True"),
    ],
)
def test_refuses(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        AllocatorSettings.parse(text)


def test_refuses_divisions_that_are_not_sixteen_powers() -> None:
    with pytest.raises(ValueError, match="must be 16 powers of two or zeros; received \\(4,\\)"):
        AllocatorSettings(roundup_power2_divisions=(4,))


@pytest.mark.parametrize(
    ("text", "request_bytes", "block_bytes"),
    [
        ("", 1, 512),
        ("", 512, 512),
        ("", 513, 1024),
        ("", 1200, 1536),
        # Between 4096 and 8192 four steps of 1024; at most 4 * 512 bytes is rounded as ever.
        ("roundup_power2_divisions:4", 4097, 5120),
        ("roundup_power2_divisions:4", 5120, 5120),
        ("roundup_power2_divisions:4", 2048, 2048),
        ("roundup_power2_divisions:4", 2049, 2560),
        ("roundup_power2_divisions:4", 1100, 1536),
        ("roundup_power2_divisions:1", 5 * MIB + 1, 5 * MIB + 512),
        ("roundup_power2_divisions:4", 5 * MIB + 1, 6 * MIB),
        ("roundup_power2_divisions:4", 8 * MIB, 8 * MIB),
        # From 4 MiB on 2 divisions, from 8 MiB on none is named, above the last 8.
        ("roundup_power2_divisions:[4:2,16:1,>:8]", 3 * MIB + 1, 4 * MIB),
        ("roundup_power2_divisions:[4:2,16:1,>:8]", 9 * MIB + 1, 9 * MIB + 512),
        ("roundup_power2_divisions:[4:2,16:1,>:8]", 33 * MIB, 36 * MIB),
        ("roundup_power2_divisions:[4:2,16:1,>:8]", 2**40 + 1, 2**40 + 2**37),
    ],
)
def test_block_sizes(text: str, request_bytes: int, block_bytes: int) -> None:
    assert AllocatorSettings.parse(text).block_bytes(request_bytes) == block_bytes


@pytest.mark.parametrize(
    ("text", "block_bytes", "segment_bytes"),
    [
        ("", 512, 2 * MIB),
        ("", MIB, 2 * MIB),
        ("", MIB + 512, 20 * MIB),
        ("", 10 * MIB - 512, 20 * MIB),
        ("", 10 * MIB, 10 * MIB),
        ("", 10 * MIB + 512, 12 * MIB),
        ("large_segment_size_mb:40", MIB + 512, 40 * MIB),
        ("large_segment_size_mb:40", 11 * MIB, 12 * MIB),
    ],
)
def test_segment_sizes(text: str, block_bytes: int, segment_bytes: int) -> None:
    assert AllocatorSettings.parse(text).segment_bytes(block_bytes) == segment_bytes


@pytest.fixture(scope="module")
def torch_divisions() -> Iterator[Callable[[str, int], int]]:
    """Torch's own parser: the divisions it finds in a text for a size, without a GPU."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if not library.exists() or not hasattr(torch._C, "_accelerator_setAllocatorSettings"):
        pytest.skip("this torch has no libc10.so with the accelerator allocator's settings")
    divisions = getattr(ctypes.CDLL(str(library)), DIVISIONS, None)
    if divisions is None:
        pytest.skip("this torch's libc10.so does not export its reading of the settings")
    divisions.argtypes, divisions.restype = [ctypes.c_size_t], ctypes.c_size_t

    def read(text: str, size_bytes: int) -> int:
        torch._C._accelerator_setAllocatorSettings(text)
        return int(divisions(size_bytes))

    yield read
    torch._C._accelerator_setAllocatorSettings("large_segment_size_mb:20")


def rounded_by_torch(size_bytes: int, divisions: int) -> int:
    """`round_size` with bits, as PyTorch has it."""
    if size_bytes < 512:
        return 512
    if divisions <= 1 or size_bytes <= 512 * divisions:
        return 512 * ((size_bytes + 511) // 512)
    if size_bytes & (size_bytes - 1) == 0:
        return size_bytes
    floor = 1 << (size_bytes.bit_length() - 1)
    step = floor >> (divisions.bit_length() - 1)
    below = size_bytes & ~(step - 1)
    return size_bytes if below == size_bytes else below + step


POWERS = st.sampled_from([2**i for i in range(18)])
INTERVALS = st.lists(st.tuples(POWERS | st.just(">"), st.sampled_from([0, 1, 2, 4, 8, 16])))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(INTERVALS | st.sampled_from([1, 2, 4, 8]), st.integers(1, 2**41))
def test_divisions_are_read_as_torch_reads_them(
    torch_divisions: Callable[[str, int], int], value: list[tuple[object, int]] | int, size: int
) -> None:
    if isinstance(value, list):
        text = "[" + ",".join(f"{mib}:{divisions}" for mib, divisions in value) + "]"
    else:
        text = str(value)
    text = f"roundup_power2_divisions:{text}"
    expected = rounded_by_torch(size, torch_divisions(text, size))
    assert AllocatorSettings.parse(text).block_bytes(size) == expected


@pytest.mark.parametrize(
    ("text", "is_read"),
    [
        ("max_split_size_mb:20", True),
        ("max_split_size_mb:19", False),
        ("max_split_size_mb:30,large_segment_size_mb:40", False),
        ("max_non_split_rounding_mb:19", False),
        ("large_segment_size_mb:11", True),
        ("large_segment_size_mb:10", False),
        ("garbage_collection_threshold:0.99", True),
        ("garbage_collection_threshold:0", False),
        ("garbage_collection_threshold:1.0", False),
        ("expandable_segments:true", False),
        ("roundup_power2_divisions:0", False),
        ("roundup_power2_divisions:[64:0]", True),
        ("roundup_power2_divisions:[]", True),
        ("roundup_power2_divisions:[24:2]", False),
        ("max_split_size_mb:128 ,", True),
    ],
)
def test_torch_takes_and_refuses_the_same(
    torch_divisions: Callable[[str, int], int], text: str, is_read: bool
) -> None:
    for read in (lambda: torch_divisions(text, 1), lambda: AllocatorSettings.parse(text)):
        if is_read:
            read()
        else:
            with pytest.raises(
                ValueError, match=r"must|too small|invalid|expected|Expected|has to|have"
            ):
                read()
