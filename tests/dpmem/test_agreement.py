"""Ranks that agree through a store: here threads of one process, each with its own end of it."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

from dpmem import agreement
from dpmem.agreement import Ranks

TIMEOUT_S = 20.0


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Ranks]]:
    """Two ranks over one store, each of which gives up after its own time."""

    def made(store: Any = None, timeouts_s: tuple[float, ...] = (TIMEOUT_S,) * 2) -> list[Ranks]:
        store = store or c10d.HashStore()
        ranks = []
        for rank, timeout_s in enumerate(timeouts_s):
            with monkeypatch.context() as patch:
                patch.setattr(agreement, "_numbers", count())
                patch.setattr(dist, "is_initialized", lambda: True)
                patch.setattr(dist, "get_rank", lambda rank=rank: rank)
                patch.setattr(dist, "get_world_size", lambda: 2)
                patch.setattr(distributed_c10d, "_get_default_store", lambda: store)
                ranks.append(Ranks(timeout_s))
        monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo")
        return ranks

    return made


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each returns or raises, in threads side by side."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BaseException as error:  # noqa: BLE001 - what is asked for
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(outcome, calls))


def after(seconds: float, answer: Any) -> Any:
    time.sleep(seconds)
    return answer


def test_who_is_late_hears_that_the_others_gave_up(make: Callable[..., list[Ranks]]) -> None:
    first, late = make(timeouts_s=(0.1, TIMEOUT_S))
    heard = together(
        lambda: first.all_say(lambda: 0),
        lambda: late.all_say(lambda: after(0.6, 1)),
    )
    assert [type(error) for error in heard] == [RuntimeError] * 2
    assert str(heard[0]) == str(heard[1])
    assert "rank 1 did not" in str(heard[0])


def test_who_waits_for_a_rank_that_raises_is_told(make: Callable[..., list[Ranks]]) -> None:
    """As with children of the ranks, whose steps wait for one another."""
    one, other = make()

    def waits() -> bool:
        deadline = time.monotonic() + 5
        while not one.is_decided() and time.monotonic() < deadline:
            time.sleep(0.01)
        told.append(one.is_decided())
        return True

    def raises() -> bool:
        raise ValueError("not this")

    told: list[bool] = []
    heard = together(lambda: one.all_say(waits), lambda: other.all_say(raises))
    assert told == [True]
    assert [(type(error), str(error)) for error in heard] == [
        (ValueError, "rank 1: ValueError: not this")
    ] * 2


def test_an_answer_that_does_not_pickle(make: Callable[..., list[Ranks]]) -> None:
    one, other = make(timeouts_s=(2.0, 2.0))
    heard = together(lambda: one.all_say(lambda: 0), lambda: other.all_say(lambda: lambda: None))
    assert [type(error) for error in heard] == [RuntimeError] * 2
    assert str(heard[0]) == str(heard[1])
    assert "rank 1: " in str(heard[0])
    assert "pickle" in str(heard[0])


def test_who_is_stopped_while_it_waits_says_so(
    make: Callable[..., list[Ranks]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = make(timeouts_s=(2.0, 2.0))
    with monkeypatch.context() as patch:

        def stop(seconds: float) -> None:
            raise KeyboardInterrupt

        patch.setattr(agreement.time, "sleep", stop)
        with pytest.raises(KeyboardInterrupt):
            one.all_say(lambda: 0)
    assert other.all_say(lambda: 1) == [0, 1]
    with pytest.raises(RuntimeError, match="rank 0 was stopped by KeyboardInterrupt"):
        other.all_say(lambda: 1)


def test_children_of_runs_that_share_a_store_do_not_meet(
    make: Callable[..., list[Ranks]],
) -> None:
    """Their prefixes alone differ, as of attempts after one another."""
    agent = c10d.TCPStore("127.0.0.1", 0, is_master=True)
    prefixes = [
        {ranks.rendezvous().prefix for ranks in make(c10d.PrefixStore(f"attempt {n}", agent))}
        for n in range(2)
    ]
    assert [len(of_one) for of_one in prefixes] == [1, 1]
    assert prefixes[0] != prefixes[1]
