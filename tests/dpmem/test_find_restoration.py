"""A search in the middle of training leaves no trace, whatever happens in it."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpmem
from dpmem import restore
from dpmem.restore import undisturbed

CPU = torch.device("cpu")
BUDGET_BYTES = 200_000
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01, foreach=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, foreach=True),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, 0.01, fused=True),
}


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 4)
    )


class Run:
    """Everything that a training loop holds."""

    def __init__(self, optimizer: str, workers: int = 0) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = net()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        data = TensorDataset(torch.randn(160, 16), torch.randn(160, 4))
        self.batches: Iterator[Any] = iter(DataLoader(data, 8, shuffle=True, num_workers=workers))

    def train_on(self, x: Tensor, y: Tensor) -> float:
        loss = (self.model(x) - y).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.item()

    def train(self, n: int) -> list[float]:
        return [self.train_on(*next(self.batches)) for _ in range(n)]

    def bits(self) -> list[Any]:
        return [
            [tensor.numpy().tobytes() for tensor in self.model.state_dict().values()],
            [
                value.numpy().tobytes() if isinstance(value, Tensor) else value
                for state in self.optimizer.state.values()
                for value in state.values()
            ],
            [{**group, "params": None} for group in self.optimizer.param_groups],
            self.scheduler.state_dict(),
            self.scaler.state_dict(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
            [module.training for module in self.model.modules()],
            [None if p.grad is None else p.grad.tolist() for p in self.model.parameters()],
        ]

    def find(self, step: Callable[[int], None] | None = None) -> dpmem.BatchSizeResult:
        return dpmem.find_batch_size(
            step or self.step,
            state=[self.model, self.optimizer, self.scheduler, self.scaler],
            budget_bytes=BUDGET_BYTES,
            device=CPU,
        )

    def step(self, n: int) -> None:
        random.random()
        np.random.rand()
        self.train_on(torch.randn(n, 16), torch.randn(n, 4))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("done", [0, 10], ids=["before the first step", "after ten"])
def test_twenty_steps_are_the_same_with_a_search_between(optimizer: str, done: int) -> None:
    plain = Run(optimizer)
    expected = plain.train(20)
    run = Run(optimizer)
    losses = run.train(done)
    before = run.bits()
    found = run.find()
    assert found.largest_safe is not None
    assert found.largest_safe > 8
    assert run.bits() == before
    assert losses + run.train(20 - done) == expected
    assert run.bits() == plain.bits()


def test_a_loader_with_workers_goes_on_where_it_was() -> None:
    expected = Run("sgd", workers=2).train(20)
    run = Run("sgd", workers=2)
    losses = run.train(10)
    run.find()
    assert losses + run.train(10) == expected


def test_a_live_model_and_optimizer() -> None:
    run = Run("adamw")
    run.train(2)
    run.model.eval()
    run.model[1].train()
    run.model[0].weight.grad = torch.ones(32, 16)
    handle = run.model[0].register_forward_hook(lambda *_: None)
    before, hooks = run.bits(), dict(run.model[0]._forward_hooks)
    found = dpmem.find_batch_size(
        (run.model, run.optimizer),
        batch=lambda n: torch.randn(n, 16),
        loss=lambda model, x: model(x).square().mean(),
        budget_bytes=BUDGET_BYTES,
        device=CPU,
    )
    assert found.largest_safe is not None
    assert run.bits() == before
    assert dict(run.model[0]._forward_hooks) == hooks
    handle.remove()


def test_the_bits_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches are tried: a copy of a model and its optimizer is large."""
    kept: list[Any] = []
    keep = restore._Memory._keep_tensor

    def counting(memory: Any, tensor: Tensor) -> list[Any]:
        kept.append(tensor)
        return keep(memory, tensor)

    monkeypatch.setattr(restore._Memory, "_keep_tensor", counting)
    run = Run("adam")
    assert len(run.find().probes) > 1
    assert len(kept) == len({id(tensor) for tensor in kept}) > 4


class Broken:
    """Raises `error` at one point of the step, from batch 4 on."""

    def __init__(self, run: Run, phase: str, error: BaseException) -> None:
        self.run, self.phase, self.error = run, phase, error

    def __call__(self, n: int) -> None:
        run = self.run
        x = torch.randn(n, 16)

        def reach(phase: str) -> None:
            if n >= 4 and phase == self.phase:
                raise self.error

        reach("batch")
        run.model[1].eval()
        run.model[0].register_forward_hook(lambda *_: None)
        output = run.model(x)
        output.register_hook(lambda _: reach("backward"))
        reach("forward")
        run.scaler.scale(output.square().mean()).backward()
        run.scaler.step(run.optimizer)
        reach("step")
        run.scaler.update()
        run.scheduler.step()
        reach("end")


