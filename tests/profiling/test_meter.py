"""measure() against torch.profiler, against arithmetic, and for what it leaves behind."""

import gc
import random
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dpmem_profiling import Job, MemoryLimitExceeded, StepContext, measure
from dpmem_profiling.job import build, make_batch, run_step

WIDTH = 64
PARAMETER_BYTES = 4 * 3 * (WIDTH * WIDTH + WIDTH)
CPU = torch.device("cpu")


def mlp() -> nn.Module:
    layers = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH))


def transformer() -> nn.Module:
    layers = (
        nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, dropout=0.1)
        for _ in range(2)
    )
    return nn.Sequential(*layers, nn.Linear(WIDTH, WIDTH))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Flatten(),
    )


def rows(n: int) -> Tensor:
    return torch.randn(n, WIDTH)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 32, WIDTH)


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


MLP = Job(mlp, rows, mean_square, optimizer=adamw, name="mlp")
TRANSFORMER = Job(transformer, sequences, mean_square, optimizer=adamw, name="transformer")
CONVOLUTIONS = Job(convolutions, rows, mean_square, optimizer=adamw, name="convolutions")


def profiler_peak_bytes(job: Job, batch_size: int) -> int:
    """The peak of the third step by the CPU allocator's own events, in a run without a tracker."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profiler:
        built = build(job, CPU)
        for step in range(3):
            with torch.profiler.record_function(f"step {step}"):
                batch = make_batch(job, batch_size, CPU)
                run_step(job, StepContext(built.model, batch, built.optimizer, CPU))
                del batch
    assert profiler.profiler is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    (recorded,) = (event for event in events if event.name() == "step 2")
    live_bytes = peak_bytes = 0
    for event in events:
        if event.name() == "[memory]":
            live_bytes += event.nbytes()
            if recorded.start_ns() <= event.start_ns() <= recorded.end_ns():
                peak_bytes = max(peak_bytes, live_bytes)
    return peak_bytes


def used_twice(model: nn.Module, batch: Tensor) -> Tensor:
    """Autograd adds the gradients of a tensor that was used twice in place, unless it is seen."""
    x = batch * 1.0
    return (x * 2).sum() + (x * 3).sum() + (x * 4).sum()


USED_TWICE = Job(nn.Identity, lambda n: rows(n).requires_grad_(), used_twice, name="used twice")


WITNESSED = [MLP, TRANSFORMER, CONVOLUTIONS, USED_TWICE]


# What one operator allocates and frees within itself is the only difference there may be, and the
# profiler alone sees it.
@pytest.mark.parametrize("zero_grad", ["start", "before_backward", "end"])
@pytest.mark.parametrize(
    "job", [MLP, TRANSFORMER, CONVOLUTIONS, USED_TWICE], ids=lambda job: job.name
)
def test_an_independent_witness_agrees(job: Job, zero_grad: Any) -> None:
    job = replace(job, zero_grad=zero_grad)
    measured_bytes = measure(job, 16).peak_allocated_bytes
    witnessed_bytes = profiler_peak_bytes(job, 16)
    assert measured_bytes <= witnessed_bytes
    assert witnessed_bytes <= 1.01 * measured_bytes


def test_scratch_within_one_operator_is_the_gap_that_remains() -> None:
    """oneDNN repacks the operands of wide convolutions: real bytes that no operator returns."""

    def wide() -> nn.Module:
        layers = [nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*layers)

    job = Job(wide, lambda n: torch.randn(n, 3, 32, 32), mean_square, optimizer=adamw)
    assert measure(job, 8).peak_allocated_bytes <= profiler_peak_bytes(job, 8)


def test_categories_add_up_by_arithmetic() -> None:
    record = measure(MLP, 8)
    activation_bytes = 4 * 8 * WIDTH
    assert record.persistent_bytes == {
        "parameter": PARAMETER_BYTES,
        # Two moments, and a float32 step count for each of 6 parameters.
        "optimizer_state": 2 * PARAMETER_BYTES + 6 * 4,
    }
    assert record.peak_by_category["gradient"] == PARAMETER_BYTES
    assert record.peak_by_category["input"] == activation_bytes
    # Each ReLU's output serves it and the next layer; then the last output (for square), the loss.
    assert record.peak_by_category["activation"] == 3 * activation_bytes + 4
    assert sum(record.at_peak.values()) == record.peak_allocated_bytes
    assert "unknown" not in record.peak_by_category
    assert (record.name, record.source, record.device) == ("mlp", "measured", "CPU")
    assert (record.batch_size, record.world_size, record.limit_bytes) == (8, 1, None)
    assert record.peak_reserved_bytes is None
    assert record.step_s is not None
    assert record.step_s > 0


def test_the_timeline_shows_the_phases_and_the_peak() -> None:
    record = measure(TRANSFORMER, 4)
    phases = [point.phase for point in record.timeline]
    order = [
        name for name, previous in zip(phases, [None, *phases], strict=False) if name != previous
    ]
    assert [name for name in order if name] == ["forward", "backward", "step", "zero_grad"]
    totals = [sum(point.live_bytes.values()) for point in record.timeline]
    assert max(totals) == record.peak_allocated_bytes
    assert totals[0] == totals[-1] == sum(record.persistent_bytes.values())
    assert len(record.timeline) <= 400


def test_the_largest_tensors_say_where_they_were_made() -> None:
    record = measure(TRANSFORMER, 16)
    assert len(record.tensors_at_peak) == 20
    sizes = [tensor.size_bytes for tensor in record.tensors_at_peak]
    assert sizes == sorted(sizes, reverse=True)
    largest = record.tensors_at_peak[0]
    # The attention's projection to query, key and value together.
    assert largest.size_bytes == 4 * 16 * 32 * 3 * WIDTH
    assert (largest.category, largest.module) == ("activation", "0.self_attn")


def test_gradients_that_live_between_steps() -> None:
    record = measure(replace(MLP, zero_grad="start"), 8)
    assert record.persistent_bytes["gradient"] == PARAMETER_BYTES


def test_buffers_and_forward_alone() -> None:
    record = measure(replace(CONVOLUTIONS, optimizer=None), 4, warmup_steps=0)
    # Running mean and variance of 16 channels, and an int64 count.
    assert record.persistent_bytes["buffer"] == 2 * 4 * 16 + 8
    assert set(record.persistent_bytes) == {"parameter", "buffer"}


class Holder(nn.Module):
    """A wrapper with memory of its own, which only it can name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.held = [torch.zeros(1000)]

    def forward(self, batch: Tensor) -> Tensor:
        return self.inner(batch)


