"""What a trace does not know, and says or refuses: values that are asked for, memory left out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from residual_job import GPU, RESIDUAL, WIDTH, Residual, last_step_peak_bytes, mean_square, rows
from torch import Tensor, nn

from dpmem_profiling import Job, StepContext
from dpmem_profiling.trace import Untraceable, trace


def test_a_value_asked_for_is_a_note() -> None:
    def logged(context: StepContext) -> None:
        with context.phase("forward"):
            loss = mean_square(context.model, context.batch)
        loss.item()
        with context.phase("backward"):
            loss.backward()
        assert context.optimizer is not None
        with context.phase("step"):
            context.optimizer.step()

    assert trace(RESIDUAL, 2, GPU).notes == ()
    traced = trace(replace(RESIDUAL, loss=None, step=logged), 2, GPU)
    assert "2 times" in traced.notes[0]


def test_a_value_asked_for_is_no_stale_factor() -> None:
    told = []

    def step(context: StepContext) -> None:
        loss = mean_square(context.model, context.batch)
        loss.backward()
        part = loss.detach().clone()
        part *= 0.25
        count = torch.ones(())
        count *= 0.0
        count += 1
        told.extend([part.item(), 1 / count.item()])
        # NAdam asks for what it scaled, whatever the phase.
        assert context.optimizer is not None
        context.optimizer.step()

    trace(replace(RESIDUAL, loss=None, step=step, optimizer=torch.optim.NAdam), 4, GPU)
    assert told == [1.0] * 4


def test_a_formatted_loss_is_a_value_asked_for() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        result = mean_square(model, batch)
        assert f"{result.detach():.3f}" == "1.000"
        return result

    assert "2 times" in " ".join(trace(replace(RESIDUAL, loss=loss), 4, GPU).notes)


def test_a_loss_as_an_array_is_a_value_asked_for() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        result = mean_square(model, batch)
        array = result.detach().cpu().numpy()
        assert (array.shape, array.dtype, float(array)) == ((), "float32", 1.0)
        with pytest.raises(RuntimeError, match="requires grad"):
            result.numpy()
        return result

    traced = trace(replace(RESIDUAL, loss=loss), 4, GPU)
    assert ".numpy()" in " ".join(traced.notes)
    assert last_step_peak_bytes(traced) == last_step_peak_bytes(trace(RESIDUAL, 4, GPU))


@pytest.mark.parametrize(
    "is_broken",
    [
        torch.isnan,
        torch.isinf,
        lambda loss: torch.isnan(loss).any(),
        lambda loss: torch.logical_or(loss.isnan(), loss.isinf()),
        lambda loss: torch.isnan(loss) | torch.isinf(loss),
        lambda loss: not torch.isfinite(loss),
        lambda loss: not torch.isfinite(loss).all(),
    ],
)
def test_a_loss_is_neither_nan_nor_infinite(is_broken: Callable[[Tensor], Any]) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        result = mean_square(model, batch)
        if is_broken(result):
            raise AssertionError("the loss is broken")
        return result

    assert "2 times" in " ".join(trace(replace(RESIDUAL, loss=loss), 4, GPU).notes)


def test_a_shape_that_depends_on_values_is_refused() -> None:
    def picky(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch[batch.sum(1) > 0]).square().mean()

    with pytest.raises(Untraceable, match=r"nonzero|masked_select|index"):
        trace(replace(RESIDUAL, loss=picky), 4, GPU)


def test_an_array_of_many_values_is_refused() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        result: Tensor = model(batch)
        return result.mean() * float(result.detach().numpy().max())

    with pytest.raises(Untraceable, match="numpy"):
        trace(replace(RESIDUAL, loss=loss), 4, GPU)


@pytest.mark.filterwarnings("ignore:Using `torch.compile", "ignore:`torch.jit")
def test_what_is_compiled_is_said_to_be_unknown() -> None:
    def compiled() -> nn.Module:
        return nn.Sequential(torch.compile(Residual(), backend="eager"))  # type: ignore[list-item]

    def in_place() -> nn.Module:
        model = Residual()
        model.compile(backend="eager")
        return model

    @torch.compile(backend="eager")
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return mean_square(model, batch)

    for job in (
        replace(RESIDUAL, model=compiled),
        replace(RESIDUAL, model=in_place),
        replace(RESIDUAL, loss=loss),
    ):
        traced = trace(job, 4, GPU)
        assert "unknown: what torch.compile" in " ".join(traced.notes)
        assert last_step_peak_bytes(traced) == last_step_peak_bytes(trace(RESIDUAL, 4, GPU))
    assert not trace(RESIDUAL, 4, GPU).notes


def test_the_history_of_lbfgs_is_said_to_be_unknown() -> None:
    def step(context: StepContext) -> None:
        def evaluate() -> float:
            loss = mean_square(context.model, context.batch)
            loss.backward()
            return float(loss.detach())

        assert context.optimizer is not None
        context.optimizer.step(evaluate)

    def lbfgs(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, history_size=8)

    job = Job(lambda: nn.Linear(WIDTH, 2 * WIDTH, bias=False), rows, optimizer=lbfgs, step=step)
    # Two vectors of 2048 numbers for each of 8 steps.
    assert "LBFGS fills, which the figures leave out: 128 KiB" in " ".join(trace(job, 4, GPU).notes)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_is_said_to_be_unknown(layer: type[nn.RNNBase]) -> None:
    def last(model: nn.Module, batch: Tensor) -> Tensor:
        outputs: Tensor = model(batch.unsqueeze(1))[0]
        return outputs.square().mean()

    job = replace(RESIDUAL, model=lambda: layer(WIDTH, WIDTH), loss=last)
    (note,) = trace(job, 4, GPU).notes
    assert "unknown: workspace and reserve of cuDNN's RNN" in note
    assert layer.__name__ in note
    # The CPU has no cuDNN.
    assert trace(job, 4, None).notes == ()
