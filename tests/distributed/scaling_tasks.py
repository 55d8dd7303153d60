"""What ranks do in tests of loss scaling. Each takes its rank and returns plain values."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import dpmem

MICRO_BATCHES = 3


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 8))


def _batch(rank: int, step: int, part: int) -> Tensor:
    seed = 1000 * rank + 10 * step + part
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))


def _agree(values: Tensor) -> bool:
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    return all(torch.equal(everyone[0], other) for other in everyone)


def scaled_training(
    rank: int, max_norm: float | None, fused: bool, overflow_on: int
) -> tuple[float, int, float, bool]:
    """Beside DDP under GradScaler and clip_grad_norm_, three micro-batches a step.

    In the second step rank `overflow_on` overflows. (Largest parameter difference, skipped steps,
    ratio of the scales, do the ranks hold the same bits and scales.)
    """
    model = _network()
    theirs = DistributedDataParallel(copy.deepcopy(model))
    ours, optimizer = dpmem.wrap(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused),
        precision="fp16",
        max_grad_norm=max_norm,
    )
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(4):
        for part in range(MICRO_BATCHES):
            x = _batch(rank, step, part)
            if step == 1 and part == 1 and rank == overflow_on:
                x = x * 1e6
            last = part == MICRO_BATCHES - 1
            for wrapped in (ours, theirs):
                wrapped.require_backward_grad_sync = last
            ours(x).square().mean().backward()
            with torch.autocast("cpu", torch.float16):
                outputs = theirs(x)
            scaler.scale(outputs.float().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scaler.unscale_(their_optimizer)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        scaler.step(their_optimizer)
        scaler.update()
        their_optimizer.zero_grad()
    worst = max(
        float((a - b).detach().abs().max())
        for a, b in zip(model.parameters(), theirs.parameters(), strict=True)
    )
    held = torch.cat([p.detach().flatten() for p in model.parameters()])
    held = torch.cat([held, ours.scaler.scale.reshape(1)])
    ratio = float(ours.scaler.scale) / scaler.get_scale()
    return worst, ours.scaler.skipped_steps, ratio, _agree(held)


def sharded_optimizer(rank: int, max_norm: float | None) -> tuple[list[str], int]:
    """ZeroRedundancyOptimizer, which steps another inside, beside the plain one; and the skips."""
    models = [_network(), _network()]
    optimizers = [
        ZeroRedundancyOptimizer(models[0].parameters(), torch.optim.AdamW, lr=1e-2),
        torch.optim.AdamW(models[1].parameters(), lr=1e-2),
    ]
    wrapped = [
        dpmem.wrap(model, optimizer, precision="fp16", max_grad_norm=max_norm)[0]
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    for step in range(4):
        x = _batch(rank, step, 0) * (1e6 if step == 2 and rank == 1 else 1.0)
        for model, optimizer in zip(wrapped, optimizers, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    different = [
        name
        for (name, ours), theirs in zip(
            models[0].named_parameters(), models[1].parameters(), strict=True
        )
        if not torch.equal(ours, theirs)
    ]
    return different, wrapped[0].scaler.skipped_steps


def different_scaler_states(rank: int, damaged: bool) -> None:
    """Rank 1 loads another state, or a damaged one."""
    ours, _ = dpmem.wrap(_network(), precision="fp16")
    state = ours.scaler.state_dict()
    if rank == 1:
        state["scale"] = float("nan") if damaged else 8.0
    ours.scaler.load_state_dict(state)
