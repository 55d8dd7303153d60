"""What ranks do in the fault tests; each runs in processes of its own."""

import copy
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import recovery_tasks
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dpmem
from dpmem.bucket_buffer import BucketBuffer


def run(
    task: str,
    rank: int,
    ranks: int,
    scratch: str,
    timeout_s: float,
    queue: Any,
    arguments: dict[str, Any],
) -> None:
    """A process's main: put (rank, what the task returns) on `queue`."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    method = f"file://{scratch}/rendezvous"
    if arguments.pop("tcp", False):
        method = f"tcp://127.0.0.1:{29600 + os.getppid() % 300}"
    dist.init_process_group(
        "gloo",
        init_method=method,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    torch.manual_seed(0)
    try:
        if task == "train_until_an_error":
            queue.put((rank, "training"))
        home = recovery_tasks if hasattr(recovery_tasks, task) else sys.modules[__name__]
        answer = getattr(home, task)(rank, **arguments)
    except Exception:  # noqa: BLE001 - the test must see whatever it is
        answer = traceback.format_exc()
    queue.put((rank, answer))
    # Others may still need this rank's notes.
    time.sleep(timeout_s)


class Net(nn.Module):
    """Four layers; raises in forward where told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ArithmeticError("planned")
        return self.layers(x)


def _raise(_: Tensor) -> None:
    raise ArithmeticError("planned")


def _step_is_right(wrapped: dpmem.DataParallel, rank: int) -> bool:
    """Is a good step's gradient the mean of those of all ranks?"""
    wrapped.zero_grad()
    wrapped(torch.full((2, 8), float(rank))).sum().backward()
    gradient = wrapped.module.layers[3].bias.grad
    first = wrapped.module.layers[0].weight.grad.clone()
    mean = sum(range(dist.get_world_size())) / dist.get_world_size()
    # The input is a constant, and the first weight's gradient proportional to it.
    alone = torch.nn.functional.linear(torch.ones(1, 8), torch.eye(8))
    assert alone.shape == (1, 8)
    everyone = [torch.empty_like(first) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, first)
    local = Net()
    local.load_state_dict(wrapped.module.state_dict())
    local(torch.full((2, 8), mean)).sum().backward()
    return (
        bool(torch.allclose(gradient, local.layers[3].bias.grad))
        and bool(torch.allclose(first, local.layers[0].weight.grad, rtol=1e-5, atol=1e-6))
        and all(torch.equal(everyone[0], other) for other in everyone)
    )


def one_raises(rank: int, where: str, which: int) -> tuple[str, int, float, bool]:
    """(error, gradients left, seconds until it, is the step after it right)."""
    torch.manual_seed(0)
    wrapped = dpmem.DataParallel(Net(), bucket_cap_mb=0.0003)
    recovered = True
    said, left, seconds = "", 0, 0.0
    for _ in range(2):
        assert _step_is_right(wrapped, rank)
        wrapped.zero_grad()
        plain, handle = BucketBuffer.pack, None
        if rank == which and where == "forward":
            wrapped.module.fails = True
        elif rank == which and where == "backward":
            handle = wrapped.module.layers[1].weight.register_hook(_raise)
        elif rank == which:
            BucketBuffer.pack = lambda self, scale: _no_memory()
        started = time.monotonic()
        try:
            wrapped(torch.ones(2, 8)).sum().backward()
        except (ArithmeticError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}".replace("RuntimeError: planned", "Arithmetic")
            if rank == which:
                said = "ArithmeticError: planned"
        seconds = time.monotonic() - started
        left = sum(p.grad is not None for p in wrapped.parameters())
        wrapped.module.fails = False
        BucketBuffer.pack = plain
        if handle is not None:
            handle.remove()
        recovered = recovered and _step_is_right(wrapped, rank)
    return said, left, seconds, recovered


def _no_memory() -> Tensor:
    raise RuntimeError("planned")


