"""What ranks do in tests. Each takes its rank and returns plain values."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toys import Skipping, are_equal_across_ranks, gradients, loss_of, make, pair

import dpmem
from dpmem.text_gpt import ByteGPT, GPTSize


def gradient_parity(
    rank: int, kind: str, bucket_cap_mb: float, set_to_none: bool = True
) -> list[str]:
    """Names of gradients that are not bit-equal to DDP's, over some SGD steps."""
    theirs, ours = pair(kind, bucket_cap_mb=bucket_cap_mb)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (theirs, ours)]
    different = []
    for step in range(3):
        for model in (theirs, ours):
            loss_of(kind, model, rank, step).backward()
        expected, received = gradients(theirs), gradients(ours)
        for name, gradient in expected.items():
            other = received[name]
            same = gradient is other is None or (
                gradient is not None and other is not None and torch.equal(gradient, other)
            )
            if not same:
                different.append(f"step {step}: {name}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none)
    return different


def clipped_training(
    rank: int, kind: str, max_norm: float, steps: int
) -> tuple[float, float, bool]:
    """(largest parameter difference to DDP + clip_grad_norm_, largest norm difference, clipped)."""
    theirs, _ = pair(kind)
    model = make(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    ours, optimizer = dpmem.wrap(model, optimizer, max_grad_norm=max_norm)
    their_optimizer = torch.optim.SGD(theirs.parameters(), lr=1e-2)
    worst_norm, clipped = 0.0, False
    for step in range(steps):
        for wrapped in (theirs, ours):
            loss_of(kind, wrapped, rank, step).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        their_optimizer.step()
        optimizer.step()
        worst_norm = max(worst_norm, abs(float(ours.grad_norm) / float(norm) - 1))
        clipped = clipped or float(norm) > max_norm
        their_optimizer.zero_grad()
        optimizer.zero_grad()
    worst = max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-12))
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    return worst, worst_norm, clipped


def parameters_agree(rank: int) -> bool:
    """After clipped, compressed training every rank holds the same bits."""
    torch.manual_seed(rank)
    model = ByteGPT(GPTSize(layers=2, width=64, heads=2, context=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = dpmem.wrap(model, optimizer, activations="4bit", max_grad_norm=0.5)
    for step in range(4):
        tokens = torch.randint(
            0, 256, (8, 64), generator=torch.Generator().manual_seed(rank + step)
        )
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return are_equal_across_ranks(list(model.parameters()))


def budgets_agree(rank: int) -> tuple[bool, bool]:
    """Under a byte budget: do ranks with other data choose the same bits, several of them?"""
    torch.manual_seed(0)
    model = ByteGPT(GPTSize(layers=2, width=64, heads=2, context=64))
    policy = dpmem.Policy(
        linear_bits=2, minimum_numel=1024, budget_bytes=1_500_000, refresh_forwards=2
    )
    wrapped, _ = dpmem.wrap(model, activations=policy)
    for step in range(4):
        tokens = torch.randint(
            0, 256, (8 - rank, 64), generator=torch.Generator().manual_seed(10 * rank + step)
        )
        nn.functional.cross_entropy(wrapped(tokens).flatten(0, 1), tokens.flatten()).backward()
        model.zero_grad()
    chosen = torch.tensor(list(wrapped._store._planner._chosen.values()))
    both = [torch.empty_like(chosen) for _ in range(dist.get_world_size())]
    dist.all_gather(both, chosen)
    return all(torch.equal(both[0], other) for other in both), len(chosen.unique()) > 1


def accumulation(rank: int, kind: str) -> list[str]:
    """Two micro-batches under no_sync, one outside: the same gradients as DDP's?"""
    theirs, ours = pair(kind)
    for model in (theirs, ours):
        with model.no_sync():
            loss_of(kind, model, rank, 0).backward()
            loss_of(kind, model, rank, 1).backward()
        loss_of(kind, model, rank, 2).backward()
    expected, received = gradients(theirs), gradients(ours)
    return [name for name in expected if not torch.equal(expected[name], received[name])]


def no_sync_is_local(rank: int) -> bool:
    """Inside no_sync the gradient is this rank's own."""
    model = make("gpt")
    alone = copy.deepcopy(model)
    wrapped = dpmem.DataParallel(model)
    with wrapped.no_sync():
        loss_of("gpt", wrapped, rank, 0).backward()
    loss_of("gpt", alone, rank, 0).backward()
    return all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(model.parameters(), alone.parameters(), strict=True)
    )


def every_backward_is_averaged(rank: int, between: str) -> bool:
    """A forward without gradients, or a second forward, between forward and backward."""
    wrapped = dpmem.DataParallel(make("gpt"))
    loss = loss_of("gpt", wrapped, rank, 0)
    if between == "no_grad":
        with torch.no_grad():
            loss_of("gpt", wrapped, rank, 1)
        loss.backward()
    elif between == "second forward":
        second = loss_of("gpt", wrapped, rank, 1)
        loss.backward()
        second.backward()
    else:
        loss.backward(retain_graph=True)
        loss.backward()
    gradient = wrapped.module.head.weight.grad.clone()
    largest = gradient.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return torch.equal(gradient, largest)


def averaged_across_no_sync(rank: int, order: str) -> list[str]:
    """A synchronized forward's backward averages, a local one's does not, in any order."""
    model = make("gpt")
    wrapped = dpmem.DataParallel(model)
    synchronized = [loss_of("gpt", wrapped, rank, 0)]
    if order == "two forwards":
        synchronized.append(loss_of("gpt", wrapped, rank, 1))
        synchronized[0].backward()
        wrapped.zero_grad()
        del synchronized[0]
    with wrapped.no_sync():
        local = loss_of("gpt", wrapped, rank, 2)
    different = []
    if order == "local first":
        local.backward()
        alone = copy.deepcopy(model)
        alone.zero_grad()
        loss_of("gpt", alone, rank, 2).backward()
        different += [
            n for n, g in gradients(model).items() if not torch.equal(g, gradients(alone)[n])
        ]
        wrapped.zero_grad()
    if order == "wrapper dropped":
        del wrapped
    synchronized[0].backward()
    for name, gradient in gradients(model).items():
        largest = gradient.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if not torch.equal(gradient, largest):
            different.append(name)
    return different


def dropped_wrapper_is_idle(rank: int) -> list[str]:
    """Rank 0 keeps the loss of a dropped wrapper: its reducer must not join the next one's work."""
    theirs, ours = pair("gpt")
    model = ours.module
    kept = loss_of("gpt", ours, rank, 0)
    if rank == 1:
        del kept
    del ours
    again = dpmem.DataParallel(model)
    for wrapped in (theirs, again):
        loss_of("gpt", wrapped, rank, 1).backward()
    expected, received = gradients(theirs), gradients(again)
    return [name for name in expected if not torch.equal(expected[name], received[name])]


def unused_without_asking(rank: int, on: tuple[int, ...]) -> tuple[str | None, bool]:
    """What the forward after a backward that missed parameters on some ranks raises, if anything;
    do all ranks hold the same gradients meanwhile?"""
    wrapped = dpmem.DataParallel(Skipping(rank in on), bucket_cap_mb=0.0001)
    wrapped(torch.ones(2, 8) * (rank + 1)).sum().backward()
    same = are_equal_across_ranks([p.grad for p in wrapped.parameters()])
    try:
        wrapped(torch.ones(2, 8))
    except RuntimeError as error:
        return str(error), same
    return None, same


def frozen_buffers_in_evaluation(rank: int) -> float:
    """Rank 0's buffers reach the others also where a model in evaluation mode is differentiated."""
    wrapped = dpmem.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).eval()
    with torch.no_grad():
        wrapped.module[1].running_mean.fill_(rank + 3)
        wrapped(torch.ones(2, 2))
        assert float(wrapped.module[1].running_mean[0]) == rank + 3
    wrapped(torch.ones(2, 2))
    return float(wrapped.module[1].running_mean[0])