PHASES = ["batch", "forward", "backward", "step", "end"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_out_of_memory_in_any_phase(phase: str, optimizer: str) -> None:
    run = Run(optimizer)
    run.train(3)
    before = run.bits()
    found = run.find(Broken(run, phase, torch.OutOfMemoryError("CUDA out of memory.")))
    assert found.largest_fitting == 3
    assert run.bits() == before
    assert not run.model[0]._forward_hooks


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("steps", [0, 3])
def test_an_interrupt_in_any_phase(phase: str, steps: int) -> None:
    run = Run("adamw")
    run.train(steps)
    before = run.bits()
    with pytest.raises(KeyboardInterrupt):
        run.find(Broken(run, phase, KeyboardInterrupt()))
    assert run.bits() == before
    assert not run.model[0]._forward_hooks


def test_objects_stay_the_same_ones() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    weight, address = model.weight, model.weight.data_ptr()
    expected = weight.detach().clone()
    with undisturbed([model, optimizer]):
        model.weight.data = torch.zeros(3, 3)
        model.weight.requires_grad_(False)
        model.extra = nn.Linear(1, 1)
        model.bias.register_hook(lambda gradient: gradient * 0)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert model.weight is weight
    assert weight.data_ptr() == address
    assert torch.equal(weight, expected)
    assert weight.requires_grad
    assert not hasattr(model, "extra")
    assert not optimizer.state
    model(torch.ones(1, 3)).sum().backward()
    assert model.bias.grad.tolist() == [1, 1, 1]


def test_buffers_and_arrays_of_every_kind() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("expanded", torch.zeros(1, 2).expand(3, 2), persistent=False)
            self.register_buffer("meta", torch.empty(2, device="meta"))
            self.seen = np.zeros(2)
            self.generator = np.random.default_rng(0)
            self.legacy = np.random.RandomState(0)

    model = Model()
    expanded, drawn = model.expanded, np.random.default_rng(0).random(3).tolist()
    drawn_by_legacy = np.random.RandomState(0).randn(3).tolist()
    with undisturbed([model]):
        model.expanded[0] += 1
        model.expanded = torch.ones(3, 2)
        model.seen += 1
        model.generator.random(5)
        model.legacy.randn(5)
    assert model.expanded is expanded
    assert not expanded.any()
    assert model.seen.tolist() == [0, 0]
    assert model.generator.random(3).tolist() == drawn
    assert model.legacy.randn(3).tolist() == drawn_by_legacy


def test_a_file_mapped_into_memory_is_not_copied(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    mapped = np.memmap(tmp_path / "data", dtype=np.uint8, mode="w+", shape=(8,))
    model.data = mapped
    with undisturbed([model]):
        model.data[0] = 1
        model.data = None
    assert model.data is mapped
    assert mapped[0] == 1


def test_a_lazy_model_is_lazy_again() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    optimizer = torch.optim.Adam(model.parameters())
    with undisturbed([model, optimizer]):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert isinstance(model[0], nn.LazyLinear)
    assert model(torch.ones(2, 5)).shape == (2, 4)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()


def test_what_became_part_of_a_graph_leaves_it() -> None:
    """An average of weights that forgets `no_grad`."""
    average, weight = torch.zeros(2), torch.ones(2, requires_grad=True)
    model = nn.Linear(2, 2)
    before = model.weight.tolist()
    with undisturbed([[average, model]]):
        average.lerp_(weight, 0.5)
        nn.init.zeros_(model.weight)
    assert average.tolist() == [0, 0]
    assert not average.requires_grad
    assert model.weight.tolist() == before


def test_what_cannot_be_put_back_keeps_nothing_else_from_it() -> None:
    class Stubborn:
        @property
        def __dict__(self) -> dict[str, int]:  # type: ignore[override]
            return Refuses(a=1)

    class Refuses(dict[str, int]):
        def clear(self) -> None:
            raise KeyError("not mine")

    model = nn.Linear(2, 2)
    before = model.weight.tolist()
    with pytest.raises(KeyError, match="not mine"), undisturbed([Stubborn(), model]):
        nn.init.zeros_(model.weight)
    assert model.weight.tolist() == before
