"""What each rank notes in the process group's store, for the others to read."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from itertools import count

from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

from dpmem.failures import StepFailed

# Of groups of one name, which may come after each other.
_numbers: defaultdict[str, "count[int]"] = defaultdict(count)


@dataclass(frozen=True)
class Note:
    """One rank's last: how many averaged backwards it began, and how its step failed, if it did.

    An attempt ends when a step failed, which is then so on all ranks: what is noted under another
    one is over.
    """

    attempt: int
    backwards: int
    # Which members' were the last of them, in their order, until all of these ended well.
    open: list[int]
    # Both as they were when the attempt before ended.
    settled: int
    lost: list[int]
    # How many backwards reached no parameter.
    empty: int = 0
    failed: str | None = None
    out_of_memory: bool = False
    # Its failure is that it waited for others.
    waited: bool = False
    # It waits for others in the backward that it began.
    is_waiting: bool = False


class Notes:
    """The notes of one group's ranks, in a part of the store that is theirs alone.

    Raises RuntimeError, from whatever reads or writes, once the store does not answer.
    """

    def __init__(self, group_name: str) -> None:
        self._group_name = group_name
        self.timeout: timedelta = distributed_c10d._get_default_store().timeout  # type: ignore[attr-defined]

    @cached_property
    def _store(self) -> c10d.Store:
        number = next(_numbers[self._group_name])
        prefix = f"dpmem lockstep {self._group_name} {number}"
        return c10d.PrefixStore(prefix, distributed_c10d._get_default_store())

    def write(self, rank: int, note: Note) -> None:
        """This rank's, in place of its last."""
        self._set(str(rank), json.dumps(asdict(note)))

    def read(self, rank: int) -> Note | None:
        """Another rank's last; None before its first."""
        note = self._get(str(rank))
        return None if note is None else Note(**json.loads(note))

    def write_plan(self, rank: int, member: int, plan: str) -> None:
        """By what plan this rank's member of that number averages from its next backward on."""
        self._set(f"{rank} plan {member}", plan)

    def plan(self, rank: int, member: int) -> str:
        """Another rank's; empty where it said none."""
        return self._get(f"{rank} plan {member}") or ""

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise _store_is_gone() from error

    def _get(self, key: str) -> str | None:
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError as error:
            raise _store_is_gone() from error


def _store_is_gone() -> RuntimeError:
    return StepFailed(
        "the process that hosts the process group's store, rank 0 unless a launcher does, no "
        "longer answers; it has died or cannot be reached, and without it no rank can go on"
    )