def recovers_after_exception(rank: int, set_to_none: bool) -> list[str]:
    """A backward that raises midway leaves nothing behind that spoils the next step."""
    theirs, ours = pair("gpt", bucket_cap_mb=0.01)

    def fail(_: Tensor) -> None:
        raise ArithmeticError("planned")

    handle = ours.module.blocks[0].expand.weight.register_hook(fail)
    try:
        loss_of("gpt", ours, rank, 0).backward()
    except ArithmeticError:
        handle.remove()
    ours.zero_grad(set_to_none)
    for model in (theirs, ours):
        loss_of("gpt", model, rank, 1).backward()
    expected, received = gradients(theirs), gradients(ours)
    return [name for name in expected if not torch.equal(expected[name], received[name])]


def wrapped_again(rank: int) -> list[str]:
    """Wrap, train, drop the wrapper, wrap again: the first must be gone."""
    theirs, ours = pair("gpt")
    model = ours.module
    loss_of("gpt", ours, rank, 0).backward()
    ours.zero_grad()
    del ours
    again = dpmem.DataParallel(model)
    for wrapped in (theirs, again):
        loss_of("gpt", wrapped, rank, 1).backward()
    expected, received = gradients(theirs), gradients(again)
    return [name for name in expected if not torch.equal(expected[name], received[name])]


def different_models(rank: int) -> None:
    dpmem.DataParallel(nn.Linear(4, 4 + rank))


def initial_state_is_rank_zeros(rank: int) -> tuple[float, float]:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].weight.fill_(rank + 1)
        model[1].running_mean.fill_(rank + 5)
    wrapped = dpmem.DataParallel(model)
    with torch.no_grad():
        model[1].running_mean.fill_(rank + 7)
    wrapped.train()
    wrapped(torch.zeros(4, 2))
    # Momentum 0.1 towards the batch's mean, which is the bias: from rank 0's 7 on every rank.
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    return float(weight[0, 0]), float(model[1].running_mean[0] - 0.1 * bias[0])


