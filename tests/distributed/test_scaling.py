"""Loss scaling on real ranks, with DistributedDataParallel under GradScaler as the oracle."""

from collections.abc import Callable

import pytest

Pool = Callable[[int], "Ranks"]  # noqa: F821 - conftest's, which tests cannot import


@pytest.mark.parametrize("overflow_on", [0, 1])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_accumulated_training_matches_ddp_under_grad_scaler(
    ranks: Pool, max_norm: float | None, fused: bool, overflow_on: int
) -> None:
    results = ranks(2).run(
        "scaled_training", max_norm=max_norm, fused=fused, overflow_on=overflow_on
    )
    for worst, skipped, ratio, same_bits in results:
        assert same_bits
        assert skipped == 1
        assert ratio == 1.0
        # Powers of two and sums of two round nothing differently; a clip coefficient does, and
        # three AdamW steps of 1e-2 an element carry it on.
        assert worst == 0.0 if max_norm is None else worst < 3 * 1e-2 * 256 * 2**-24


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_an_optimizer_that_steps_another(ranks: Pool, max_norm: float | None) -> None:
    assert ranks(2).run("sharded_optimizer", max_norm=max_norm) == [([], 1)] * 2


@pytest.mark.parametrize("damaged", [False, True])
def test_ranks_load_one_scaler_state(ranks: Pool, damaged: bool) -> None:
    for error in ranks(2).errors("different_scaler_states", damaged=damaged):
        assert isinstance(error, RuntimeError)
        assert "all ranks must have the same loss scaler's state" in str(error)
        assert ("received nan" if damaged else "8.0") in str(error)
