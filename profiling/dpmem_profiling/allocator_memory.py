"""The memory that the caching allocator holds of its device, and how it takes and returns it.

Sources  c10/cuda/CUDACachingAllocator.cpp: `alloc_block`, `release_block`, `release_blocks`,
         `find_expandable_block`, `try_allocate_expandable_block`, `map_block`, `unmap_block`,
         `ExpandableSegment`, `snapshot`
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from dpmem_profiling.allocator_blocks import Block, Pool, Region, Segment, SegmentBlock
from dpmem_profiling.allocator_settings import SMALL_SEGMENT_BYTES

# Address space for an expandable segment where the device's memory is not known.
_UNKNOWN_DEVICE_BYTES = 2**40


class Device:
    """The memory under the allocator: cudaMalloc and the driver's virtual memory calls.

    Gives ascending addresses, never one twice, until `capacity_bytes` are in use (None: forever).
    Raises ValueError for a capacity that is not positive.
    """

    def __init__(self, capacity_bytes: int | None = None) -> None:
        if capacity_bytes is not None and capacity_bytes < 1:
            raise ValueError(f"capacity_bytes must be positive; received {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._next_address = SMALL_SEGMENT_BYTES

    def malloc(self, size_bytes: int) -> int | None:
        """The address of `size_bytes` of memory, None if there is not that much."""
        if not self.hold(size_bytes):
            return None
        return self.reserve(size_bytes)

    def free(self, address: int, size_bytes: int) -> None:
        """Take back what `malloc` gave."""
        self.used_bytes -= size_bytes

    def reserve(self, size_bytes: int) -> int:
        """The address of `size_bytes` of address space, without memory."""
        address = self._next_address
        self._next_address += -(-size_bytes // SMALL_SEGMENT_BYTES) * SMALL_SEGMENT_BYTES
        return address

    def map(self, address: int, size_bytes: int) -> bool:
        """Put memory behind `size_bytes` of address space; False if there is not that much."""
        return self.hold(size_bytes)

    def unmap(self, address: int, size_bytes: int) -> None:
        """Take the memory from behind `size_bytes` of address space."""
        self.used_bytes -= size_bytes

    def hold(self, size_bytes: int) -> bool:
        """Count `size_bytes` as in use; False if there is not that much."""
        if self.capacity_bytes is not None and self.used_bytes + size_bytes > self.capacity_bytes:
            return False
        self.used_bytes += size_bytes
        return True


class ReservedMemory:
    """Regions of a device, the blocks that tile them, and pools of the free ones.

    `large_page_bytes` is the page of expandable segments in the large pool.
    """

    def __init__(self, device: Device, large_page_bytes: int) -> None:
        self.device = device
        self.large_page_bytes = large_page_bytes
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        # Searches of the large pools, in which the age of a free block is counted.
        self.n_searches = 0
        self._regions: dict[int, Region] = {}
        self._pools: dict[tuple[bool, int], Pool] = {}

    def pool(self, stream: int, is_small: bool) -> Pool:
        """The pool of a stream, made when first asked for."""
        key = (is_small, stream)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = Pool(stream, is_small)
        return pool

    def pools(self, *, is_small: bool) -> list[Pool]:
        """The small or the large pools, by stream."""
        return [pool for (small, _), pool in sorted(self._pools.items()) if small is is_small]

    def add(self, block: Block) -> None:
        """Put a free or unmapped block into its pool, as of age 0."""
        block.age_base = self.n_searches
        block.region.pool.add(block)

    def take(self, pool: Pool, size_bytes: int) -> Block | None:
        """A cudaMalloc as one free block, not in its pool; None if the device has not the room."""
        address = self.device.malloc(size_bytes)
        if address is None:
            return None
        region = self._regions[address] = Region(pool, address, size_bytes)
        self._count(size_bytes)
        return region.head

    def release(self, block: Block) -> None:
        """Give back a cudaMalloc, which is one free block."""
        assert not block.is_split, "only whole cudaMallocs can be given back"
        block.region.pool.remove(block)
        del self._regions[block.address]
        self.device.free(block.address, block.size_bytes)
        self.reserved_bytes -= block.size_bytes

    def release_all(self) -> None:
        """Give back every cudaMalloc and every page that is free."""
        for is_small in (False, True):
            for pool in self.pools(is_small=is_small):
                for block in pool.free_blocks():
                    if block.region.page_bytes:
                        self._unmap(block)
                    elif not block.is_split:
                        self.release(block)

    def expand(self, pool: Pool, wanted_bytes: int) -> Block | None:
        """Map pages until a free block of at least `wanted_bytes` is there; not in its pool.

        None if the device has not the room; what was mapped until then stays, free.
        """
        block = pool.lowest_room(wanted_bytes) or self._reserve(pool).head
        if block.state == "unmapped":
            mapped = self._map(block, min(block.size_bytes, wanted_bytes))
            if mapped is None:
                return None
            block = mapped
        while block.size_bytes < wanted_bytes:
            following = block.next
            assert following is not None, "room was found"
            missing_bytes = wanted_bytes - block.size_bytes
            mapped = self._map(following, min(following.size_bytes, missing_bytes))
            if mapped is None:
                return None
            block = mapped
        pool.remove(block)
        return block

    def fixed_bytes(self) -> int:
        """Bytes of free blocks that `release_all` could not give back."""
        total = 0
        for pool in self._pools.values():
            for block in pool.free_blocks():
                if block.region.page_bytes:
                    total += block.size_bytes - block.region.whole_pages(block)[1]
                elif block.is_split:
                    total += block.size_bytes
        return total

    def segments(self) -> list[Segment]:
        """What is reserved, by address; of an expandable segment, each stretch that is mapped."""
        found = []
        for address in sorted(self._regions):
            region = self._regions[address]
            for is_unmapped, group in groupby(
                region.blocks(), lambda block: block.state == "unmapped"
            ):
                if not is_unmapped:
                    found.append(_as_segment(region, list(group)))
        return found

    def restore(self, segments: Iterable[Segment]) -> list[Block]:
        """Hold what `segments` show; returns the blocks that are not free.

        Stretches of expandable segments go into one address space where they can. A stretch of 0
        bytes says that an address space begins there. Raises ValueError if the device has not the
        room.
        """
        assert not self._regions, "only what is empty can be restored"
        blocks = []
        for segment in sorted(segments, key=lambda segment: segment.address):
            pool = self.pool(segment.stream, segment.is_small)
            if not self.device.hold(segment.size_bytes):
                raise ValueError(
                    f"capacity_bytes {self.device.capacity_bytes} is less than the segments hold; "
                    "give at least their sum"
                )
            self._count(segment.size_bytes)
            if not segment.is_expandable:
                region = Region(pool, segment.address, segment.size_bytes)
                self._regions[segment.address] = region
                blocks += self._restore_blocks(region.head, segment)
                continue
            region = self._address_space(pool, segment)
            if segment.size_bytes:
                blocks += self._restore_blocks(self._cut(region, segment), segment)
        return [block for block in blocks if block.state != "free"]

    def _address_space(self, pool: Pool, segment: Segment) -> Region:
        for region in self._regions.values():
            offset = segment.address - region.address
            if (
                region.pool is pool
                and region.page_bytes
                and offset % region.page_bytes == 0
                and offset + segment.size_bytes <= region.size_bytes
            ):
                return region
        return self._reserve(pool, segment.address)

    def _cut(self, region: Region, segment: Segment) -> Block:
        """The unmapped block that spans a stretch, cut out of its region; not in its pool."""
        # Segments come by address: what lies ahead is the region's last block.
        *_, block = region.blocks()
        region.pool.remove(block)
        if segment.address > block.address:
            stretch = block.split(segment.address - block.address, "unmapped")
            self.add(block)
            block = stretch
        if segment.size_bytes < block.size_bytes:
            self.add(block.split(segment.size_bytes, "unmapped"))
        return block

    def _restore_blocks(self, block: Block, segment: Segment) -> list[Block]:
        """Cut `block`, which spans the segment, into the segment's blocks."""
        blocks = []
        for given in segment.blocks:
            assert given.address == block.address, "blocks tile their segment"
            is_last = given.size_bytes == block.size_bytes
            rest = block if is_last else block.split(given.size_bytes, "free")
            block.state = given.state
            block.requested_bytes = given.requested_bytes
            if given.state == "free":
                self.add(block)
            blocks.append(block)
            block = rest
        assert blocks[-1] is block, "blocks tile their segment to its end"
        return blocks

    def _reserve(self, pool: Pool, address: int | None = None) -> Region:
        """Address space of an expandable segment: 9/8 of the device's memory."""
        page_bytes = SMALL_SEGMENT_BYTES if pool.is_small else self.large_page_bytes
        total_bytes = self.device.capacity_bytes or _UNKNOWN_DEVICE_BYTES
        size_bytes = -(-(total_bytes + total_bytes // 8) // page_bytes) * page_bytes
        if address is None:
            address = self.device.reserve(size_bytes)
        region = self._regions[address] = Region(pool, address, size_bytes, page_bytes)
        self.add(region.head)
        return region

    def _map(self, block: Block, size_bytes: int) -> Block | None:
        """Put pages behind the first `size_bytes` of an unmapped block; None if there are none.

        Returns the free block that they are now part of.
        """
        page_bytes = block.region.page_bytes
        mapped_bytes = -(-size_bytes // page_bytes) * page_bytes
        if not self.device.map(block.address, mapped_bytes):
            return None
        block.region.pool.remove(block)
        if mapped_bytes < block.size_bytes:
            self.add(block.split(mapped_bytes, "unmapped"))
        block.state = "free"
        block = block.merged()
        self.add(block)
        self._count(mapped_bytes)
        return block

    def _unmap(self, block: Block) -> None:
        """Take the pages that lie wholly in a free block from behind it."""
        region = block.region
        first, size_bytes = region.whole_pages(block)
        if not size_bytes:
            return
        region.pool.remove(block)
        if first > block.address:
            pages = block.split(first - block.address, "free")
            self.add(block)
            block = pages
        if size_bytes < block.size_bytes:
            self.add(block.split(size_bytes, "free"))
        block.state = "unmapped"
        block = block.merged()
        self.device.unmap(first, size_bytes)
        self.reserved_bytes -= size_bytes
        if block.is_split:
            self.add(block)
        else:
            del self._regions[region.address]

    def _count(self, size_bytes: int) -> None:
        self.reserved_bytes += size_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)


def _as_segment(region: Region, blocks: list[Block]) -> Segment:
    shown = tuple(
        SegmentBlock(block.address, block.size_bytes, block.requested_bytes, block.state)
        for block in blocks
    )
    return Segment(
        address=blocks[0].address,
        size_bytes=sum(block.size_bytes for block in blocks),
        stream=region.pool.stream,
        blocks=shown,
        is_small=region.pool.is_small,
        is_expandable=region.page_bytes > 0,
    )
