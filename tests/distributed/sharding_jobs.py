"""Jobs whose models fully_shard shards, measured on ranks and forecast without."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import dpmem
from dpmem.text_gpt import ByteGPT, GPTSize, next_byte_loss
from dpmem_profiling import measure

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept": {"reshard_after_forward": False},
    "narrow": {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    },
}


def perceptron(which: str, *, whole: bool = False) -> dpmem.Job:
    """A width that two ranks cannot halve; each layer is gathered by itself, or all as a whole."""

    def model() -> nn.Module:
        layers = [nn.Linear(64, 333), nn.ReLU(), nn.Linear(333, 128), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(128, 64))

    def shard(model: nn.Module, optimizer: Any) -> Any:
        for layer in () if whole else model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, **OPTIONS[which])
        fully_shard(model, **OPTIONS[which])
        return model, torch.optim.AdamW(model.parameters())

    return dpmem.Job(
        model, lambda n: torch.randn(n, 64), lambda model, x: model(x).square().mean(), wrap=shard
    )


def gpt() -> dpmem.Job:
    """Blocks, and embeddings that are the head's weights too."""
    size = GPTSize(layers=3, width=64, heads=4, context=32)

    def shard(model: nn.Module, optimizer: Any) -> Any:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    return dpmem.Job(
        lambda: ByteGPT(size),
        lambda n: torch.randint(256, (n, size.context + 1)),
        next_byte_loss,
        wrap=shard,
    )


JOBS = {
    **{which: lambda which=which: perceptron(which) for which in OPTIONS},
    "whole": lambda: perceptron("plain", whole=True),
    "gpt": gpt,
}


def measured_peak_bytes(rank: int, job: str) -> int:
    """The least of three: gloo's threads may hold a collective's tensors for longer."""
    return min(
        measure(JOBS[job](), 16, device="cpu", warmup_steps=1).peak_allocated_bytes
        for _ in range(3)
    )


def forecast_beside_others(rank: int) -> str | None:
    """What is said to rank 0, which forecasts a wrapped job; the others do not."""
    if rank > 0:
        return None
    try:
        dpmem.estimate(perceptron("plain"), batch_size=4, gpu="t4")
    except ValueError as error:
        return str(error)
    return None
