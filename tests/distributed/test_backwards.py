"""Which backward averages which gradients, in every order that training code comes up with."""

from collections.abc import Callable

import pytest

Pool = Callable[[int], "Ranks"]  # noqa: F821 - conftest's, which tests cannot import


@pytest.mark.parametrize(
    "scenario",
    [
        "head_outside",
        "head_outside_after_accumulation",
        "input_gradient_first",
        "gradient_penalty",
        "frozen_for_a_while",
        "frozen_and_slow_on_one_rank",
        "forward_inside_backward",
        "raised_elsewhere",
        "second_call_in_a_reentrant_checkpoint",
        "both_call_in_a_reentrant_checkpoint",
        "first_call_in_a_non_reentrant_checkpoint",
        "second_call_in_a_non_reentrant_checkpoint",
        "both_call_in_a_non_reentrant_checkpoint",
    ],
)
def test_gradients_are_the_mean_over_ranks(ranks: Pool, scenario: str) -> None:
    assert ranks(2).run("averaged", scenario=scenario) == [[], []]


def test_two_accumulations_in_one_backward_are_an_error(ranks: Pool) -> None:
    for error in ranks(2).errors("twice_in_one_backward"):
        assert "arrived twice" in str(error)
        assert "use_reentrant=False" in str(error)


@pytest.mark.parametrize("how", ["checkpoint", "synchronized forward after"])
def test_local_backwards_stay_local(ranks: Pool, how: str) -> None:
    assert ranks(2).run("stays_local", how=how) == [[], []]
