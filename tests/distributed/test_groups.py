"""Several groups, several wrappers, wrappers of one rank."""

from collections.abc import Callable

import pytest

Pool = Callable[[int], "Ranks"]  # noqa: F821 - conftest's, which tests cannot import


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_rank_may_copy_its_wrapper(ranks: Pool, precision: str) -> None:
    assert ranks(2).run("copied_on_one_rank", precision=precision) == [[], []]


def test_ranks_are_called_by_their_numbers_in_the_default_group(ranks: Pool) -> None:
    for rank, error in enumerate(ranks(4).errors("different_models_in_a_group")):
        first = rank // 2 * 2
        assert f"rank {first} and rank {first + 1} differ" in str(error)


@pytest.mark.parametrize("how", ["chained", "side by side"])
def test_several_wrappers_in_one_backward(ranks: Pool, how: str) -> None:
    """Unused parameters on one rank must not make buckets of one meet buckets of the other."""
    assert ranks(2).run("several_wrappers", how=how) == [[], []]


def test_a_backward_inside_one_that_has_not_launched_all_is_refused(ranks: Pool) -> None:
    """A reentrant checkpoint's: where it ends, the other's unused parameters are not known yet."""
    first, second = ranks(2).errors("several_wrappers", how="nested")
    assert "use_reentrant=False" in str(first)
    assert "rank 0 failed in this step: a backward inside another raised" in str(second)


def test_a_group_of_other_ranks_is_refused(ranks: Pool) -> None:
    for error in ranks(2).errors("group_of_others"):
        assert "received a group that this rank is not in" in str(error)
