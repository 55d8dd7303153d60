"""A model of PyTorch's CUDA caching allocator: the same requests get the same addresses.

Rules, each with the function of c10/cuda/CUDACachingAllocator.cpp (PyTorch 2.13) that has it:

- Sizes: `allocator_settings.py`. Up to 1 MiB the small pool serves, above it the large one
  (`get_pool`).
- Choice: of the stream's free blocks the smallest that is large enough, the lowest address among
  equals (`get_free_block`, `BlockComparatorSize`). Blocks of at least max_split_size are kept for
  requests of at least that size, which take no block larger than they need by
  max_non_split_rounding or more. Where a block of an expandable segment is first, each next block
  that could grow to less is preferred.
- Split: what is left over becomes a free block if it is at least 512 bytes (small pool, expandable
  segments) or more than 1 MiB and the request below max_split_size (`should_split`).
- Free: neighbours that are free become one block, at once (`free_block`, `try_merge_blocks`). If
  other streams have used the block, only when they are done (`recordStream`, `insert_events`).
- Nothing fits (`malloc`): collect garbage; ask the device; with max_split_size give back blocks of
  at least that size and ask again; give back all that is cached and ask again, counted as a retry;
  out of memory. What a memory fraction does not allow the device is not asked for (`alloc_block`).
- Garbage (`garbage_collect_cached_blocks`): under a memory fraction, when reserved bytes exceed the
  threshold, whole cached cudaMallocs of the large pool go that have not been chosen for at least
  the average number of searches; repeated until enough is back.
- Expandable segments: pages of 2 MiB (small) or one large segment (large) are mapped at the lowest
  address where free and unmapped blocks in a row have room (`find_expandable_block`, `map_block`);
  address space for 9/8 of the device is reserved at a time; only pages wholly free are unmapped
  (`unmap_block`).

Not modelled: private pools (CUDA graphs, MemPool) and free-memory callbacks.
"""

from __future__ import annotations

from collections.abc import Iterable

from dpmem_profiling.allocator_blocks import Block, Pool, Segment
from dpmem_profiling.allocator_memory import Device, ReservedMemory
from dpmem_profiling.allocator_settings import MIN_BLOCK_BYTES, SMALL_BYTES, AllocatorSettings


class OutOfDeviceMemory(RuntimeError):  # noqa: N818 - as torch.OutOfMemoryError
    """A request that the device cannot serve even after everything cached was given back.

    Attributes: `requested_bytes` as asked, `reserved_bytes` and `allocated_bytes` at that moment,
    `capacity_bytes` (None where the device has no stated limit).
    """

    def __init__(
        self,
        requested_bytes: int,
        *,
        reserved_bytes: int,
        allocated_bytes: int,
        capacity_bytes: int | None,
    ) -> None:
        super().__init__(
            f"out of device memory: {requested_bytes} bytes asked for, {allocated_bytes} in use, "
            f"{reserved_bytes} reserved, of {capacity_bytes}"
        )
        self.requested_bytes = requested_bytes
        self.reserved_bytes = reserved_bytes
        self.allocated_bytes = allocated_bytes
        self.capacity_bytes = capacity_bytes


