"""The limit of a search, corrected by what its probes meet; the host's and a GPU's memory.

The GPU's figures are put where the driver would answer.
"""

import resource
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dpmem
from dpmem import finder, host, jobs, limits
from dpmem.limits import Drift, outside_bytes, search_within
from dpmem_profiling import BatchSizeResult, MemoryRecord, NvmlUnavailable, Probe
from dpmem_profiling.tried import Tried

CUDA = torch.device("cuda", 0)


def within(
    probe: Callable[[int], Probe],
    *,
    safety: float | None = None,
    caching_allocator: bool = True,
    drift: Iterator[int] | None = None,
) -> BatchSizeResult:
    return search_within(
        Tried(probe),
        1_000_000,
        safety=safety,
        caching_allocator=caching_allocator,
        drift_bytes=(lambda: 0) if drift is None else (lambda: next(drift)),
        max_batch=1 << 20,
    )


def plain(n: int) -> Probe:
    return Probe(n, "fits", allocated_bytes=10_000 * n, reserved_bytes=10_000 * n)


def runs_out_at(n_fails: int) -> Callable[[int], Probe]:
    return lambda n: Probe(n, "oom") if n >= n_fails else plain(n)


def test_two_percent_are_kept_free() -> None:
    found = within(plain)
    assert (found.limit_bytes, found.margin_bytes) == (1_000_000, 20_000)
    assert (found.largest_fitting, found.largest_safe, found.notes) == (100, 98, ())


def test_a_stated_safety_is_kept_to_the_byte() -> None:
    def gap(n: int) -> Probe:
        return Probe(n, "fits", allocated_bytes=5_000 * n, reserved_bytes=10_000 * n)

    for safety, largest in ((0.0, 100), (0.25, 75)):
        found = within(gap, safety=safety, drift=iter([50_000] * 9))
        assert (found.largest_safe, found.margin_bytes) == (largest, int(1_000_000 * safety))
        assert "took 48.8 KiB more of the device; safety= was given" in found.notes[0]


def test_what_the_allocator_holds_beyond_tensors_is_kept_free() -> None:
    def probe(n: int) -> Probe:
        return Probe(n, "fits", allocated_bytes=10_000 * n - 50_000, reserved_bytes=10_000 * n)

    found = within(probe)
    assert (found.margin_bytes, found.largest_safe, found.largest_fitting) == (50_000, 95, 100)
    # What a process is beyond its tensors is no allocator's rounding.
    assert within(probe, caching_allocator=False).largest_safe == 98


def test_a_gap_that_is_the_whole_limit_leaves_nothing() -> None:
    found = within(lambda n: Probe(n, "fits", allocated_bytes=n, reserved_bytes=999_999 + n))
    assert found.largest_safe is None


def test_an_allocators_retry_is_a_sign_of_memory() -> None:
    found = within(lambda n: replace(plain(n), outcome="retry") if n >= 61 else plain(n))
    assert found.largest_fitting == 60
    assert found.limit_bytes == 600_000
    assert found.largest_safe == 58


def test_memory_that_runs_out_below_the_limit_is_the_limit() -> None:
    found = within(runs_out_at(61))
    assert (found.largest_fitting, found.limit_bytes) == (60, 600_000)
    assert (found.margin_bytes, found.largest_safe) == (12_000, 58)
    assert found.notes[0].startswith("memory ran out below 977 KiB")
    assert "the limit is 586 KiB, the most that a batch took which fit" in found.notes[0]
    assert len({probe.batch for probe in found.probes}) == len(found.probes)


def test_memory_that_runs_out_above_the_limit_changes_nothing() -> None:
    found = within(runs_out_at(101))
    assert (found.largest_fitting, found.limit_bytes, found.notes) == (100, 1_000_000, ())


def test_memory_that_runs_out_unseen_leaves_the_limit() -> None:
    def flat(n: int) -> Probe:
        return Probe(n, "oom") if n > 6 else Probe(n, "fits", allocated_bytes=500_000 + n)

    found = within(flat)
    assert (found.largest_safe, found.largest_fitting, found.limit_bytes) == (6, 6, 1_000_000)


