"""Gradients of a single rank: nothing travels."""

from collections.abc import Sequence

from torch import Tensor, nn

from dpmem.layout import writable_gradient
from dpmem_kernels import GradStats, grad_stats


class LocalGradients:
    """World size 1: gradients stay where autograd left them. Stands in for a Reducer."""

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._parameters = [parameter for _, parameter in parameters]

    def prepare(self, *, synchronize: bool) -> None:
        """Nothing to prepare."""

    def follow(self, outputs: list[Tensor], *, synchronize: bool) -> None:
        """Nothing to follow."""

    def forward_failed(self, error: BaseException | None) -> None:
        """Nobody waits."""

    def release(self) -> None:
        """Nothing to release."""

    def bucket_tensors(self) -> list[Tensor]:
        """No buckets."""
        return []

    def gradients(self) -> list[Tensor]:
        """Every gradient once, flat, sharing memory with `parameter.grad`."""
        return [
            writable_gradient(parameter)
            for parameter in self._parameters
            if parameter.grad is not None
        ]

    def stats(self) -> list[GradStats]:
        """Sum of squares and finite flag of all gradients, read now."""
        gradients = self.gradients()
        return [grad_stats(gradients)] if gradients else []
