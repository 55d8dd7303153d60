"""Which trained parameter's gradient lives in which bucket, and the memory of all buckets."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from dpmem.bucket_buffer import BucketBuffer, Member, SparseBuffer, size_and_dtype
from dpmem.buckets import BucketPlan
from dpmem.layout import writable_gradient
from dpmem_kernels import GradStats, grad_stats


class BucketLayout:
    """The buckets of those of `parameters` that require a gradient now; made anew for others.

    capacities_bytes  of the first bucket, the second, ...; the last holds for all that follow
    wire_dtype        what gradients travel as; None: as they are
    sparse            indices of parameters whose gradients are sparse
    order             in which gradients come, counted among those that require one; None: the
                      last first
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        capacities_bytes: Sequence[int],
        wire_dtype: torch.dtype | None,
        sparse: Collection[int],
        order: Sequence[int] | None,
    ) -> None:
        # What this was made for.
        self.kinds = kinds_of(parameters)
        self.trainable = tuple(i for i, p in enumerate(parameters) if p.requires_grad)
        self._frozen = [p for p in parameters if not p.requires_grad]
        self.plan = BucketPlan.build(
            [size_and_dtype(parameters[i]) for i in self.trainable],
            capacities_bytes=capacities_bytes,
            order=order,
            alone=[place for place, i in enumerate(self.trainable) if i in sparse],
        )
        self.buffers: list[BucketBuffer] = []
        # Of each trained parameter: the number of its bucket, and where in it.
        self.place_of: dict[int, tuple[int, Member]] = {}
        for number, bucket in enumerate(self.plan.buckets):
            indices = [self.trainable[slot.parameter] for slot in bucket.slots]
            members = [parameters[i] for i in indices]
            if indices[0] in sparse:
                self.buffers.append(SparseBuffer(bucket, members))
            else:
                self.buffers.append(BucketBuffer(bucket, members, wire_dtype))
            for index, member in zip(indices, self.buffers[-1].members, strict=True):
                self.place_of[index] = number, member

    def tensors(self) -> list[Tensor]:
        """The flat buffers that exist now."""
        return [buffer.flat for buffer in self.buffers if buffer.flat is not None]

    def release(self) -> None:
        """Let go of buckets whose gradients have all been set to None."""
        for buffer in self.buffers:
            if not buffer.has_gradients():
                buffer.release()

    def gradients(self) -> list[Tensor]:
        """Every gradient once, flat: a whole bucket where all its gradients are still its views."""
        return [*self._kept(), *(g for buffer in self.buffers for g in buffer.gradients())]

    def stats(self) -> list[GradStats]:
        """Sums of squares and finite flags that together cover `gradients()`."""
        kept = self._kept()
        of_kept = [grad_stats(kept)] if kept else []
        return [*of_kept, *(stats for buffer in self.buffers for stats in buffer.stats())]

    def _kept(self) -> list[Tensor]:
        """Gradients that parameters had when they were frozen: optimizers update with these too."""
        return [writable_gradient(p) for p in self._frozen if p.grad is not None]


def kinds_of(parameters: Sequence[nn.Parameter]) -> list[tuple[bool, torch.dtype]]:
    """All of parameters that a layout depends on and that may change."""
    return [(p.requires_grad, p.dtype) for p in parameters]
