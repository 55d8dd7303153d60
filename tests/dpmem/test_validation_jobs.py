"""The measured runs that reports/validation rebuilds: every row, its model's size, its step."""

import gc
import importlib
import importlib.util
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpmem.zoo.presets import PRESETS
from dpmem_profiling.job import Job, StepContext, ZeroGrad, build, make_batch, run_step

HERE = Path(__file__).parents[2] / "reports/validation"
CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture(scope="module")
def jobs() -> ModuleType:
    for library in ("torchvision", "transformers", "timm"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module("jobs")
    finally:
        sys.path.remove(str(HERE))


def row_of(jobs: ModuleType, model: str) -> Any:
    return next(row for row in jobs.rows() if row.model == model)


def test_every_row_is_there(jobs: ModuleType) -> None:
    rows = jobs.rows()
    measured = [row for row in rows if row.measured_bytes is not None]
    assert (len(measured), len(rows)) == (56, 61)
    # NVML counts the driver's pages.
    assert all(row.measured_bytes % (2 * MIB) == 0 for row in measured)
    assert all(row.gpu_total_bytes is not None for row in rows if row.measured_bytes is None)
    assert {row.recorded_zero_grad for row in rows} == {None, "start", "before_backward", "end"}
    timm_rows = jobs.timm_rows()
    assert (len(timm_rows), len({row.model for row in timm_rows})) == (1219, 333)
    assert timm_rows[0] == jobs.TimmRow("beit_base_patch16_224", 16, 4747 * MIB)


def test_every_row_has_a_job_and_a_batch(jobs: ModuleType) -> None:
    for row in jobs.rows():
        job = jobs.job(row)
        batch = job.batch(3)
        if row.kind == "cnn":
            images, labels = batch
            assert images.shape == (3, 3, 86, 86)
            assert labels.shape == (3,)
        else:
            assert batch["input_ids"].shape == (3, 128)
            assert batch["attention_mask"].sum() == 3 * 128 - 2
            assert (batch["labels"] == -100).sum() == 2
            assert "attention_mask" not in job.batch(1)


def test_models_have_the_published_size(jobs: ModuleType) -> None:
    models = jobs.torchvision.models
    # The last layer's inputs, where it has 10 outputs instead of 1,000.
    features = {"MnasNet": 1280, "MobeNetV3Large": 1280, "MobeNetV3Small": 1024}
    names = {*jobs._CLASSIFIERS, *jobs._LANGUAGE_MODELS}
    assert names > {row.model for row in jobs.rows()}
    for name in sorted(names):
        kind = "cnn" if name in jobs._CLASSIFIERS else "transformer"
        row = replace(row_of(jobs, "VGG16"), model=name, kind=kind)
        # RegNet's builder reads tensors that it makes.
        with torch.device("cpu" if name.startswith("RegNet") else "meta"):
            model = jobs.job(row).model()
        if row.kind == "cnn":
            builder, classes = jobs._CLASSIFIERS[name]
            published = models.get_model_weights(builder).DEFAULT.meta["num_params"]
            published -= (1000 - classes) * (features.get(name, 0) + 1)
        else:
            published = PRESETS[jobs._LANGUAGE_MODELS[name].preset].parameters
        assert sum(parameter.numel() for parameter in model.parameters()) == published, name


@contextmanager
def phases_into(names: list[str], phase: str) -> Iterator[None]:
    names.append(phase)
    yield


def context_of(job: Job, n: int, recorder: Callable[..., Any] | None = None) -> StepContext:
    built = build(job, CPU)
    batch = make_batch(job, n, CPU)
    if recorder is None:
        return StepContext(built.model, batch, built.optimizer, CPU)
    return StepContext(built.model, batch, built.optimizer, CPU, recorder)


@pytest.mark.parametrize(
    ("zero_grad", "order"),
    [
        ("start", ["zero_grad", "forward", "backward", "step"]),
        ("before_backward", ["forward", "zero_grad", "backward", "step"]),
        ("end", ["forward", "backward", "step", "zero_grad"]),
    ],
)
def test_gradients_are_dropped_where_told(
    jobs: ModuleType, zero_grad: ZeroGrad, order: list[str]
) -> None:
    names: list[str] = []
    job = jobs.job(row_of(jobs, "MobeNetV3Small"), zero_grad=zero_grad)
    context = context_of(job, 2, lambda phase: phases_into(names, phase))
    run_step(job, context)
    assert names == order
    has_gradients = any(parameter.grad is not None for parameter in context.model.parameters())
    assert has_gradients == (zero_grad != "end")


def test_outputs_live_until_the_next_forward_pass_is_done(jobs: ModuleType) -> None:
    job = jobs.job(row_of(jobs, "MobeNetV3Small"))
    context: StepContext | None = context_of(job, 2)
    assert context is not None
    outputs: list[weakref.ref[Tensor]] = []
    alive_within: list[int] = []

    def look(_: nn.Module, __: Any, output: Tensor) -> None:
        outputs.append(weakref.ref(output))
        alive_within.append(sum(reference() is not None for reference in outputs))

    context.model.register_forward_hook(look)
    for _ in range(3):
        run_step(job, context)
    assert alive_within == [1, 2, 2]
    assert [reference() is not None for reference in outputs] == [False, False, True]
    # They go with the model.
    del context
    gc.collect()
    assert outputs[-1]() is None


def test_timm_rows_have_a_job(jobs: ModuleType) -> None:
    job = jobs.timm_job("test_vit")
    context = context_of(job, 2)
    run_step(job, context)
    assert isinstance(context.optimizer, torch.optim.SGD)
    # timm/optim/optim_factory.py, with the defaults of timm's train.py.
    no_decay, decay = context.optimizer.param_groups
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0, 2e-5)
    assert {parameter.ndim for parameter in no_decay["params"]} == {1}
    assert min(parameter.ndim for parameter in decay["params"]) > 1
    for group in (no_decay, decay):
        assert (group["momentum"], group["nesterov"]) == (0.9, True)
    assert job.batch(1)[0].shape == (1, 3, 160, 160)
    timm = importlib.import_module("timm")
    unknown = {row.model for row in jobs.timm_rows() if not timm.is_model(row.model)}
    assert unknown == set()


@pytest.mark.slow
def test_every_row_steps(jobs: ModuleType) -> None:
    """A step of two samples of every model and optimizer; on fake tensors where it is too large."""
    seen = set()
    for row in jobs.rows():
        if (row.model, row.optimizer) in seen or "A100" in row.gpu:
            continue
        seen.add((row.model, row.optimizer))
        job = jobs.job(row)
        context = context_of(job, 2)
        run_step(job, context)
        gradients = [parameter.grad for parameter in context.model.parameters()]
        assert all(gradient is not None for gradient in gradients), row
        assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)


@pytest.mark.slow
def test_large_rows_step_on_fake_tensors(jobs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its step depends on the size of the weights, which fake ones have not.
    fixed_rate = staticmethod(lambda group, state: group["lr"])
    monkeypatch.setattr(jobs.transformers.Adafactor, "_get_lr", fixed_rate)
    for row in jobs.rows():
        if "A100" not in row.gpu:
            continue
        job = jobs.job(row)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = job.model().train()
            optimizer = job.optimizer(model.parameters())
            # Made by a generator, and therefore real.
            batch = {name: torch.zeros_like(value) for name, value in job.batch(1).items()}
            run_step(job, StepContext(model, batch, optimizer, CPU))
        assert all(parameter.grad is not None for parameter in model.parameters())
