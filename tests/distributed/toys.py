"""Models for tests on several ranks, and oracles for their gradients."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dpmem
from dpmem.text_gpt import ByteGPT, GPTSize

Loss = Callable[[nn.Module, int], Tensor]


class ConvNet(nn.Module):
    """Convolutions in channels_last, batch norm, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class TiedAndUnused(nn.Module):
    """Tied weights, a parameter nobody uses, one used on rank 0 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Parameter(torch.ones(3))
        self.sometimes = nn.Linear(8, 8)

    def forward(self, x: Tensor, use: bool) -> Tensor:
        hidden = self.embed(x) * self.scalar
        return self.head(self.sometimes(hidden) if use else hidden)


class Skipping(nn.Module):
    """Three layers, the middle one unused where `skip`."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.first, self.middle, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden if self.skip else self.middle(hidden))


def make(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "conv":
        return ConvNet()
    if kind == "gpt":
        return ByteGPT(GPTSize(layers=2, width=32, heads=2, context=16))
    return TiedAndUnused()


def loss_of(kind: str, model: nn.Module, rank: int, step: int) -> Tensor:
    noise = torch.Generator().manual_seed(100 * step + rank)
    if kind == "conv":
        return model(torch.randn(4, 3, 8, 8, generator=noise)).square().sum()
    tokens = torch.randint(0, 20, (3, 16), generator=noise)
    if kind == "gpt":
        return model(tokens).float().logsumexp(-1).sum()
    return model(tokens, rank == 0).square().sum()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name.removeprefix("module."): None if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def pair(kind: str, **options: Any) -> tuple[DistributedDataParallel, dpmem.DataParallel]:
    model = make(kind)
    unused = kind == "tied"
    theirs = DistributedDataParallel(
        copy.deepcopy(model), find_unused_parameters=unused, gradient_as_bucket_view=True
    )
    return theirs, dpmem.DataParallel(model, find_unused_parameters=unused, **options)


def are_equal_across_ranks(tensors: list[Tensor]) -> bool:
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return all(torch.equal(everyone[0], other) for other in everyone)


def averaged(model: nn.Module, loss: Loss) -> list[Tensor | None]:
    """The gradients of `model` averaged over ranks whose loss is `loss(model, rank)`."""
    ranks = dist.get_world_size()
    total: list[Tensor | None] = [None for _ in model.parameters()]
    for rank in range(ranks):
        alone = copy.deepcopy(model)
        alone.zero_grad()
        loss(alone, rank).backward()
        for i, parameter in enumerate(alone.parameters()):
            if parameter.grad is not None:
                share = parameter.grad.to_dense() / ranks
                before = total[i]
                total[i] = share if before is None else before + share
    return total


def differing(model: nn.Module, expected: list[Tensor | None]) -> list[str]:
    """Names of gradients that are not the expected ones, to a rounding."""
    names = []
    for (name, parameter), want in zip(model.named_parameters(), expected, strict=True):
        have = parameter.grad
        if have is None or want is None:
            same = have is want
        else:
            same = have.dtype == want.dtype and torch.allclose(have.to_dense(), want, rtol=1e-5)
        if not same:
            names.append(name)
    return names


class Layers(nn.Module):
    """Three layers; `which` names those that take part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("a", "b", "c")})

    def forward(self, x: Tensor, which: str = "abc") -> Tensor:
        for name in which:
            x = torch.tanh(self.layers[name](x))
        return x


def input_of(rank: int, width: int = 6) -> Tensor:
    return torch.randn(4, width, generator=torch.Generator().manual_seed(50 + rank))