def bucket_memory(rank: int) -> tuple[int, int, int, bool]:
    """Bucket bytes planned, after backward, after zero_grad and a forward; are .grads in them?"""
    wrapped = dpmem.DataParallel(make("gpt"), bucket_cap_mb=0.02)
    planned = wrapped._gradients.plan.size_bytes
    loss_of("gpt", wrapped, rank, 0).backward()
    buckets = wrapped.owned_tensors()["bucket"]
    held = sum(t.untyped_storage().nbytes() for t in buckets)
    addresses = {t.untyped_storage().data_ptr() for t in buckets}
    inside = all(p.grad.untyped_storage().data_ptr() in addresses for p in wrapped.parameters())
    del buckets
    wrapped.zero_grad()
    with torch.no_grad():
        loss_of("gpt", wrapped, rank, 0)
    after = sum(t.untyped_storage().nbytes() for t in wrapped.owned_tensors()["bucket"])
    return planned, held, after, inside


def edited_gradients_are_clipped(rank: int) -> tuple[float, float]:
    """(norm clipping saw, true norm) when the user edits a gradient between backward and step."""
    model = make("gpt")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wrapped, optimizer = dpmem.wrap(model, optimizer, max_grad_norm=1.0)
    loss_of("gpt", wrapped, rank, 0).backward()
    model.head.weight.grad.mul_(3.0)
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    optimizer.step()
    return float(wrapped.grad_norm), float(expected)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, steps: int) -> None:
    for step in range(steps):
        loss_of(kind, model, dist.get_rank(), step).backward()
        optimizer.step()
        optimizer.zero_grad()


def fifty_steps(rank: int, kind: str, optimizer: str) -> float:
    """The largest relative difference of a parameter to DDP's after 50 steps."""
    theirs, ours = pair(kind)
    make = getattr(torch.optim, optimizer)
    for model in (theirs, ours):
        _train(model, make(model.parameters(), lr=1e-4), kind, 50)
    return max(
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-12))
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def ulps_per_step(rank: int, kind: str) -> float:
    """How far gradients are from DDP's from the same state, in ulps of each tensor's maximum."""
    theirs, ours = pair(kind, bucket_cap_mb=0.01)
    worst = 0.0
    for step in range(4):
        with torch.no_grad():
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                a.copy_(b)
        for model in (theirs, ours):
            loss_of(kind, model, rank, step).backward()
        expected, received = gradients(theirs), gradients(ours)
        for name, want in expected.items():
            have = received[name]
            assert (want is None) == (have is None)
            if want is None or have is None or not want.any():
                continue
            largest = want.abs().max()
            ulp = torch.nextafter(largest, largest * 2) - largest
            worst = max(worst, float((have - want).abs().max() / ulp))
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        for model in (theirs, ours):
            model.zero_grad()
    return worst


def bytes_held(rank: int, bucket_cap_mb: float) -> dict[str, int]:
    """Bytes of parameters, gradients and buckets after a backward, as the meter's tracker sees the
    storages that a step leaves; and what BucketPlan predicts for ours."""
    from dpmem_profiling.tracker import MemoryTracker

    held = {}
    for name in ("ours", "DDP", "DDP with views"):
        model = make("gpt")
        tracker = MemoryTracker(torch.device("cpu"), block_bytes=1)
        wrapped: nn.Module
        with tracker:
            for parameter in model.parameters():
                tracker.see(parameter)
            if name == "ours":
                wrapped = dpmem.DataParallel(model, bucket_cap_mb=bucket_cap_mb)
            else:
                wrapped = DistributedDataParallel(
                    model, bucket_cap_mb=bucket_cap_mb, gradient_as_bucket_view="views" in name
                )
            for step in range(3):
                loss_of("gpt", wrapped, rank, step).backward()
                if step < 2:
                    wrapped.zero_grad()
        storages = {}
        for parameter in model.parameters():
            for tensor in (parameter, parameter.grad):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        held[name] = sum(storages.values())
        held[f"{name}, live"] = tracker.live_bytes
        if name == "ours":
            parameters = sum(p.untyped_storage().nbytes() for p in model.parameters())
            held["predicted"] = parameters + wrapped._gradients.plan.size_bytes
            held["parameters"] = parameters
        del wrapped, model
    return held


def find_batch_size(rank: int, budgets: list[int], raises_on: int | None = None) -> Any:
    """What each rank finds for a wrapped job of its own budget."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if rank == raises_on:
            raise KeyError("no such token")
        return model(batch).square().mean()

    job = dpmem.Job(
        model=lambda: nn.Linear(64, 64),
        batch=lambda n: torch.randn(n, 64),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters),
        wrap=None if raises_on is not None else (lambda m, o: (DistributedDataParallel(m), o)),
    )
    result = dpmem.find_batch_size(
        job,
        budget_bytes=budgets[rank],
        device=torch.device("cpu"),
        across_ranks=True,
        timeout_s=20,
    )
    return result.largest_safe, result.largest_fitting, [done.batch for done in result.probes]
