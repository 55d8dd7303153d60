"""On the CPU two small probes and one that confirms: what their steps ask for tells of the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpmem
from dpmem import isolation
from dpmem.isolation import Room, probe_in_child
from dpmem_profiling import measure

CPU = torch.device("cpu")


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh())


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)


def samples(n: int) -> Tensor:
    return torch.randn(n, 64)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 12, 32)


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def likeness(model: nn.Module, batch: Tensor) -> Tensor:
    features = model(batch)
    return (features @ features.T).logsumexp(1).mean()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters)


JOBS = {
    "perceptron": dpmem.Job(perceptron, samples, mean_square, adamw),
    "attention": dpmem.Job(attention, sequences, mean_square, adamw),
    "contrastive": dpmem.Job(perceptron, samples, likeness, adamw),
}


@pytest.mark.parametrize("budget_bytes", [1 << 20, 16 << 20])
@pytest.mark.parametrize("name", JOBS)
def test_three_probes_and_a_fourth_for_both_answers(name: str, budget_bytes: int) -> None:
    """Gradients lead where batches are small, activations where they are large."""
    job = JOBS[name]
    result = dpmem.find_batch_size(job, budget_bytes=budget_bytes, device=CPU)
    assert len(result.probes) <= 4
    assert all(probe.outcome == "fits" for probe in result.probes)
    for answer, limit_bytes in (
        (result.largest_fitting, result.limit_bytes),
        (result.largest_safe, result.limit_bytes - result.margin_bytes),
    ):
        assert answer is not None
        more = answer + 1 + max(answer // 100, 1)
        assert measure(job, more, device=CPU).peak_allocated_bytes > limit_bytes


def test_a_run_under_way_takes_as_few() -> None:
    model = perceptron()
    tried: list[int] = []
    result = dpmem.find_batch_size(
        (model, adamw(model.parameters())),
        batch=samples,
        loss=mean_square,
        budget_bytes=8 << 20,
        safety=0.0,
        on_try=tried.append,
    )
    assert result.largest_fitting
    assert len(tried) == 3


def test_requests_come_from_a_process_of_its_own() -> None:
    done = probe_in_child(JOBS["perceptron"], 5, CPU, Room(1 << 30, None))
    assert done.requests is not None
    assert done.requests.peak_bytes() == done.allocated_bytes


def test_what_a_process_is_its_requests_do_not_tell() -> None:
    limit = isolation.process_limit()
    if limit is None:
        pytest.skip("needs a system that says what a process may take")
    pickled = isolation.pickled_job(JOBS["perceptron"])
    done = isolation._probe(pickled, 2, CPU, Room(*limit), None)
    assert not isinstance(done, ValueError)
    assert done.reserved_bytes is not None
    assert done.requests is None
