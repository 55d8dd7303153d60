"""What oneDNN takes beside the results of convolutions, against the CPU allocator's events."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpmem_profiling import Job
from dpmem_profiling.job import build, make_batch, run_step
from dpmem_profiling.stepping import StepContext
from dpmem_profiling.trace import trace

CPU = torch.device("cpu")
CAPABILITY = torch.backends.cpu.get_cpu_capability()

pytestmark = pytest.mark.skipif(
    CAPABILITY not in ("AVX2", "AVX512"), reason="the rules are those of oneDNN on x86"
)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """More than one, and 1x1 convolutions are oneDNN's too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job(*layers: Callable[[], nn.Module], side: int, channels_last: bool = False) -> Job:
    """8 images; what comes after the layers takes little."""
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def model() -> nn.Module:
        return nn.Sequential(*(layer() for layer in layers)).to(memory_format=layout)

    def batch(n: int) -> Tensor:
        first = layers[0]()
        return torch.randn(n, int(first.in_channels), side, side).contiguous(memory_format=layout)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return F.avg_pool2d(model(batch), 2).square().mean()

    return Job(model, batch, loss, name="convolutions")


def forecast_bytes(made: Job) -> int:
    changes = trace(made, 8, None, steps=1).changes
    return max(accumulate(change.delta_bytes for change in changes))


def allocated_bytes(made: Job) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profiler:
        built = build(made, CPU)
        batch = make_batch(made, 8, CPU)
        run_step(made, StepContext(built.model, batch, built.optimizer, CPU))
    assert profiler.profiler is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def conv(*sizes: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*sizes, bias=False, **options)


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(job(conv(16, 16, 3), conv(16, 32, 3), side=24), id="whole blocks"),
        pytest.param(job(conv(3, 20, 3), conv(20, 30, 3), side=24), id="filled blocks"),
        pytest.param(job(conv(6, 10, 3), side=24), id="few channels"),
        pytest.param(job(conv(16, 16, 1), conv(16, 10, 1), side=24), id="not oneDNN's"),
        pytest.param(job(conv(16, 64, 3), conv(64, 64, 3, groups=4), side=24), id="grouped"),
        pytest.param(job(conv(16, 64, 3), conv(64, 64, 3, groups=64), side=24), id="depthwise"),
        pytest.param(
            job(conv(16, 32, 3), lambda: nn.ConvTranspose2d(32, 16, 2, 2, bias=False), side=24),
            id="transposed",
        ),
    ],
)
def test_maps_are_copied_into_blocks(made: Job) -> None:
    assert forecast_bytes(made) == allocated_bytes(made)


@pytest.mark.skipif(CAPABILITY != "AVX512", reason="of older vectors other kernels are made")
@pytest.mark.parametrize(("groups", "channels_last"), [(1, False), (1, True), (256, True)], ids=str)
def test_so_are_weights(groups: int, channels_last: bool) -> None:
    """By far the largest here. Of a depthwise one 255 of 256 values are empty."""
    layers = (conv(256, 256, 3, padding=1, groups=groups) for _ in range(2))
    made = job(*layers, side=2, channels_last=channels_last)
    assert forecast_bytes(made) == pytest.approx(allocated_bytes(made), rel=0.002)


def test_frozen_weights_need_less() -> None:
    """Of the gradient of the input alone: the output's gradient, then the input's twice."""

    def frozen() -> nn.Module:
        return conv(32, 32, 3)().requires_grad_(False)

    made = job(conv(16, 32, 3), frozen, side=24)
    assert forecast_bytes(made) == allocated_bytes(made)


def test_the_gradient_decides_how_a_pooling_is_laid_out() -> None:
    """Of a flattened map it is contiguous: indices and the input's gradient are copied to be so."""

    def pooled() -> nn.Module:
        return nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Unflatten(1, (32, 12, 12)))

    made = job(conv(16, 32, 1), pooled, side=24, channels_last=True)
    assert forecast_bytes(made) == allocated_bytes(made)


class Summed(nn.Module):
    """Whose gradient is expanded: of its channels one is there."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)


def test_an_expanded_gradient_is_filled_for_any_convolution() -> None:
    made = job(conv(16, 64, 1), Summed, side=24)
    assert forecast_bytes(made) == allocated_bytes(made)
