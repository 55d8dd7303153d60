"""A job that keeps more after every step is said to leak; one that keeps the same is not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import dpmem
from dpmem.growth import note_of_a_leak
from dpmem_profiling import BatchSizeResult, Probe, format_bytes

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


def loss_kept_with_its_graph(model: nn.Module, batch: Tensor) -> Tensor:
    kept.append(loss(model, batch))
    return kept[-1]


def loss_beside_a_kept_metric(model: nn.Module, batch: Tensor) -> Tensor:
    kept.append(model[0](batch).square().sum())
    return loss(model, batch)


def step_that_keeps_gradients(context: dpmem.StepContext) -> None:
    loss(context.model, context.batch).backward()
    kept.extend(parameter.grad for parameter in context.model.parameters())
    context.optimizer.step()
    context.optimizer.zero_grad()


def cyclic_loss(model: nn.Module, batch: Tensor) -> Tensor:
    Node(model(batch).detach())
    return loss(model, batch)


JOB = dpmem.Job(make_model, make_batch, loss, optimizer=torch.optim.AdamW)


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    kept.clear()


def found(job: dpmem.Job, *, isolate: bool = False, multiple_of: int = 1) -> BatchSizeResult:
    return dpmem.find_batch_size(
        job,
        budget_bytes=2_000_000,
        # A process for each batch tried takes seconds.
        max_batch=16 if isolate else 512,
        device=CPU,
        isolate=isolate,
        multiple_of=multiple_of,
    )


@pytest.mark.parametrize("isolate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_outputs_in_a_list(isolate: bool) -> None:
    result = found(replace(JOB, loss=loss_of_kept_outputs), isolate=isolate)
    (note,) = result.notes
    assert note.startswith("the job leaks: each step at batch ")
    for probe in result.probes:
        if probe.outcome == "fits":
            assert probe.growth_bytes == 4 * WIDTH * probe.batch
    assert note in str(result)
    assert BatchSizeResult.from_json(result.to_json()) == result


def test_what_is_said_is_about_the_answer_in_multiples() -> None:
    result = found(replace(JOB, loss=loss_of_kept_outputs), multiple_of=100)
    growth_bytes = 4 * WIDTH * result.largest_safe
    steps = (result.limit_bytes - result.peak_bytes) // growth_bytes
    assert result.largest_safe % 100 == 0
    assert result.notes[0].startswith(
        f"the job leaks: each step at batch {result.largest_safe} leaves "
        f"{format_bytes(growth_bytes)} behind, which fills the limit in {steps:,} more;"
    )


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


@pytest.mark.parametrize("updates_first", [True, False])
def test_gradients_accumulated_over_two_steps_are_no_leak(updates_first: bool) -> None:
    # The recorded step, each probe's second, makes the gradients, or the optimizer's state.
    counts = [0]

    def counted_model() -> nn.Module:
        counts[0] = 0
        return make_model()

    def step(context: dpmem.StepContext) -> None:
        loss(context.model, context.batch).backward()
        if (counts[0] % 2 == 0) == updates_first:
            context.optimizer.step()
            context.optimizer.zero_grad()
        counts[0] += 1

    result = found(replace(JOB, model=counted_model, loss=None, step=step))
    assert result.notes == ()
    assert {probe.growth_bytes for probe in result.probes if probe.outcome == "fits"} == {0}


def test_gradients_in_a_list() -> None:
    result = found(replace(JOB, loss=None, step=step_that_keeps_gradients))
    assert result.notes[0].startswith("the job leaks: ")
    # One gradient of each parameter of the linear layer and the normalization.
    expected_bytes = 4 * (WIDTH * WIDTH + 3 * WIDTH)
    assert {probe.growth_bytes for probe in result.probes if probe.outcome == "fits"} == {
        expected_bytes
    }


def test_a_metric_kept_with_its_graph() -> None:
    result = found(replace(JOB, loss=loss_beside_a_kept_metric))
    assert result.notes[0].startswith("the job leaks: ")
    for probe in result.probes:
        if probe.outcome == "fits":
            # Its graph holds the batch, for the weight's gradient, and what is squared.
            assert probe.growth_bytes == 2 * 4 * WIDTH * probe.batch + 4


def test_a_loss_kept_after_backward_holds_a_scalar() -> None:
    # Backward releases what the graph saved: four bytes a step are no leak to speak of.
    result = found(replace(JOB, loss=loss_kept_with_its_graph))
    assert result.notes == ()
    assert {probe.growth_bytes for probe in result.probes if probe.outcome == "fits"} == {4}


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
