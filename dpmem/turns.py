"""Wrappers that one backward reaches launch their buckets in turns.

Chained or side by side they share a process group, on which collectives match by their order alone.
Which bucket is full first differs among ranks where parameters are unused. So a wrapper launches
nothing before those that the backward reached earlier have launched all, which is the same order
everywhere.
"""

import weakref
from typing import Protocol

import torch.distributed as dist


class Launching(Protocol):
    """What takes turns."""

    def launch_full(self) -> bool:
        """Launch what is full. Is everything launched?"""

    def launch_rest(self) -> None:
        """The backward is over: launch everything."""


class Turns:
    """Those of one backward over one process group."""

    def __init__(self) -> None:
        self._order: list[weakref.ref[Launching]] = []
        self._is_over = False

    @classmethod
    def take(cls, group: dist.ProcessGroup, backward: int, member: Launching) -> "Turns":
        """After all that the backward of this number reached before."""
        turns = _running.setdefault((group.group_name, backward), cls())
        turns._order.append(weakref.ref(member))
        return turns

    def launch_full(self) -> None:
        """Launch what is full and may go."""
        for reference in self._order:
            member = reference()
            if member is not None and not member.launch_full():
                return

    def launch_rest(self) -> None:
        """The backward is over, for all: what is told after it follows the last bucket of all."""
        if not self._is_over:
            self._is_over = True
            for reference in self._order:
                member = reference()
                if member is not None:
                    member.launch_rest()


# Members hold them until their backward is over.
_running: "weakref.WeakValueDictionary[tuple[str, int], Turns]" = weakref.WeakValueDictionary()
