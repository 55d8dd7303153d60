"""What steps asked of their allocator, and what steps of another batch size would ask.

Two batches that made the same requests in the same order tell of others: a size is a line in the
batch, a constant for what the model holds and a multiple for what the samples need; or else a
multiple of the pairs of samples. Only scratch may be there at one of them and not at the other: a
kernel's, given back before anything else goes on. The allocator's model then says what that makes
it reserve, every stair and fragment of it; without a caching allocator it is the most bytes held at
once, every bend of it. No forecast of the job is needed.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from dpmem_profiling.allocator import CachingAllocator
from dpmem_profiling.allocator_blocks import Segment, SegmentBlock
from dpmem_profiling.allocator_settings import MIN_BLOCK_BYTES, AllocatorSettings
from dpmem_profiling.tracker import Change

_NEW = -1
# No block is as large, and arrays hold no more.
_MOST_BYTES = 2**62


@dataclass(frozen=True, eq=False, repr=False)
class Requests:
    """In order. Arrays, since there may be hundreds of thousands and they go between processes.

    settings  those of the caching allocator that was asked; None for one that caches nothing
    held      what it held before the first request
    events    _NEW for a request, else the number of the block that goes. Blocks are numbered in
              order of their requests, after those that were held, which are in order of address
    sizes     of the blocks that were requested, as asked for
    streams   theirs, numbered in order of appearance; 0 is the first
    """

    settings: AllocatorSettings | None
    held: tuple[Segment, ...]
    events: array[int]
    sizes: array[int]
    streams: array[int]

    def is_like(self, other: Requests) -> bool:
        """The same but for sizes, and for scratch that kernels take and give back at once?"""
        one, two = self.places, other.places
        return (
            self.settings == other.settings
            and one.lasting == two.lasting
            and len(_in_use(self.held)) == len(_in_use(other.held))
        )

    @cached_property
    def places(self) -> Places:
        """Where in the step its blocks are requested."""
        return _places(self.events, self.streams, len(_in_use(self.held)))

    def peak_bytes(self) -> int:
        """The most that was reserved, were there no end of memory; or the most held at once."""
        return self._held_bytes() if self.settings is None else self._reserved_bytes(self.settings)

    def _reserved_bytes(self, settings: AllocatorSettings) -> int:
        allocator = CachingAllocator(settings)
        allocator.restore(self.held)
        addresses = _in_use(self.held)
        requests = zip(self.sizes, self.streams, strict=True)
        for number in self.events:
            if number == _NEW:
                addresses.append(allocator.malloc(*next(requests)))
            else:
                allocator.free(addresses[number])
        return allocator.peak_reserved_bytes

    def _held_bytes(self) -> int:
        held_bytes = peak_bytes = 0
        sizes = iter(self.sizes)
        for number in self.events:
            if number == _NEW:
                held_bytes += next(sizes)
                peak_bytes = max(peak_bytes, held_bytes)
            else:
                held_bytes -= self.sizes[number]
        return peak_bytes


@dataclass(frozen=True)
class Gap:
    """Between the events of blocks that last: how many come before."""

    events: int


@dataclass(frozen=True)
class Within:
    """While this block is there: its number among those requested; None: it is not, in this step.

    One step deep, whatever that block is within itself: a list of a thousand tensors, which gives
    back the last first, nests as many.
    """

    block: int | None


class Place(NamedTuple):
    """A block's number among those that last, or that of scratch among other scratch `around`."""

    around: Gap | Within | None
    number: int


class Places(NamedTuple):
    """Where in a step its blocks are requested.

    lasting    the events and streams of the blocks that are no scratch, which are numbered anew
    of_blocks  for each block
    scratch    how much scratch there is within a gap, or within other scratch; where there is any
    """

    lasting: tuple[array[int], array[int]]
    of_blocks: Sequence[Place]
    scratch: Mapping[Gap | Within | None, int]


