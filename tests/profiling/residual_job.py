"""The job that tests of traces trace, and the peak of what they traced."""

from typing import Any

import torch
from torch import Tensor, nn

from dpmem_profiling import Job
from dpmem_profiling.trace import Kernels, Trace

WIDTH = 32
GPU = Kernels((8, 6), cublas_workspace_bytes=4096)


class Residual(nn.Module):
    """Uses its input twice, so that autograd must add two gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.inner(x)
        return x


def rows(n: int) -> Tensor:
    return torch.randn(n, WIDTH)


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


RESIDUAL = Job(Residual, rows, mean_square, optimizer=sgd, name="residual")


def last_step_peak_bytes(traced: Trace) -> int:
    """The most bytes live in the last step, workspaces left out."""
    live = peak = 0
    for event, change in enumerate(traced.changes):
        if change.storage is not None and traced.categories[change.storage] != "workspace":
            live += change.delta_bytes
        if event >= traced.step_starts[-1]:
            peak = max(peak, live)
    return peak
