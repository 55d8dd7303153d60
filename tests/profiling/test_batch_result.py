"""A search's result: its answers in multiples, and how it is read, written and drawn."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpmem_profiling import BatchSizeResult, Probe, search
from dpmem_profiling.report.batch_words import batch_size_rows
from dpmem_profiling.tried import Tried, in_multiples, timed_between


def line(seconds: Callable[[int], float] = lambda n: 0.01 * n) -> Callable[[int], Probe]:
    """100 + 10 bytes a sample."""
    return lambda n: Probe(n, "fits", allocated_bytes=100 + 10 * n, seconds=seconds(n))


def found(probe: Callable[[int], Probe], multiple_of: int = 1) -> BatchSizeResult:
    tried = Tried(probe)
    result = search(tried, limit_bytes=1000, margin_bytes=100)
    return in_multiples(tried.completing(result), tried, multiple_of)


def test_each_batch_is_tried_and_told_once() -> None:
    calls: list[int] = []
    told: list[int] = []
    begun: list[int] = []

    def probe(n: int) -> Probe:
        assert begun[-1] == n
        calls.append(n)
        return line()(n)

    tried = Tried(probe, lambda done: told.append(done.batch), begun.append)
    first = search(tried, limit_bytes=1000, margin_bytes=100)
    second = search(tried, limit_bytes=900, margin_bytes=0)
    assert (first.largest_safe, second.largest_fitting) == (80, 80)
    assert calls == told == begun == list(dict.fromkeys(calls))
    assert [probe.batch for probe in tried.completing(second).probes] == calls
    assert [batch for batch, _ in tried.completing(second).curve] == sorted(calls)


def test_answers_are_rounded_down_to_multiples_that_were_tried() -> None:
    result = found(line(), 7)
    assert (result.largest_safe, result.largest_fitting) == (77, 84)
    assert {77, 84} <= {probe.batch for probe in result.probes}
    assert result.peak_bytes == 870
    assert result.fastest == 77
    assert result.limited_by.endswith("rounded down from 80, no multiple of 7")
    assert found(line(), 8).limited_by == found(line()).limited_by


def test_a_multiple_that_does_not_fit_is_passed_over() -> None:
    def probe(n: int) -> Probe:
        return Probe(n, "oom") if n == 77 else line()(n)

    assert found(probe, 7).largest_safe == 70


def test_no_multiple_is_safe() -> None:
    result = found(line(), 85)
    assert (result.largest_safe, result.largest_fitting, result.fastest) == (None, 85, None)
    # That of the smallest batch.
    assert result.peak_bytes == 110
    assert result.limited_by.startswith("no multiple of 85 is safe; without that condition 80 is")
    with pytest.raises(ValueError, match="at least 1; received 0"):
        found(line(), 0)


def test_a_result_reads_as_a_short_text() -> None:
    text = str(found(line(), 8))
    assert text.startswith("largest safe batch      80\nlargest that fits       88\n")
    assert "both are multiples of   8\n" in text
    assert "kept free               100 B (10.0%)\n" in text
    assert "probe, batch 80         fits, 900 B, 0.8 s a step" in text
    assert all(len(row) < 120 for row in text.split("\n"))


def test_no_answer_reads_as_one_too() -> None:
    result = search(lambda n: Probe(n, "oom"), limit_bytes=1000, margin_bytes=100)
    rows = dict(batch_size_rows(result))
    assert rows["largest safe batch"] == "none"
    assert rows["fastest of those tried"] == "not known"
    assert rows["peak at the smallest batch"] == "unknown"
    assert rows["probe, batch 1"] == "oom, unknown"


def fastest(seconds: Callable[[int], float]) -> str:
    return dict(batch_size_rows(found(line(seconds))))["fastest of those tried"]


def test_a_smaller_batch_as_fast_is_named() -> None:
    # 1, 4, 80 and 90 are tried; 80 is safe.
    assert fastest(lambda n: 1.0) == "80, 80 samples/s"
    assert fastest(lambda n: n / 50) == "1, 50 samples/s; batch 1 is as fast as 80, within 2%"
    slow_start = {1: 0.05, 4: 4 * 0.0101}
    words = fastest(lambda n: slow_start.get(n, n * 0.01))
    assert words == "80, 100 samples/s; batch 4 is as fast as 80, within 2%"
    # 3 % is not the same.
    assert fastest(lambda n: n * (0.0103 if n < 80 else 0.01)) == "80, 100 samples/s"


def test_accumulation_that_serves_better_is_named() -> None:
    words = fastest(lambda n: n * (0.01 if n < 80 else 0.0125))
    assert words == (
        "1, 100 samples/s; accumulation serves better than batch 80: 1 at a time is 25% faster"
    )


@pytest.mark.parametrize(
    ("more", "multiple_of", "expected"),
    [
        # 1, 4, 80 and 90 are tried in any case, 88 where 90 is no multiple.
        (0, 1, []),
        (2, 1, [18, 8]),
        (2, 8, [16, 32]),
        (9, 32, [32]),
        (2, 85, []),
    ],
)
def test_more_batches_are_timed_in_the_widest_gaps(
    more: int, multiple_of: int, expected: list[int]
) -> None:
    tried = Tried(line(lambda n: n / (200 if n == 18 else 100)))
    result = search(tried, limit_bytes=1000, margin_bytes=100)
    before = in_multiples(tried.completing(result), tried, multiple_of)
    after = timed_between(before, tried, more)
    assert [probe.batch for probe in after.probes[len(before.probes) :]] == expected
    assert set(expected) <= set(after.samples_per_second()) <= set(dict(after.curve))
    assert after.largest_safe == before.largest_safe
    if 18 in expected:
        assert after.fastest == 18


def test_the_fastest_is_safe_where_peaks_rise_and_fall() -> None:
    def probe(n: int) -> Probe:
        """A kernel for these few takes much room, and little time."""
        special = n in range(25, 30)
        return Probe(n, "fits", None, 10 * n + 700 * special, seconds=0.1 if special else n)

    tried = Tried(probe)
    result = timed_between(search(tried, limit_bytes=1000, margin_bytes=100), tried, 6)
    above = {batch for batch, peak_bytes in result.curve if peak_bytes > 900}
    assert above & set(range(25, 30))
    assert not above & set(result.samples_per_second())
    assert result.fastest not in above


def test_parts_of_a_large_batch_are_multiples_too() -> None:
    result = found(line(), 8)
    assert result.largest_safe == 80
    assert found(line()).accumulation_for(140) == (70, 2)
    assert result.accumulation_for(144) == (72, 2)
    assert result.accumulation_for(8 * 97) == (8, 97)
    with pytest.raises(ValueError, match="a multiple of multiple_of=8; got 140"):
        result.accumulation_for(140)


def test_a_result_survives_json() -> None:
    def probe(n: int) -> Probe:
        if n == 1:
            return Probe(n, "error", error="needs two")
        return Probe(n, "fits", allocated_bytes=100 + 10 * n, peak_by_phase={"step": 100 + 10 * n})

    result = found(probe, 8)
    data = json.loads(json.dumps(result.to_json()))
    assert BatchSizeResult.from_json(data) == result
    with pytest.raises(ValueError, match=r"BatchSizeResult has exactly .* surplus: shoe"):
        BatchSizeResult.from_json({**data, "shoe": 1})
    with pytest.raises(ValueError, match="schema_version must be 1; got 9"):
        BatchSizeResult.from_json({**data, "schema_version": 9})


def test_a_result_draws_itself(tmp_path: Path) -> None:
    result = found(line())
    result.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG\r\n")
