"""Backwards of every kind, each compared with the sum that plain modules give in one process.

A scenario trains `net` as rank `rank` would. Run on the wrapper it must leave the mean, over ranks,
of what it leaves on the bare module; where it says "local", this rank's own gradients.
"""

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dpmem


class Net(nn.Module):
    """Two layers, and a head that losses may apply themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 600, bias=False)

    def forward(self, x: Tensor, *, to_head: bool = True) -> Tensor:
        hidden = self.second(torch.tanh(self.first(x)))
        return self.head(hidden)[:, :4] if to_head else hidden


class Planned(Exception):  # noqa: N818 - not an error of the code under test
    """Raised by a hook in the middle of a backward."""


def _x(rank: int, step: int = 0) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def _no_sync(net: nn.Module) -> AbstractContextManager[None]:
    return net.no_sync() if isinstance(net, dpmem.DataParallel) else nullcontext()


def _inner(net: nn.Module) -> Net:
    return net.module if isinstance(net, dpmem.DataParallel) else net


def _checkpointed(net: nn.Module, rank: int, which: str, reentrant: bool) -> None:
    x = _x(rank).requires_grad_()

    def call(x: Tensor, inside: bool) -> Tensor:
        return checkpoint(net, x, use_reentrant=reentrant) if inside else net(x)

    call(call(x, which in ("first", "both")), which in ("second", "both")).sum().backward()


def head_outside(net: nn.Module, rank: int) -> None:
    """The loss applies the head itself, so its gradient arrives before the output is reached."""
    hidden = net(_x(rank), to_head=False)
    F.linear(hidden, _inner(net).head.weight).square().mean().backward()


def head_outside_after_accumulation(net: nn.Module, rank: int) -> None:
    with _no_sync(net):
        head_outside(net, rank)
    head_outside(net, rank)


def input_gradient_first(net: nn.Module, rank: int) -> None:
    """One rank alone asks for its input's gradient: nobody else is in a backward then."""
    x = _x(rank).requires_grad_()
    output = net(x).sum()
    if rank == 0:
        torch.autograd.grad(output, x)
    net(_x(rank, 1)).sum().backward()


def gradient_penalty(net: nn.Module, rank: int) -> None:
    x = _x(rank).requires_grad_()
    (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()


def frozen_for_a_while(net: nn.Module, rank: int) -> None:
    """A discriminator in the generator's step: its parameters need no gradient then."""
    net.requires_grad_(False)
    net(_x(rank).requires_grad_()).sum().backward()
    net.requires_grad_(True)
    net(_x(rank, 1)).sum().backward()


def frozen_and_slow_on_one_rank(net: nn.Module, rank: int) -> None:
    """One rank is in its next step before another sees that its backward averages nothing."""

    def dawdle(_: Tensor) -> None:
        time.sleep(0.3 if rank == 0 else 0.0)

    net.requires_grad_(False)
    x = _x(rank).requires_grad_()
    x.register_hook(dawdle)
    net(x).sum().backward()
    net.requires_grad_(True)
    net(_x(rank, 1)).sum().backward()


def forward_inside_backward(net: nn.Module, rank: int) -> None:
    def look(_: Tensor) -> None:
        with torch.no_grad():
            net(_x(rank, 1))

    output = net(_x(rank))
    _inner(net).first.weight.register_hook(look)
    output.sum().backward()


def raised_elsewhere(net: nn.Module, rank: int) -> None:
    """Every rank's backward raises, each at another place; the next step is right."""

    def fail(_: Tensor) -> None:
        raise Planned

    layer = _inner(net).second if rank == 0 else _inner(net).first
    handle = layer.weight.register_hook(fail)
    try:
        net(_x(rank)).sum().backward()
    except Planned:
        handle.remove()
    net.zero_grad()
    net(_x(rank, 1)).sum().backward()


SCENARIOS: dict[str, Callable[[nn.Module, int], None]] = {
    scenario.__name__: scenario
    for scenario in (
        head_outside,
        head_outside_after_accumulation,
        input_gradient_first,
        gradient_penalty,
        frozen_for_a_while,
        frozen_and_slow_on_one_rank,
        forward_inside_backward,
        raised_elsewhere,
    )
} | {
    f"{which}_call_in_{'a' if reentrant else 'a_non'}_reentrant_checkpoint": (
        lambda net, rank, which=which, reentrant=reentrant: _checkpointed(
            net, rank, which, reentrant
        )
    )
    for which, reentrant in (
        ("second", True),
        ("both", True),
        ("first", False),
        ("second", False),
        ("both", False),
    )
}


def averaged(rank: int, scenario: str) -> list[str]:
    """Names of the parameters whose gradient is not the mean of the ranks' own."""
    world_size = dist.get_world_size()
    expected = Net()
    for one in range(world_size):
        alone = Net()
        SCENARIOS[scenario](alone, one)
        for total, parameter in zip(expected.parameters(), alone.parameters(), strict=True):
            if parameter.grad is not None:
                share = parameter.grad / world_size
                total.grad = share if total.grad is None else total.grad + share
    # 10 bytes: every gradient has a bucket to itself.
    wrapped = dpmem.DataParallel(
        Net(),
        bucket_cap_mb=1e-5,
        find_unused_parameters=scenario == "gradient_penalty",
    )
    SCENARIOS[scenario](wrapped, rank)
    return [
        name
        for (name, ours), theirs in zip(
            wrapped.module.named_parameters(), expected.parameters(), strict=True
        )
        if (ours.grad is None) != (theirs.grad is None)
        or (ours.grad is not None and not torch.allclose(ours.grad, theirs.grad, atol=1e-5))
    ]


def twice_in_one_backward(rank: int) -> None:
    _checkpointed(dpmem.DataParallel(Net()), rank, "first", reentrant=True)


def stays_local(rank: int, how: str) -> list[str]:
    """Names of the parameters whose gradient is not this rank's own."""
    net = Net()
    alone = copy.deepcopy(net)
    alone(_x(rank)).sum().backward()
    wrapped = dpmem.DataParallel(net)
    wrapped(_x(rank, 1)).sum().backward()
    wrapped.zero_grad()
    with wrapped.no_sync():
        if how == "checkpoint":
            x = _x(rank).requires_grad_()
            loss = checkpoint(wrapped, x, use_reentrant=True).sum()
            loss.backward()
        else:
            loss = wrapped(_x(rank)).sum()
    if how == "synchronized forward after":
        wrapped(_x(rank, 1))
        loss.backward()
    return [
        name
        for (name, ours), theirs in zip(net.named_parameters(), alone.parameters(), strict=True)
        if not torch.equal(ours.grad, theirs.grad)
    ]
