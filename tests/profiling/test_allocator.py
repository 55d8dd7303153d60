"""Every rule of the allocator model by a small example, with numbers worked by hand."""

import pytest

from dpmem_profiling import AllocatorSettings, CachingAllocator, OutOfDeviceMemory
from dpmem_profiling.allocator_blocks import Segment, SegmentBlock

MIB = 2**20


def allocator(text: str = "", capacity_mib: int | None = None) -> CachingAllocator:
    capacity_bytes = None if capacity_mib is None else capacity_mib * MIB
    return CachingAllocator(AllocatorSettings.parse(text), capacity_bytes=capacity_bytes)


def tiling(model: CachingAllocator) -> list[list[tuple[float, str]]]:
    """Of each segment, its blocks in MiB."""
    return [
        [(block.size_bytes / MIB, block.state) for block in segment.blocks]
        for segment in model.segments()
    ]


def filled(model: CachingAllocator, *sizes_mib: float) -> list[int]:
    return [model.malloc(int(size * MIB)) for size in sizes_mib]


def test_small_requests_share_a_segment_of_2_mib() -> None:
    model = allocator()
    first, second = model.malloc(1), model.malloc(513)
    assert second == first + 512
    assert (model.allocated_bytes, model.reserved_bytes) == (512 + 1024, 2 * MIB)
    # Of the 2 MiB less 1536 bytes that are left, one request of 1 MiB is served, a second not.
    filled(model, 1)
    assert model.reserved_bytes == 2 * MIB
    filled(model, 1)
    assert model.reserved_bytes == 4 * MIB
    assert len(model.segments()) == 2


def test_a_small_block_is_split_down_to_512_bytes() -> None:
    model = allocator()
    rest = 2 * MIB - 512
    filled(model, 1)
    model.malloc(rest - MIB)
    assert [block.state for block in model.segments()[0].blocks] == ["live", "live", "free"]
    assert model.segments()[0].blocks[2].size_bytes == 512


@pytest.mark.parametrize(
    ("request_bytes", "tiles"),
    [
        # 1 to 10 MiB come out of 20 MiB, the rest stays free.
        (MIB + 1, [MIB + 512, 19 * MIB - 512]),
        (10 * MIB - 1, [10 * MIB, 0]),
        (10 * MIB, [10 * MIB, 0]),
        (10 * MIB + 1, [10 * MIB + 512, 2 * MIB - 512]),
        # A rest of 1 MiB stays in the block, one of 1 MiB + 512 does not.
        (11 * MIB, [12 * MIB, 0]),
        (11 * MIB - 512, [11 * MIB - 512, MIB + 512]),
    ],
)
def test_large_segments_and_their_rests(request_bytes: int, tiles: list[int]) -> None:
    model = allocator()
    model.malloc(request_bytes)
    (segment,) = model.segments()
    assert [block.size_bytes for block in segment.blocks] == [size for size in tiles if size]
    assert model.allocated_bytes == tiles[0]
    assert model.reserved_bytes == sum(tiles)


def test_the_smallest_block_that_fits_is_taken() -> None:
    model = allocator()
    blocks = filled(model, 30, 20, 24)
    for address in blocks:
        model.free(address)
    assert filled(model, 19.5) == [blocks[1]]
    # 20 MiB is taken as it is; then 24 fits best, and keeps 0.5 of it.
    assert filled(model, 23.5) == [blocks[2]]
    assert model.allocated_bytes == 44 * MIB
    assert filled(model, 12) == [blocks[0]]
    assert tiling(model)[0] == [(12, "live"), (18, "free")]


def test_among_equals_the_lowest_address_is_taken() -> None:
    model = allocator()
    blocks = filled(model, 20, 20, 20)
    for address in (blocks[2], blocks[0], blocks[1]):
        model.free(address)
    assert filled(model, 20, 20, 20) == blocks


def test_large_blocks_do_not_serve_small_requests() -> None:
    model = allocator()
    model.free(model.malloc(20 * MIB))
    model.malloc(MIB)
    assert model.reserved_bytes == 22 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)])
