"""fully_shard's memory forecast, held to what the meter sees of it on two ranks."""

from collections.abc import Callable

import pytest
from sharding_jobs import JOBS

from dpmem.forecast import _among
from dpmem_profiling.trace import Trace, trace

Pool = Callable[[int], "Ranks"]  # noqa: F821 - conftest's, which tests cannot import
# Beside the tensors that are forecast, each mesh holds its ranks: on the host, here too.
MESHES_BYTES = 64


def last_step_peak_bytes(traced: Trace) -> int:
    live = peak = 0
    for event, change in enumerate(traced.changes):
        live += change.delta_bytes
        if event >= traced.step_starts[-1]:
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("job", JOBS)
def test_a_sharded_step_takes_what_was_forecast(ranks: Pool, job: str) -> None:
    measured_bytes = ranks(2).run("measured_peak_bytes", job=job)[0]
    traced = trace(JOBS[job](), 16, None, around=_among(2))
    assert 0 <= measured_bytes - last_step_peak_bytes(traced) <= MESHES_BYTES


def test_no_wrapped_job_is_forecast_beside_ranks_that_wait(ranks: Pool) -> None:
    said, _ = ranks(2).run("forecast_beside_others")
    assert said.startswith("a forecast of a wrapped job must not speak to other ranks")
