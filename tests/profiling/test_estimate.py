"""The forecast: what it adds to a trace, and what it decides by it."""

import json
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dpmem_profiling import AllocatorSettings, Forecast, Job, StepContext
from dpmem_profiling import estimate as estimate_module
from dpmem_profiling.estimate import ASSUMED_CONTEXT_BYTES, BAND_ABOVE, BAND_BELOW
from dpmem_profiling.gpus import GPUS, Gpu

WIDTH = 256
MIB = 1 << 20


def gpu(total_bytes: int, context_bytes: int | None = 0, **changes: Any) -> Gpu:
    return replace(
        GPUS["a100-40gb"], total_bytes=total_bytes, context_bytes=context_bytes, **changes
    )


def mlp() -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def uneven(model: nn.Module, batch: Tensor) -> Tensor:
    """Asks for many sizes, so that the cache holds what the next request cannot use."""
    for rows in range(3, 40, 4):
        (batch.repeat(rows, 1) * 1.0).sum()
    return mean_square(model, batch)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters)


JOB = Job(mlp, lambda n: torch.randn(n, WIDTH), mean_square, optimizer=adam, name="mlp")


def test_an_estimate_adds_up() -> None:
    estimate = Forecast(JOB).estimate(4096, gpu(1 << 30, context_bytes=100 * MIB))
    assert sum(estimate.breakdown.values()) == estimate.peak_allocated_bytes
    # Two workspaces of cuBLAS, and the activations of four layers of 4 MiB.
    assert estimate.breakdown["workspace"] == 2 * 8_519_680
    assert estimate.breakdown["activation"] >= 4 * 4 * MIB
    assert estimate.peak_reserved_bytes >= estimate.peak_allocated_bytes
    assert estimate.peak_reserved_bytes % (2 * MIB) == 0
    assert estimate.outside_torch_bytes == 100 * MIB
    assert estimate.total_bytes == estimate.peak_reserved_bytes + 100 * MIB
    assert estimate.low_bytes == int(estimate.peak_reserved_bytes * (1 - BAND_BELOW)) + 100 * MIB
    assert estimate.high_bytes == int(estimate.peak_reserved_bytes * (1 + BAND_ABOVE)) + 100 * MIB
    assert estimate.fits
    assert max(estimate.at_peak, key=lambda tensor: tensor.size_bytes) == estimate.at_peak[0]
    assert json.loads(json.dumps(estimate.to_json()))["gpu"] == "a100-40gb"


def test_an_unknown_context_is_none_and_said() -> None:
    estimate = Forecast(JOB).estimate(8, gpu(1 << 30, context_bytes=None))
    assert estimate.outside_torch_bytes is None
    assert estimate.total_bytes == estimate.peak_reserved_bytes + ASSUMED_CONTEXT_BYTES
    assert "context is not known" in estimate.notes[0]


