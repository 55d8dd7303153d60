"""dpmem.estimate and its command: what they pass on, and what they say."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import dpmem
from dpmem.activations.offload import HostMemory
from dpmem.forecast import estimate_command, forecast_of
from dpmem.jobs import owned_tensors
from dpmem.text_gpt import ByteGPT, GPTSize, next_byte_loss
from dpmem_profiling import measure
from dpmem_profiling.gpus import GPUS
from dpmem_profiling.trace import Kernels, trace

WIDTH = 256


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def mlp() -> nn.Module:
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])


JOB = dpmem.Job(mlp, lambda n: torch.randn(n, WIDTH), mean_square, optimizer=sgd, name="mlp")
PARAMETER_BYTES = 4 * 4 * (WIDTH * WIDTH + WIDTH)


def test_an_estimate_of_the_job_as_it_is() -> None:
    estimate = dpmem.estimate(JOB, batch_size=64, gpu="a100-40gb")
    assert (estimate.name, estimate.gpu, estimate.batch_size) == ("mlp", "a100-40gb", 64)
    assert estimate.breakdown["parameter"] == PARAMETER_BYTES
    assert estimate.fits
    assert estimate.largest_batch is not None
    assert estimate.largest_batch > 1_000_000


def test_a_wrapper_is_traced_and_its_memory_named() -> None:
    wrap = partial(dpmem.wrap, max_grad_norm=1.0)
    alone = dpmem.estimate(JOB, batch_size=64, gpu="a100-40gb", wrap=wrap)
    ranks = dpmem.estimate(JOB, batch_size=64, gpu="a100-40gb", wrap=wrap, world_size=2)
    # The clip holds a scalar or two.
    assert alone.breakdown.get("bucket", 0) <= 1024
    # Several ranks keep their gradients in buckets.
    record = forecast_of(dpmem.Job(**{**vars(JOB), "wrap": wrap}), world_size=2).record(
        64, GPUS["a100-40gb"]
    )
    assert record.peak_by_category["bucket"] >= PARAMETER_BYTES
    assert ranks.peak_allocated_bytes >= alone.peak_allocated_bytes
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("world_size", [1, 2])
def test_distributed_data_parallel_follows_a_rule(world_size: int) -> None:
    def with_ddp(**options: Any) -> dpmem.Estimate:
        return dpmem.estimate(
            JOB,
            batch_size=64,
            gpu="a100-40gb",
            wrap=lambda model, optimizer: (DistributedDataParallel(model, **options), optimizer),
            world_size=world_size,
        )

    beside, views = with_ddp(), with_ddp(gradient_as_bucket_view=True)
    assert beside.breakdown["bucket"] == views.breakdown["bucket"] == PARAMETER_BYTES
    assert beside.breakdown["gradient"] == PARAMETER_BYTES
    assert views.peak_allocated_bytes < beside.peak_allocated_bytes
    with pytest.raises(ValueError, match="usual options, passed by name; received mixed_precision"):
        with_ddp(mixed_precision=object())


def fully_sharded(model: nn.Module, optimizer: Any) -> Any:
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.Adam(model.parameters())


def sharded_flat(model: nn.Module, optimizer: Any) -> Any:
    return FullyShardedDataParallel(model), optimizer


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_sharded_flat_are_refused(world_size: int) -> None:
    with pytest.raises(ValueError, match="no rule for FullyShardedDataParallel"):
        dpmem.estimate(JOB, batch_size=64, gpu="t4", wrap=sharded_flat, world_size=world_size)


def test_shards_of_a_single_rank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fully_shard shards over the ranks .* world_size=1"):
        dpmem.estimate(JOB, batch_size=64, gpu="t4", wrap=fully_sharded)


def test_shards_are_smaller_the_more_ranks_there_are() -> None:
    two, eight = (
        dpmem.estimate(JOB, batch_size=64, gpu="t4", wrap=fully_sharded, world_size=world_size)
        for world_size in (2, 8)
    )
    for category in ("parameter", "optimizer_state"):
        assert eight.breakdown[category] == pytest.approx(two.breakdown[category] / 4, rel=0.05)
    assert any("fully_shard's own streams" in note for note in two.notes)


def test_compressed_activations_are_forecast_smaller() -> None:
    n = 16384
    plain, small = (
        dpmem.estimate(
            JOB, batch_size=n, gpu="a100-40gb", wrap=partial(dpmem.wrap, activations=bits)
        )
        for bits in (None, "4bit")
    )
    # Three layers' inputs in an eighth and a little: at least two whole ones are saved.
    assert small.peak_allocated_bytes <= plain.peak_allocated_bytes - 2 * 4 * n * WIDTH
    assert small.breakdown["compressed"] > 0


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_what_a_step_refuses_its_forecast_refuses() -> None:
    def compiled() -> nn.Module:
        return torch.compile(mlp(), backend="eager")  # type: ignore[return-value]

    wrap = partial(dpmem.wrap, activations="4bit")
    with pytest.raises(NotImplementedError, match="run uncompiled"):
        measure(replace(JOB, model=compiled, wrap=wrap), 4, device="cpu")
    with pytest.raises(NotImplementedError, match="run uncompiled"):
        dpmem.estimate(replace(JOB, model=compiled), batch_size=4, gpu="t4", wrap=wrap)


def test_offloaded_activations_are_not_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 16384
    one_layer = 4 * n * WIDTH

    def peak_bytes(activations: str | None, most_in_flight: int) -> int:
        memory = partial(HostMemory, most_in_flight)
        monkeypatch.setattr("dpmem.activations.store.HostMemory", memory)
        wrap = partial(dpmem.wrap, activations=activations)
        made = dpmem.estimate(JOB, batch_size=n, gpu="a100-40gb", wrap=wrap)
        assert sum(made.breakdown.values()) == made.peak_allocated_bytes
        return made.peak_allocated_bytes

    plain = peak_bytes(None, 0)
    assert peak_bytes("offload", 0) <= plain - 2 * one_layer
    # What is on its way is still there.
    assert plain - 2 * one_layer < peak_bytes("offload", 64 * one_layer)


def test_where_gradients_are_dropped_moves_the_peak() -> None:
    at_end, at_start = (
        dpmem.estimate(JOB, batch_size=4096, gpu="a100-40gb", zero_grad=position)
        for position in ("end", "before_backward")
    )
    # Old gradients are alive during the forward pass.
    assert at_start.peak_allocated_bytes >= at_end.peak_allocated_bytes


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="did you mean a100-40gb"):
        dpmem.estimate(JOB, batch_size=1, gpu="a100")
    with pytest.raises(ValueError, match="world_size must be at least 1"):
        dpmem.estimate(JOB, batch_size=1, gpu="t4", world_size=0)


@pytest.fixture
def target(tmp_path: Path) -> str:
    path = tmp_path / "small_job.py"
    path.write_text(
        "import torch, dpmem\n"
        "def job():\n"
        "    return dpmem.Job(lambda: torch.nn.Linear(8, 8), lambda n: torch.randn(n, 8),\n"
        "                     lambda model, batch: model(batch).sum())\n"
    )
    return f"{path}:job"


def test_the_command_prints_a_row_for_each_gpu(target: str) -> None:
    arguments = [target, "--batch", "4", "--gpu", "t4", "--gpu", "h100-80gb"]
    result = CliRunner().invoke(estimate_command, arguments, standalone_mode=False)
    assert result.return_value == 0
    assert "t4" in result.output
    assert "h100-80gb" in result.output
    assert result.output.count("yes") == 2


def test_the_command_prints_json(target: str) -> None:
    arguments = [target, "--batch", "4", "--gpu", "t4", "--json"]
    result = CliRunner().invoke(estimate_command, arguments, standalone_mode=False)
    (estimate,) = json.loads(result.output)
    assert estimate["gpu"] == "t4"
    assert sum(estimate["breakdown"].values()) == estimate["peak_allocated_bytes"]


def test_what_fits_nowhere_is_a_finding(target: str) -> None:
    arguments = [target, "--batch", str(10**10), "--gpu", "t4"]
    result = CliRunner().invoke(estimate_command, arguments, standalone_mode=False)
    assert result.return_value == 1
    assert "fits none of these GPUs: it takes" in result.stderr


def test_compressed_steps_leave_nothing_behind() -> None:
    """Several views of one saved tensor, restored together: their memory is gone after a step."""

    size = GPTSize(layers=2, width=64, heads=2, context=64)
    job = dpmem.Job(
        partial(ByteGPT, size),
        lambda n: torch.zeros(n, 65, dtype=torch.int64),
        next_byte_loss,
        sgd,
        wrap=partial(dpmem.wrap, activations="4bit"),
    )
    traced = trace(job, 16, Kernels((8, 0), 0), steps=4, owned=owned_tensors)
    live = [
        sum(change.delta_bytes for change in traced.changes[:start]) for start in traced.step_starts
    ]
    assert live[1] == live[2] == live[3]


def test_what_is_not_known_of_recurrent_layers_is_in_the_estimate() -> None:
    def last(model: nn.Module, batch: Tensor) -> Tensor:
        outputs: Tensor = model(batch.unsqueeze(1))[0]
        return outputs.square().mean()

    job = replace(JOB, model=partial(nn.LSTM, WIDTH, WIDTH), loss=last)
    notes = dpmem.estimate(job, batch_size=4, gpu="a100-40gb").notes
    assert any("unknown: workspace and reserve of cuDNN's RNN" in note for note in notes)