def test_free_neighbours_become_one(order: tuple[int, ...]) -> None:
    model = allocator()
    blocks = filled(model, 5, 5, 5)
    assert tiling(model) == [[(5, "live"), (5, "live"), (5, "live"), (5, "free")]]
    for index in order:
        model.free(blocks[index])
    assert tiling(model) == [[(20, "free")]]


def test_blocks_of_one_stream_do_not_serve_another() -> None:
    model = allocator()
    first = model.malloc(20 * MIB, stream=0)
    model.free(first)
    assert model.malloc(20 * MIB, stream=7) != first
    assert model.malloc(20 * MIB, stream=0) == first
    assert [segment.stream for segment in model.segments()] == [0, 7]


def test_a_block_that_another_stream_uses_is_pending_until_it_is_done() -> None:
    model = allocator()
    block = model.malloc(20 * MIB)
    model.record_stream(block, 1)
    model.free(block)
    assert tiling(model) == [[(20, "pending")]]
    assert model.allocated_bytes == 0
    assert model.is_pending(block)
    assert filled(model, 20) != [block]
    model.synchronize()
    assert not model.is_pending(block)
    assert filled(model, 20) == [block]


def test_a_pending_block_does_not_merge() -> None:
    model = allocator()
    first, second = filled(model, 5, 5)
    model.record_stream(first, 1)
    model.free(first)
    model.free(second)
    assert tiling(model) == [[(5, "pending"), (15, "free")]]
    model.complete(first)
    assert tiling(model) == [[(20, "free")]]


def test_use_by_its_own_stream_makes_nothing_pending() -> None:
    model = allocator()
    block = model.malloc(20 * MIB, stream=3)
    model.record_stream(block, 3)
    model.free(block)
    assert tiling(model) == [[(20, "free")]]


def test_oversize_blocks_are_kept_for_oversize_requests() -> None:
    model = allocator("max_split_size_mb:64")
    block = model.malloc(100 * MIB)
    model.free(block)
    small = model.malloc(40 * MIB)
    assert small != block
    # 80 + 20 MiB of rounding is not above 100, so the block is too large for 80.
    assert model.malloc(80 * MIB) != block
    # It is taken whole for 81.
    before = model.allocated_bytes
    assert model.malloc(81 * MIB) == block
    assert model.allocated_bytes - before == 100 * MIB


def test_how_much_larger_an_oversize_block_may_be() -> None:
    model = allocator("max_split_size_mb:64,max_non_split_rounding_mb:30")
    block = model.malloc(100 * MIB)
    model.free(block)
    assert model.malloc(71 * MIB) == block


def test_what_is_cached_is_given_back_before_giving_up() -> None:
    model = allocator(capacity_mib=40)
    model.free(model.malloc(20 * MIB))
    model.malloc(30 * MIB)
    assert (model.n_retries, model.reserved_bytes) == (1, 30 * MIB)
    assert model.peak_reserved_bytes == 30 * MIB


def test_out_of_memory_says_what_there_is_and_leaves_the_rest_alive() -> None:
    model = allocator(capacity_mib=40)
    (block,) = filled(model, 5)
    with pytest.raises(OutOfDeviceMemory) as error:
        model.malloc(30 * MIB)
    assert error.value.requested_bytes == 30 * MIB
    # The segment of 20 MiB is split and cannot go.
    assert error.value.reserved_bytes == 20 * MIB
    assert error.value.allocated_bytes == 5 * MIB
    assert error.value.capacity_bytes == 40 * MIB
    assert model.n_retries == 1
    model.free(block)
    model.malloc(30 * MIB)
    assert (model.n_retries, model.reserved_bytes) == (2, 30 * MIB)


def test_running_short_waits_for_other_streams() -> None:
    model = allocator(capacity_mib=40)
    block = model.malloc(30 * MIB)
    model.record_stream(block, 1)
    model.free(block)
    model.malloc(40 * MIB)
    assert model.n_retries == 1


