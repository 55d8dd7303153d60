"""Bits under a byte budget: each storage gets as many as its part in the gradients' noise is worth.

The first forward takes the fewest bits that the policy allows. Its backward tells what each storage
adds to the variance of the gradients (`sensitivity`); from then on bits are raised where a byte
removes the most variance, until the budget is used up. Raising bits never makes another storage
need more, so what is planned is an upper bound of what is stored.
"""

import heapq
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpmem.activations.sensitivity import GradientReader, sensitivities
from dpmem.activations.slots import Saved, View, stored_bytes

Agree = Callable[[Tensor], Tensor]
"""A tensor's elementwise maximum over all ranks: fp64 [n] -> fp64 [n]."""


class Candidate(NamedTuple):
    """A storage whose bits may be chosen."""

    numel: int
    exact_bits: int
    least_bits: int

    def options(self) -> list[int]:
        """The bits it may have, ascending; the last is exact."""
        return [bits for bits in (2, 4, 8) if bits >= self.least_bits] + [self.exact_bits]

    def stored_bytes(self, bits: int, group_size: int) -> int:
        """Bytes of the codes and their metadata, or of the values."""
        if bits == self.exact_bits:
            return self.numel * bits // 8
        groups = -(-self.numel // group_size)
        return groups * (group_size * bits // 8 + 4)

    def variance(self, sensitivity: float, bits: int) -> float:
        """What it adds to the gradients' variance at `bits`."""
        return 0.0 if bits == self.exact_bits else sensitivity / (2**bits - 1) ** 2


def allocate(
    candidates: Sequence[Candidate],
    sensitivity: Sequence[float],
    budget_bytes: int,
    group_size: int,
) -> list[int]:
    """Bits of each candidate: greedily the raise that removes the most variance a byte.

    Starts from the fewest bits, which may take more than the budget already: then these remain.
    Equal arguments give equal bits.
    """
    chosen = [candidate.least_bits for candidate in candidates]
    left = budget_bytes - sum(
        candidate.stored_bytes(bits, group_size)
        for candidate, bits in zip(candidates, chosen, strict=True)
    )
    heap: list[tuple[float, int, int, int]] = []

    def offer(i: int) -> None:
        candidate, now = candidates[i], chosen[i]
        for bits in (option for option in candidate.options() if option > now):
            cost = candidate.stored_bytes(bits, group_size)
            cost -= candidate.stored_bytes(now, group_size)
            gain = candidate.variance(sensitivity[i], now)
            gain -= candidate.variance(sensitivity[i], bits)
            heapq.heappush(heap, (-gain / cost, i, bits, cost))

    for i in range(len(candidates)):
        offer(i)
    while heap:
        _, i, bits, cost = heapq.heappop(heap)
        # Offers made at fewer bits than it has by now are stale: newer ones are in the heap.
        candidate = candidates[i]
        due = candidate.stored_bytes(bits, group_size)
        if bits <= chosen[i] or cost != due - candidate.stored_bytes(chosen[i], group_size):
            continue
        if cost <= left:
            chosen[i] = bits
            left -= cost
            offer(i)
    return chosen


class Planner:
    """Chooses the bits of each forward's storages, numbered from 1 by when they were first saved.

    Raises RuntimeError where the fewest bits take more than the budget, and where ranks save
    different numbers of tensors. Warns where one forward took more because its tensors grew.
    """

    def __init__(
        self, budget_bytes: int, group_size: int, refresh_forwards: int, agree: Agree | None
    ) -> None:
        self.reader: GradientReader | None = None
        self._budget_bytes, self._group_size = budget_bytes, group_size
        self._refresh_forwards = refresh_forwards
        self._agree = agree
        self._candidates: dict[int, Candidate] = {}
        self._planned: dict[int, Candidate] = {}
        self._chosen: dict[int, int] = {}
        self._sensitivity: list[float] = []
        self._since_refresh = 0
        self._fixed_bytes = 0
        self._count = 0
        self._off_plan = False

    def begin(self) -> None:
        """A forward begins: plan by what the last ones told, and read this one if it is due."""
        if self.reader is not None and self.reader.readings:
            told = sensitivities(self.reader.readings, self._count + 1)
            self._sensitivity = self._maximum(told)
            self.reader = None
            self._plan()
        elif self._agree is None and self._planned and self._candidates != self._planned:
            # Other shapes, other bits. With several ranks that waits for the next reading: only
            # then is it certain that all of them plan.
            self._plan()
        self._candidates = {}
        self._off_plan = False
        self._since_refresh += 1
        due = self._since_refresh > self._refresh_forwards or not self._sensitivity
        if due:
            self.reader = GradientReader(self._group_size)
            self._since_refresh = 0

    def bits(self, number: int, numel: int, exact_bits: int, least_bits: int) -> int:
        """Bits for the storage `number`, whose use bears `least_bits`."""
        known = self._candidates.get(number)
        least = least_bits if known is None else max(known.least_bits, least_bits)
        self._candidates[number] = Candidate(numel, exact_bits, least)
        planned = self._planned.get(number)
        if planned is None or planned.numel < numel:
            # More than was planned for: what the others were given is needed here.
            self._off_plan = True
        if planned is None or planned.numel != numel or self._off_plan:
            return least
        return max(self._chosen[number], least)

    def end(self, saved: Collection[Saved]) -> None:
        """A forward that saved these tensors ended."""
        kept = stored_bytes(saved)
        total_bytes = sum(kept.values())
        # By number, what the candidates' values took, once each.
        values = {
            one.packed.number: held
            for one in saved
            if isinstance(one.packed, View) and one.packed.number in self._candidates
            if (held := one.packed.values_key()) is not None
        }
        self._count = len(saved)
        self._fixed_bytes = total_bytes - sum(kept[held] for held in values.values())
        if total_bytes <= self._budget_bytes:
            return
        least = self._fixed_bytes + sum(
            candidate.stored_bytes(candidate.least_bits, self._group_size)
            for candidate in self._candidates.values()
        )
        if least > self._budget_bytes:
            raise RuntimeError(
                f"a forward's activations must fit in the budget of {self._budget_bytes} bytes; "
                f"with the fewest bits they take {least}, {self._fixed_bytes} of them exact or "
                "masks; raise the budget, make the batch smaller or checkpoint a part of the model"
            )
        warnings.warn(
            f"a forward saved larger tensors than the one before, for which the budget of "
            f"{self._budget_bytes} bytes was planned, and took {total_bytes}; the next one is "
            "planned for them; begin with the largest shapes, or use fixed bits",
            stacklevel=4,
        )

    def _plan(self) -> None:
        # A row a number: a rank with a smaller batch may have fewer candidates, and plans for all.
        table = [[0, 0, 0] for _ in range(self._count + 1)]
        for number, candidate in self._candidates.items():
            table[number] = list(candidate)
        table[0][0] = self._fixed_bytes
        table = self._maximum(table)
        candidates = {
            number: Candidate(*map(int, row))
            for number, row in enumerate(table)
            if number > 0 and row[0] > 0
        }
        # What was saved beyond the forward that was read is not known to matter.
        weights = [*self._sensitivity, *[0.0] * self._count]
        chosen = allocate(
            list(candidates.values()),
            [weights[number] for number in candidates],
            self._budget_bytes - int(table[0][0]),
            self._group_size,
        )
        self._planned = dict(self._candidates)
        self._chosen = dict(zip(candidates, chosen, strict=True))

    def _maximum(self, rows: list[Any]) -> list[Any]:
        """The elementwise maximum over the ranks of a list of numbers, or of rows of them."""
        if self._agree is None:
            return rows
        size = float(len(rows) - 1)
        low, high = self._agree(torch.tensor([-size, size], dtype=torch.float64)).tolist()
        if -low != high:
            raise RuntimeError(
                "ranks must save as many tensors as each other for a shared budget; received "
                f"{int(-low)} to {int(high)}; give each rank's model the same forward, or use "
                "fixed bits"
            )
        return self._agree(torch.tensor(rows, dtype=torch.float64)).tolist()
