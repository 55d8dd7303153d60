"""Memory the executed program can reach: named arrays in a global arena, banks of scratch.

Global memory is one byte arena. Every array starts on a 256-byte boundary, as a CUDA allocation
does, and is followed by an unmapped gap, so an access that runs off an array faults rather than
reading its neighbour. Shared and local memory are banks: one per block, one per thread, each
filled with 0xff bytes (NaN as a float) so that reading what nobody wrote shows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import MemoryFault
from .formats import UNSIGNED, Array

BASE_ADDRESS = 0x7F00_0000_0000
ALIGNMENT_BYTES = 256
GAP_BYTES = 4096


@dataclass(frozen=True)
class Allocation:
    """A mapped array: bytes [start, start + size_bytes) of the arena."""

    name: str
    start: int
    size_bytes: int
    array: Array

    @property
    def address(self) -> int:
        return BASE_ADDRESS + self.start

    def __str__(self) -> str:
        return f"{self.name} [{self.address:#x}, {self.address + self.size_bytes:#x})"


class _Bytes:
    """A byte arena read and written as rows of `count` words of `bits`."""

    def __init__(self, size_bytes: int, fill: int) -> None:
        # 32 is the widest access; whole rows of it keep every strided view in step.
        self.bytes = np.full(-(-size_bytes // 32) * 32, fill, np.uint8)

    def load(self, offsets: Array, bits: int, count: int) -> Array:
        """[len(offsets), count] words at byte `offsets`, which are multiples of the row size."""
        rows = self.bytes.view(UNSIGNED[bits]).reshape(-1, count)
        loaded: Array = rows[offsets // (bits // 8 * count)]
        return loaded

    def store(self, offsets: Array, words: Array) -> None:
        """Writes [len(offsets), count] words. Among equal offsets the last one stays."""
        bits, count = words.dtype.itemsize * 8, words.shape[1]
        rows = self.bytes.view(UNSIGNED[bits]).reshape(-1, count)
        rows[offsets // (bits // 8 * count)] = words


class GlobalMemory(_Bytes):
    """Arrays at addresses. Map every array a kernel reaches, then hand the memory to `run`.

    `run` maps array arguments by itself; mapping beforehand is for arrays reached only through
    addresses stored in other arrays, such as the tensors of a pointer table:

        memory = GlobalMemory()
        table = np.array([memory.map("w", w), memory.map("b", b)], np.int64)
        run(program, (8,), [table, out], memory=memory)
    """

    def __init__(self) -> None:
        super().__init__(0, 0)
        self._allocations: list[Allocation] = []
        self._end = GAP_BYTES

    def map(self, name: str, array: Array, *, misalignment_bytes: int = 0) -> int:
        """The address given to `array`, the same one each time the same array is mapped.

        `misalignment_bytes` moves it off the 256-byte boundary, as a slice of a tensor is.
        An array that is not writeable faults when the program stores to it.
        Raises ValueError for an array that is not contiguous, or overlaps one already mapped.
        """
        if not array.flags.c_contiguous:
            raise ValueError(
                f"arrays must be C-contiguous; received {name} with strides {array.strides}; "
                "pass np.ascontiguousarray(...) and copy the result back"
            )
        for allocation in self._allocations:
            if np.may_share_memory(array, allocation.array):
                same_start = array.ctypes.data == allocation.array.ctypes.data
                if same_start and array.nbytes == allocation.size_bytes:
                    return allocation.address
                raise ValueError(
                    f"arrays must not overlap; received {name} over a part of {allocation.name}; "
                    "map the whole array and pass its address plus an offset"
                )
        allocation = Allocation(name, self._end + misalignment_bytes, array.nbytes, array)
        self._allocations.append(allocation)
        end = allocation.start + array.nbytes + GAP_BYTES
        self._end = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return allocation.address

    def copy_in(self) -> None:
        """Builds the arena from the mapped arrays."""
        super().__init__(self._end, 0xFF)
        for allocation in self._allocations:
            self._part(allocation)[:] = np.ravel(allocation.array).view(np.uint8)

    def copy_out(self) -> None:
        """Writes the arena back into the mapped arrays that are writeable."""
        for allocation in self._allocations:
            if allocation.array.flags.writeable:
                flat = allocation.array.reshape(-1)
                flat[:] = self._part(allocation).view(allocation.array.dtype)

    def _part(self, allocation: Allocation) -> Array:
        return self.bytes[allocation.start : allocation.start + allocation.size_bytes]

    def locate(self, addresses: Array, size_bytes: int, *, writing: bool, text: str) -> Array:
        """Arena offsets of `addresses` (uint64), each an access of `size_bytes`.

        Raises MemoryFault naming the first address that is misaligned, outside every array, or,
        when `writing`, inside a read-only one. `text` is the instruction, for the message.
        """
        offsets = (addresses - np.uint64(BASE_ADDRESS)).view(np.int64)
        if not offsets.size:
            return offsets
        low, high = int(offsets.min()), int(offsets.max()) + size_bytes
        for allocation in self._allocations:
            end = allocation.start + allocation.size_bytes
            if allocation.start <= low and high <= end:
                self._check(offsets, [allocation], size_bytes, writing, text)
                return offsets
        starts = np.array([allocation.start for allocation in self._allocations], np.int64)
        ends = np.array([a.start + a.size_bytes for a in self._allocations], np.int64)
        owners = np.searchsorted(starts, offsets, side="right") - 1
        outside = (owners < 0) | (offsets + size_bytes > ends[owners] if ends.size else True)
        if outside.any():
            self._fault_outside(int(offsets[outside][0]), int(outside.sum()), size_bytes, text)
        touched = [self._allocations[index] for index in np.unique(owners)]
        self._check(offsets, touched, size_bytes, writing, text)
        return offsets

    def _fault_outside(self, offset: int, count: int, size_bytes: int, text: str) -> None:
        before = [a for a in self._allocations if a.start <= offset]
        nearest = f"; the array before it is {before[-1]}" if before else ""
        raise MemoryFault(
            f"{size_bytes} bytes at {BASE_ADDRESS + offset & 2**64 - 1:#x} lie outside every array "
            f"({count} threads){nearest}: {text}"
        )

    def _check(
        self, offsets: Array, touched: list[Allocation], size_bytes: int, writing: bool, text: str
    ) -> None:
        misaligned = offsets & (size_bytes - 1) != 0
        if misaligned.any():
            offset = int(offsets[misaligned][0])
            owner = next(a for a in reversed(touched) if a.start <= offset)
            raise MemoryFault(
                f"{BASE_ADDRESS + offset:#x} in {owner} is not a multiple of the "
                f"{size_bytes} bytes accessed ({int(misaligned.sum())} threads): {text}"
            )
        for allocation in touched:
            if writing and not allocation.array.flags.writeable:
                raise MemoryFault(f"store to the read-only array {allocation}: {text}")


class Banks(_Bytes):
    """Equal private blocks of bytes: shared memory per block of threads, local per thread."""

    def __init__(self, space: str, num_banks: int, size_bytes: int) -> None:
        self._space = space
        self._size_bytes = size_bytes
        self._stride = -(-size_bytes // 32) * 32
        super().__init__(num_banks * self._stride, 0xFF)

    def locate(self, bank: Array, offsets: Array, size_bytes: int, *, text: str) -> Array:
        """Arena offsets of byte `offsets` (int64) within each thread's `bank`.

        Raises MemoryFault naming the first offset out of bounds or misaligned.
        """
        problems: tuple[tuple[str, Any], ...] = (
            ("outside", (offsets < 0) | (offsets + size_bytes > self._size_bytes)),
            ("misaligned in", offsets & (size_bytes - 1) != 0),
        )
        for what, wrong in problems:
            if wrong.any():
                raise MemoryFault(
                    f"{size_bytes} bytes at {int(offsets[wrong][0]):#x} are {what} the "
                    f"{self._size_bytes} bytes of {self._space} memory "
                    f"({int(wrong.sum())} threads): {text}"
                )
        located: Array = bank * self._stride + offsets
        return located
