"""What is expected of batches that were not tried."""

import random
from itertools import accumulate

import pytest

from dpmem_profiling.extrapolate import Recorder
from dpmem_profiling.outlook import (
    Corrected,
    Line,
    Lines,
    Replayed,
    first_reach,
    last_within,
    outlook,
    replayed,
)
from dpmem_profiling.record import Probe


@pytest.mark.parametrize("seed", range(40))
def test_the_last_within_is_found_by_few_looks(seed: int) -> None:
    rng = random.Random(seed)
    most_bytes = rng.choice([5, 1_000, 100_000])
    bend = rng.choice([0, 0, 3])
    rises = [rng.randrange(most_bytes) + bend * batch for batch in range(3_000)]
    curve = list(accumulate(rises))
    target_bytes = rng.choice(curve) + rng.randrange(-1, 2)
    fits = rng.choice([0, 1, 7])
    if fits and curve[fits] > target_bytes:
        fits = 0
    looked: list[int] = []

    def look(batch: int) -> float:
        looked.append(batch)
        return curve[batch]

    expected = max((batch for batch in range(1, 3_000) if curve[batch] <= target_bytes), default=0)
    assert last_within(look, target_bytes, fits, 3_000) == expected
    # Halving alone takes 12, after as many to find an end.
    assert len(looked) <= 20
    assert all(0 < batch < 3_000 for batch in looked)


@pytest.mark.parametrize("slope", [0.0, 1e-12])
def test_what_does_not_grow_reaches_the_end(slope: float) -> None:
    assert last_within(lambda batch: slope * batch, 1.0, 0, 1 << 20) == (1 << 20) - 1


def test_the_highest_line_counts() -> None:
    lines = Lines(10, [Line(100.0, 1.0), Line(90.0, 4.0), Line(80.0, -1.0)])
    assert lines.is_rising
    # 100 + n and 90 + 4 n meet after 3.3 samples.
    assert [lines.at(batch) for batch in (10, 13, 14)] == [100.0, 103.0, 106.0]
    assert [lines.slope(batch) for batch in (13, 14)] == [1.0, 4.0]
    assert lines.reach(150, 99) == 25
    assert not Lines(10, [Line(100.0, 0.0)]).is_rising


