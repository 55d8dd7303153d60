"""Communication hooks: DistributedDataParallel's for our engine, and our kernels for its engine."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _distributed_c10d as c10d

from dpmem_kernels import PackPlan, bucket_pack, bucket_unpack

Reduced = torch.futures.Future[Tensor]


class GradBucket:
    """One bucket of gradients on its way, with the methods of torch.distributed.GradBucket.

    torch's own hooks (torch.distributed.algorithms.ddp_comm_hooks) take it.
    """

    def __init__(self, number: int, buffer: Tensor, members: Sequence[Any], is_last: bool) -> None:
        self._number = number
        self._buffer = buffer
        self._members = members
        self._is_last = is_last

    def index(self) -> int:
        """Its number among the buckets of a backward, from 0, in the order of their launch."""
        return self._number

    def buffer(self) -> Tensor:
        """This rank's gradients, not yet divided by the number of ranks: 1-D."""
        return self._buffer

    def set_buffer(self, tensor: Tensor) -> None:
        """Reduce `tensor` instead, of the same size. Raises ValueError for another size."""
        if tensor.numel() != self._buffer.numel():
            raise ValueError(
                f"a bucket of {self._buffer.numel()} elements must keep its size; received "
                f"{tensor.numel()}"
            )
        self._buffer = tensor.view(-1)

    def gradients(self) -> list[Tensor]:
        """Views of the buffer in the parameters' shapes."""
        if self._buffer.is_sparse:
            return [self._buffer]
        return [member.view(self._buffer) for member in self._members]

    def parameters(self) -> list[nn.Parameter]:
        """Whose gradients these are, in the order of `gradients()`."""
        return [member.parameter for member in self._members]

    def is_last(self) -> bool:
        """Is it the last bucket of the backward?"""
        return self._is_last


CommHook = Callable[[GradBucket], Reduced]


def comm_hook(
    wire_dtype: torch.dtype = torch.bfloat16, process_group: dist.ProcessGroup | None = None
) -> Callable[[object, c10d.GradBucket], Reduced]:
    """A communication hook for DistributedDataParallel that averages gradients as `wire_dtype`.

    One launch casts the bucket and divides it by the number of ranks, one casts what came back.
    Division comes before the rounding and the sum, so that a half-precision sum overflows no sooner
    than the average.

    wire_dtype     torch.bfloat16, float16 or float32
    process_group  the one of the model; default: all ranks

    Raises ValueError for another dtype, TypeError at a bucket that is not float32, bfloat16 or
    float16.

    Example:
        model = DistributedDataParallel(model)
        model.register_comm_hook(None, dpmem.comm_hook())
    """
    if wire_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            "wire_dtype must be torch.bfloat16, torch.float16 or torch.float32; received "
            f"{wire_dtype}"
        )
    plans: dict[tuple[int, torch.dtype, torch.device], PackPlan] = {}

    def average(state: object, bucket: c10d.GradBucket) -> Reduced:
        buffer = bucket.buffer()
        key = (buffer.numel(), buffer.dtype, buffer.device)
        if key not in plans:
            plans[key] = PackPlan([buffer.numel()], [buffer.dtype], [0], buffer.device)
        plan = plans[key]
        wire = torch.empty(buffer.numel(), dtype=wire_dtype, device=buffer.device)
        bucket_pack(plan, [buffer], wire, scale=1.0 / dist.get_world_size(process_group))
        work = dist.all_reduce(wire, group=process_group, async_op=True)

        def arrive(_: torch.futures.Future[list[Tensor]]) -> Tensor:
            bucket_unpack(plan, wire, [buffer])
            return buffer

        return work.get_future().then(arrive)

    return average