@pytest.mark.parametrize(
    ("request_mib", "left_mib", "n_retries"),
    [
        # The first of at least max_split_size is enough.
        (30, 50 + 30, 0),
        # No one block is enough: the largest, then the next.
        (88, 88, 0),
        # Both are not enough: everything goes, small ones too.
        (94, 94, 1),
    ],
)
def test_oversize_blocks_are_given_back_first(
    request_mib: int, left_mib: int, n_retries: int
) -> None:
    model = allocator("max_split_size_mb:32", capacity_mib=102)
    for address in filled(model, 40, 50, 0.5):
        model.free(address)
    assert model.reserved_bytes == 92 * MIB
    model.malloc(request_mib * MIB)
    small = 0 if n_retries else 2
    assert (model.n_retries, model.reserved_bytes / MIB) == (n_retries, left_mib + small)


def test_the_largest_oversize_blocks_go_first() -> None:
    model = allocator("max_split_size_mb:32", capacity_mib=142)
    for address in filled(model, 40, 50, 52):
        model.free(address)
    # 52 and 50 are enough for 60.
    filled(model, 60)
    assert (model.n_retries, model.reserved_bytes / MIB) == (0, 40 + 60)


def test_a_memory_fraction_limits_what_is_reserved() -> None:
    model = allocator("per_process_memory_fraction:0.5", capacity_mib=100)
    filled(model, 40)
    with pytest.raises(OutOfDeviceMemory):
        filled(model, 12)
    filled(model, 10)
    with pytest.raises(ValueError, match=r"fraction 0\.5 must be of a known capacity; give"):
        allocator("per_process_memory_fraction:0.5")


@pytest.mark.parametrize(("threshold", "left_mib"), [(0.6, 40 + 24), (0.75, 30 + 40 + 24)])
def test_garbage_goes_oldest_first_until_enough_is_back(threshold: float, left_mib: int) -> None:
    model = allocator(
        f"per_process_memory_fraction:0.5,garbage_collection_threshold:{threshold}",
        capacity_mib=200,
    )
    old, young = filled(model, 20, 30)
    model.free(old)  # after 2 searches
    filled(model, 40)
    model.free(young)  # after 3
    # The 4th search finds nothing in its stream. 90 of 100 MiB are reserved; ages are 2 and 1,
    # 1.5 on average. With 60 allowed 30 are to go: first the old 20, then the young. With 75
    # allowed 15 are to go, and the old is enough.
    model.malloc(24 * MIB, stream=1)
    assert (model.reserved_bytes / MIB, model.n_retries) == (left_mib, 0)


def test_without_a_fraction_no_garbage_is_collected() -> None:
    model = allocator("garbage_collection_threshold:0.1", capacity_mib=100)
    model.free(model.malloc(40 * MIB))
    model.malloc(50 * MIB, stream=1)
    assert model.reserved_bytes == 90 * MIB


def test_an_expandable_segment_grows_in_place() -> None:
    model = allocator("expandable_segments:True")
    first = model.malloc(MIB + 1)
    assert model.reserved_bytes == 20 * MIB
    # 19 MiB - 512 of the first page are free, so one more page is enough.
    second = model.malloc(30 * MIB)
    assert second == first + MIB + 512
    assert model.reserved_bytes == 40 * MIB
    assert len(model.segments()) == 1
    # The small pool has its own, with pages of 2 MiB; the large one splits down to 512 bytes.
    small = model.malloc(MIB)
    assert (model.malloc(MIB), model.reserved_bytes) == (small + MIB, 42 * MIB)
    model.malloc(9 * MIB - 1024)
    assert model.reserved_bytes == 42 * MIB
    assert tiling(model)[0][-1] == (512 / MIB, "free")


def test_only_whole_free_pages_are_unmapped_and_the_lowest_gap_is_filled_again() -> None:
    model = allocator("expandable_segments:True")
    first, middle, _ = filled(model, 30, 30, 30)
    assert model.reserved_bytes == 100 * MIB
    model.free(middle)
    # Of what is free, 30 to 60 and 90 to 100 MiB, only the page from 40 to 60 is whole.
    assert model.inactive_split_bytes == 20 * MIB
    model.empty_cache()
    assert model.reserved_bytes == 80 * MIB
    assert tiling(model) == [[(30, "live"), (10, "free")], [(30, "live"), (10, "free")]]
    assert filled(model, 25) == [first + 30 * MIB]
    assert model.reserved_bytes == 100 * MIB


