"""Wrappers that one backward reaches launch their buckets in turns.

Chained or side by side they share a process group, on which collectives match by their order alone.
Which bucket is full first differs among ranks where parameters are unused. So a wrapper launches
nothing before those that the backward reached earlier have launched all, which is the same order
everywhere. A backward inside another, as a reentrant checkpoint's, ends before the outer one can
say what is unused: there a wrapper begins only where those of the outer one have launched all.
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
        """After all that the backward of this number reached before.

        Raises RuntimeError inside another backward whose members have not launched all.
        """
        for (group_name, other), outer in list(_running.items()):
            if group_name == group.group_name and other != backward and not outer.launch_full():
                raise RuntimeError(
                    "a backward inside another, over the same process group, must begin after all "
                    "gradients of the outer one's wrapper have arrived, or averages match others "
                    "on other ranks; received one before that, as of a reentrant checkpoint around "
                    "a wrapper; use checkpoint(..., use_reentrant=False), or a group for each"
                )
        turns = _running.setdefault((group.group_name, backward), cls())
        turns._order.append(weakref.ref(member))
        return turns

    def launch_full(self) -> bool:
        """Launch what is full and may go. Is everything launched?"""
        for reference in self._order:
            member = reference()
            if member is not None and not member.launch_full():
                return False
        return True

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
