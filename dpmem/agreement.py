"""Ranks that say what they found and all hear the same."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

Said = TypeVar("Said")


class Ranks:
    """Every rank of the default process group, over a gloo group of their own with a timeout.

    Of their own: a collective of the training that failed halfway must not be taken for theirs.
    All ranks enter and leave the block.
    """

    def __init__(self, timeout_s: float) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "across_ranks=True needs a process group; received none; "
                "call torch.distributed.init_process_group first"
            )
        self._timeout = timedelta(seconds=timeout_s)
        self._group: Any = None

    def __enter__(self) -> Ranks:
        self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        return self

    def __exit__(self, *exc_info: object) -> None:
        dist.destroy_process_group(self._group)

    def all_say(self, find: Callable[[], Said]) -> list[Said]:
        """What `find` returns on each rank, in order.

        Raises the same error on all ranks where it raises on any: ValueError for a ValueError, else
        RuntimeError, naming the first such rank; RuntimeError where a rank says nothing in time.
        """
        mine: tuple[Said | None, str | None, bool] = (None, None, False)
        cause: Exception | None = None
        try:
            mine = (find(), None, False)
        except Exception as error:  # noqa: BLE001 - the others wait for whatever it is
            mine = (None, f"{type(error).__name__}: {error}", isinstance(error, ValueError))
            cause = error
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, mine, group=self._group)
        for rank, (_, problem, is_value_error) in enumerate(everyone):
            if problem is not None:
                kind = ValueError if is_value_error else RuntimeError
                raise kind(f"rank {rank}: {problem}") from cause
        return [said for said, _, _ in everyone]
