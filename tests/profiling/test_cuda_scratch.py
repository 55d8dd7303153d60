"""What CUDA's operators take beside their results: each rule at sizes worked out by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpmem_profiling import AllocatorSettings, Job
from dpmem_profiling.cuda_semantics import Architecture
from dpmem_profiling.trace import Kernels, Trace, between, trace
from dpmem_profiling.trace_replay import replay_allocations
from dpmem_profiling.tracker import Change

KERNELS = Kernels(architecture=(8, 6), cublas_workspace_bytes=512)
FLOAT_BYTES = 4


def traced(
    model: Callable[[], nn.Module], n: int, batch: Callable[[int], Tensor], steps: int = 1
) -> Trace:
    def loss(model: nn.Module, batch: Tensor) -> Any:
        return model(batch).square().mean()

    return trace(Job(model, batch, loss, name="layer"), n, KERNELS, steps=steps)


def images(n: int) -> Tensor:
    return torch.randn(n, 6, 10, 10)


def test_a_convolution_may_copy_what_is_not_channels_last() -> None:
    possible = traced(lambda: nn.Conv2d(6, 9, 3), 5, images).possible
    x, weight, out = 5 * 6 * 10 * 10, 9 * 6 * 3 * 3, 5 * 9 * 8 * 8
    # Forward reads x and weight; backward, of an input without gradient, the output's and x.
    assert [size_bytes for _, size_bytes in possible] == [FLOAT_BYTES * (x + weight + out)] * 2


def test_the_larger_of_two_gradients_of_a_convolution_counts() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.Conv2d(6, 100, 3, bias=False))

    possible = traced(model, 2, images).possible
    x, weight, out = 2 * 6 * 10 * 10, 100 * 6 * 3 * 3, 2 * 100 * 8 * 8
    # A weight of 1x1 is channels_last as it is. Backward goes from the last layer to the first.
    assert [size_bytes for _, size_bytes in possible] == [
        FLOAT_BYTES * 2 * x,
        FLOAT_BYTES * (x + weight + out),
        FLOAT_BYTES * (x + weight + out),
        FLOAT_BYTES * 2 * x,
    ]


def test_a_depthwise_convolution_is_not_cudnns() -> None:
    possible = traced(lambda: nn.Conv2d(6, 12, 3, groups=6), 5, images).possible
    assert [size_bytes for _, size_bytes in possible] == [0, 0]


def test_channels_last_needs_no_copies() -> None:
    def model() -> nn.Module:
        layers = nn.Sequential(nn.Conv2d(6, 9, 3), nn.Conv2d(9, 5, 3))
        return layers.to(memory_format=torch.channels_last)

    possible = traced(model, 5, lambda n: images(n).to(memory_format=torch.channels_last)).possible
    # The loss gives its gradient in another layout: one copy.
    grad_out = 5 * 5 * 6 * 6
    assert [size_bytes for _, size_bytes in possible] == [0, 0, FLOAT_BYTES * grad_out, 0]


def test_one_channel_is_not_depthwise() -> None:
    possible = traced(lambda: nn.Conv2d(1, 4, 3), 5, lambda n: torch.randn(n, 1, 10, 10)).possible
    # x and weight have one channel and any layout; the output is copied.
    assert [size_bytes for _, size_bytes in possible] == [FLOAT_BYTES * 5 * 4 * 8 * 8] * 2


def test_possible_workspaces_are_lines_in_the_batch() -> None:
    def model() -> nn.Module:
        return nn.Conv2d(6, 9, 3)

    low, high = traced(model, 3, images, 2), traced(model, 10, images, 2)
    for n in (3, 4, 9, 50):
        made = between(low, high, n)
        assert made is not None
        assert made.possible == traced(model, n, images, 2).possible


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


@pytest.mark.usefixtures("benchmark")
def test_the_fastest_convolution_copies_what_it_reads() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.Conv2d(6, 9, 3, bias=False))

    x, weight, out = 5 * 6 * 10 * 10, 9 * 6 * 3 * 3, 5 * 9 * 8 * 8
    # The layer of 1x1 multiplies matrices as they are. In backward the input's gradient is first.
    runs = [FLOAT_BYTES * size for size in (x + weight, out + weight, out + x)]
    made = traced(model, 5, images, steps=2)
    # In the first step each is taken twice: while kernels are tried, then by the best.
    assert workspaces(made) == [runs[0], runs[0], runs[1], runs[1], runs[2], runs[2], *runs]
    assert [size_bytes for _, size_bytes in made.possible][1:3] == [
        FLOAT_BYTES * (x + weight + out)
    ] * 2


@pytest.mark.usefixtures("benchmark")
def test_the_cache_is_emptied_for_each_convolution_that_is_met_first() -> None:
    def model() -> nn.Module:
        layers = [nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(3)]
        return nn.Sequential(*layers, nn.Conv2d(6, 6, 3, bias=False))

    made = traced(model, 5, images, steps=2)
    # Two kinds of layers: forward, input and weight. Only the first layer's input has no gradient.
    assert len(made.emptied) == 2 * 3
    assert max(made.emptied) < made.step_starts[1]
    assert traced(lambda: nn.Conv2d(6, 12, 3, groups=6), 5, images).emptied == ()


@pytest.mark.usefixtures("benchmark")
def test_without_tensor_cores_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(architecture: Architecture | None, dtype: torch.dtype) -> bool:
        def loss(model: nn.Module, batch: Tensor) -> Any:
            return model(batch.to(dtype)).square().mean()

        job = Job(lambda: nn.Conv2d(6, 9, 3, dtype=dtype), images, loss)
        return bool(workspaces(trace(job, 5, Kernels(architecture, 512), steps=1)))

    assert copied((7, 0), torch.float16)
    assert not copied((7, 5), torch.float32)
    assert not copied((7, 5), torch.bfloat16)
    assert copied((8, 0), torch.float32)
    assert not copied((8, 0), torch.float64)
    assert not copied(None, torch.float16)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert not copied((8, 0), torch.float32)


@pytest.mark.usefixtures("benchmark")
def test_what_is_tried_is_a_line_in_the_batch() -> None:
    def model() -> nn.Module:
        return nn.Conv2d(6, 9, 3)

    low, high = traced(model, 3, images, 2), traced(model, 10, images, 2)
    made, real = between(low, high, 50), traced(model, 50, images, 2)
    assert made is not None
    assert made.emptied == real.emptied
    assert [change.delta_bytes for change in made.changes] == [
        change.delta_bytes for change in real.changes
    ]
    assert between(low, replace(high, emptied=high.emptied[1:]), 50) is None


@pytest.mark.usefixtures("benchmark")
def test_a_convolution_goes_without_what_there_is_no_memory_for() -> None:
    made = traced(lambda: nn.Conv2d(6, 9, 3), 5000, images)
    settings = AllocatorSettings()
    peak_bytes = replay_allocations(made, settings, None).reserved_bytes
    assert peak_bytes is not None
    least = replace(made, changes=tuple(c for c in made.changes if not is_workspace(made, c)))
    least_bytes = replay_allocations(replace(least, emptied=()), settings, None).reserved_bytes
    assert least_bytes is not None
    assert least_bytes < peak_bytes
    with_less = replay_allocations(made, settings, least_bytes)
    assert with_less.reserved_bytes is not None
    assert with_less.reserved_bytes <= least_bytes


class Attention(nn.Module):
    """Of 4 heads of 40 to 2 groups, of 100 tokens, in half precision."""

    def __init__(self, masked: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(40, dtype=dtype))
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        query = self.scale * x.to(self.scale.dtype)
        mask = torch.ones(100, 100, dtype=torch.bool) if self.masked else None
        key = query if self.masked else query[:, :2]
        return F.scaled_dot_product_attention(query, key, key, mask, enable_gqa=True)


def test_attention_sums_a_gradient_in_single_precision() -> None:
    def batch(n: int) -> Tensor:
        return torch.empty(n, 4, 100, 40)

    rows = 3 * 4 * 128
    grouped = 2 * 3 * 100 * 4 * 40
    flash = traced(lambda: Attention(masked=False), 3, batch)
    assert workspaces(flash) == [4 * rows, 4 * rows * 64, grouped, grouped]
    efficient = traced(lambda: Attention(masked=True), 3, batch)
    # attention_backward.cu makes delta for the kernel to fill: a number for each query.
    assert workspaces(efficient) == [FLOAT_BYTES * 3 * 4 * 100, 4 * rows * 64]
    single = traced(lambda: Attention(masked=True, dtype=torch.float32), 3, batch)
    assert workspaces(single) == [FLOAT_BYTES * 3 * 4 * 100 * 40, FLOAT_BYTES * 3 * 4 * 100]


def test_softmax_backward_multiplies_first() -> None:
    made = traced(lambda: nn.Sequential(nn.Linear(10, 7), nn.Softmax(dim=-1)), 3, images)
    # Beside cuBLAS, which multiplies matrices in both threads.
    products = [FLOAT_BYTES * 3 * 6 * 10 * 7]
    assert [size_bytes for size_bytes in workspaces(made) if size_bytes != 512] == products


def test_attention_of_the_math_kernel_looks_for_rows_without_a_key() -> None:
    class Windows(nn.Module):
        """Of five dimensions, which no fused kernel takes."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            query = self.scale * x
            return F.scaled_dot_product_attention(query, query, query)

    made = traced(Windows, 3, lambda n: torch.empty(n, 2, 5, 11, 8))
    scores = 3 * 2 * 5 * 11 * 11
    found = [size_bytes for size_bytes in workspaces(made) if size_bytes != 512]
    assert found == [FLOAT_BYTES * scores, scores, FLOAT_BYTES * scores]