def test_a_block_at_the_end_of_an_expandable_segment_is_spared() -> None:
    model = allocator("expandable_segments:True")
    _, gap, _, end = filled(model, 20, 12, 18, 10)
    model.free(gap)
    model.free(end)
    # 10 MiB at the end fits 9 best, but could grow; 12 in the middle could not.
    assert filled(model, 9) == [gap]
    assert filled(model, 9) == [end]


def test_an_expandable_segment_is_given_back_whole() -> None:
    model = allocator("expandable_segments:True", capacity_mib=100)
    for address in filled(model, 30, 0.5):
        model.free(address)
    model.empty_cache()
    assert (model.reserved_bytes, model.segments()) == (0, [])


def test_an_expandable_segment_runs_out_of_device_memory() -> None:
    model = allocator("expandable_segments:True", capacity_mib=60)
    blocks = filled(model, 20, 20)
    model.free(blocks[0])
    # The freed page is unmapped and mapped again behind the other.
    assert filled(model, 40) == [blocks[1] + 20 * MIB]
    assert (model.n_retries, model.reserved_bytes) == (1, 60 * MIB)
    with pytest.raises(OutOfDeviceMemory):
        filled(model, 20)


def test_a_full_address_space_is_followed_by_another() -> None:
    model = allocator("expandable_segments:True", capacity_mib=80)
    # 9/8 of 80 MiB is 90: in pages of 20, address space for 100.
    blocks = filled(model, 20, 20, 20, 20)
    model.free(blocks[0])
    model.free(blocks[2])
    # Two pages are unmapped then, but neither where they were nor at the end is room for 40.
    (block,) = filled(model, 40)
    assert not blocks[0] <= block < blocks[0] + 100 * MIB
    assert (model.n_retries, model.reserved_bytes) == (1, 80 * MIB)


def test_expandable_blocks_serve_nothing_once_they_are_turned_off() -> None:
    address = 2**30

    def segment(at: int, size_mib: int, *, is_expandable: bool) -> Segment:
        blocks = (SegmentBlock(at, size_mib * MIB, 0, "free"),)
        return Segment(at, size_mib * MIB, 0, blocks, False, is_expandable)

    model = allocator()
    model.restore([segment(address, 20, is_expandable=True)])
    assert filled(model, 20) != [address]

    model = allocator()
    model.restore(
        [
            segment(address, 20, is_expandable=True),
            segment(2 * address, 40, is_expandable=False),
        ]
    )
    assert filled(model, 20) == [2 * address]


def test_fragments_are_what_empty_cache_cannot_give_back() -> None:
    model = allocator()
    _, loose = filled(model, 5, 30)
    model.free(loose)
    assert model.inactive_split_bytes == 15 * MIB
    model.empty_cache()
    assert model.reserved_bytes - model.allocated_bytes == 15 * MIB


def test_peaks_are_counted_anew_when_asked() -> None:
    model = allocator()
    model.free(model.malloc(30 * MIB))
    model.empty_cache()
    filled(model, 10)
    assert (model.peak_allocated_bytes, model.peak_reserved_bytes) == (30 * MIB, 30 * MIB)
    model.reset_peaks()
    assert (model.peak_allocated_bytes, model.peak_reserved_bytes) == (10 * MIB, 10 * MIB)


def test_mistakes_are_named() -> None:
    model = allocator()
    with pytest.raises(ValueError, match="must be at least 1 byte; received 0"):
        model.malloc(0)
    block = model.malloc(1)
    model.free(block)
    with pytest.raises(ValueError, match="no block at 0x200000 is live"):
        model.free(block)
    with pytest.raises(ValueError, match="no block at 0x200000 is live"):
        model.record_stream(block, 1)
    with pytest.raises(ValueError, match="no block at 0x200000 is pending"):
        model.complete(block)
    with pytest.raises(ValueError, match="capacity_bytes must be positive; received 0"):
        allocator(capacity_mib=0)
    full = allocator(capacity_mib=10)
    with pytest.raises(ValueError, match="less than the segments hold"):
        full.restore(
            [Segment(2**30, 20 * MIB, 0, (SegmentBlock(2**30, 20 * MIB, 0, "free"),), False)]
        )
