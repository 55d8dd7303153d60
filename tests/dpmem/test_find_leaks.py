"""A job that keeps more after every step is said to leak; one that keeps the same is not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dpmem
from dpmem.growth import note_of_a_leak
from dpmem_profiling import BatchSizeResult, Probe

CPU = torch.device("cpu")
WIDTH = 64
kept: list[Tensor] = []


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())


def make_batch(n: int) -> Tensor:
    return torch.randn(n, WIDTH)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def loss_of_kept_outputs(model: nn.Module, batch: Tensor) -> Tensor:
    kept.append(model(batch))
    return kept[-1].square().mean()


class Node:
    """Garbage that only the collector finds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.itself = tensor, self


def cyclic_loss(model: nn.Module, batch: Tensor) -> Tensor:
    Node(model(batch).detach())
    return loss(model, batch)


JOB = dpmem.Job(make_model, make_batch, loss, optimizer=torch.optim.AdamW)


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    kept.clear()


def found(job: dpmem.Job, *, isolate: bool = False) -> BatchSizeResult:
    return dpmem.find_batch_size(
        job, budget_bytes=2_000_000, max_batch=512, device=CPU, isolate=isolate
    )


@pytest.mark.parametrize("isolate", [False, True])
def test_outputs_in_a_list(isolate: bool) -> None:
    result = found(replace(JOB, loss=loss_of_kept_outputs), isolate=isolate)
    (note,) = result.notes
    assert note.startswith("the job leaks: each step at batch ")
    for probe in result.probes:
        if probe.outcome == "fits":
            assert probe.growth_bytes == 4 * WIDTH * probe.batch
    assert note in str(result)
    assert BatchSizeResult.from_json(result.to_json()) == result


@pytest.mark.parametrize(
    ("optimizer", "zero_grad", "loss"),
    [
        (torch.optim.AdamW, "start", cyclic_loss),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), "end", cyclic_loss),
        (None, "end", loss),
    ],
)
def test_what_stays_the_same_is_no_leak(
    optimizer: Callable[..., torch.optim.Optimizer] | None,
    zero_grad: str,
    loss: Callable[..., Tensor],
) -> None:
    result = found(replace(JOB, optimizer=optimizer, zero_grad=zero_grad, loss=loss))
    assert result.notes == ()
    assert {probe.growth_bytes for probe in result.probes if probe.outcome == "fits"} == {0}


def test_the_words_and_when_they_are_said() -> None:
    def result(growth_bytes: list[int | None]) -> BatchSizeResult:
        probes = tuple(
            Probe(batch, "fits", allocated_bytes=10**6 * batch, growth_bytes=size)
            for batch, size in enumerate(growth_bytes, start=1)
        )
        return BatchSizeResult(
            largest_fitting=2,
            largest_safe=2,
            fastest=None,
            peak_bytes=2 * 10**6,
            limit_bytes=3 * 10**6,
            margin_bytes=0,
            source="measured",
            probes=probes,
            curve=(),
            limited_by="",
        )

    (note,) = note_of_a_leak(result([50_000, 100_000]))
    assert note.startswith(
        "the job leaks: each step at batch 2 leaves 97.7 KiB behind, which fills the limit in 10 "
        "more; look for what it keeps"
    )
    # One batch at which nothing grew, a counter, a forecast.
    assert note_of_a_leak(result([0, 100_000])) == ()
    assert note_of_a_leak(result([8, 8])) == ()
    assert note_of_a_leak(result([None, None])) == ()
