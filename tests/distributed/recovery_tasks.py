"""What ranks do in the tests of a step that is lost: who is how far in it when one rank raises."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dpmem


class Pair(nn.Module):
    """Two factors, a bucket each; gradients are the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.seldom = (nn.Parameter(torch.ones(())) for _ in range(2))

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return self.always * x + (self.seldom * x if both else 0)


def _raise(*_: Any) -> None:
    raise ArithmeticError("planned")


def _wrapped(**options: Any) -> dpmem.DataParallel:
    return dpmem.DataParallel(Pair(), bucket_cap_mb=0, **options)


Answer = tuple[str, list[tuple[float, float]]]


def _steps(
    wrapped: dpmem.DataParallel,
    step: Callable[[float], Tensor],
    rank: int,
    *,
    lost: int,
    raises: int,
    arm: Callable[[], Callable[[], None]],
) -> Answer:
    """(What step `lost` of four said, both gradients after each of the others.)

    `arm` makes it raise, on rank `raises`, until what it returns is called.
    """
    said, seen = "", []
    for number in range(4):
        wrapped.zero_grad()
        disarm = arm() if rank == raises and number == lost else None
        try:
            step(float(rank + number)).backward()
        except (ArithmeticError, RuntimeError) as error:
            said = str(error)
        else:
            pair = wrapped.module
            seen.append(tuple(-1.0 if p.grad is None else p.grad.item() for p in pair.parameters()))
        if disarm is not None:
            disarm()
    return said, seen


def raises_behind_its_last_bucket(rank: int, which: int, lost: int, unused: bool) -> Answer:
    """When the others may already tell what they received, and in which order."""
    wrapped = _wrapped(find_unused_parameters=unused)

    def arm() -> Callable[[], None]:
        # Called after the wrapper's own hooks; both factors' gradients come, in whatever order.
        come: list[Tensor] = []

        def hook(parameter: Tensor) -> None:
            come.append(parameter)
            if len(come) == 2:
                _raise()

        hooks = [p.register_post_accumulate_grad_hook(hook) for p in wrapped.parameters()]
        return lambda: [hook.remove() for hook in hooks]

    return _steps(
        wrapped, lambda x: wrapped(torch.tensor(x)), rank, lost=lost, raises=which, arm=arm
    )


def loses_a_static_graphs_first_step(rank: int) -> Answer:
    """Rank 0 uses one of the factors, always; its first backward raises."""
    wrapped = _wrapped(static_graph=True)

    def arm() -> Callable[[], None]:
        return wrapped.module.always.register_hook(_raise).remove

    def step(x: float) -> Tensor:
        return wrapped(torch.tensor(x), both=rank == 1)

    return _steps(wrapped, step, rank, lost=0, raises=0, arm=arm)


def raises_in_a_communication_hook(rank: int) -> Answer:
    wrapped = _wrapped()
    raising: list[bool] = []

    def reduce(_: object, bucket: dpmem.GradBucket) -> Any:
        if raising and bucket.index() == 1:
            _raise()
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, reduce)

    def arm() -> Callable[[], None]:
        raising.append(True)
        return raising.clear

    return _steps(wrapped, lambda x: wrapped(torch.tensor(x)), rank, lost=1, raises=1, arm=arm)


def raises_between_a_chains_forwards(rank: int) -> Answer:
    """The other ranks launch the buckets of both, and then tell what was unused."""
    first, second = (_wrapped(find_unused_parameters=True) for _ in range(2))

    def arm() -> Callable[[], None]:
        return second.module.register_forward_pre_hook(_raise).remove

    def step(x: float) -> Tensor:
        second.zero_grad()
        return second(first(torch.tensor(x))) / 2

    return _steps(first, step, rank, lost=2, raises=0, arm=arm)


def raises_where_ranks_may_join(rank: int) -> Answer:
    """Every forward tells ranks that ran out of inputs, behind what the lost step left."""
    wrapped = _wrapped()

    def arm() -> Callable[[], None]:
        return wrapped.module.always.register_hook(_raise).remove

    with wrapped.join():
        return _steps(wrapped, lambda x: wrapped(torch.tensor(x)), rank, lost=1, raises=1, arm=arm)


def goes_on_in_no_sync(rank: int) -> Answer:
    """Behind a backward that raised, rank 1 accumulates before its next average."""
    wrapped = _wrapped()
    armed: list[bool] = []
    wrapped.module.always.register_hook(lambda gradient: _raise() if armed else gradient)

    def arm() -> Callable[[], None]:
        armed.append(True)
        return armed.clear

    def step(x: float) -> Tensor:
        if not armed:
            with wrapped.no_sync():
                wrapped(torch.tensor(10 * x)).backward()
        return wrapped(torch.tensor(x))

    return _steps(wrapped, step, rank, lost=1, raises=1, arm=arm)
