"""What makes ranks hold the same model: agreement at the start, broadcasts from one of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def check_ranks_agree(
    parameters: Sequence[tuple[str, nn.Parameter]], group: dist.ProcessGroup
) -> None:
    """Raises RuntimeError where ranks hold other names, shapes, dtypes or strides than rank 0."""
    mine = [
        (name, tuple(p.shape), str(p.dtype), p.stride(), p.requires_grad) for name, p in parameters
    ]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        if theirs == everyone[0]:
            continue
        different = next(
            (pair for pair in zip(everyone[0], theirs, strict=False) if pair[0] != pair[1]),
            (f"{len(everyone[0])} parameters", f"{len(theirs)} parameters"),
        )
        raise RuntimeError(
            "all ranks must wrap the same model; rank 0 and rank "
            f"{rank} differ: {different[0]} against {different[1]}; build it from the same "
            "configuration on every rank"
        )


def check_same(group: dist.ProcessGroup, what: str, mine: object) -> None:
    """Raises RuntimeError on all ranks where one has another value than rank 0. A collective."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise RuntimeError(
                f"all ranks must have the same {what}; rank 0 has {everyone[0]} and rank {rank} "
                f"has {theirs}; give every rank the same"
            )


# Tensors travel together, as many as fit this; larger ones alone, without a copy.
_TOGETHER_BYTES = 25 << 20


def broadcast(
    tensors: Iterable[Tensor],
    group: dist.ProcessGroup,
    source: int = 0,
    *,
    wait: Callable[[dist.Work], object] = dist.Work.wait,
) -> None:
    """Give all ranks the values of `source`, a rank of `group`; `wait` awaits each collective."""
    first = dist.get_global_rank(group, source)
    is_source = dist.get_rank(group) == source
    with torch.no_grad():
        parcels = [
            # By .data, which counts no version, as a collective counts none: what a forward saved
            # of a buffer stays usable, and the ranks' buffers differ by that rank's own doing.
            (members, _parcel(members))
            for members in _together([tensor.data for tensor in tensors])
        ]
        works = [dist.broadcast(parcel, first, group=group, async_op=True) for _, parcel in parcels]
        for work, (members, parcel) in zip(works, parcels, strict=True):
            wait(work)
            if is_source or parcel is members[0]:
                continue
            shares = parcel.split([member.numel() for member in members])
            for member, share in zip(members, shares, strict=True):
                member.copy_(share.view(member.shape))


def _together(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Groups of tensors of one dtype and device, in an order that all ranks share."""
    groups: list[list[Tensor]] = []
    open_group: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        key = (tensor.dtype, tensor.device)
        group = open_group.get(key)
        held = 0 if group is None else sum(member.nbytes for member in group)
        if group is None or held + tensor.nbytes > _TOGETHER_BYTES:
            group = open_group[key] = []
            groups.append(group)
        group.append(tensor)
    return groups


def _parcel(members: Sequence[Tensor]) -> Tensor:
    if len(members) == 1 and members[0].is_contiguous():
        return members[0]
    return torch.cat([member.reshape(-1) for member in members])


def highest_rank(group: dist.ProcessGroup, device: torch.device, *, among: bool) -> int:
    """The highest rank of those for which `among` holds; -1 for none. A collective."""
    rank = torch.tensor([dist.get_rank(group) if among else -1], device=device)
    dist.all_reduce(rank, dist.ReduceOp.MAX, group)
    return int(rank.item())


def maximum(group: dist.ProcessGroup, device: torch.device, values: Tensor) -> Tensor:
    """The elementwise maximum of `values`, a tensor on the host, over the ranks of `group`."""
    on_device = values.to(device, copy=True)
    dist.all_reduce(on_device, dist.ReduceOp.MAX, group)
    return on_device.cpu()
