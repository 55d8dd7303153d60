"""Ranks that search together: one answer or one error, and nobody waits for ever."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize("world_size", [2, 4])
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