def _places(events: Sequence[int], streams: Sequence[int], n_held: int) -> Places:
    is_scratch = _which_are_scratch(events, n_held, len(streams))
    numbers = list(range(n_held))
    lasting = array("i"), array("h")
    of_blocks: list[Place] = []
    scratch: Counter[Gap | Within | None] = Counter()
    within: list[Within] = []
    n_lasting = n_held
    for number in events:
        if number != _NEW and is_scratch[number]:
            within.pop()
        elif number != _NEW:
            lasting[0].append(numbers[number])
        elif is_scratch[len(numbers)]:
            numbers.append(_NEW)
            around = within[-1] if within else Gap(len(lasting[0]))
            within.append(Within(len(of_blocks)))
            of_blocks.append(Place(around, scratch[around]))
            scratch[around] += 1
        else:
            lasting[0].append(_NEW)
            lasting[1].append(streams[len(numbers) - n_held])
            numbers.append(n_lasting)
            of_blocks.append(Place(None, n_lasting))
            n_lasting += 1
    return Places(lasting, of_blocks, scratch)


def _which_are_scratch(events: Sequence[int], n_held: int, n_requested: int) -> bytearray:
    """Of each block: is it given back before anything else goes on, but for other such blocks?"""
    is_scratch = bytearray(n_held + n_requested)
    # A block that was requested, or None for one that went.
    so_far: list[int | None] = []
    n_blocks = n_held
    for number in events:
        if number == _NEW:
            so_far.append(n_blocks)
            n_blocks += 1
        elif so_far and so_far[-1] == number:
            so_far.pop()
            is_scratch[number] = True
        else:
            so_far.append(None)
    return is_scratch


class Recorder:
    """Makes Requests of what it is told, in order."""

    def __init__(
        self, settings: AllocatorSettings | None = None, held: Sequence[Segment] = ()
    ) -> None:
        if settings is not None:
            # What fraction a process may have is the search's to know: its limit.
            settings = replace(settings, per_process_memory_fraction=1.0)
        self._settings = settings
        self._stream_numbers = {0: 0}
        ordered = sorted(held, key=lambda segment: segment.address)
        self._held = tuple(
            replace(segment, stream=self._stream(segment.stream), blocks=_live(segment))
            for segment in ordered
        )
        # A block is known by its address, or by the number of its storage.
        self._numbers = {address: n for n, address in enumerate(_in_use(self._held))}
        self._n_blocks = len(self._numbers)
        self._events, self._sizes, self._streams = array("i"), array("q"), array("h")

    def takes(self, block: int, size_bytes: int, stream: int = 0) -> None:
        """`block` is its name until it goes."""
        self._numbers[block] = self._n_blocks
        self._n_blocks += 1
        self._events.append(_NEW)
        self._sizes.append(size_bytes)
        self._streams.append(self._stream(stream))

    def knows(self, block: int) -> bool:
        """Is there a block of this name?"""
        return block in self._numbers

    def gives(self, block: int) -> None:
        """The block of this name goes."""
        self._events.append(self._numbers.pop(block))

    def requests(self) -> Requests:
        """All until now."""
        return Requests(self._settings, self._held, self._events, self._sizes, self._streams)

    def _stream(self, stream: int) -> int:
        # Other processes have other numbers for theirs.
        return self._stream_numbers.setdefault(stream, len(self._stream_numbers))


def requests_of(live_at_start: Mapping[int, int], changes: Sequence[Change]) -> Requests:
    """Of a step whose storages, number -> bytes, were those at its start: what holds memory alone
    counts, as on the CPU.

    Of what comes before the first phase, only what is then left: to make a batch takes a tensor for
    each of its samples, so that no two batches ask alike.
    """
    recorder = Recorder()
    made = next((at for at, change in enumerate(changes) if change.phase is not None), 0)
    left = Counter(live_at_start)
    for change in changes[:made]:
        if change.storage is not None:
            left[change.storage] += change.delta_bytes
    sizes: dict[int, int] = {}
    storages = sorted(left.items())
    storages += [
        (change.storage, change.delta_bytes)
        for change in changes[made:]
        if change.storage is not None
    ]
    for number, delta_bytes in storages:
        old_bytes = sizes.get(number, 0)
        sizes[number] = old_bytes + delta_bytes
        if old_bytes:
            recorder.gives(number)
        if sizes[number]:
            recorder.takes(number, sizes[number])
    return recorder.requests()