def test_workspaces_of_convolutions_are_an_interval_beside_the_total() -> None:
    def images(n: int) -> Tensor:
        return torch.randn(n, 64, 64, 64)

    def total(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum()

    job = Job(lambda: nn.Conv2d(64, 64, 3, padding=1), images, total, name="conv")
    plain = Forecast(job).estimate(8, gpu(1 << 30))
    # Copies of the input and of the output, 8 MiB each, beside both.
    assert plain.convolution_workspace_bytes is not None
    least_bytes, most_bytes = plain.convolution_workspace_bytes
    assert least_bytes == 0
    assert 16 * MIB <= most_bytes < 20 * MIB
    assert any("Convolutions may take up to" in note for note in plain.notes)
    # They are beside the total, and what fits does not depend on them.
    assert plain.total_bytes == plain.peak_reserved_bytes
    tight = Forecast(job).estimate(8, gpu(plain.total_bytes))
    assert tight.fits
    assert tight.convolution_workspace_bytes == plain.convolution_workspace_bytes
    without_cudnn = Forecast(job).estimate(8, gpu(1 << 30, architecture=None))
    assert without_cudnn.convolution_workspace_bytes is None
    assert any(note.startswith("unknown: workspaces") for note in without_cudnn.notes)
    assert Forecast(JOB).estimate(8, gpu(1 << 30)).convolution_workspace_bytes == (0, 0)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    forecast = Forecast(JOB)
    for room_mib in (60, 100, 333):
        card = gpu(room_mib * MIB)
        largest = forecast.largest_batch(card)
        for batch, fits in ((largest, True), (largest + 1, False)):
            needed_bytes = int(forecast.reserved_bytes(batch, card) * (1 + BAND_ABOVE))
            assert (needed_bytes <= card.total_bytes) == fits


def test_no_batch_fits_a_gpu_that_is_too_small() -> None:
    estimate = Forecast(JOB).estimate(1, gpu(4 * MIB))
    assert estimate.fits is False
    assert estimate.largest_batch == 0


def test_what_every_batch_takes_rules_out_small_gpus_by_one_trace() -> None:
    forecast = Forecast(JOB)
    # Weights, biases, and two states of each.
    fixed_bytes = 3 * 4 * 4 * (WIDTH * WIDTH + WIDTH)
    with mock.patch.object(estimate_module, "trace", wraps=estimate_module.trace) as traced:
        assert forecast.largest_batch(gpu(fixed_bytes)) == 0
        assert forecast.largest_batch(gpu(fixed_bytes, architecture=(7, 0))) == 0
        assert traced.call_count == 1
        assert forecast.largest_batch(gpu(2 * fixed_bytes + 40 * MIB)) > 0
        assert traced.call_count > 1


def test_a_data_set_that_ends_leaves_the_largest_batch_unknown() -> None:
    samples = torch.zeros(8, WIDTH)
    estimate = Forecast(replace(JOB, batch=lambda n: samples[:n])).estimate(8, gpu(1 << 30))
    assert estimate.fits
    assert estimate.largest_batch is None
    assert "largest batch is not known: Job.batch(" in estimate.notes[-1]


def test_a_step_that_loops_over_its_samples_is_not_traced_for_ever() -> None:
    def accumulate(context: StepContext) -> None:
        for sample in context.batch.split(1):
            mean_square(context.model, sample).backward()

    job = replace(JOB, loss=None, optimizer=None, step=accumulate)
    with mock.patch.object(estimate_module, "MOST_SEARCHED_CHANGES", 1000):
        estimate = Forecast(job).estimate(4, gpu(1 << 30))
    assert estimate.largest_batch is None
    assert "or more" in estimate.notes[-1]


def test_a_gpu_that_is_nearly_full_retries_and_says_so() -> None:
    forecast = Forecast(replace(JOB, loss=uneven))
    endless_bytes = forecast.reserved_bytes(1024, gpu(1 << 40))
    estimate = forecast.estimate(1024, gpu(endless_bytes - 20 * MIB))
    assert estimate.fits
    assert estimate.peak_reserved_bytes < endless_bytes
    assert any("gives its cache back" in note for note in estimate.notes)


def test_every_gpu_has_its_own_workspaces_from_one_trace() -> None:
    runs = []

    def counted(model: nn.Module, batch: Tensor) -> Tensor:
        runs.append(batch.shape[0])
        return mean_square(model, batch)

    forecast = Forecast(replace(JOB, loss=counted))
    found = {
        name: forecast.estimate(64, GPUS[name]).breakdown["workspace"]
        for name in ("a100-40gb", "h100-80gb", "mi300x")
    }
    assert found == {"a100-40gb": 2 * 8_519_680, "h100-80gb": 64 * MIB, "mi300x": 256 * MIB}
    # Two batches make the line for all.
    assert len(set(runs)) == 2


def test_cudnns_attention_is_unknown_where_torch_prefers_it() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        heads = model(batch).view(-1, 4, 16, WIDTH // 64)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads).float().sum()

    def notes(gpu_name: str, dtype: torch.dtype) -> list[str]:
        job = Job(
            lambda: nn.Linear(WIDTH, WIDTH).to(dtype),
            lambda n: torch.randn(n, WIDTH, dtype=dtype),
            loss,
        )
        found = Forecast(job).estimate(4, GPUS[gpu_name]).notes
        return [note for note in found if "cuDNN's attention" in note]

    (note,) = notes("h100-80gb", torch.bfloat16)
    assert note.startswith("unknown:")
    assert notes("b200", torch.float16)
    assert not notes("a100-80gb", torch.bfloat16)
    assert not notes("rtx-5090", torch.bfloat16)
    # Its kernels are for half precision.
    assert not notes("h100-80gb", torch.float32)


def test_allocator_settings_are_a_what_if() -> None:
    card = gpu(1 << 30)
    settings = AllocatorSettings.parse("expandable_segments:True")
    job = replace(JOB, loss=uneven)
    plain, expandable = Forecast(job), Forecast(job, settings=settings)
    assert expandable.reserved_bytes(1024, card) < plain.reserved_bytes(1024, card)


def test_the_record_of_a_forecast_is_of_its_last_step() -> None:
    forecast = Forecast(JOB)
    card = gpu(1 << 30)
    record = forecast.record(64, card)
    assert record.source == "predicted"
    assert record.growth_bytes is None
    assert record.device == card.title
    assert record.persistent_bytes["parameter"] == 4 * 4 * (WIDTH * WIDTH + WIDTH)
    assert record.persistent_bytes["optimizer_state"] >= 2 * record.persistent_bytes["parameter"]
    assert record.peak_allocated_bytes <= forecast.estimate(64, card).peak_allocated_bytes
    assert record.timeline[0].event == 0