def stairs(batch: int) -> float:
    return 8.0 * (batch // 8)


@pytest.mark.parametrize(
    ("peaks", "best", "other", "expected", "off_bytes"),
    [
        # One probe, twice of what was forecast: all is twice that.
        ({16: 32}, 16, None, {17: 32.0, 24: 48.0, 40: 80.0}, 16.0),
        # Two, both 5 more: a constant.
        ({16: 21, 40: 45}, 40, 16, {41: 45.0, 48: 53.0}, 5.0),
        # Off by 0 and by 24, 24 samples apart: a byte for each sample more.
        ({16: 16, 40: 64}, 40, 16, {41: 65.0, 48: 80.0}, 24.0),
        # Between a batch that fits and one that is too large.
        ({16: 16, 40: 64}, 16, 40, {17: 17.0, 24: 32.0}, 24.0),
    ],
)
def test_probes_correct_a_forecast(
    peaks: dict[int, int],
    best: int,
    other: int | None,
    expected: dict[int, float],
    off_bytes: float,
) -> None:
    corrected = Corrected(stairs, peaks, best, other)
    assert corrected.at(best) == peaks[best]
    assert {batch: corrected.at(batch) for batch in expected} == expected
    assert corrected.off_bytes == off_bytes


def test_a_corrected_forecast_reaches_the_edge_of_a_step() -> None:
    corrected = Corrected(stairs, {16: 21, 40: 45}, 40, 16)
    assert corrected.reach(60, 1_000) == 55
    assert corrected.reach(60, 50) == 49
    assert corrected.slope(48) == 1.0


def test_steep_curves_take_few_looks_too() -> None:
    looked: list[int] = []

    def look(batch: int) -> float:
        looked.append(batch)
        return float(batch) ** 6

    assert last_within(look, 1000.5**6, 0, 1 << 20) == 1000
    assert len(looked) <= 24


def probed(reserved_bytes: dict[int, int], forward: float) -> dict[int, Probe]:
    """Reserved bytes by batch, and a forward phase of so many bytes a sample beside 1000."""
    return {
        batch: Probe(
            batch,
            "fits",
            reserved_bytes=size_bytes,
            peak_by_phase={"forward": int(forward * batch), "step": 1000},
        )
        for batch, size_bytes in reserved_bytes.items()
    }


def lines_of(reserved_bytes: dict[int, int], best: int) -> Lines:
    found = outlook(probed(reserved_bytes, 10.0), reserved_bytes, best, 1 << 20, None)
    assert isinstance(found, Lines)
    return found


def test_phases_are_raised_by_what_an_allocator_holds_beyond_them() -> None:
    # At 50 samples forward takes 500, the step 1000, and the allocator holds twice of that.
    lines = lines_of({25: 2000, 50: 2000}, 50)
    assert lines.at(50) == 2000.0
    # Forward reaches the step's peak at 100 samples.
    assert lines.at(100) == 2000.0
    assert lines.at(200) == 4000.0


def test_a_slope_is_not_taken_between_neighbours() -> None:
    # 240 and 250 lie within an allocator's step of each other.
    lines = lines_of({100: 2000, 240: 4800, 250: 5800}, 250)
    assert lines.slope(260) == pytest.approx((5800 - 2000) / 150, rel=0.1)


def test_where_the_stairs_of_a_forecast_begin() -> None:
    def in_stairs_of_16(batch: int) -> float:
        return 1000.0 * -(-batch // 16)

    forecast = Corrected(in_stairs_of_16, {177: 12_000, 320: 20_000}, 320, 177)
    assert [forecast.stair_start(batch) for batch in (1, 160, 176, 177, 190, 192)] == [
        None,
        145,
        161,
        177,
        177,
        177,
    ]
    # 100 lies on the stair from 97 on, 16 on one that begins before its last tenth.
    assert [forecast.stair_start(batch) for batch in (100, 16)] == [97, None]
    # 177 is the first of its stair: the next one too late by 1 / 176 would have shown there.
    assert forecast.late(320) == pytest.approx(320 / 176)
    assert Corrected(in_stairs_of_16, {16: 1000}, 16, None).late(16) == float("inf")


def test_a_batch_beyond_a_hump_is_not_reached() -> None:
    def humped(batch: int) -> float:
        return 10.0 * batch + (300.0 if 40 <= batch < 70 else 0.0)

    # 70 to 80 take no more than 800 again, and 51 to 69 do.
    assert first_reach(humped, 650, 1, 1 << 20) == 39
    assert first_reach(humped, 800, 1, 1 << 20) == 50
    assert first_reach(humped, 1000, 1, 1 << 20) == 100
    assert Corrected(humped, {10: 100, 20: 200}, 20, 10).reach(800, 1 << 20) == 50


def test_a_narrow_hump_is_seen_from_near_and_a_wide_one_from_afar() -> None:
    def humped(batch: int) -> float:
        return 10.0 * batch + (300.0 if batch == 87 or 70 <= batch < 73 else 0.0)

    assert first_reach(humped, 1000, 1, 1 << 20) == 100
    # 87 takes 1170, and of 70 to 72 each 1000 at least.
    assert first_reach(humped, 1000, 1, 1 << 20, finely=True) == 70


def asked(batch: int, *sizes: int, off_bytes: int = 0) -> Probe:
    """A step that held blocks of these sizes all at once, where nothing is cached."""
    recorder = Recorder()
    for number, size_bytes in enumerate(sizes):
        recorder.takes(number, size_bytes)
    peak_bytes = sum(sizes) + off_bytes
    return Probe(batch, "fits", allocated_bytes=peak_bytes, requests=recorder.requests())


def beyond(*probes: Probe) -> Replayed | None:
    """What is expected beyond the last."""
    known = {probe.batch: probe for probe in probes}
    peaks = {probe.batch: probe.peak_bytes or 0 for probe in probes}
    return replayed(known, peaks, probes[-1].batch, 1 << 20)


def test_two_probes_that_asked_alike_tell_of_any_batch() -> None:
    known = beyond(asked(1, 700, 10), asked(4, 700, 40))
    assert known is not None
    assert known.is_rising
    assert [known.at(batch) for batch in (1, 4, 30)] == [710.0, 740.0, 1000.0]
    assert known.reach(1005, 1 << 20) == 30
    assert known.off_bytes == 0
    # One that asked for what was foreseen, and one that did not.
    assert known.hidden_bytes(asked(30, 700, 300)) == 0
    assert known.hidden_bytes(asked(30, 700, 3000)) == float("inf")
    assert known.hidden_bytes(Probe(30, "fits", allocated_bytes=1000)) == float("inf")


def test_what_takes_memory_past_the_allocator_is_a_line_too() -> None:
    known = beyond(asked(1, 700, 10, off_bytes=8), asked(4, 700, 40, off_bytes=14))
    assert known is not None
    # 8 bytes for one sample and 2 for each more.
    assert known.at(30) == 1000 + 66
    assert known.off_bytes == known.hidden_bytes(asked(30, 700, 300)) == 14


def test_probes_that_asked_otherwise_tell_of_no_other() -> None:
    assert beyond(asked(1, 700), asked(4, 700, 40)) is None
    assert beyond(asked(4, 700, 40)) is None
    assert beyond(Probe(1, "fits", allocated_bytes=9), asked(4, 700, 40)) is None
