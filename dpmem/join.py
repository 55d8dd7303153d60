"""Uneven inputs: a rank that has run out takes part in what the others still do.

The protocol is torch.distributed.algorithms.join's, so a wrapper shares one Join context with other
Joinables, such as ZeroRedundancyOptimizer.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import JoinHook


class Shadowing(Protocol):
    """What a wrapper does for ranks that have joined."""

    def shadow_step(self) -> None:
        """Match the collectives of one forward and backward of the other ranks."""

    def take_final_model(self, *, is_last: bool) -> None:
        """Take the model of the rank that joined last."""


class Shadow(JoinHook):
    """What torch's Join runs on a rank without inputs."""

    def __init__(self, wrapper: Shadowing) -> None:
        self._wrapper = wrapper

    def main_hook(self) -> None:
        """As often as another rank runs a forward."""
        self._wrapper.shadow_step()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Once, when no rank has inputs left."""
        self._wrapper.take_final_model(is_last=is_last_joiner)


def any_synchronizes(group: dist.ProcessGroup, device: torch.device, mine: bool) -> bool:
    """Will the backward of this forward be averaged? Ranks without inputs follow the others."""
    flag = torch.tensor([int(mine)], device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return bool(flag.item())


def active_ranks(work: dist.Work) -> int:
    """How many ranks have inputs, from the all-reduce that Join.notify_join_context started."""
    (count,) = work.get_future().wait()
    assert isinstance(count, Tensor)
    return int(count.item())
