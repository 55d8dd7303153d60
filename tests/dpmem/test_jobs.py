"""What people do with a Job: the search on a real machine, and what they hear where it fails."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpmem import explain, host, jobs
from dpmem.explain import explain_too_small
from dpmem.failures import is_out_of_memory
from dpmem.finder import find_batch_size
from dpmem.jobs import (
    checked_budget,
    device_memory_bytes,
)
from dpmem_profiling import BatchSizeResult, InvalidJob, Job, MemoryLimitExceeded

CPU = torch.device("cpu")


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters)


# 64 * 64 + 64 weights of 4 bytes.
MLP = Job(lambda: nn.Linear(64, 64), lambda n: torch.randn(n, 64), mean_square, optimizer=adamw)
WEIGHT_BYTES = 4 * (64 * 64 + 64)


def refusing(reject: Any, error: Exception) -> Job:
    """MLP with a loss that raises `error` at the batch sizes that `reject` names."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if reject(len(batch)):
            raise error
        return mean_square(model, batch)

    return replace(MLP, loss=loss)


# A few dozen samples: few probes.
BUDGET_BYTES = 110_000


def search(job: Job, budget_bytes: int = BUDGET_BYTES) -> BatchSizeResult:
    return find_batch_size(job, budget_bytes=budget_bytes, device=CPU)


def test_batch_normalization_refuses_one_sample_only() -> None:
    job = replace(MLP, model=lambda: nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)))
    result = search(job)
    assert (result.probes[0].batch, result.probes[0].outcome) == (1, "error")
    assert result.largest_safe is not None
    assert result.largest_safe > 4
    assert result.limited_by.startswith("memory: ")


def test_an_error_at_large_batches_bounds_the_search() -> None:
    result = search(refusing(lambda n: n > 6, IndexError("index out of range")))
    assert (result.largest_safe, result.largest_fitting) == (6, 6)
    assert result.limited_by.startswith("batch 7 failed: raised IndexError: index out of range (")
    assert {p.outcome for p in result.probes if p.batch > 6} == {"error"}


def test_a_job_that_always_fails_raises_its_first_error() -> None:
    calls = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(len(batch))
        raise KeyError(f"at {len(batch)}")

    with pytest.raises(KeyError, match="at 1"):
        search(replace(MLP, loss=loss))
    assert calls == [1, 2, 4, 8]


def test_a_job_that_breaks_its_contract_is_not_tried_again() -> None:
    sizes = []

    def batch(n: int) -> Tensor:
        sizes.append(n)
        return torch.randn(4, 64)

    with pytest.raises(InvalidJob, match="must return 1 samples"):
        search(replace(MLP, batch=batch))
    assert sizes == [1]


def test_a_broken_device_ends_the_search() -> None:
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        search(refusing(lambda n: n > 1, error))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        torch.AcceleratorError("CUDA error: out of memory"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_devices_say_when_memory_runs_out(error: Exception) -> None:
    assert is_out_of_memory(error)
    result = search(refusing(lambda n: n > 6, error))
    assert result.largest_fitting == 6
    assert result.limited_by == "memory: batch 7 was tried and takes too much"


def test_what_the_cpu_allocator_says_when_memory_runs_out() -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the tokenizer ran out of memory slots"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("CUDA out of memory"),
        IndexError("index out of range in self"),
    ],
)
def test_other_errors_are_never_taken_for_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_a_failing_probe_leaves_no_tensors() -> None:
    storages = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        storages.append(weakref.ref(batch.untyped_storage()))
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    gc.disable()
    try:
        with pytest.raises(ValueError, match="outer") as caught:
            search(replace(MLP, loss=loss))
        assert caught.value.__cause__ is not None
        assert [storage() for storage in storages] == [None] * 4
    finally:
        gc.enable()


def explained(job: Job, budget_bytes: int) -> str:
    result = search(job, budget_bytes)
    assert result.largest_safe is None
    return explain_too_small(job, result, CPU)


def test_how_much_is_missing_is_known_where_the_machine_has_it() -> None:
    message = explained(MLP, WEIGHT_BYTES + 100)
    # Weights, gradients and two moments.
    assert "is below the model's own size, 65" in message
    assert "optimizer_state 32" in message
    assert "at least" not in message


def test_the_explanation_stops_where_the_machine_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # Half of 80,000 is less than the 66,560 that weights, gradients and moments take.
    monkeypatch.setattr(explain, "device_memory_bytes", lambda device: (80_000, 1 << 40))
    message = explained(MLP, WEIGHT_BYTES + 100)
    assert "below the model's own size, by forecast 6" in message
    assert "; largest at batch 1: optimizer_state 3" in message
    assert "workspace" not in message
    assert "what would help: a smaller model" in message