def hold(model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    return Holder(model), optimizer


def held(model: nn.Module) -> Mapping[Any, list[Tensor]]:
    assert isinstance(model, Holder)
    return {"compressed": model.held}


def test_a_wrappers_own_memory() -> None:
    job = replace(MLP, wrap=hold)
    assert measure(job, 8).persistent_bytes["bucket"] == 4000
    assert measure(job, 8, owned=held).persistent_bytes["compressed"] == 4000


def test_what_is_owned_is_no_gradient() -> None:
    job = replace(MLP, wrap=hold, zero_grad="start")

    def gradients(model: nn.Module) -> Mapping[Any, list[Tensor]]:
        return {"bucket": [p.grad for p in model.parameters() if p.grad is not None]}

    persistent_bytes = measure(job, 8, owned=gradients).persistent_bytes
    assert persistent_bytes["bucket"] == PARAMETER_BYTES + 4000
    assert "gradient" not in persistent_bytes


def test_owned_must_use_known_categories() -> None:
    with pytest.raises(ValueError, match=r"owned\(\) must use the categories .* got 'mine'"):
        measure(MLP, 2, owned=lambda model: {"mine": []})  # type: ignore[dict-item]


def test_memory_that_nobody_claims_is_unknown() -> None:
    leaked = []

    def leaky(model: nn.Module, batch: Tensor) -> Tensor:
        if not leaked:
            leaked.append(torch.zeros(500))
        return mean_square(model, batch)

    assert measure(replace(MLP, loss=leaky), 8).persistent_bytes["unknown"] == 2000


def test_a_step_without_phases_says_so() -> None:
    def step(context: StepContext) -> None:
        mean_square(context.model, context.batch).backward()
        context.model.zero_grad()

    record = measure(replace(MLP, loss=None, step=step), 8)
    assert "activation" not in record.peak_by_category
    assert "marks no forward phase" in record.notes[0]
    assert measure(MLP, 8).notes == ()


def test_what_forward_did_not_make_is_no_activation() -> None:
    def step(context: StepContext) -> None:
        noise = torch.randn_like(context.batch)
        with context.phase("forward"):
            loss = mean_square(context.model, context.batch + noise)
        with context.phase("backward"):
            loss.backward()
        with context.phase("zero_grad"):
            context.model.zero_grad()

    record = measure(replace(MLP, loss=None, step=step), 8)
    # The noise; the noisy input is one activation more than the plain loop has.
    assert record.at_peak["temporary"] >= 4 * 8 * WIDTH
    assert record.peak_by_category["activation"] == 4 * 4 * 8 * WIDTH + 4


def test_the_limit_stops_a_step_and_leaves_nothing() -> None:
    models: list[weakref.ref[nn.Module]] = []

    def watched() -> nn.Module:
        model = mlp()
        models.append(weakref.ref(model))
        return model

    job = replace(MLP, model=watched)
    peak_bytes = measure(job, 64).peak_allocated_bytes
    assert measure(job, 64, limit_bytes=peak_bytes).limit_bytes == peak_bytes
    with pytest.raises(MemoryLimitExceeded) as caught:
        measure(job, 64, limit_bytes=peak_bytes - 1)
    # While the exception is still held:
    assert caught.value.live_bytes >= peak_bytes
    assert [model() for model in models] == [None] * 3
    assert "step" in caught.value.during
    with pytest.raises(MemoryLimitExceeded, match="during building the model"):
        measure(job, 64, limit_bytes=1000)


def test_an_error_in_the_job_leaves_no_hooks() -> None:
    hooks = torch.nn.modules.module

    def fails(model: nn.Module, batch: Tensor) -> Tensor:
        model(batch)
        raise KeyError("in the loss")

    resize = torch.UntypedStorage.resize_
    with pytest.raises(KeyError):
        measure(replace(MLP, loss=fails), 8)
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert torch.UntypedStorage.resize_ is resize
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_an_error_in_the_job_holds_no_memory() -> None:
    storages: list[weakref.ref[torch.UntypedStorage]] = []

    def inner(model: nn.Module, batch: Tensor) -> Tensor:
        output = model(batch)
        storages.extend(weakref.ref(t.untyped_storage()) for t in (batch, output))
        raise KeyError("inner")

    def fails(model: nn.Module, batch: Tensor) -> Tensor:
        try:
            return inner(model, batch)
        except KeyError as error:
            raise ValueError("outer") from error

    with pytest.raises(ValueError, match="outer") as caught:
        measure(replace(MLP, loss=fails), 8)
    # While the exception is still held, with the lines where it was raised:
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.traceback[-1].name == "fails"
    assert [storage() for storage in storages] == [None] * 2


def test_memory_and_random_states_are_as_before() -> None:
    storages: list[weakref.ref[torch.UntypedStorage]] = []

    def noisy(model: nn.Module, batch: Tensor) -> Tensor:
        random.random()
        np.random.random()
        for parameter in model.parameters():
            storages.append(weakref.ref(parameter.untyped_storage()))
        return mean_square(model, batch)

    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    measure(replace(MLP, loss=noisy), 8)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert storages
    assert all(storage() is None for storage in storages)


def test_the_garbage_collector_is_as_before() -> None:
    assert gc.get_freeze_count() == 0
    measure(MLP, 8)
    assert gc.get_freeze_count() == 0
    with pytest.raises(ValueError, match="knows the devices"):
        measure(MLP, 8, device="meta")
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        measure(MLP, 8)
        assert gc.get_freeze_count() > 0.9 * frozen
    finally:
        gc.unfreeze()


def test_measuring_does_not_depend_on_what_is_live_already() -> None:
    first = measure(MLP, 8)
    kept = torch.zeros(100_000)
    gc.collect()
    assert measure(MLP, 8).at_peak == first.at_peak
    del kept


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0; got -1"),
        ({"world_size": 0}, "world_size must be at least 1; got 0"),
        ({"limit_bytes": 0}, "limit_bytes must be at least 1; got 0"),
        ({"device": "meta"}, "knows the devices cpu and cuda; got meta"),
    ],
)
def test_impossible_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(MLP, **{"batch_size": 4, **wrong})


def test_short_steps_are_timed_again_and_the_fastest_counts() -> None:
    took_s = iter([0.0, 0.0, 0.0, 0.03, 0.001, 0.03, 0.03, 0.03])

    def step(context: StepContext) -> None:
        time.sleep(next(took_s))

    job = Job(lambda: nn.Linear(1, 1), lambda n: torch.zeros(n, 1), step=step)
    record = measure(job, 1, warmup_steps=2, timing_s=60.0)
    assert record.step_s is not None
    assert 0.001 <= record.step_s < 0.03
    # Two to warm up, one recorded, five timed.
    assert list(took_s) == []
    took_s = iter([0.0] * 4)
    measure(job, 1, warmup_steps=2)
    assert list(took_s) == []
