"""What DataParallel's arguments must be, and what follows from them."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# DistributedDataParallel's: the first bucket is small, so that the first collective starts early.
_FIRST_BUCKET_BYTES = 1 << 20
_BUCKET_CAPACITY_MIB = 25.0


@dataclass(frozen=True)
class ReducerOptions:
    """What DataParallel was asked for.

    capacities_bytes  of the first bucket, the second, ...; the last holds for all that follow
    find_unused       a parameter may receive no gradient, another one on each rank
    static_graph      the same parameters receive gradients, as often, in every backward
    as_views          gradients are views of the buckets, else tensors of their own
    wire_dtype        what gradients travel as; None: as they are
    """

    capacities_bytes: tuple[int, ...]
    find_unused: bool = False
    static_graph: bool = False
    as_views: bool = True
    wire_dtype: torch.dtype | None = None


def capacities_bytes(each_mib: float | None, listed_mib: Sequence[float] | None) -> tuple[int, ...]:
    """Of the first bucket, the second, ...; the last holds for all that follow.

    Example: 4 MiB each and no list are (1 MiB, 4 MiB); 0.5 MiB each (0.5 MiB, 0.5 MiB).
    """
    if listed_mib:
        return tuple(int(mib * 2**20) for mib in listed_mib)
    # DistributedDataParallel's 0 is a bucket for each gradient.
    each = int((_BUCKET_CAPACITY_MIB if each_mib is None else each_mib) * 2**20) or 1
    return min(_FIRST_BUCKET_BYTES, each), each


def device_of(parameters: Iterable[nn.Parameter]) -> torch.device:
    """The device of the parameters that require a gradient.

    Raises RuntimeError where there is none, ValueError for several devices.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise RuntimeError(
            "DataParallel averages gradients, so the module must have a parameter that "
            "requires one; received none; use the module as it is"
        )
    devices = sorted({str(parameter.device) for parameter in trainable})
    if len(devices) > 1:
        raise ValueError(
            f"a wrapped module must live on one device; received {', '.join(devices)}; "
            "move it to one of them"
        )
    return trainable[0].device


def check_devices(
    device: torch.device,
    device_ids: Sequence[int | torch.device] | None,
    output_device: int | torch.device | None,
) -> None:
    """Raises ValueError where these do not name `device`, or more than one."""
    for named in (*(device_ids or ()), *(() if output_device is None else (output_device,))):
        wanted = torch.device("cuda", named) if isinstance(named, int) else torch.device(named)
        if wanted != device:
            raise ValueError(
                f"device_ids and output_device must name the module's device {device}; "
                f"received {wanted}; move the module there first, or leave them out"
            )
    if device_ids is not None and len(device_ids) > 1:
        raise ValueError(
            f"one process drives one device; received device_ids={list(device_ids)}; "
            "start one process a device with torchrun"
        )


def refuse(option: str, value: object, only: object, why: str) -> None:
    """Raises ValueError for any value of an option but the one that is honoured."""
    if value != only:
        raise ValueError(f"{option} must be {only!r}: {why}; received {value!r}; leave it out")


def group_of(process_group: dist.ProcessGroup | None, mesh: Any) -> dist.ProcessGroup | None:
    """The ranks to average over; None for this one alone.

    Raises RuntimeError for two groups, for a mesh of several dimensions and for a group that this
    rank is not in.
    """
    if mesh is not None:
        if process_group is not None:
            raise RuntimeError("Cannot specify both process_group and device_mesh arguments.")
        if mesh.ndim != 1:
            raise RuntimeError(
                f"Only 1D device mesh is supported, but got {mesh}; pass one dimension of it"
            )
        group = mesh.get_group(mesh_dim=0)
        assert isinstance(group, dist.ProcessGroup)
        return group
    if process_group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    if process_group is not None and dist.get_rank(process_group) < 0:
        raise RuntimeError(
            "a model is wrapped on the ranks of its process group; received a group that this rank "
            "is not in; wrap it on the others only"
        )
    return process_group


def refuse_to_leave_out(module: nn.Module, ignored: Collection[str]) -> None:
    """Raises ValueError where trained parameters are ignored, and so not clipped nor unscaled."""
    own = [n for n, p in module.named_parameters() if n in ignored and p.requires_grad]
    if own:
        raise ValueError(
            "max_grad_norm and precision='fp16' work on gradients that all ranks share; "
            f"{len(own)} that are trained were to be ignored, such as {own[0]!r}; freeze them, "
            "or clip and scale yourself"
        )


def sparse_weights(module: nn.Module) -> Collection[int]:
    """The ids of weights that receive sparse gradients."""
    layers: Iterable[nn.Module] = module.modules()
    return {
        id(layer.weight)
        for layer in layers
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse
    }