def tokens(n: int) -> Tensor:
    return torch.zeros(n, 33, dtype=torch.long)


def is_workspace(made: Trace, change: Change) -> bool:
    return change.storage is not None and made.categories[change.storage] == "workspace"


def workspaces(made: Trace) -> list[int]:
    return [
        change.delta_bytes
        for change in made.changes
        if is_workspace(made, change) and change.delta_bytes > 0
    ]


def test_an_embedding_sorts_its_indices_and_sums_in_parts() -> None:
    n = 7 * 33
    made = traced(lambda: nn.Embedding(100_000, 16), 7, tokens)
    assert workspaces(made) == [8 * n, 8 * n, (n // 10 + n) * 16 * FLOAT_BYTES]
    # Where few rows are looked up often, as many sums as rows.
    made = traced(lambda: nn.Embedding(50, 16), 7, tokens)
    assert workspaces(made) == [8 * n, 8 * n, (n // 10 + 50) * 16 * FLOAT_BYTES]


def test_partial_sums_are_a_line_to_a_row() -> None:
    def model() -> nn.Module:
        return nn.Embedding(100_000, 16)

    low, high = traced(model, 3, tokens, 2), traced(model, 10, tokens, 2)
    for n in (4, 9, 50):
        made = between(low, high, n)
        assert made is not None
        real = traced(model, n, tokens, 2)
        differences = [
            abs(a.delta_bytes - b.delta_bytes)
            for a, b in zip(made.changes, real.changes, strict=True)
        ]
        assert 0 < max(differences) <= 10 * 16 * FLOAT_BYTES
        assert sum(change.delta_bytes for change in made.changes) == sum(
            change.delta_bytes for change in real.changes
        )