@dataclass(frozen=True, eq=False)
class Extrapolated:
    """The peak of any batch, by the requests that two of them made alike."""

    low: int
    high: int
    low_requests: Requests
    high_requests: Requests
    _peaks: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.low_requests.is_like(self.high_requests), "what is unlike tells of no other"

    @property
    def grows(self) -> bool:
        """Is there anything of which more samples need more?"""
        return any(high_bytes > low_bytes for low_bytes, high_bytes in self._sizes)

    @property
    def is_plain(self) -> bool:
        """Are the sizes, but for a hundredth, whole bytes for each sample or pair of samples?"""
        low, high = self.low, self.high
        others_bytes = sum(two for one, two in self._sizes if not _is_plain(low, one, high, two))
        return 100 * others_bytes <= sum(self.high_requests.sizes)

    def __call__(self, batch: int) -> float:
        if batch not in self._peaks:
            self._peaks[batch] = self.requests(batch).peak_bytes()
        return self._peaks[batch]

    def requests(self, batch: int) -> Requests:
        """Those of a step with so many samples."""
        low, high = self.low, self.high
        if batch == low:
            # It may have scratch of its own.
            return self.low_requests
        sizes = (_size(low, one, high, two, batch) for one, two in self._sizes)
        return replace(self.high_requests, sizes=array("q", sizes))

    @cached_property
    def _sizes(self) -> list[tuple[int, int]]:
        """Of each block at `high`: its size at `low`, and at `high`."""
        low, high = self.low_requests.places, self.high_requests.places
        at_low = {place: block for block, place in enumerate(low.of_blocks)}
        # Of each block, which it is at `low`.
        same: list[int | None] = []
        sizes = []
        for (around, number), size_bytes in zip(
            high.of_blocks, self.high_requests.sizes, strict=True
        ):
            there = around
            if isinstance(around, Within):
                assert around.block is not None
                there = Within(same[around.block])
            block = at_low.get(Place(there, number))
            same.append(block)
            if around is None or low.scratch.get(there) == high.scratch[around]:
                assert block is not None
                low_bytes = self.low_requests.sizes[block]
            elif there not in low.scratch:
                # A kernel's own.
                low_bytes = size_bytes
            else:
                # One of several, of which it is not known which is whose: rather too large.
                low_bytes = size_bytes * self.low // self.high
            sizes.append((low_bytes, size_bytes))
        return sizes

    def foresaw(self, batch: int, requests: Requests | None) -> bool:
        """Did a step with so many samples make the very requests, to a block's rounding?"""
        if (
            requests is None
            or requests.events != self.high_requests.events
            or not requests.is_like(self.high_requests)
        ):
            return False
        pairs = zip(self.requests(batch).sizes, requests.sizes, strict=True)
        return all(
            -(-one // MIN_BLOCK_BYTES) == -(-other // MIN_BLOCK_BYTES) for one, other in pairs
        )


def _is_line(low: int, low_bytes: int, high: int, high_bytes: int) -> bool:
    """Is it a line in the batch, which takes nothing or more for no sample, to a rounding?"""
    return 2 * low_bytes * (high - low) >= (high_bytes - low_bytes) * (2 * low - 1)


def _size(low: int, low_bytes: int, high: int, high_bytes: int, batch: int) -> int:
    """Of a block in a step with `batch` samples, by those with `low` and `high`.

    What grows faster than a line, as the likeness of each sample to each other does, is a line for
    each sample: 4 bytes for 1 sample and 64 for 4 are 16 for each of 4, and 32 for each of 8.
    """
    span = high - low
    if _is_line(low, low_bytes, high, high_bytes):
        size_bytes = low_bytes + ((high_bytes - low_bytes) * (batch - low) + span // 2) // span
    else:
        each = low_bytes * high * (high - batch) + high_bytes * low * (batch - low)
        size_bytes = batch * each // (low * high * span)
    # A block of 0 bytes is not asked for.
    return min(max(size_bytes, 1), _MOST_BYTES)


def _is_plain(low: int, low_bytes: int, high: int, high_bytes: int) -> bool:
    if _is_line(low, low_bytes, high, high_bytes):
        return (high_bytes - low_bytes) % (high - low) == 0
    per_pair, rest = divmod(high_bytes * low - low_bytes * high, low * high * (high - low))
    return rest == 0 and low_bytes >= per_pair * low * low


def _live(segment: Segment) -> tuple[SegmentBlock, ...]:
    """The segment's blocks; one that waits for another stream is in use until it is told to go."""
    return tuple(
        replace(block, state="live") if block.state == "pending" else block
        for block in segment.blocks
    )


def _in_use(held: Sequence[Segment]) -> list[Any]:
    """The addresses of the blocks that are, in order."""
    return [block.address for segment in held for block in segment.blocks if block.state != "free"]
