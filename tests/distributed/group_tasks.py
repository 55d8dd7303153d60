"""Several groups, several wrappers, wrappers of one rank; ranks' side."""

import copy

import torch.distributed as dist
from torch import Tensor, nn
from toys import Layers, averaged, differing, input_of

import dpmem


def _loss(model: nn.Module, rank: int) -> Tensor:
    return model(input_of(rank)).square().sum()


def copied_on_one_rank(rank: int, precision: str) -> list[str]:
    """Rank 0 keeps the best so far; then all copy, and train the copy."""
    wrapped, _ = dpmem.wrap(Layers(), precision=precision)
    _loss(wrapped, rank).backward()
    if rank == 0:
        copy.deepcopy(wrapped)
    wrapped.zero_grad()
    again = copy.deepcopy(wrapped)
    different = []
    for trained in (wrapped, again):
        model = trained.module
        expected = averaged(model, _loss)
        _loss(trained, rank).backward()
        trained.unscale_()
        if precision == "fp32":
            different += differing(model, expected)
    return different


def different_models_in_a_group(rank: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    dpmem.DataParallel(nn.Linear(2, 1 + rank), process_group=groups[rank // 2])
