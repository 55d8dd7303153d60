"""What gradients travel as, and communication hooks; ranks' side."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from toys import Layers, are_equal_across_ranks, averaged, input_of

import dpmem


def narrow_wire(rank: int, dtype: torch.dtype) -> tuple[list[str], bool, set[torch.dtype]]:
    """Gradients that travel as `dtype`: rounded once before the sum and in it, equal on all."""
    model = Layers()
    wrapped = dpmem.DataParallel(model, wire_dtype=dtype)
    traveled: list[torch.dtype] = []
    plain = dist.all_reduce

    def spy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        traveled.append(tensor.dtype)
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = spy
    try:
        wrapped(input_of(rank)).square().sum().backward()
    finally:
        dist.all_reduce = plain
    exact = averaged(model, lambda model, rank: model(input_of(rank)).square().sum())
    shares = []
    for other in range(dist.get_world_size()):
        alone = copy.deepcopy(model)
        alone.zero_grad()
        alone(input_of(other)).square().sum().backward()
        shares.append([(p.grad / dist.get_world_size()).to(dtype) for p in alone.parameters()])
    wrong = [
        name
        for (name, p), a, b in zip(model.named_parameters(), *shares, strict=True)
        if not torch.equal(p.grad, (a + b).float())
    ]
    assert not all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), exact, strict=True))
    same = are_equal_across_ranks([p.grad for p in model.parameters()])
    return wrong, same, set(traveled)


def clipped_over_a_narrow_wire(rank: int) -> tuple[float, float]:
    """The norm that clipping saw, and that of the gradients before it."""
    model = Layers()
    wrapped, optimizer = dpmem.wrap(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        max_grad_norm=0.01,
        wire_dtype=torch.bfloat16,
    )
    wrapped(input_of(rank)).square().sum().backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    optimizer.step()
    return float(wrapped.grad_norm), float(expected)


def torchs_hook(rank: int) -> list[float]:
    """torch's bf16 hook on our engine, and an error for a hook that returns a list."""
    model = Layers()
    wrapped = dpmem.DataParallel(model, bucket_cap_mb=0.0001)
    wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    expected = averaged(model, lambda model, rank: model(input_of(rank)).square().sum())
    wrapped(input_of(rank)).square().sum().backward()
    return [
        float((p.grad - e).abs().max() / e.abs().max())
        for p, e in zip(model.parameters(), expected, strict=True)
    ]


def hook_of_a_list(rank: int) -> None:
    wrapped = dpmem.DataParallel(Layers())

    def hook(state: object, bucket: dpmem.GradBucket) -> Any:
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future()

    wrapped.register_comm_hook(None, hook)
    wrapped(input_of(rank)).sum().backward()


def two_hooks(rank: int) -> None:
    wrapped = dpmem.DataParallel(Layers())
    wrapped.register_comm_hook(None, default_hooks.allreduce_hook)
    wrapped.register_comm_hook(None, default_hooks.allreduce_hook)


def our_hook_for_ddp(rank: int) -> list[str]:
    """DistributedDataParallel with dpmem.comm_hook: as our engine with that wire."""
    theirs = DistributedDataParallel(Layers())
    theirs.register_comm_hook(None, dpmem.comm_hook(torch.bfloat16))
    ours = dpmem.DataParallel(Layers(), wire_dtype=torch.bfloat16)
    different = []
    for _ in range(3):
        for model in (theirs, ours):
            model.zero_grad()
            model(input_of(rank)).square().sum().backward()
        different += [
            name
            for (name, a), b in zip(
                theirs.module.named_parameters(), ours.parameters(), strict=True
            )
            if not torch.equal(a.grad, b.grad)
        ]
    return different
