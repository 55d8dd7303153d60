"""What a person hears who searched with a job, a step or a budget that cannot be right."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpmem
from dpmem_profiling import BatchSizeResult, InvalidJob, StepContext, format_bytes

CPU = torch.device("cpu")


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


MLP = dpmem.Job(
    lambda: nn.Linear(64, 64),
    lambda n: torch.randn(n, 64),
    mean_square,
    optimizer=lambda parameters: torch.optim.AdamW(parameters, foreach=True),
)
WEIGHT_BYTES = 4 * (64 * 64 + 64)
BUDGET_BYTES = 200_000


def refused(target: Any, **options: Any) -> str:
    with pytest.raises(InvalidJob) as caught:
        dpmem.find_batch_size(target, budget_bytes=BUDGET_BYTES, device=CPU, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("always", [1, 4])
def test_a_batch_function_of_a_constant_size(always: int) -> None:
    message = refused(replace(MLP, batch=lambda n: torch.randn(always, 64)))
    n = 4 if always == 1 else 1
    assert message.startswith(f"Job.batch({n}) must return {n} samples")
    live = nn.Linear(64, 64)
    message = refused((live, None), batch=lambda n: torch.randn(always, 64), loss=mean_square)
    assert message.startswith(f"Job.batch({n}) must return {n} samples")


def test_a_batch_of_samples_that_hold_nothing() -> None:
    job = replace(
        MLP,
        batch=lambda n: {"rows": torch.empty(n, 0), "x": torch.randn(8, 64)},
        loss=lambda model, batch: mean_square(model, batch["x"]),
    )
    message = refused(job)
    assert message.startswith("Job.batch must return more bytes for more samples; received 2.00 Ki")


def test_a_step_function_that_ignores_its_argument() -> None:
    model = nn.Linear(64, 64)

    def step(n: int) -> None:
        mean_square(model, torch.randn(8, 64)).backward()

    message = refused(step, state=[model])
    assert message.startswith("a step must take more memory for more samples; received one that ")
    assert "at batch 1 and at 1048576 alike; make the batch of the size" in message


def test_a_loss_that_never_uses_the_batch() -> None:
    job = replace(MLP, loss=lambda model, batch: model(torch.ones(8, 64)).square().mean())
    message = refused(job)
    assert message.startswith("a step must use its batch; from batch 1 to ")
    assert message.endswith("nothing else of the step did; compute the loss from it")


def test_a_job_whose_optimizer_hides_small_batches_is_none_of_these() -> None:
    # Up to batch 16 the peak is the optimizer's, where no activation lives.
    found = dpmem.find_batch_size(MLP, budget_bytes=BUDGET_BYTES, max_batch=16, device=CPU)
    peaks = [probe.peak_by_phase for probe in found.probes]
    assert found.largest_safe == 16
    assert peaks[0]["step"] > peaks[-1]["forward"] > peaks[0]["forward"]

    def whole(context: StepContext) -> None:
        mean_square(context.model, context.batch).backward()
        context.optimizer.step()
        context.optimizer.zero_grad()

    unseen = replace(MLP, loss=None, step=whole)
    found = dpmem.find_batch_size(unseen, budget_bytes=BUDGET_BYTES, max_batch=16, device=CPU)
    assert found.largest_safe == 16


def test_a_step_function_whose_peak_is_the_optimizers_is_none_either() -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step(n: int) -> None:
        mean_square(model, torch.randn(n, 64)).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = dpmem.find_batch_size(
        step, state=[model, optimizer], budget_bytes=BUDGET_BYTES, max_batch=16, device=CPU
    )
    assert found.largest_safe == 16
    # What this test is about: as much for one sample as for sixteen.
    assert len({peak_bytes for _, peak_bytes in found.curve}) == 1


@pytest.mark.parametrize("isolate", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget_bytes", [0, -1])
def test_budgets_that_are_none(budget_bytes: int, isolate: bool) -> None:
    job = replace(MLP, model=nn.Identity, batch=torch.ones, loss=torch.sum, optimizer=None)
    with pytest.raises(ValueError, match=f"must be positive; received {budget_bytes} bytes"):
        dpmem.find_batch_size(job, budget_bytes=budget_bytes, isolate=isolate, device=CPU)


def test_one_sample_that_does_not_fit_is_explained() -> None:
    found = dpmem.find_batch_size(MLP, budget_bytes=2 * WEIGHT_BYTES, device=CPU)
    assert found.largest_safe is None
    message = found.explanation
    assert message is not None
    # Weights, gradients and two moments, with steps counted: 2 % of the budget is kept free.
    kept_bytes = int(2 * WEIGHT_BYTES * 0.02)
    short_bytes = 4 * WEIGHT_BYTES + 8 - (2 * WEIGHT_BYTES - kept_bytes)
    assert f"by {format_bytes(short_bytes)};" in message
    assert "largest at batch 1: optimizer_state 32" in message
    assert message.count(" KiB,") >= 3
    assert "what would help: a smaller model, an optimizer with less state" in message
    assert message in str(found)


def test_a_sample_with_too_many_activations_is_explained() -> None:
    job = replace(
        MLP,
        model=lambda: nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 1)),
        batch=lambda n: torch.randn(n, 100, 64),
        optimizer=None,
    )
    found = dpmem.find_batch_size(job, budget_bytes=3 << 20, device=CPU)
    assert found.explanation is not None
    assert "below one sample's step, " in found.explanation
    # 100 rows of 4096 outputs are kept.
    assert f"activation {format_bytes(4 * 100 * 4096)}" in found.explanation
    assert "activations='2bit'" in found.explanation


def slow(context: StepContext) -> None:
    """A millisecond a sample."""
    time.sleep(1e-3 * len(context.batch))
    mean_square(context.model, context.batch).backward()
    context.model.zero_grad()


def test_a_step_may_be_held_to_a_time() -> None:
    job = replace(MLP, loss=None, optimizer=None, step=slow)
    free = dpmem.find_batch_size(job, budget_bytes=BUDGET_BYTES, device=CPU)
    assert free.largest_safe is not None
    assert free.largest_safe > 100
    held = dpmem.find_batch_size(job, budget_bytes=BUDGET_BYTES, device=CPU, max_step_s=0.08)
    assert held.largest_safe is not None
    # Sleep never ends early; how late it does is the machine's to say.
    assert 40 <= held.largest_safe < 80
    assert held.largest_safe == held.largest_fitting
    assert "time: batch" in held.limited_by
    assert "longer than the 0.08 s asked for" in held.limited_by
    timed = [probe for probe in held.probes if probe.outcome == "slow"]
    assert timed
    assert all(probe.seconds > 0.08 for probe in timed)


def test_not_even_one_sample_within_the_time() -> None:
    def step(context: StepContext) -> None:
        time.sleep(0.02)
        slow(context)

    job = replace(MLP, loss=None, optimizer=None, step=step)
    held = dpmem.find_batch_size(job, budget_bytes=BUDGET_BYTES, device=CPU, max_step_s=0.01)
    assert held.largest_safe is None
    assert held.explanation is None
    assert held.limited_by.startswith("batch 1 took 0.0")


def test_times_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="max_step_s must be positive seconds; received 0"):
        dpmem.find_batch_size(MLP, budget_bytes=BUDGET_BYTES, max_step_s=0, device=CPU)
    with pytest.raises(TypeError, match="a forecast for a100-40gb knows no times"):
        dpmem.find_batch_size(MLP, gpu="a100-40gb", max_step_s=1)


@pytest.mark.parametrize("gpu", [None, "rtx-4060"])
def test_the_longest_samples_decide(gpu: str | None) -> None:
    def rows(length: int) -> Any:
        return lambda n: torch.randn(n, length, 64)

    def find(job: dpmem.Job) -> BatchSizeResult:
        if gpu is not None:
            return dpmem.find_batch_size(job, gpu=gpu)
        return dpmem.find_batch_size(job, budget_bytes=10 * BUDGET_BYTES, device=CPU)

    short, long = replace(MLP, batch=rows(4)), replace(MLP, batch=rows(40))
    both = replace(MLP, batch=rows(4), longest_batch=rows(40))
    assert find(both).largest_safe == find(long).largest_safe
    assert (find(short).largest_safe or 0) > 5 * (find(long).largest_safe or 0)


def test_multiples_that_are_none() -> None:
    with pytest.raises(ValueError, match="multiple_of must be at least 1; received 0"):
        dpmem.find_batch_size(MLP, budget_bytes=BUDGET_BYTES, multiple_of=0, device=CPU)


def test_answers_in_multiples() -> None:
    plain = dpmem.find_batch_size(MLP, budget_bytes=BUDGET_BYTES, device=CPU)
    found = dpmem.find_batch_size(MLP, budget_bytes=BUDGET_BYTES, multiple_of=16, device=CPU)
    assert found.largest_safe == plain.largest_safe // 16 * 16
    assert found.largest_fitting == plain.largest_fitting // 16 * 16
    assert found.explanation is None
    predicted = dpmem.find_batch_size(
        replace(MLP, batch=lambda n: torch.randn(n, 1 << 10, 64)), gpu="a100-40gb", multiple_of=8
    )
    assert predicted.largest_safe % 8 == 0
