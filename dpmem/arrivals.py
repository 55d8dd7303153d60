"""Which gradients a backward brings, and what ranks tell each other about that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Wait = Callable[["dist.Work | torch.futures.Future[Tensor]"], Any]


@dataclass
class _Told:
    """What is on its way to all ranks: who received a gradient, and the order. None: no need."""

    used: Tensor | None = None
    order: Tensor | None = None
    works: "list[dist.Work]" = field(default_factory=list)


class Arrivals:
    """Counts the gradients of `trained` parameters, in one averaged backward after the other.

    names         of all parameters
    trained       indices of those that require a gradient
    find_unused, static_graph
                  as `ReducerOptions` has them
    """

    def __init__(
        self,
        names: Sequence[str],
        trained: Sequence[int],
        *,
        find_unused: bool,
        static_graph: bool,
    ) -> None:
        self._names = names
        self._trained = trained
        self._place = {index: place for place, index in enumerate(trained)}
        self._static_graph = static_graph
        self.may_be_unused = find_unused or static_graph
        self._times = dict.fromkeys(trained, 0)
        # How often a gradient is accumulated in one backward, as a static graph has it.
        self._expected: dict[int, int] | None = None
        # Of a static graph: which parameters receive a gradient on some rank.
        self._used_somewhere: frozenset[int] | None = None
        # The order in which the first backward brings gradients; None once the ranks agreed on one,
        # which holds from the next averaged backward on.
        self._seen: list[int] | None = []
        self._agreed: list[int] | None = None
        # Of the backward that ends.
        self._told: _Told | None = None

    def __contains__(self, index: int) -> bool:
        return index in self._times

    def begin(self) -> None:
        """Another backward: nothing has come."""
        self._times = dict.fromkeys(self._trained, 0)

    def has_come(self, index: int) -> bool:
        """Count a gradient. Is it complete, so that it may travel?

        A static graph's first backward shows how often each is accumulated: until its end none is.

        Raises RuntimeError where it was complete already.
        """
        self._times[index] += 1
        times = self._times[index]
        if self._static_graph and self._expected is None:
            if times == 1:
                self._see(index)
            return False
        last = 1 if self._expected is None else max(1, self._expected[index])
        if times > last:
            raise RuntimeError(
                "each parameter's gradient must be accumulated once in a backward; that of "
                f"{self._names[index]!r} arrived twice, as it does when a module runs in two "
                "reentrant checkpoints, or in one and outside it; use "
                "checkpoint(..., use_reentrant=False), or static_graph=True where every backward "
                "does the same"
            )
        if times == last:
            self._see(index)
        return times == last

    def _see(self, index: int) -> None:
        if self._seen is not None:
            self._seen.append(index)

    def none(self) -> bool:
        """Has no gradient come?"""
        return not any(self._times.values())

    def outstanding(self) -> list[int]:
        """Those that have not come."""
        return [index for index, times in self._times.items() if times == 0]

    def complaint(self, missing: Sequence[int]) -> str | None:
        """At the end of a backward that left `missing` without a gradient: what is wrong with it.

        The first backward of a static graph is what all others are held against.
        """
        if self._static_graph:
            if self._expected is None:
                self._expected = dict(self._times)
            changed = [i for i, times in self._times.items() if times != self._expected[i]]
            if not changed:
                return None
            return (
                "with static_graph=True every backward must bring the same gradients, equally "
                f"often; others than in the first one came for {self._list(changed)}; leave "
                "static_graph out"
            )
        if missing and not self.may_be_unused:
            return (
                "every parameter that requires a gradient must receive one in each synchronized "
                f"backward; {len(missing)} did not receive grad: {self._list(missing)}; freeze "
                "them, use them in the loss, or pass find_unused_parameters=True"
            )
        return None

    def _list(self, indices: Sequence[int]) -> str:
        """Names, with their numbers among the parameters that require a gradient."""
        shown = ", ".join(f"{self._names[i]!r} (number {self._place[i]})" for i in indices[:32])
        return shown + (f" and {len(indices) - 32} more" if len(indices) > 32 else "")

    def agree(
        self,
        missing: list[int],
        group: dist.ProcessGroup,
        device: torch.device,
        wait: Wait,
        *,
        is_lost: bool = False,
    ) -> list[int]:
        """Which of `missing` received a gradient on another rank, or may have. Collectives.

        Where waiting for them raises, others may yet take part: the next call, with `is_lost`,
        waits for the same again, and learns nothing of a step in which not all ranks told theirs.
        """
        told = self._told = self._told or self._tell(missing, group, device)
        for work in told.works:
            wait(work)
        self._told = None
        if told.order is not None:
            # Rank 0 need not read what it said: in a forecast it says it without data.
            is_first = dist.get_rank(group) == 0
            self._agreed = self._order() if is_first else told.order.tolist()
            self._seen = None
        if not self.may_be_unused:
            return missing
        if told.used is not None and self._static_graph and not is_lost:
            self._used_somewhere = self._those(told.used)
        if not missing:
            # To read the answer is to wait for the device.
            return []
        somewhere = self._used_somewhere
        if somewhere is None:
            assert told.used is not None
            somewhere = self._those(told.used)
        return [index for index in missing if index in somewhere]

    def _tell(
        self, missing: Sequence[int], group: dist.ProcessGroup, device: torch.device
    ) -> "_Told":
        told = _Told()
        if self.may_be_unused and self._used_somewhere is None:
            with torch.profiler.record_function("search_unused_parameters"):
                absent = frozenset(missing)
                used = [i not in absent for i in self._trained]
                told.used = torch.tensor(used, dtype=torch.int32, device=device)
                work = dist.all_reduce(told.used, dist.ReduceOp.MAX, group=group, async_op=True)
                told.works.append(work)
        if self._seen is not None:
            told.order = torch.tensor(self._order(), device=device)
            first = dist.get_global_rank(group, 0)
            told.works.append(dist.broadcast(told.order, first, group=group, async_op=True))
        return told

    def _those(self, used: Tensor) -> frozenset[int]:
        flags = zip(self._trained, used.tolist(), strict=True)
        return frozenset(index for index, flag in flags if flag)

    def _order(self) -> list[int]:
        """In which gradients came here, and behind them those that did not, the last first."""
        assert self._seen is not None
        seen = frozenset(self._seen)
        rest = [index for index in reversed(self._trained) if index not in seen]
        return [self._place[index] for index in [*self._seen, *rest]]

    def take_order(self) -> list[int] | None:
        """The order that was agreed on since this was asked, counted among `trained`; None: none.

        Example: where parameters 2, 5 and 7 are trained and rank 0 saw 7, 2, 5: [2, 0, 1].
        """
        order, self._agreed = self._agreed, None
        return order
