"""What makes ranks hold the same model: agreement at the start, broadcasts from one of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def check_ranks_agree(
    parameters: Sequence[tuple[str, nn.Parameter]], group: dist.ProcessGroup
) -> None:
    """Raises RuntimeError where a rank has other names, shapes, dtypes or strides than another."""
    mine = [
        (name, tuple(p.shape), str(p.dtype), p.stride(), p.requires_grad) for name, p in parameters
    ]
    first, everyone = _gathered(mine, group)
    for rank, theirs in everyone.items():
        if theirs == everyone[first]:
            continue
        different = next(
            (pair for pair in zip(everyone[first], theirs, strict=False) if pair[0] != pair[1]),
            (f"{len(everyone[first])} parameters", f"{len(theirs)} parameters"),
        )
        raise RuntimeError(
            f"all ranks must wrap the same model; rank {first} and rank "
            f"{rank} differ: {different[0]} against {different[1]}; build it from the same "
            "configuration on every rank"
        )


def check_same(group: dist.ProcessGroup, what: str, mine: object) -> None:
    """Raises RuntimeError on all ranks where one has another value than the first. A collective."""
    first, everyone = _gathered(mine, group)
    for rank, theirs in everyone.items():
        if theirs != everyone[first]:
            raise RuntimeError(
                f"all ranks must have the same {what}; rank {first} has {everyone[first]} and "
                f"rank {rank} has {theirs}; give every rank the same"
            )


def _gathered(mine: object, group: dist.ProcessGroup) -> tuple[int, dict[int, Any]]:
    """The group's first rank, and what each has, by their numbers in the default group."""
    ranks = dist.get_process_group_ranks(group)
    everyone: list[Any] = [None] * len(ranks)
    dist.all_gather_object(everyone, mine, group=group)
    return ranks[0], dict(zip(ranks, everyone, strict=True))


def check_same_bits(tensors: Sequence[tuple[str, Tensor]], group: dist.ProcessGroup) -> None:
    """Raises RuntimeError on all ranks where a tensor's bits differ from the first's. A collective.

    Eight bytes of each tensor travel, its `_digest`.
    """
    with torch.no_grad():
        mine = torch.stack([_digest(tensor) for _, tensor in tensors])
    ranks = dist.get_process_group_ranks(group)
    everyone = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(everyone, mine, group=group)
    for rank, theirs in zip(ranks, everyone, strict=True):
        different = (theirs != everyone[0]).nonzero().flatten().tolist()
        if different:
            raise RuntimeError(
                "all ranks must hold the same parameters and buffers bit for bit; rank "
                f"{rank} differs from rank {ranks[0]} in {len(different)} of {len(tensors)}, such "
                f"as {tensors[different[0]][0]!r}; change them by the averaged gradients alone, or "
                "wrap the model again to start alike"
            )


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Odd, and so are all the weights made of it: no change of one word goes unseen.
_WEIGHT = -7046029254386353131
_DIGESTED_AT_ONCE = 1 << 20


def _digest(tensor: Tensor) -> Tensor:
    """An int64 scalar: the tensor's bits as words, summed with weights by place, modulo 2^64.

    Example: fp32 [1.0, 2.0], the words 0x3F800000 and 0x40000000, give
    0x3F800000 w + 0x40000000 (3 w) with w = 0x9E3779B97F4A7C15.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _DIGESTED_AT_ONCE):
        some = words[start : start + _DIGESTED_AT_ONCE]
        place = torch.arange(start, start + some.numel(), device=tensor.device)
        total += ((2 * place + 1) * _WEIGHT * some).sum()
    return total


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