class CachingAllocator:
    """The caching allocator of one device under `settings`.

    `capacity_bytes` is what cudaMalloc can give in total, None for no limit; `device` stands in
    for a `Device` of that capacity. `settings.per_process_memory_fraction` is taken of the
    capacity (PyTorch takes it of the device's memory, of which the CUDA context needs a part).

    Raises ValueError for a memory fraction without a capacity.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        *,
        capacity_bytes: int | None = None,
        device: Device | None = None,
    ) -> None:
        assert capacity_bytes is None or device is None, "a device has its own capacity"
        self.settings = settings = AllocatorSettings() if settings is None else settings
        self._device = Device(capacity_bytes) if device is None else device
        self._memory = ReservedMemory(self._device, settings.large_segment_size_bytes)
        self._live: dict[int, Block] = {}
        # By address, in the order they were freed.
        self._pending: dict[int, Block] = {}
        self.allocated_bytes = 0
        self.peak_allocated_bytes = 0
        self.n_retries = 0
        self._is_expandable = settings.expandable_segments
        self._max_split_bytes = settings.max_split_size_bytes
        rounding_bytes = settings.max_non_split_rounding_bytes
        if rounding_bytes is None:
            rounding_bytes = settings.large_segment_size_bytes
        self._max_rounding_bytes = rounding_bytes
        self._allowed_bytes: int | None = None
        self._garbage_bytes: int | None = None
        if settings.per_process_memory_fraction < 1:
            capacity = self._device.capacity_bytes
            if capacity is None:
                raise ValueError(
                    f"per_process_memory_fraction {settings.per_process_memory_fraction} must be "
                    "of a known capacity; give capacity_bytes"
                )
            self._allowed_bytes = int(settings.per_process_memory_fraction * capacity)
            if settings.garbage_collection_threshold is not None:
                threshold = settings.garbage_collection_threshold
                self._garbage_bytes = int(threshold * self._allowed_bytes)

    @property
    def reserved_bytes(self) -> int:
        """What the device has given and not got back."""
        return self._memory.reserved_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """The most that was reserved at once since the peaks were reset."""
        return self._memory.peak_reserved_bytes

    @property
    def inactive_split_bytes(self) -> int:
        """Free bytes that `empty_cache` could not give back: fragmentation.

        In expandable segments, too, where PyTorch's statistic of this name counts none: what of
        the free blocks is not whole pages. Pending blocks are not free.
        """
        return self._memory.fixed_bytes()

    def malloc(self, size_bytes: int, stream: int = 0) -> int:
        """Serve a request on `stream`; returns the address.

        Raises ValueError for a request below 1 byte (PyTorch gives empty tensors no memory) and
        OutOfDeviceMemory, after which the allocator can go on.
        """
        if size_bytes < 1:
            raise ValueError(f"a request must be at least 1 byte; received {size_bytes}")
        wanted = self.settings.block_bytes(size_bytes)
        pool = self._memory.pool(stream, wanted <= SMALL_BYTES)
        if self._garbage_bytes is not None and not pool.is_small:
            self._memory.n_searches += 1
        index = self._best_fit(pool, wanted)
        block = self._take_from_device(pool, wanted) if index is None else pool.take(index)
        if block is None:
            raise OutOfDeviceMemory(
                size_bytes,
                reserved_bytes=self.reserved_bytes,
                allocated_bytes=self.allocated_bytes,
                capacity_bytes=self._device.capacity_bytes,
            )
        if self._splits(pool, wanted, block.size_bytes - wanted):
            self._memory.add(block.split(wanted, "free"))
        block.state = "live"
        block.requested_bytes = size_bytes
        self._live[block.address] = block
        self.allocated_bytes += block.size_bytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block.address

    def is_cached(self, size_bytes: int, stream: int = 0) -> bool:
        """Whether a free block would serve the request, without asking the device."""
        wanted = self.settings.block_bytes(size_bytes)
        pool = self._memory.pool(stream, wanted <= SMALL_BYTES)
        return self._best_fit(pool, wanted) is not None

    def free(self, address: int) -> None:
        """Give back what `malloc` returned; pending while other streams use it.

        Raises ValueError for an address that is not live.
        """
        block = self._live_block(address)
        del self._live[address]
        self.allocated_bytes -= block.size_bytes
        if block.streams:
            block.state = "pending"
            self._pending[address] = block
        else:
            self._cache(block)

    def record_stream(self, address: int, stream: int) -> None:
        """Note that `stream` uses the block: once freed it is pending until `synchronize`.

        Raises ValueError for an address that is not live.
        """
        block = self._live_block(address)
        if stream != block.region.pool.stream:
            block.streams = (block.streams or set()) | {stream}

    def synchronize(self) -> None:
        """All streams have done their work: what is pending becomes free.

        PyTorch learns of it by events, at the next request (`process_events`).
        """
        for address in list(self._pending):
            self.complete(address)

    def complete(self, address: int) -> None:
        """The other streams are done with this one pending block.

        Raises ValueError for an address that is not pending.
        """
        block = self._pending.pop(address, None)
        if block is None:
            raise ValueError(f"no block at {address:#x} is pending; free it first")
        self._cache(block)

    def is_pending(self, address: int) -> bool:
        """Whether the block there was freed and waits for other streams."""
        return address in self._pending

    def empty_cache(self) -> None:
        """Wait for all streams and give every cudaMalloc and page that is free to the device."""
        self.synchronize()
        self._memory.release_all()

    def reset_peaks(self) -> None:
        """Count peaks from here on."""
        self.peak_allocated_bytes = self.allocated_bytes
        self._memory.peak_reserved_bytes = self.reserved_bytes

    def segments(self) -> list[Segment]:
        """What is reserved and the blocks that tile it, by address.

        Of an expandable segment, each stretch that is mapped.
        """
        return self._memory.segments()

    def restore(self, segments: Iterable[Segment]) -> None:
        """Start from `segments` instead of from nothing; for an allocator not yet used.

        Expandable stretches of one stream and pool are put into one address space where their
        addresses allow it; a stretch of 0 bytes says that an address space begins there. Pending
        blocks wait for `complete`. Raises ValueError if the capacity is below their sum.
        """
        for block in self._memory.restore(segments):
            if block.state == "pending":
                self._pending[block.address] = block
            else:
                self._live[block.address] = block
                self.allocated_bytes += block.size_bytes
        self.reset_peaks()

    def _live_block(self, address: int) -> Block:
        block = self._live.get(address)
        if block is None:
            raise ValueError(f"no block at {address:#x} is live; give what malloc returned, once")
        return block

    def _cache(self, block: Block) -> None:
        block.state = "free"
        block.requested_bytes = 0
        block.streams = None
        self._memory.add(block.merged())

    def _splits(self, pool: Pool, wanted_bytes: int, rest_bytes: int) -> bool:
        if pool.is_small or self._is_expandable:
            return rest_bytes >= MIN_BLOCK_BYTES
        return rest_bytes > SMALL_BYTES and not self._is_oversize(wanted_bytes)

    def _is_oversize(self, size_bytes: int) -> bool:
        return self._max_split_bytes is not None and size_bytes >= self._max_split_bytes

    def _best_fit(self, pool: Pool, wanted_bytes: int) -> int | None:
        """Where in the pool's free blocks the one is that serves a request; None if none does."""
        index = pool.first_of(wanted_bytes)
        if index == len(pool.free):
            return None
        block: Block = pool.free[index][-1]
        if block.region.page_bytes and not self._is_expandable:
            # They were turned off since: what is left of them serves no more requests.
            for _, _, other in pool.free[index + 1 :]:
                index += 1
                if not other.region.page_bytes:
                    block = other
                    break
            else:
                return None
        elif self._is_expandable:
            while block.region.page_bytes and index + 1 < len(pool.free):
                following: Block = pool.free[index + 1][-1]
                if following.growth_bytes >= block.growth_bytes:
                    break
                index, block = index + 1, following
        if self._is_oversize(wanted_bytes):
            if block.size_bytes >= wanted_bytes + self._max_rounding_bytes:
                return None
        elif self._is_oversize(block.size_bytes):
            return None
        return index

    def _take_from_device(self, pool: Pool, wanted_bytes: int) -> Block | None:
        if self._garbage_bytes is not None:
            self._collect_garbage(self.reserved_bytes - self._garbage_bytes)
        block = self._ask_device(pool, wanted_bytes)
        if block is None and self._release_oversize(pool, wanted_bytes):
            block = self._ask_device(pool, wanted_bytes)
        if block is None:
            self.empty_cache()
            self.n_retries += 1
            block = self._ask_device(pool, wanted_bytes)
        return block

    def _ask_device(self, pool: Pool, wanted_bytes: int) -> Block | None:
        size_bytes = self.settings.segment_bytes(wanted_bytes)
        allowed_bytes = self._allowed_bytes
        if allowed_bytes is not None and self.reserved_bytes + size_bytes > allowed_bytes:
            return None
        if self._is_expandable:
            return self._memory.expand(pool, wanted_bytes)
        return self._memory.take(pool, size_bytes)

    def _collect_garbage(self, to_reclaim_bytes: int) -> None:
        if to_reclaim_bytes <= 0:
            return
        ages = {
            block: self._memory.n_searches - block.age_base
            for pool in self._memory.pools(is_small=False)
            for block in pool.free_blocks()
            if not block.is_split and not block.region.page_bytes
        }
        while to_reclaim_bytes > 0 and ages:
            average = sum(ages.values()) / len(ages)
            for block in [block for block, age in ages.items() if age >= average]:
                del ages[block]
                to_reclaim_bytes -= block.size_bytes
                self._memory.release(block)

    def _release_oversize(self, pool: Pool, wanted_bytes: int) -> bool:
        """Give back enough oversize blocks for the request; False if there are not enough."""
        if self._max_split_bytes is None:
            return False
        enough_bytes = max(wanted_bytes, self._max_split_bytes)
        index = pool.first_of(enough_bytes)
        blocks = pool.free_blocks()
        if index < len(blocks) and not blocks[index].region.page_bytes:
            self._memory.release(blocks[index])
            return True
        released_bytes = 0
        for block in reversed(blocks[:index]):
            if released_bytes >= enough_bytes or not self._is_oversize(block.size_bytes):
                break
            if not block.region.page_bytes:
                released_bytes += block.size_bytes
                self._memory.release(block)
        return released_bytes >= enough_bytes
