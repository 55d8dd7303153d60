"""Job: what it refuses, and the order in which a step runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpmem_profiling import InvalidJob, Job, StepContext, build, make_batch, run_step

CPU = torch.device("cpu")


def model() -> nn.Module:
    return nn.Linear(3, 1)


def batch(n: int) -> dict[str, Any]:
    return {"x": torch.ones(n, 3), "class_weights": torch.ones(7), "label": "kept"}


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).sum()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"loss": None}, TypeError, "exactly one of loss and step; got neither"),
        ({"step": print}, TypeError, "exactly one of loss and step; got both"),
        ({"model": nn.Linear(1, 1)}, TypeError, "Job.model must build the model"),
        ({"batch": torch.ones(3)}, TypeError, "Job.batch must be a callable.*got Tensor"),
        ({"optimizer": "adam"}, TypeError, "Job.optimizer must be a callable or None; got str"),
        ({"wrap": 3}, TypeError, "Job.wrap must be a callable or None; got int"),
        ({"zero_grad": "never"}, ValueError, "start, before_backward, end; got 'never'"),
        ({"name": 7}, TypeError, "Job.name must be a str; got int"),
    ],
)
def test_refused_on_construction(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Job(**{"model": model, "batch": batch, "loss": loss, **fields})


def test_build_trains_the_model_and_wraps_last() -> None:
    seen = []

    def wrap(model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        seen.append((model.training, type(optimizer)))
        return nn.Sequential(model), optimizer

    built = build(
        Job(lambda: model().eval(), batch, loss, optimizer=sgd, wrap=wrap), torch.device("cpu")
    )
    assert seen == [(True, torch.optim.SGD)]
    assert isinstance(built.model, nn.Sequential)


def test_a_wrap_that_forgets_the_optimizer_is_refused() -> None:
    job = Job(model, batch, loss, wrap=lambda model, optimizer: model)  # type: ignore[arg-type]
    with pytest.raises(InvalidJob, match=r"must return \(model, optimizer\); got Linear"):
        build(job, CPU)


def test_a_batch_keeps_its_shape() -> None:
    made = make_batch(Job(model, batch, loss), 5, CPU)
    assert made["x"].shape == (5, 3)
    assert made["class_weights"].shape == (7,)
    assert made["label"] == "kept"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: torch.ones(8, 3), r"4 samples .* got shape \(8, 3\)"),
        (lambda n: torch.tensor(1.0), r"got shape \(\)"),
        (lambda n: ["text"] * n, "got list with none"),
    ],
)
def test_a_batch_function_must_use_its_size(make: Any, message: str) -> None:
    with pytest.raises(InvalidJob, match=message):
        make_batch(Job(model, make, loss), 4, CPU)


def test_a_model_factory_must_return_a_model() -> None:
    with pytest.raises(InvalidJob, match=r"must return an nn.Module; got NoneType"):
        build(Job(lambda: None, batch, loss), CPU)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("zero_grad", "order"),
    [
        ("start", ["zero_grad", "forward", "backward", "step"]),
        ("before_backward", ["forward", "zero_grad", "backward", "step"]),
        ("end", ["forward", "backward", "step", "zero_grad"]),
    ],
)
def test_the_order_of_a_step(zero_grad: Any, order: list[str]) -> None:
    phases: list[str] = []

    @contextmanager
    def recorder(name: str) -> Iterator[None]:
        phases.append(name)
        yield

    job = Job(model, batch, loss, optimizer=sgd, zero_grad=zero_grad)
    built = build(job, CPU)
    before = [parameter.detach().clone() for parameter in built.model.parameters()]
    made = make_batch(job, 2, CPU)
    run_step(job, StepContext(built.model, made, built.optimizer, CPU, recorder))
    assert phases == order
    weight, bias = built.model.parameters()
    # d(sum of outputs)/dw = 2 samples of ones; SGD with lr 0.1 moves every weight by -0.2.
    torch.testing.assert_close(weight.detach(), before[0] - 0.2)
    torch.testing.assert_close(bias.detach(), before[1] - 0.2)
    assert (weight.grad is None) == (zero_grad == "end")


def test_without_an_optimizer_the_model_drops_its_gradients() -> None:
    job = Job(model, batch, loss)
    built = build(job, CPU)
    run_step(job, StepContext(built.model, make_batch(job, 2, CPU), None, CPU))
    assert all(parameter.grad is None for parameter in built.model.parameters())


def test_a_step_replaces_the_loop() -> None:
    seen = []

    def step(context: StepContext) -> None:
        with context.phase("forward"):
            seen.append(context.batch["x"].shape[0])

    job = Job(model, batch, step=step)
    run_step(job, StepContext(model(), make_batch(job, 3, CPU), None, CPU))
    assert seen == [3]


def test_unknown_phases_are_refused() -> None:
    context = StepContext(model(), None, None, CPU)
    with pytest.raises(ValueError, match=r"phase must be one of .*; got 'forwards'"):
        context.phase("forwards")  # type: ignore[arg-type]


def test_a_loss_must_be_a_scalar() -> None:
    job = Job(model, batch, lambda model, batch: model(batch["x"]))
    with pytest.raises(InvalidJob, match=r"scalar tensor; got \(2, 1\)"):
        run_step(job, StepContext(model(), make_batch(job, 2, CPU), None, CPU))
