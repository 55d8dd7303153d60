"""A search on a GPU begins with what a forecast proposes. The GPU is one that the tests make up."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpmem
from dpmem import finder
from dpmem.expected import Expected
from dpmem.isolation import Room
from dpmem_profiling import Probe

CUDA = torch.device("cuda", 0)
LIMIT_BYTES = 256 << 20


@pytest.fixture(autouse=True)
def an_a100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(finder, "undisturbed", lambda state: nullcontext(lambda: None))
    monkeypatch.setattr(finder, "_room_here", lambda budget, device: Room(LIMIT_BYTES, None))


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def job(model: Any = lambda: nn.Linear(512, 512), samples: int = 1 << 20) -> dpmem.Job:
    def batch(n: int) -> Tensor:
        if n > samples:
            raise ValueError(f"there are {samples} samples")
        return torch.randn(n, 512)

    return dpmem.Job(model, batch, mean_square, name="linear")


class Device:
    """Runs steps as the job's own forecast has them, and keeps `more_bytes` for itself."""

    def __init__(self, job: dpmem.Job, more_bytes: int = 0) -> None:
        self._takes, self._more_bytes = Expected(job, CUDA), more_bytes
        self.tried: list[int] = []

    def __call__(self, job: dpmem.Job, batch: int, device: Any, limit_bytes: Any) -> Probe:
        self.tried.append(batch)
        job.batch(batch)
        reserved_bytes = int(self._takes(batch)) + self._more_bytes
        if reserved_bytes > LIMIT_BYTES:
            return Probe(batch, "oom")
        return Probe(batch, "fits", allocated_bytes=1, reserved_bytes=reserved_bytes)


@pytest.mark.parametrize("more_bytes", [0, 50 << 20])
def test_the_forecast_proposes(monkeypatch: pytest.MonkeyPatch, more_bytes: int) -> None:
    device = Device(job(), more_bytes)
    monkeypatch.setattr(finder, "measured_probe", device)
    result = dpmem.find_batch_size(job(), device=CUDA, safety=0.0)
    assert result.largest_fitting is not None
    takes = Expected(job(), CUDA)
    largest = result.largest_fitting
    assert takes(largest) + more_bytes <= LIMIT_BYTES
    assert takes(largest + 2 + largest // 100) + more_bytes > LIMIT_BYTES
    assert len(device.tried) <= (5 if more_bytes else 3)
    for probe in result.probes:
        if probe.outcome == "fits":
            assert probe.predicted_bytes == takes(probe.batch)
            assert probe.reserved_bytes == probe.predicted_bytes + more_bytes


def test_a_job_that_cannot_be_forecast_is_searched_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class ByValue(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x[:, 0] > 0])

    def model() -> nn.Module:
        return ByValue(512, 512)

    monkeypatch.setattr(finder, "measured_probe", Device(job()))
    result = dpmem.find_batch_size(job(model), device=CUDA, safety=0.0)
    assert result.probes[0].batch == 1
    assert result.probes[0].predicted_bytes is None
    assert result.largest_fitting
    said = "searched without a forecast, which could not be made: "
    assert any(note.startswith(said) for note in result.notes)


def test_no_batch_is_proposed_that_there_are_no_samples_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(job(samples=700))
    monkeypatch.setattr(finder, "measured_probe", device)
    result = dpmem.find_batch_size(job(samples=700), device=CUDA, safety=0.0)
    assert result.largest_fitting is not None
    assert 693 <= result.largest_fitting <= 700
    assert "there are 700 samples" in result.limited_by
    assert not result.notes


def test_a_run_under_way_is_not_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(512, 512)
    device = Device(job())
    monkeypatch.setattr(finder, "measured_probe", device)
    result = dpmem.find_batch_size(
        (model, None), batch=job().batch, loss=mean_square, device=CUDA, safety=0.0
    )
    assert device.tried[0] == 1
    assert all(probe.predicted_bytes is None for probe in result.probes)
