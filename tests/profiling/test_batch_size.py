"""search() against exhaustive search on synthetic peak curves."""

import json
import math
import random
from collections.abc import Callable

import pytest

from dpmem_profiling.batch_size import search
from dpmem_profiling.record import BatchSizeResult, Probe

MAX_BATCH = 3000
LIMIT_BYTES = 1_000_000
MARGIN_BYTES = 50_000


def line(batch: int) -> int:
    return 20_000 + 3_217 * batch


def optimizer_peak(batch: int) -> int:
    return max(400_000, 30_000 + 3_217 * batch)


def steps(batch: int) -> int:
    return 20_000 + 30_000 * -(-batch // 16)


def wide_steps(batch: int) -> int:
    return 20_000 + 300_000 * (batch // 500)


def kink(batch: int) -> int:
    return 10_000 + 100 * batch + 9_000 * max(0, batch - 60)


def concave(batch: int) -> int:
    return int(50_000 * batch**0.5)


def convex(batch: int) -> int:
    return 10_000 + 3 * batch**2


def exhaustive(peak: Callable[[int], int], budget_bytes: int) -> int | None:
    return max((n for n in range(1, MAX_BATCH + 1) if peak(n) <= budget_bytes), default=None)


def is_within_a_percent(answer: int | None, exact: int | None) -> bool:
    """Never above the exact one, and at most a percent below."""
    assert answer is not None
    assert exact is not None
    return exact - exact // 100 <= answer <= exact


def prober(peak: Callable[[int], int], oom_bytes: int | None = None) -> Callable[[int], Probe]:
    def probe(batch: int) -> Probe:
        if oom_bytes is not None and peak(batch) > oom_bytes:
            return Probe(batch, "oom")
        return Probe(batch, "fits", allocated_bytes=peak(batch))

    return probe


CURVES = [line, optimizer_peak, steps, wide_steps, kink, concave, convex]


def by_phase(batch: int) -> dict[str, int]:
    """The optimizer's step is flat and highest where batches are small."""
    return {"forward": 30_000 + 3_000 * batch, "backward": 9_000 + 3_217 * batch, "step": 400_000}


@pytest.mark.parametrize("limit_bytes", [450_000, 1_000_000, 8_000_000])
def test_phases_tell_the_line_that_small_batches_hide(limit_bytes: int) -> None:
    def probe(batch: int) -> Probe:
        phases = by_phase(batch)
        return Probe(batch, "fits", allocated_bytes=max(phases.values()), peak_by_phase=phases)

    def peak(batch: int) -> int:
        return max(by_phase(batch).values())

    result = search(probe, limit_bytes=limit_bytes, margin_bytes=limit_bytes // 50)
    assert result.largest_fitting == exhaustive(peak, limit_bytes)
    assert result.largest_safe == exhaustive(peak, limit_bytes - limit_bytes // 50)
    assert len(result.probes) <= 4
    blind = search(prober(peak), limit_bytes=limit_bytes, margin_bytes=limit_bytes // 50)
    assert blind.largest_safe == result.largest_safe
    assert len(blind.probes) > len(result.probes)


@pytest.mark.parametrize("limit_bytes", [700 << 10, 1 << 20, 4 << 20, 64 << 20])
def test_a_slope_that_grows_within_a_phase_costs_few_failures(limit_bytes: int) -> None:
    """A small perceptron's backward, as measured: weights' gradients, then activations, lead."""

    def phases(batch: int) -> dict[str, int]:
        backward = max(529_400 + 1_280 * batch, 462_900 + 3_328 * batch)
        return {"backward": backward, "step": 661_500 + 256 * batch}

    def probe(batch: int) -> Probe:
        peak_bytes = max(phases(batch).values())
        if peak_bytes > limit_bytes:
            return Probe(batch, "oom", allocated_bytes=limit_bytes + 1)
        return Probe(batch, "fits", allocated_bytes=peak_bytes, peak_by_phase=phases(batch))

    result = search(probe, limit_bytes=limit_bytes, margin_bytes=0)
    exact = (limit_bytes - 462_900) // 3_328
    assert is_within_a_percent(result.largest_fitting, exact)
    # As many as a slope of 2.6 times what small batches show takes to be halved away.
    assert [done.outcome for done in result.probes].count("oom") <= 3
    assert len(result.probes) <= 8


@pytest.mark.parametrize("oom_bytes", [None, LIMIT_BYTES], ids=["measured", "oom above the limit"])
@pytest.mark.parametrize("peak", CURVES)
def test_agrees_with_exhaustive_search(peak: Callable[[int], int], oom_bytes: int | None) -> None:
    result = search(
        prober(peak, oom_bytes),
        limit_bytes=LIMIT_BYTES,
        margin_bytes=MARGIN_BYTES,
        max_batch=MAX_BATCH,
    )
    assert is_within_a_percent(result.largest_fitting, exhaustive(peak, LIMIT_BYTES))
    assert is_within_a_percent(result.largest_safe, exhaustive(peak, LIMIT_BYTES - MARGIN_BYTES))
    assert result.peak_bytes == peak(result.largest_safe)
    # Bisection alone would need 2 * log2(3000) = 24.
    assert len(result.probes) <= 17


@pytest.mark.parametrize("margin_bytes", [0, MARGIN_BYTES])
@pytest.mark.parametrize("seed", range(20))
def test_a_straight_line_takes_four_probes(seed: int, margin_bytes: int) -> None:
    rng = random.Random(seed)
    base_bytes, sample_bytes = rng.randrange(1, 500_000), rng.randrange(300, 40_000)
    result = search(
        prober(lambda batch: base_bytes + sample_bytes * batch),
        limit_bytes=LIMIT_BYTES,
        margin_bytes=margin_bytes,
    )
    assert result.largest_fitting == (LIMIT_BYTES - base_bytes) // sample_bytes
    assert result.largest_safe == (LIMIT_BYTES - margin_bytes - base_bytes) // sample_bytes
    assert len(result.probes) <= (4 if margin_bytes else 3)


@pytest.mark.parametrize("seed", range(50))
def test_noise_never_yields_a_batch_that_was_not_seen_to_fit(seed: int) -> None:
    rng = random.Random(seed)
    noise_bytes = [rng.randrange(20_000) for _ in range(MAX_BATCH + 1)]
    result = search(
        prober(lambda batch: line(batch) + noise_bytes[batch]),
        limit_bytes=LIMIT_BYTES,
        margin_bytes=MARGIN_BYTES,
        max_batch=MAX_BATCH,
    )
    peaks = dict(result.curve)
    assert peaks[result.largest_safe] <= LIMIT_BYTES - MARGIN_BYTES
    assert peaks[result.largest_fitting] <= LIMIT_BYTES
    # The noise adds between 0 and 20,000 bytes to the line, so a batch that is better by more than
    # that would have fitted, and one that needs less cannot have failed.
    assert line(result.largest_safe + 1) + 20_000 > LIMIT_BYTES - MARGIN_BYTES
    assert len(result.probes) <= 24


def test_a_staircase_is_probed_and_not_inferred() -> None:
    """What an allocator reserves: beyond a batch that fits exactly, many more may cost nothing."""

    def probe(batch: int) -> Probe:
        reserved_bytes = 20_000 * -(-line(batch) // 20_000)
        return Probe(batch, "fits", allocated_bytes=line(batch), reserved_bytes=reserved_bytes)

    result = search(probe, limit_bytes=LIMIT_BYTES, margin_bytes=MARGIN_BYTES)
    exact = exhaustive(line, LIMIT_BYTES)
    assert is_within_a_percent(result.largest_fitting, exact)
    failed = min(done.batch for done in result.probes if done.reserved_bytes > LIMIT_BYTES)
    assert failed - result.largest_fitting <= 1 + result.largest_fitting // 100


def reserved(batch: int) -> int:
    return 20_000 * -(-line(batch) // 20_000)


def of_an_allocator(batch: int) -> Probe:
    if reserved(batch) > LIMIT_BYTES:
        return Probe(batch, "oom")
    return Probe(batch, "fits", allocated_bytes=line(batch), reserved_bytes=reserved(batch))


@pytest.mark.parametrize("margin_bytes", [0, MARGIN_BYTES])
def test_with_a_right_forecast_three_probes_and_none_that_fails(margin_bytes: int) -> None:
    result = search(
        of_an_allocator, limit_bytes=LIMIT_BYTES, margin_bytes=margin_bytes, forecast=reserved
    )
    assert result.largest_fitting == exhaustive(reserved, LIMIT_BYTES)
    assert result.largest_safe == exhaustive(reserved, LIMIT_BYTES - margin_bytes)
    assert len(result.probes) <= (4 if margin_bytes else 3)
    assert {done.outcome for done in result.probes} == {"fits"}
    assert "by the forecast" in result.limited_by
    without = search(of_an_allocator, limit_bytes=LIMIT_BYTES, margin_bytes=margin_bytes)
    assert len(without.probes) > len(result.probes)


@pytest.mark.parametrize("seed", range(60))
def test_a_wrong_forecast_costs_probes_and_not_the_answer(seed: int) -> None:
    rng = random.Random(seed)
    scale, more_bytes = rng.uniform(0.5, 2.0), rng.randrange(200_000)
    noise_bytes = [rng.randrange(1 + 30_000 * (seed % 2)) for _ in range(MAX_BATCH + 2)]

    def forecast(batch: int) -> float:
        return scale * line(batch) + more_bytes + noise_bytes[batch]

    result = search(
        of_an_allocator,
        limit_bytes=LIMIT_BYTES,
        margin_bytes=MARGIN_BYTES,
        max_batch=MAX_BATCH,
        forecast=forecast,
    )
    assert is_within_a_percent(result.largest_fitting, exhaustive(reserved, LIMIT_BYTES))
    exact = exhaustive(reserved, LIMIT_BYTES - MARGIN_BYTES)
    assert is_within_a_percent(result.largest_safe, exact)
    assert len(result.probes) <= 11


@pytest.mark.parametrize("stair_bytes", [60_000, 100_000, 150_000, 250_000])
@pytest.mark.parametrize("error", [-0.03, -0.01, 0.005, 0.01, 0.02, 0.03])
def test_a_wrong_forecast_that_long_stairs_hide_is_not_trusted(
    error: float, stair_bytes: int
) -> None:
    """Right about every batch that was tried, and yet its last stair ends too early or late."""

    def stairs(bytes_: float) -> int:
        return stair_bytes * -(-int(bytes_) // stair_bytes)

    for limit_bytes in range(900_000, 1_100_001, 20_000):

        def probe(batch: int, limit_bytes: int = limit_bytes) -> Probe:
            peak_bytes = stairs(line(batch))
            if peak_bytes > limit_bytes:
                return Probe(batch, "oom")
            return Probe(batch, "fits", allocated_bytes=line(batch), reserved_bytes=peak_bytes)

        result = search(
            probe,
            limit_bytes=limit_bytes,
            margin_bytes=0,
            forecast=lambda batch: stairs(20_000 + (1 + error) * 3_217 * batch),
        )
        exact = exhaustive(lambda batch: stairs(line(batch)), limit_bytes)
        assert is_within_a_percent(result.largest_fitting, exact)


def test_a_forecast_is_followed_with_care_until_two_probes_have_corrected_it() -> None:
    def forecast(batch: int) -> float:
        return reserved(batch) - 500 * batch

    result = search(
        of_an_allocator, limit_bytes=LIMIT_BYTES, margin_bytes=MARGIN_BYTES, forecast=forecast
    )
    # By one probe alone 292 would be within the margin: it takes 960,000 of 950,000 bytes.
    assert [done.batch for done in result.probes][:3] == [83, 262, 285]
    assert (result.probes[2].peak_bytes or 0) <= LIMIT_BYTES - MARGIN_BYTES


@pytest.mark.parametrize(
    "forecast",
    [lambda batch: 5.0, lambda batch: math.inf, lambda batch: 1e-3 * batch],
    ids=["flat", "impossible", "far too low"],
)
def test_a_forecast_of_no_use_changes_nothing(forecast: Callable[[int], float]) -> None:
    def find(forecast: Callable[[int], float] | None) -> BatchSizeResult:
        return search(
            of_an_allocator,
            limit_bytes=LIMIT_BYTES,
            margin_bytes=MARGIN_BYTES,
            max_batch=MAX_BATCH,
            forecast=forecast,
        )

    # What it proposes is the end of all batches, or one sample.
    assert find(forecast).probes[0].batch == 1
    assert find(forecast).largest_safe == find(None).largest_safe


def test_a_forecast_ends_where_the_data_does() -> None:
    def probe(batch: int) -> Probe:
        return of_an_allocator(batch) if batch <= 100 else Probe(batch, "error", error="no more")

    def forecast(batch: int) -> float:
        return reserved(batch) if batch <= 100 else math.inf

    result = search(probe, limit_bytes=LIMIT_BYTES, margin_bytes=0, forecast=forecast)
    assert result.largest_fitting == 100
    assert "no more" in result.limited_by


def test_a_small_batch_that_fails_ends_the_forecasts_say() -> None:
    def probe(batch: int) -> Probe:
        return Probe(batch, "error", error="too many") if batch > 9 else of_an_allocator(batch)

    result = search(probe, limit_bytes=LIMIT_BYTES, margin_bytes=0, forecast=reserved)
    assert result.largest_fitting == 9
    assert [done.batch for done in result.probes][:2] == [76, 1]


def test_a_constant_peak_stops_at_max_batch() -> None:
    result = search(
        prober(lambda batch: 500), limit_bytes=1000, margin_bytes=10, max_batch=MAX_BATCH
    )
    assert (result.largest_safe, result.largest_fitting) == (MAX_BATCH, MAX_BATCH)
    assert result.limited_by == "max_batch=3000; the peak does not grow with the batch"


def test_less_than_a_percent_below_max_batch_no_more_is_tried() -> None:
    result = search(
        prober(lambda batch: 100 + 10 * batch), limit_bytes=10_060, margin_bytes=0, max_batch=1000
    )
    assert result.largest_safe == 996
    assert all(probe.outcome == "fits" for probe in result.probes)
    assert result.limited_by == (
        "max_batch=1000, at most a percent away; the peak grows by 10 B a sample"
    )


def test_nothing_fits() -> None:
    result = search(prober(lambda batch: 1500 + batch), limit_bytes=1024, margin_bytes=10)
    assert (result.largest_safe, result.largest_fitting, result.fastest) == (None, None, None)
    assert result.peak_bytes == 1501
    assert result.limited_by == "batch 1 needs 1.47 KiB, 477 B more than the limit"
    assert len(result.probes) == 1


def test_fits_only_within_the_margin() -> None:
    result = search(prober(lambda batch: 900 + 50 * batch), limit_bytes=1000, margin_bytes=100)
    assert (result.largest_safe, result.largest_fitting) == (None, 2)
    assert result.limited_by == "batch 1 fits, but within the margin of 100 B"
    assert result.peak_bytes == 950


@pytest.mark.parametrize("outcome", ["oom", "retry", "error"])
def test_every_other_outcome_is_an_upper_bound(outcome: str) -> None:
    def probe(batch: int) -> Probe:
        if batch > 37:
            reason = "raised KeyError" if outcome == "error" else None
            return Probe(batch, outcome, error=reason)  # type: ignore[arg-type]
        return Probe(batch, "fits", reserved_bytes=10 * batch, allocated_bytes=1)

    result = search(probe, limit_bytes=1000, margin_bytes=0)
    assert (result.largest_safe, result.largest_fitting) == (37, 37)
    expected = {"error": "batch 38 failed: raised KeyError"}
    assert result.limited_by == expected.get(
        outcome, "memory: batch 38 was tried and takes too much"
    )


@pytest.mark.parametrize(
    ("least", "first", "tried"), [(2, 2, [1, 2, 35]), (4, 4, [1, 2, 4, 57]), (7, 8, [1, 2, 4, 8])]
)
def test_small_batches_that_the_job_refuses(least: int, first: int, tried: list[int]) -> None:
    def probe(batch: int) -> Probe:
        if batch < least:
            return Probe(batch, "error")
        return Probe(batch, "fits", allocated_bytes=line(batch))

    result = search(probe, limit_bytes=LIMIT_BYTES, margin_bytes=MARGIN_BYTES)
    assert [done.batch for done in result.probes][: len(tried)] == tried
    assert result.largest_fitting == exhaustive(line, LIMIT_BYTES)
    assert result.largest_safe == exhaustive(line, LIMIT_BYTES - MARGIN_BYTES)
    assert result.peak_bytes == line(result.largest_safe)
    assert result.curve[0] == (first, line(first))


def test_the_first_batch_that_the_job_takes_does_not_fit() -> None:
    def probe(batch: int) -> Probe:
        if batch == 1:
            return Probe(batch, "error")
        return Probe(batch, "oom", allocated_bytes=2048)

    result = search(probe, limit_bytes=1024, margin_bytes=0)
    assert [done.batch for done in result.probes] == [1, 2]
    assert (result.largest_safe, result.largest_fitting, result.peak_bytes) == (None, None, 2048)
    assert result.limited_by == "batch 2 needs at least 2.00 KiB, 1.00 KiB more than the limit"


@pytest.mark.parametrize(("max_batch", "tried"), [(1, "1"), (3, "1, 2"), (3000, "1, 2, 4, 8")])
def test_a_job_that_fails_at_every_batch(max_batch: int, tried: str) -> None:
    result = search(
        lambda batch: Probe(batch, "error"), limit_bytes=1024, margin_bytes=0, max_batch=max_batch
    )
    assert (result.largest_safe, result.largest_fitting, result.peak_bytes) == (None, None, None)
    assert result.limited_by == (
        f"every batch tried ({tried}) failed for a reason other than memory"
    )


def test_fastest_is_the_safe_probe_with_most_samples_per_second() -> None:
    seconds = {1: 1.0, 4: 1.0, 80: 40.0, 90: 1.0}

    def probe(batch: int) -> Probe:
        return Probe(batch, "fits", allocated_bytes=100 + 10 * batch, seconds=seconds[batch])

    seen: list[Probe] = []
    result = search(probe, limit_bytes=1000, margin_bytes=100, on_probe=seen.append)
    assert (result.largest_safe, result.largest_fitting, result.fastest) == (80, 90, 4)
    assert tuple(seen) == result.probes
    assert [point.batch for point in seen] == [1, 4, 80, 90]
    assert result.curve == ((1, 110), (4, 140), (80, 900), (90, 1000))
    assert result.limited_by == (
        "memory: 10 B a sample, so batch 81 would take too much by the line through the probes"
    )
    assert json.loads(json.dumps(result.to_json()))["largest_safe"] == 80


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"limit_bytes": 0, "margin_bytes": 0}, "limit_bytes must be positive; got 0"),
        ({"limit_bytes": 10, "margin_bytes": 10}, "below limit_bytes=10; got 10"),
        ({"limit_bytes": 10, "margin_bytes": -1}, "at least 0 and below limit_bytes=10; got -1"),
        ({"limit_bytes": 10, "margin_bytes": 1, "max_batch": 0}, "max_batch must be at least 1"),
    ],
)
def test_impossible_budgets(budget: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(prober(line), **budget)


def test_a_probe_that_fits_must_name_its_peak() -> None:
    with pytest.raises(ValueError, match="got none for batch 1"):
        search(lambda batch: Probe(batch, "fits"), limit_bytes=10, margin_bytes=0)
