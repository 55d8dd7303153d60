"""What ranks tell each other about a backward besides its gradients."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Wait = Callable[[dist.Work], Any]


def used_on_some_rank(
    used: list[bool], group: dist.ProcessGroup, device: torch.device, wait: Wait
) -> Callable[[], list[int]]:
    """Tell which parameters received a gradient here; in return 1 for those that did on any rank.

    The answer is a function, because to read it is to wait for the device.
    """
    flags = torch.tensor(used, dtype=torch.int32, device=device)
    wait(dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group, async_op=True))
    return flags.tolist


def order_of_first_rank(
    order: list[int], group: dist.ProcessGroup, device: torch.device, wait: Wait
) -> list[int]:
    """Rank 0's `order`, on every rank."""
    told = torch.tensor(order, device=device)
    first = dist.get_global_rank(group, 0)
    wait(dist.broadcast(told, first, group=group, async_op=True))
    # Rank 0 need not read what it said: in a forecast it says it without data.
    return order if dist.get_rank(group) == 0 else told.tolist()
