"""Several groups, several wrappers, wrappers of one rank; ranks' side."""

import copy
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
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


def several_wrappers(rank: int, how: str) -> list[str]:
    """Two wrappers in one backward, of which rank 0 leaves layers unused."""
    first, second = Layers(), Layers()
    both = nn.ModuleList([first, second])
    wrappers = [
        # 10 bytes: every gradient has a bucket to itself.
        dpmem.DataParallel(model, find_unused_parameters=True, bucket_cap_mb=1e-5)
        for model in (first, second)
    ]

    def loss(models: Sequence[nn.Module], rank: int, step: int) -> Tensor:
        x = input_of(rank + step)
        used = "ab" if rank == 0 else "abc"
        if how == "nested":
            x.requires_grad_()
            hidden = checkpoint(models[0], x, use_reentrant=True)
            return models[1](hidden, used).square().sum()
        if how == "chained":
            return models[1](models[0](x), used).square().sum()
        return models[0](x, used[::-1]).square().sum() + models[1](x, used).square().sum()

    different = []
    for step in range(3):
        expected = averaged(both, lambda models, rank, step=step: loss(models, rank, step))
        loss(wrappers, rank, step).backward()
        different += [f"step {step}: {name}" for name in differing(both, expected)]
        both.zero_grad()
    return different


def group_of_others(rank: int) -> None:
    alone = [dist.new_group([one]) for one in range(2)]
    dpmem.DataParallel(Layers(), process_group=alone[1 - rank])