def out_of_memory(rank: int) -> tuple[str, str, bool]:
    """Rank 1 asks the CPU's allocator for more than there is, in its forward."""

    class Greedy(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                torch.empty(1 << 60, dtype=torch.uint8)
            return super().forward(x)

    torch.manual_seed(0)
    wrapped = dpmem.DataParallel(Greedy())
    wrapped.module.fails = rank == 1
    name = message = ""
    try:
        wrapped(torch.ones(2, 8)).sum().backward()
    except RuntimeError as error:
        name, message = type(error).__name__, str(error)
        if rank == 0 and not isinstance(error, torch.OutOfMemoryError):
            raise
    wrapped.module.fails = False
    return name, message, _step_is_right(wrapped, rank)


def all_raise(rank: int) -> bool:
    """Each rank's forward raises, at different times; the next step is right, and not late."""
    torch.manual_seed(0)
    wrapped = dpmem.DataParallel(Net())
    right = _step_is_right(wrapped, rank)
    for _ in range(2):
        wrapped.module.fails = True
        time.sleep(1.5 * rank)
        try:
            wrapped(torch.ones(2, 8))
        except ArithmeticError:
            wrapped.module.fails = False
        if rank == 0:
            # Longer than the other ranks wait before they look around.
            time.sleep(3)
        right = right and _step_is_right(wrapped, rank)
    return right


def raises_late(rank: int) -> str:
    torch.manual_seed(0)
    wrapped = dpmem.DataParallel(Net())
    assert _step_is_right(wrapped, rank)
    wrapped.zero_grad()
    # Called after the wrapper's own hooks, the second time when the one bucket has been launched.
    calls: list[Tensor] = []

    def raise_at_the_second(gradient: Tensor) -> None:
        calls.append(gradient)
        if len(calls) == 2:
            raise ArithmeticError("planned")

    if rank == 1:
        for parameter in wrapped.module.layers[0].parameters():
            parameter.register_post_accumulate_grad_hook(raise_at_the_second)
    try:
        wrapped(torch.ones(2, 8)).sum().backward()
    except ArithmeticError:
        time.sleep(2)
    wrapped.zero_grad()
    try:
        wrapped(torch.ones(2, 8)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def train_until_an_error(rank: int) -> str:
    torch.manual_seed(0)
    wrapped = dpmem.DataParallel(Net(), bucket_cap_mb=0.0003)
    while True:
        try:
            wrapped(torch.ones(2, 8)).sum().backward()
        except RuntimeError as error:
            return str(error)
        wrapped.zero_grad()
        time.sleep(0.02)


def one_is_not_finite(rank: int, value: str) -> list[int]:
    """Positions in a gradient whose bad value did not make the norm and all elements say so."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.ones(n)) for n in (5, 3))

    def forward(self: Odd, x: Tensor) -> Tensor:
        return (self.first.sum() + self.second.sum()) * x

    Odd.forward = forward
    wrong = []
    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    wrapped, optimizer = dpmem.wrap(model, optimizer, max_grad_norm=1.0)
    for position in range(8):
        parameter = model.first if position < 5 else model.second
        bad = torch.ones(parameter.numel())
        bad[position % 5] = float(value) if rank == 1 else 1.0
        handle = parameter.register_hook(lambda gradient, bad=bad: gradient * bad)
        wrapped(torch.ones(())).backward()
        handle.remove()
        reached = parameter.grad[position % 5].item()
        optimizer.step()
        norm = float(wrapped.grad_norm)
        if math.isfinite(reached) or math.isfinite(norm):
            wrong.append(position)
        optimizer.zero_grad()
    return wrong


def one_reaches_no_parameter(rank: int, unused: bool) -> list[str | float]:
    """Rank 1's second step uses the input alone; the gradients, or what is raised, by step."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, use: bool) -> Tensor:
            return x * self.factor if use else x * 2

    wrapped = dpmem.DataParallel(Scaled(), find_unused_parameters=unused)
    seen: list[str | float] = []
    for step in range(4):
        x = torch.tensor(float(10 * rank + step), requires_grad=True)
        try:
            wrapped(x, not (rank == 1 and step == 1)).backward()
        except RuntimeError as error:
            seen.append(str(error))
        else:
            gradient = wrapped.module.factor.grad
            seen.append(-1.0 if gradient is None else gradient.item())
        wrapped.zero_grad()
    return seen


def halves(rank: int) -> tuple[str, bool]:
    """Two groups of two, one wrapper each: rank 3 raises, and rank 1 keeps rank 0 waiting.

    (What this rank's step says, is the step after it right.)
    """
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    wrapped = dpmem.DataParallel(Net(), process_group=groups[rank // 2])
    wrapped(torch.ones(2, 8)).sum().backward()
    wrapped.zero_grad()
    wrapped.module.fails = rank == 3
    said = ""
    try:
        loss = wrapped(torch.ones(2, 8)).sum()
        if rank == 1:
            time.sleep(2.5)
        loss.backward()
    except (ArithmeticError, RuntimeError) as error:
        said = str(error)
    if rank == 3:
        time.sleep(2.0)
    wrapped.module.fails = False
    wrapped.zero_grad()
    wrapped(torch.full((2, 8), float(rank))).sum().backward()
    gradient = wrapped.module.layers[0].weight.grad
    both = [torch.empty_like(gradient) for _ in range(2)]
    dist.all_gather(both, gradient, group=groups[rank // 2])
    return said, torch.equal(*both)


def frozen_differently(rank: int, which: tuple[int | None, ...]) -> tuple[str, str]:
    """Rank r freezes layer which[r] after a good step. What this step and the next one say."""
    wrapped = dpmem.DataParallel(Net())
    assert _step_is_right(wrapped, rank)
    layer = which[rank]
    if layer is not None:
        wrapped.module.layers[layer].requires_grad_(False)
    said = []
    for _ in range(2):
        wrapped.zero_grad()
        try:
            wrapped(torch.ones(2, 8)).sum().backward()
        except RuntimeError as error:
            said.append(str(error))
    return tuple(said)


def one_of_several_raises(rank: int, how: str) -> tuple[list[str], list[bool]]:
    """Two wrappers, in whose third step rank 0's forward or backward of one raises.

    (What each backward of that step said, is each backward after it right.)
    """
    generator, critic = Net(), Net()
    wrappers = [dpmem.DataParallel(net, bucket_cap_mb=0.0003) for net in (generator, critic)]
    raising = critic if how == "the second of a chain" else generator

    def steps(models: Sequence[nn.Module], x: Tensor) -> list[Callable[[], Tensor]]:
        first, second = models
        if how in ("in turn", "forwards first"):
            return [lambda: first(x).square().sum(), lambda: second(x).square().sum() * 3]
        return [lambda: second(first(x)).square().sum()]

    said, right = [], []
    held: list[Exception] = []
    for step in range(5):
        if step == 4:
            # What they held of the failed step is over.
            held.clear()
        fails = step == 2 and rank == 0
        handle = None
        if fails and how == "a chain's backward":
            handle = critic.layers[1].weight.register_hook(_raise)
        elif fails:
            raising.fails = True
        x = [torch.full((2, 8), float(one + step)) for one in range(2)]
        losses: list[Callable[[], Tensor]] = steps(wrappers, x[rank])
        if how == "forwards first":
            # The second one's comes before the first one's, which raises.
            second = losses[1]()
            losses[1] = lambda second=second: second
        for number, loss in enumerate(losses):
            for net in (generator, critic):
                net.zero_grad()
            try:
                loss().backward()
            except (ArithmeticError, RuntimeError) as error:
                held.append(error)
                said.append(f"step {step} loss {number}: {error}")
                continue
            means = _means((generator, critic), lambda nets, x, n=number: steps(nets, x)[n](), x)
            parameters = [*generator.parameters(), *critic.parameters()]
            right.append(
                all(
                    mean is None or torch.allclose(p.grad, mean, rtol=1e-4, atol=1e-6)
                    for p, mean in zip(parameters, means, strict=True)
                )
            )
        if handle is not None:
            handle.remove()
        raising.fails = False
    return said, right


def _means(
    nets: Sequence[nn.Module], loss: Callable[[Sequence[nn.Module], Tensor], Tensor], inputs: Any
) -> list[Tensor | None]:
    """Gradients of copies, averaged over what each rank's input gives."""
    copies = copy.deepcopy(list(nets))
    for net in copies:
        net.fails = False
        net.zero_grad()
    (sum(loss(copies, x) for x in inputs) / len(inputs)).backward()
    return [parameter.grad for net in copies for parameter in net.parameters()]
