"""What a run moved and executed."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .formats import Array

SECTOR_BYTES = 32


@dataclass
class Counts:
    """What a run executed.

    *Accesses*: `loads`, `stores` and `atomics` map the width of a global-memory access in bytes to
    how many threads made one; threads masked off are not counted.

    *Distinct bytes*: the 32-byte sectors that the threads of one block touch, whole, since that is
    what memory is asked for. A sector that a block loads several times counts once for the block,
    as it does if caches keep what a block uses until the block ends; that is an assumption, for no
    cache is modelled. A sector that two blocks load counts twice, and so does one that a block
    loads and stores. Atomics are not among them.

    `instructions` are PTX instructions times the threads that reached them, predicated off or not:
    what occupies issue slots.
    """

    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    atomics: Counter[int] = field(default_factory=Counter)
    distinct_loaded_sectors: int = 0
    distinct_stored_sectors: int = 0
    instructions: int = 0

    @property
    def loaded_bytes(self) -> int:
        return sum(width * count for width, count in self.loads.items())

    @property
    def stored_bytes(self) -> int:
        return sum(width * count for width, count in self.stores.items())

    @property
    def atomic_bytes(self) -> int:
        return sum(width * count for width, count in self.atomics.items())

    @property
    def distinct_bytes(self) -> int:
        return SECTOR_BYTES * (self.distinct_loaded_sectors + self.distinct_stored_sectors)


class Footprint:
    """The sectors that each block of a batch touched in one direction."""

    def __init__(self) -> None:
        self._blocks: list[Array] = []
        self._sectors: list[Array] = []

    def add(self, blocks: Array, offsets: Array) -> None:
        """Accesses at `offsets` by threads of `blocks`; each, being aligned, lies in one sector."""
        self._blocks.append(blocks)
        self._sectors.append(offsets // SECTOR_BYTES)

    def distinct(self) -> int:
        """Sectors touched by each block, added up."""
        if not self._sectors:
            return 0
        blocks, sectors = np.concatenate(self._blocks), np.concatenate(self._sectors)
        return int(np.unique(blocks * (sectors.max() + 1) + sectors).size)
