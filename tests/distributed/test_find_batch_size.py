"""Ranks that search together: one answer or one error, and nobody waits for ever."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_smallest_budget_counts(ranks: Callable[[int], Any], world_size: int) -> None:
    large, small = 250_000, 150_000
    mixed = ranks(world_size).run("find_batch_size", budgets=[large] * (world_size - 1) + [small])
    alone = ranks(world_size).run("find_batch_size", budgets=[small] * world_size)
    roomy = ranks(world_size).run("find_batch_size", budgets=[large] * world_size)
    assert mixed == [mixed[0]] * world_size
    assert mixed == alone
    assert roomy[0][0] > mixed[0][0] > 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_that_raises_is_named_on_all(ranks: Callable[[int], Any], world_size: int) -> None:
    errors = ranks(world_size).errors(
        "find_batch_size", budgets=[150_000] * world_size, raises_on=1
    )
    assert len({str(error) for error in errors}) == 1
    assert "rank 1 raised KeyError: 'no such token'" in str(errors[0])


def test_a_budget_that_is_wrong_on_one_rank(ranks: Callable[[int], Any]) -> None:
    errors = ranks(2).errors("find_batch_size", budgets=[150_000, -1])
    assert {type(error) for error in errors} == {ValueError}
    assert len({str(error) for error in errors}) == 1
    assert "rank 1: ValueError: a budget must be positive; received -1" in str(errors[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"safety": [0.1, 2.0]}, "rank 1: ValueError: safety must be a fraction"),
        ({"multiple_of": [0, 8]}, "rank 0: ValueError: multiple_of must be at least 1"),
        ({"max_batch": [16, 64]}, "rank 0 received max_batch=16 and rank 1 max_batch=64"),
        ({"safety": [None, 0.5]}, "rank 0 received safety=None and rank 1 safety=0.5"),
    ],
)
def test_options_that_are_wrong_or_others_on_one_rank(
    ranks: Callable[[int], Any], options: dict[str, list[Any]], words: str
) -> None:
    errors = ranks(2).errors("find_with_options", **options)
    assert {type(error) for error in errors} == {ValueError}
    assert len({str(error) for error in errors}) == 1
    assert words in str(errors[0])


def test_the_slowest_rank_counts(ranks: Callable[[int], Any]) -> None:
    results = ranks(2).run("find_with_a_slow_rank")
    assert results[0] == results[1]
    assert results[0].largest_safe == 3
    assert "slow" in {probe.outcome for probe in results[0].probes}


def test_the_worst_outcome_counts(ranks: Callable[[int], Any]) -> None:
    results = ranks(2).run("find_where_an_allocator_retries")
    assert results[0] == results[1]
    assert results[0].largest_fitting == 3
    assert "retry" in {probe.outcome for probe in results[0].probes}


@pytest.mark.slow
def test_a_silent_rank_is_named_on_all(ranks: Callable[[int], Any]) -> None:
    errors = ranks(2).errors("find_with_a_silent_rank")
    assert len({str(error) for error in errors}) == 1
    assert "within timeout_s=1 what it found; rank 1 did not" in str(errors[0])


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_live_wrapper_trains_on_after_a_rank_failed(
    ranks: Callable[[int], Any], where: str
) -> None:
    plain = ranks(2).run("find_on_a_live_wrapper", where=where, search=False)
    searched = ranks(2).run("find_on_a_live_wrapper", where=where, search=True)
    assert [found for found, _ in searched] == [3, 3]
    assert [losses for _, losses in searched] == [losses for _, losses in plain]


@pytest.mark.slow
def test_a_rank_that_runs_out_in_a_child_keeps_nobody_waiting(ranks: Callable[[int], Any]) -> None:
    (one, total), (other, _) = ranks(2).run("find_in_children")
    assert one == other
    assert [(probe.batch, probe.outcome) for probe in one.probes] == [(1, "fits"), (2, "oom")]
    assert one.largest_fitting == 1
    assert total == 2