def test_an_error_is_no_sign_of_memory() -> None:
    found = within(lambda n: Probe(n, "error", error="odd") if n > 60 else plain(n))
    assert (found.largest_fitting, found.limit_bytes, found.notes) == (60, 1_000_000, ())


def test_what_others_take_meanwhile_is_added() -> None:
    found = within(plain, drift=iter([30_000, 30_000, 30_000]))
    assert (found.margin_bytes, found.largest_safe, found.largest_fitting) == (50_000, 95, 100)
    assert "took 29.3 KiB more of the device; the margin holds it" in found.notes[0]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A GPU of which NVML says how much is in use, and torch how much of that is its."""
    figures = {"used": 3_000, "own": 1_000}
    monkeypatch.setattr(
        limits.nvml,
        "visible_devices",
        lambda: (SimpleNamespace(used_bytes=figures["used"]),),
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: figures["own"])
    return figures


def test_drift_is_what_is_not_ours(used: dict[str, int]) -> None:
    assert outside_bytes(CUDA) == 2_000
    drift = Drift(CUDA)
    used.update(used=9_000, own=7_000)
    drift.sample()
    assert drift.most_bytes == 0
    used.update(used=9_500, own=7_000)
    drift.sample()
    used.update(used=1_000, own=0)
    drift.sample()
    assert drift.most_bytes == 500


@pytest.mark.parametrize("error", [NvmlUnavailable("no driver"), ValueError("which GPU?")])
def test_drift_that_nobody_can_tell(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(limits.nvml, "visible_devices", fails)
    assert outside_bytes(CUDA) is None
    drift = Drift(CUDA)
    drift.sample()
    assert drift.most_bytes == 0


def test_what_this_process_holds_of_a_gpu_is_its_budget_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3_000, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5_000)
    assert jobs.checked_budget(None, CUDA) == 8_000
    assert jobs.checked_budget(10_000, CUDA) == 10_000


MEMINFO = "MemTotal:       1000 kB\nMemAvailable:    600 kB\n"
STATUS = "VmPeak:\t 500 kB\nVmSize:\t 400 kB\nVmHWM:\t 300 kB\nVmRSS:\t 200 kB\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function: limits the address space of a machine of 600 KiB free; this process has 400."""
    for name, text in {"meminfo": MEMINFO, "self/status": STATUS}.items():
        (tmp_path / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc" / name).write_text(text)
    monkeypatch.setattr(host, "_ROOT", tmp_path)

    def limit(limit_bytes: int) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda which: (limit_bytes, limit_bytes))

    limit(resource.RLIM_INFINITY)
    return limit


def test_a_process_may_have_what_is_free_beside_what_it_has(
    machine: Callable[[int], None],
) -> None:
    assert host.memory_bytes() == (600 << 10, 1000 << 10)
    assert host.process_limit() == (800 << 10, "VmHWM")
    assert host.process_peak_bytes("VmHWM") == 300 << 10


def test_a_process_keeps_to_its_address_space_where_that_is_less(
    machine: Callable[[int], None],
) -> None:
    machine(900 << 10)
    assert host.memory_bytes() == (500 << 10, 900 << 10)
    assert host.process_limit() == (900 << 10, "VmPeak")
    machine(1100 << 10)
    assert host.memory_bytes() == (600 << 10, 1000 << 10)
    assert host.process_limit() == (800 << 10, "VmHWM")


def test_a_machine_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_ROOT", tmp_path)
    assert host.memory_bytes() is None
    assert host.process_limit() is None


def test_an_allocators_retry_is_no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    retries = iter([3, 4, 4, 4])
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: {"num_alloc_retries": next(retries)})
    measure_within = jobs.measure_within

    def on_cpu(job: dpmem.Job, n: int, _: torch.device, *more: Any) -> MemoryRecord:
        return measure_within(job, n, torch.device("cpu"), *more)

    monkeypatch.setattr(finder, "measure_within", on_cpu)
    job = dpmem.Job(lambda: nn.Linear(2, 2), lambda n: torch.randn(n, 2), lambda m, x: m(x).sum())
    first, second = (finder.measured_probe(job, 4, CUDA, None) for _ in range(2))
    assert (first.outcome, second.outcome) == ("retry", "fits")
    assert first.peak_bytes == second.peak_bytes
