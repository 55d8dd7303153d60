"""The model and the batch of a traced step: fakes, or built for real where that needs data."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from residual_job import GPU, RESIDUAL, WIDTH, Residual, rows
from torch import Tensor, nn

from dpmem_profiling import Job
from dpmem_profiling.trace import trace


def test_a_constructor_that_needs_data_builds_for_real() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = (torch.arange(1, 4) * 8).tolist()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, width) for width in widths)
            self.register_buffer("gain", torch.tensor(0.5))
            self.first = self.layers[0]

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([layer(x) for layer in self.layers], 1) * self.gain

    traced = trace(replace(RESIDUAL, model=Counted), 4, GPU)
    parameters = sum(
        change.delta_bytes
        for change in traced.changes
        if change.storage is not None and traced.categories[change.storage] == "parameter"
    )
    assert parameters == 4 * (WIDTH + 1) * (8 + 16 + 24)


@pytest.mark.parametrize(
    "fill",
    [
        lambda weight: nn.init.trunc_normal_(weight, std=0.02),
        lambda weight: nn.init.normal_(weight, 3.0, 0.1),
        lambda weight: nn.init.uniform_(weight, 2.0, 4.0),
        lambda weight: weight.data.uniform_(),
    ],
)
def test_what_is_built_for_real_takes_no_random_numbers(fill: Callable[[Tensor], Tensor]) -> None:
    """Each weight is its distribution's mean, so constructors that reject values come to an end."""
    means = []

    def make_model() -> nn.Module:
        layer = nn.Linear(8, 8)
        fill(layer.weight)
        while not bool((layer.weight.abs() < 100).all()):
            fill(layer.weight)
        if type(layer.weight.data) is Tensor:
            means.append(layer.weight.unique().tolist())
        return layer

    job = Job(make_model, lambda n: torch.randn(n, 8), lambda model, batch: model(batch).sum())
    state = torch.get_rng_state()
    assert trace(job, 2, GPU).changes
    assert means[0] in ([0.0], [3.0], [0.5])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_truncated_normal_needs_no_data() -> None:
    built = []

    def make_model() -> nn.Module:
        layer = nn.Linear(8, 8)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        built.append(type(layer.weight.data))
        return layer

    job = Job(make_model, lambda n: torch.randn(n, 8), lambda model, batch: model(batch).sum())
    assert trace(job, 2, GPU).changes
    assert len(built) == 1
    assert built[0] is not Tensor


def test_a_model_may_be_cast_while_it_is_built() -> None:
    def bare() -> nn.Module:
        model = Residual()
        model.scale = nn.Parameter(torch.ones(WIDTH))
        return model.to(torch.bfloat16)

    traced = trace(replace(RESIDUAL, model=bare, batch=lambda n: rows(n).bfloat16()), 4, GPU)
    parameters = [
        traced.storages[i].dtype for i, c in enumerate(traced.categories) if c == "parameter"
    ]
    assert parameters == ["bfloat16"] * 5


def test_real_tensors_of_a_data_set_become_fake_ones() -> None:
    data = torch.randn(100, WIDTH)
    traced = trace(replace(RESIDUAL, batch=lambda n: data[:n]), 4, GPU)
    inputs = [traced.storages[i] for i, c in enumerate(traced.categories) if c == "input"]
    assert [info.shape for info in inputs] == [(4, WIDTH)] * len(traced.step_starts)


def test_an_expanded_input_arrives_at_its_full_size() -> None:
    job = replace(RESIDUAL, batch=lambda n: torch.zeros(1, WIDTH).expand(n, -1))
    traced = trace(job, 16, GPU)

    inputs = {i for i, category in enumerate(traced.categories) if category == "input"}
    arrived = [c.delta_bytes for c in traced.changes if c.storage in inputs and c.delta_bytes > 0]
    assert arrived == [16 * WIDTH * 4] * 2


def test_nothing_is_left_behind() -> None:
    state = torch.get_rng_state()
    trace(RESIDUAL, 4, GPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(Residual()(torch.ones(1, WIDTH))) is Tensor
