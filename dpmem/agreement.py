"""Ranks that say what they found and all hear the same.

They speak through the process group's store, not by collectives: a collective of the training that
failed halfway cannot be taken for theirs, the store knows who is silent, and a rank that waits for
the others can be told to stop.
"""

from __future__ import annotations

import pickle
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

Said = TypeVar("Said")

# How often a rank looks, at first and in the end: the store serves all of them.
_POLL_S, _POLL_AT_MOST_S = 0.02, 0.5
# Said instead of an answer, once, by the first rank that could not go on.
_OVER = "over"
# How a round ends where all ranks spoke in time.
_ALL_SAID = "all said"

# Errors that are the same on all ranks; all others are a RuntimeError there.
_KINDS: tuple[type[Exception], ...] = (ValueError, TypeError)

_numbers = count()


class Rendezvous(NamedTuple):
    """How a process that this rank starts joins those of the others: in a group like this one."""

    rank: int
    world_size: int
    backend: str
    # A TCPStore's host and port, or a FileStore's path.
    address: tuple[str, int] | str
    prefix: str
    timeout_s: float


class Ranks:
    """Every rank of the default process group. All ranks make these in the same order.

    timeout_s  how long a rank waits for what the others say
    """

    def __init__(self, timeout_s: float) -> None:
        if not dist.is_initialized():
            raise ValueError(
                "across_ranks=True needs a process group; received none; "
                "call torch.distributed.init_process_group first"
            )
        self._timeout_s = timeout_s
        self._name = f"dpmem agreement {next(_numbers)}"
        self._default_store = distributed_c10d._get_default_store()
        self._store = c10d.PrefixStore(self._name, self._default_store)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._round = 0

    def all_say(
        self, find: Callable[[], Said], failed: Callable[[Said], str | None] = lambda said: None
    ) -> list[Said]:
        """What `find` returns on each rank, in order.

        failed  what is wrong with what `find` returned, None where nothing is: `first_failed` says
                afterwards on which rank it was so first, and `is_decided` meanwhile that it is

        Raises the same error on all ranks where it raises on any: ValueError or TypeError for one
        of these, else RuntimeError, naming the first such rank; RuntimeError where a rank says
        nothing in time. What is no Exception, as Ctrl-C, goes on, and the others hear of it.
        """
        self._round += 1
        try:
            cause = self._say(find, failed)
            everyone = self._hear()
        except Exception:
            raise
        except BaseException as error:
            self._end(f"rank {self._rank} was stopped by {type(error).__name__}")
            raise
        if self._round > 1:
            # Whoever has spoken in this round has heard all of the one before.
            for what in (self._rank, "failed", "end"):
                self._store.delete_key(f"{self._round - 1}/{what}")
        for rank, (_, problem, kind) in enumerate(everyone):
            if problem is not None:
                raise kind(f"rank {rank}: {problem}") from cause
        return [said for said, _, _ in everyone]

    def note(self, failure: str | None) -> None:
        """Tell the others of a failure before this rank is done with it; of the first on any."""
        if failure is not None:
            words = f"{self._rank} {failure}"
            self._store.compare_set(self._key("failed"), "", words)

    def is_decided(self) -> bool:
        """Has any rank failed in this round, or gone?"""
        return any(self._store.check([key]) for key in (self._key("failed"), _OVER))

    def first_failed(self) -> int | None:
        """The rank that failed first in the round that ended; None where none did."""
        words = self._failure()
        return None if words is None else int(words.split(" ")[0])

    def rendezvous(self) -> Rendezvous:
        """Where processes that the ranks start meet in this round.

        Raises TypeError where the store cannot be reached from another process.
        """
        store: Any = self._default_store
        while isinstance(store, c10d.PrefixStore):
            store = store.underlying_store
        if isinstance(store, c10d.TCPStore):
            address: tuple[str, int] | str = (store.host, store.port)
        elif isinstance(store, c10d.FileStore):
            address = store.path  # type: ignore[attr-defined]
        else:
            raise TypeError(
                "isolate=True across ranks needs a process group whose store other processes can "
                f"reach; received a {type(store).__name__}; init_process_group with "
                "init_method='env://', 'tcp://' or 'file://'"
            )
        backend = str(dist.get_backend_config())
        # A store's prefix, which may be all that tells two runs apart, cannot be asked for.
        token = self._store.compare_set("token", "", secrets.token_hex(8)).decode()
        prefix = f"{self._name} children {token} {self._round}"
        return Rendezvous(self._rank, self._world_size, backend, address, prefix, self._timeout_s)

    def _say(
        self, find: Callable[[], Said], failed: Callable[[Said], str | None]
    ) -> Exception | None:
        """Tell the others what `find` returns, or what it raised, which is returned."""
        cause: Exception | None = None
        try:
            said = find()
            mine = pickle.dumps((said, None, RuntimeError))
            self.note(failed(said))
        except Exception as error:  # noqa: BLE001 - the others wait for whatever it is
            kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
            problem = f"{type(error).__name__}: {error}"
            mine = pickle.dumps((None, problem, kind))
            self.note(f"raised {problem}")
            cause = error
        self._store.set(self._key(self._rank), mine)  # type: ignore[arg-type]
        return cause

    def _hear(self) -> list[Any]:
        # One is late where others have given up: whoever is first decides for all how it ended.
        end = self._store.compare_set(self._key("end"), "", self._wait()).decode()
        if end != _ALL_SAID:
            self._end(end)
            raise RuntimeError(end)
        keys = [self._key(rank) for rank in range(self._world_size)]
        return [pickle.loads(self._store.get(key)) for key in keys]

    def _wait(self) -> str:
        """Until every rank has spoken, or will not: how the round ends, as far as is seen here."""
        silent = [self._key(rank) for rank in range(self._world_size)]
        deadline, pause_s = time.monotonic() + self._timeout_s, _POLL_S
        while True:
            while self._store.check(silent[:1]):
                del silent[0]
                if not silent:
                    return _ALL_SAID
            if self._store.check([_OVER]):
                return self._store.get(_OVER).decode()
            if time.monotonic() > deadline:
                return self._silence()
            time.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _POLL_AT_MOST_S)

    def _silence(self) -> str:
        ranks = range(self._world_size)
        silent = [rank for rank in ranks if not self._store.check([self._key(rank)])]
        who = ("rank " if len(silent) == 1 else "ranks ") + ", ".join(map(str, silent))
        words = f"every rank must say within timeout_s={self._timeout_s:g} what it found; {who} did"
        failure = self._failure()
        if failure is None:
            return f"{words} not; see whether it is alive, or pass a larger timeout_s"
        return (
            f"{words} not, after rank {failure}; where a step waits for one that failed, pass "
            "isolate=True: then each batch is tried in processes that can be ended"
        )

    def _failure(self) -> str | None:
        key = self._key("failed")
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _end(self, words: str) -> None:
        self._store.compare_set(_OVER, "", words)

    def _key(self, what: int | str) -> str:
        return f"{self._round}/{what}"


def join(rendezvous: Rendezvous, device: torch.device) -> None:
    """Make this process one of a default group, with those that the other ranks start."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    address = rendezvous.address
    store: c10d.Store = (
        c10d.FileStore(address, -1)
        if isinstance(address, str)
        else c10d.TCPStore(*address, is_master=False)
    )
    dist.init_process_group(
        rendezvous.backend,
        store=c10d.PrefixStore(rendezvous.prefix, store),
        rank=rendezvous.rank,
        world_size=rendezvous.world_size,
        timeout=timedelta(seconds=rendezvous.timeout_s),
    )
