"""A step of a fused optimizer that clips or unscales asks the device for no value."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dpmem

FUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "sgd": (torch.optim.SGD, {}),
    "sgd momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adagrad": (torch.optim.Adagrad, {}),
}

# On a GPU these wait for it: they ask for a value, or for a size that values decide.
WAITING_OPERATIONS = (
    "_local_scalar_dense",
    "equal",
    "masked_select",
    "nonzero",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
)
# On the CPU no operation is left of these that a dispatch mode could see.
WAITING_METHODS = (
    "cpu",
    "numpy",
    "tolist",
    "item",
    "__array__",
    "__bool__",
    "__int__",
    "__float__",
)


class _NoWaitingOperation(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:])
        )
        assert not by_mask, f"{name} with a mask waits for the device"
        assert name not in WAITING_OPERATIONS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class _NoWaitingMethod(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in WAITING_METHODS, f"Tensor.{name} waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_sync() -> Iterator[None]:
    """Raises where the host asks the device for a value."""
    with _NoWaitingOperation(), _NoWaitingMethod():
        yield


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a mask to write by": lambda x: x.__setitem__(x > 0, x),
    "where": lambda x: torch.where(x > 0),
    "equal": lambda x: torch.equal(x, x + 1),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("kind", WAITING)
def test_what_waits_for_the_device_is_seen(kind: str) -> None:
    """By the test below."""
    x = torch.ones(4)
    with no_sync(), pytest.raises(AssertionError, match="waits for the device"):
        WAITING[kind](x)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", FUSED)
def test_steps_do_not_wait_for_the_device(name: str, precision: Any) -> None:
    make, options = FUSED[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8))
    optimizer = make(model.parameters(), lr=1e-2, fused=True, **options)
    ours, optimizer = dpmem.wrap(model, optimizer, max_grad_norm=1.0, precision=precision)
    if ours.scaler is not None:  # where nothing overflows that need not
        ours.scaler.load_state_dict({"scale": 8.0, "growth_tracker": 0, "skipped_steps": 0})
    for step, size in enumerate((100.0, 0.01, 100.0)):
        (ours(torch.randn(4, 16)).square().sum() * size).backward()
        if step == 0:
            optimizer.step()
            continue
        with no_sync():
            optimizer.step()