def test_where_a_forecast_is_not_to_be_had_the_least_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return mean_square(model, batch) + len(batch.nonzero())

    monkeypatch.setattr(explain, "device_memory_bytes", lambda device: (80_000, 1 << 40))
    message = explained(replace(MLP, loss=loss), WEIGHT_BYTES + 100)
    assert "below one sample's step, at least 4" in message
    assert "by at least" in message
    assert "what takes the room is not known: its forecast raised Untraceable: a fore" in message


def test_the_explanation_keeps_to_the_budget_where_the_machine_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explain, "device_memory_bytes", lambda device: None)
    limits = []
    measure = jobs.measure

    def watched(*args: Any, **kwargs: Any) -> Any:
        limits.append(kwargs["limit_bytes"])
        return measure(*args, **kwargs)

    monkeypatch.setattr(jobs, "measure", watched)
    assert "by forecast" in explained(MLP, WEIGHT_BYTES + 100)
    assert set(limits) == {WEIGHT_BYTES + 100}


def test_the_explanation_survives_a_device_that_runs_out() -> None:
    job = refusing(lambda n: True, torch.OutOfMemoryError("CUDA out of memory."))
    message = explained(job, BUDGET_BYTES)
    assert "does not fit" in message
    assert "more than this machine could give" in message


def test_the_smallest_batch_that_the_job_takes_is_explained() -> None:
    job = refusing(lambda n: n < 2, ValueError("Expected more than 1 value per channel"))
    # Weights and batch fit, so the loss is reached; gradients do not.
    assert "largest at batch 2:" in explained(job, 2 * WEIGHT_BYTES)


def test_a_sample_that_fits_only_within_the_margin() -> None:
    peak_bytes = search(MLP).curve[0][1]
    message = explained(MLP, peak_bytes)
    assert "by " in message
    assert "at least" not in message


@pytest.mark.parametrize(
    ("budget_bytes", "message"),
    [
        (None, "a budget must be stated"),
        (0, "must be positive; received 0"),
        (-5, "must be positive; received -5"),
        (1 << 60, "that this machine has; received"),
    ],
)
def test_impossible_budgets(budget_bytes: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_budget(budget_bytes, CPU)
    with pytest.raises(ValueError, match=message):
        find_batch_size(MLP, budget_bytes=budget_bytes, device=CPU)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, (614_400, 1_024_000)),
        (
            {
                "proc/meminfo": MEMINFO,
                "sys/fs/cgroup/memory.max": "max\n",
                "sys/fs/cgroup/memory.current": "5\n",
            },
            (614_400, 1_024_000),
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "sys/fs/cgroup/memory.max": "300000\n",
                "sys/fs/cgroup/memory.current": "100000\n",
            },
            (200_000, 300_000),
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "400000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "100000\n",
            },
            (300_000, 400_000),
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/slurm/job 7/step\n",
                "sys/fs/cgroup/slurm/job 7/memory.max": "400000\n",
                "sys/fs/cgroup/slurm/job 7/memory.current": "300000\n",
                "sys/fs/cgroup/slurm/job 7/memory.stat": "file 9\ninactive_file 50000\n",
                "sys/fs/cgroup/slurm/job 7/step/memory.max": "max\n",
            },
            (150_000, 400_000),
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/pbs\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "100000\n",
                "sys/fs/cgroup/memory/pbs/memory.limit_in_bytes": "400000\n",
                "sys/fs/cgroup/memory/pbs/memory.usage_in_bytes": "300000\n",
                "sys/fs/cgroup/memory/pbs/memory.stat": "total_inactive_file 40000\n",
            },
            (140_000, 400_000),
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/docker/0b11\n",
                "sys/fs/cgroup/memory.max": "400000\n",
                "sys/fs/cgroup/memory.current": "100000\n",
            },
            (300_000, 400_000),
        ),
    ],
    ids=[
        "not Linux",
        "plain",
        "cgroup without a limit",
        "cgroup 2",
        "cgroup 1",
        "nested cgroups 2",
        "nested cgroup 1",
        "a container that sees not its path",
    ],
)
def test_host_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    expected: tuple[int, int] | None,
) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    monkeypatch.setattr(host, "_ROOT", tmp_path)
    assert device_memory_bytes(CPU) == expected


def test_a_memory_limit_is_out_of_memory() -> None:
    assert is_out_of_memory(MemoryLimitExceeded(1, 2, "a test"))
