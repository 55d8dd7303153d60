"""The search on a GPU that is not here, in a process of its own, and what does not go together."""

import operator
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpmem
from dpmem.isolation import Room, probe_in_child
from dpmem.under_way import device_of
from dpmem_profiling import Job

CPU = torch.device("cpu")


def model() -> nn.Module:
    return nn.Linear(64, 64)


def batch(n: int) -> Tensor:
    return torch.randn(n, 64)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def wide(n: int) -> Tensor:
    return torch.randn(n, 1 << 20)


JOB = Job(model, batch, loss)


def test_predicted_is_the_largest_batch_of_the_estimate() -> None:
    job = replace(JOB, model=lambda: nn.Linear(1 << 20, 8), batch=wide)
    found = dpmem.find_batch_size(job, gpu="a100-40gb")
    estimate = dpmem.estimate(job, batch_size=8, gpu="a100-40gb")
    assert found.source == "predicted"
    assert found.largest_safe == estimate.largest_batch
    assert found.largest_fitting > found.largest_safe


def test_a_stated_safety_takes_the_forecasts_margins_place() -> None:
    job = replace(JOB, model=lambda: nn.Linear(1 << 20, 8), batch=wide)
    found = dpmem.find_batch_size(job, gpu="a100-40gb", safety=0.25)
    assert found.margin_bytes == found.limit_bytes // 4
    assert found.peak_bytes <= found.limit_bytes - found.margin_bytes


def test_more_batches_are_timed_on_request() -> None:
    options = {"budget_bytes": 1 << 20, "device": CPU}
    plain = dpmem.find_batch_size(JOB, **options)
    more = dpmem.find_batch_size(JOB, timed_batches=3, **options)
    assert len(more.samples_per_second()) == len(plain.samples_per_second()) + 3
    assert more.largest_safe == plain.largest_safe
    with pytest.raises(ValueError, match="must not be negative; received -1"):
        dpmem.find_batch_size(JOB, timed_batches=-1, **options)


def test_a_step_counts_what_its_model_holds() -> None:
    live = model()

    def step(n: int) -> None:
        loss(live, batch(n)).backward()

    found = dpmem.find_batch_size(step, state=[live], budget_bytes=100_000, device=CPU, max_batch=9)
    assert found.largest_safe == 9
    # Weights and biases, and their gradients.
    assert found.peak_bytes >= 2 * 4 * (64 * 64 + 64)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (len, {"gpu": "a100-40gb"}, "gpu= needs a Job"),
        (len, {"isolate": True}, "isolate=True needs a Job"),
        ((nn.Linear(1, 1), None), {}, "it needs both"),
        (JOB, {"batch": batch}, "belong to a target"),
        (nn.Linear(1, 1), {}, "needs a Job, "),
        ((nn.Linear(1, 1), 3), {"batch": batch, "loss": loss}, r"received \(Linear, int\)"),
        (replace(JOB, loss=lambda m, x: x.sum()), {"isolate": True}, "must be importable"),
        (JOB, {"gpu": "a100-40gb"}, "knows its memory; received budget_bytes"),
        (JOB, {"gpu": "a100-40gb", "budget_bytes": None, "max_step_s": 1.0}, "max_step_s=1.0"),
        (JOB, {"gpu": "a100-40gb", "budget_bytes": None, "timed_batches": 2}, "timed_batches=2"),
        (JOB, {"gpu": "a100-40gb", "budget_bytes": None, "isolate": True}, "isolate=True"),
    ],
)
def test_what_does_not_go_together(target: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        dpmem.find_batch_size(target, **{"budget_bytes": 1 << 20, "device": CPU, **options})


@pytest.mark.parametrize("safety", [-0.1, 1.0])
def test_a_safety_that_is_no_fraction(safety: float) -> None:
    with pytest.raises(ValueError, match="from 0 to below 1"):
        dpmem.find_batch_size(JOB, budget_bytes=1 << 20, safety=safety, device=CPU)


def test_a_run_under_way_is_tried_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on a GPU that happens to be there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    live = model()
    assert device_of(None, [live]) == CPU
    assert device_of("cpu", []) == CPU
    assert device_of(None, []) == torch.device("cuda", 3)
    assert device_of("cuda", [live]) == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert device_of(None, [len]) == torch.device("cuda", 0)


def test_a_budget_in_words_is_refused() -> None:
    with pytest.raises(TypeError, match="number of bytes; received '8GiB'"):
        dpmem.find_batch_size(JOB, budget_bytes="8GiB", device="cpu")


def test_a_target_batch_in_parts() -> None:
    found = dpmem.find_batch_size(JOB, budget_bytes=1 << 20, max_batch=12, device=CPU)
    assert found.largest_safe == 12
    assert found.accumulation_for(64) == (8, 8)
    assert found.accumulation_for(5) == (5, 1)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        found.accumulation_for(0)


# Of functions that another process can import.
IDLE = Job(partial(nn.Linear, 4, 4), torch.ones, step=operator.attrgetter("batch"))


def test_a_probe_in_a_child_is_measured_there() -> None:
    done = probe_in_child(IDLE, 5, CPU, Room(1 << 20, None))
    assert (done.batch, done.outcome) == (5, "fits")
    # 20 weights and biases, and the batch.
    assert done.allocated_bytes == 4 * (20 + 5)
    assert probe_in_child(IDLE, 5, CPU, Room(90, None)).outcome == "oom"


@pytest.mark.slow
def test_a_child_that_the_kernel_kills_ran_out_of_memory() -> None:
    killed = replace(IDLE, model=partial(signal.raise_signal, signal.SIGKILL))
    assert probe_in_child(killed, 1, CPU, Room(1 << 20, None)).outcome == "oom"


@pytest.mark.slow
def test_a_child_that_crashes_leaves_the_parent_whole() -> None:
    with pytest.raises(RuntimeError, match="ended its process with exit code -6"):
        dpmem.find_batch_size(
            replace(IDLE, model=os.abort),
            isolate=True,
            budget_bytes=1 << 20,
            max_batch=1,
            device=CPU,
        )


def test_a_script_that_runs_as_it_is_imported_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, dpmem\n"
        "def loss(model, x): return model(x).sum()\n"
        "job = dpmem.Job(torch.nn.Identity, torch.ones, loss)\n"
        "dpmem.find_batch_size(job, budget_bytes=1 << 20, isolate=True)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "put what the script does under `if __name__ == '__main__':`" in done.stderr
