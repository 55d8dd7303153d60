"""What the caching allocator's rules work on: blocks, the regions they tile, pools of free ones.

Sources  c10/cuda/CUDACachingAllocator.cpp: `Block`, `BlockPool`, `BlockComparatorSize`,
         `BlockComparatorAddress`, `try_merge_blocks`, `ExpandableSegment`
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

# live: given out. pending: given back, while another stream may still be using it. free: cached.
# unmapped: address space of an expandable segment with no memory behind it.
State = Literal["live", "pending", "free", "unmapped"]


@dataclass(frozen=True)
class SegmentBlock:
    """A block as a snapshot shows it. `requested_bytes` is 0 where the block is free."""

    address: int
    size_bytes: int
    requested_bytes: int
    state: State


@dataclass(frozen=True)
class Segment:
    """Device memory in one piece, tiled by blocks: a cudaMalloc, or a stretch of mapped pages."""

    address: int
    size_bytes: int
    stream: int
    blocks: tuple[SegmentBlock, ...]
    is_small: bool
    is_expandable: bool = False


class Block:
    """A block: mutable, linked to its neighbours in the region."""

    __slots__ = (
        "address",
        "age_base",
        "next",
        "prev",
        "region",
        "requested_bytes",
        "size_bytes",
        "state",
        "streams",
    )

    def __init__(self, region: Region, address: int, size_bytes: int, state: State) -> None:
        self.region = region
        self.address = address
        self.size_bytes = size_bytes
        self.state = state
        self.requested_bytes = 0
        # How often its pool had been searched when the block was last put into it.
        self.age_base = 0
        self.prev: Block | None = None
        self.next: Block | None = None
        # Streams other than its own that use it.
        self.streams: set[int] | None = None

    @property
    def is_split(self) -> bool:
        """Whether it shares its region with other blocks."""
        return self.prev is not None or self.next is not None

    @property
    def growth_bytes(self) -> int:
        """How large it could become by mapping what follows it."""
        following = self.next
        if following is None or following.state != "unmapped":
            return self.size_bytes
        return self.size_bytes + following.size_bytes

    def split(self, size_bytes: int, state: State) -> Block:
        """Keep the first `size_bytes`; the rest becomes a new block in `state`, returned."""
        assert 0 < size_bytes < self.size_bytes, "a split leaves two blocks"
        rest = Block(self.region, self.address + size_bytes, self.size_bytes - size_bytes, state)
        self.size_bytes = size_bytes
        rest.prev, rest.next = self, self.next
        if self.next is not None:
            self.next.prev = rest
        self.next = rest
        return rest

    def merged(self) -> Block:
        """Join with the neighbours in the same state, taking them out of their pool.

        Returns the block that is left, whose own place in the pool is the caller's care.
        """
        pool = self.region.pool
        block = self
        before = block.prev
        if before is not None and before.state == block.state:
            pool.remove(before)
            before._absorb_next()
            block = before
        after = block.next
        if after is not None and after.state == block.state:
            pool.remove(after)
            block._absorb_next()
        return block

    def _absorb_next(self) -> None:
        after = self.next
        assert after is not None
        self.size_bytes += after.size_bytes
        self.next = after.next
        if after.next is not None:
            after.next.prev = self


class Region:
    """What the device gave at once: a cudaMalloc, or (`page_bytes` above 0) address space."""

    __slots__ = ("address", "head", "page_bytes", "pool", "size_bytes")

    def __init__(self, pool: Pool, address: int, size_bytes: int, page_bytes: int = 0) -> None:
        self.pool = pool
        self.address = address
        self.size_bytes = size_bytes
        self.page_bytes = page_bytes
        self.head = Block(self, address, size_bytes, "unmapped" if page_bytes else "free")

    def blocks(self) -> Iterator[Block]:
        """Its blocks, by address."""
        block: Block | None = self.head
        while block is not None:
            yield block
            block = block.next

    def whole_pages(self, block: Block) -> tuple[int, int]:
        """First address and bytes of the pages that lie wholly in `block`: (x, 0) if none do."""
        first = -(-(block.address - self.address) // self.page_bytes)
        end = (block.address + block.size_bytes - self.address) // self.page_bytes
        n_pages = max(end - first, 0)
        return self.address + first * self.page_bytes, n_pages * self.page_bytes


class Pool:
    """The small or large blocks of one stream that are free, and those that are unmapped.

    PyTorch keeps one set for all streams, ordered by stream first; since every search stays in
    its stream, one list per stream is the same.
    """

    __slots__ = ("free", "is_small", "stream", "unmapped")

    def __init__(self, stream: int, is_small: bool) -> None:
        self.stream = stream
        self.is_small = is_small
        # (size, address, block), ascending: best fit is the first of at least the size, lowest
        # address among equals. Addresses differ, so blocks themselves are never compared.
        self.free: list[tuple[Any, ...]] = []
        # (address, block), ascending.
        self.unmapped: list[tuple[Any, ...]] = []

    def add(self, block: Block) -> None:
        """Put in a block that is free or unmapped."""
        if block.state == "free":
            insort(self.free, (block.size_bytes, block.address, block))
        else:
            insort(self.unmapped, (block.address, block))

    def remove(self, block: Block) -> None:
        """Take out a block that is in, whose size and address have not changed since."""
        if block.state == "free":
            entry = self.free.pop(bisect_left(self.free, (block.size_bytes, block.address)))
        else:
            entry = self.unmapped.pop(bisect_left(self.unmapped, (block.address,)))
        assert entry[-1] is block, "a block is where its size and address say"

    def first_of(self, size_bytes: int) -> int:
        """Where in `free` the blocks of at least `size_bytes` begin."""
        return bisect_left(self.free, (size_bytes,))

    def take(self, index: int) -> Block:
        """Take out the free block at a place in `free`."""
        block: Block = self.free.pop(index)[-1]
        return block

    def lowest_room(self, size_bytes: int) -> Block | None:
        """The lowest of free and unmapped blocks in a row that have `size_bytes` together."""
        for _, block in self.unmapped:
            first = block.prev if block.prev is not None and block.prev.state == "free" else block
            room_bytes = 0
            following: Block | None = first
            while following is not None and following.state in ("free", "unmapped"):
                room_bytes += following.size_bytes
                if room_bytes >= size_bytes:
                    return first
                following = following.next
        return None

    def free_blocks(self) -> list[Block]:
        """The free blocks, by size and address."""
        return [entry[-1] for entry in self.free]
