"""fully_shard in a forecast: its own code on tensors without data, but for what reads values.

A device mesh is a tensor of ranks that is looked up, so it is made with data. What DTensor runs
only to know the shape of a result takes no memory, and is kept from whoever watches.

Source: torch/distributed/device_mesh.py, torch/distributed/tensor/_sharding_prop.py.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

from torch.distributed import device_mesh
from torch.utils._python_dispatch import _disable_current_modes


def _unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


@contextmanager
def sharding_without_data() -> Iterator[None]:
    """Within, fully_shard and DTensor work on fake tensors."""
    # Here, not above: they take a second. All of it, so that nobody imports what is patched below.
    from torch.distributed import fsdp  # noqa: F401
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    original = device_mesh.init_device_mesh

    @_unwatched
    def make_mesh(device_type: str, *args: Any, **kwargs: Any) -> Any:
        # Steps are traced on the CPU, whatever accelerator is here.
        return original("cpu", *args, **kwargs)

    name = original.__name__
    # Whoever imported it by name has it in a module of its own.
    holders = [
        module
        for module in list(sys.modules.values())
        if getattr(module, "__dict__", {}).get(name) is original
    ]
    shapes = ShardingPropagator._propagate_tensor_meta_non_cached
    with ExitStack() as undo:
        for module in holders:
            undo.enter_context(mock.patch.object(module, name, make_mesh))
        undo.enter_context(
            mock.patch.object(ShardingPropagator, shapes.__name__, _unwatched(shapes))
        )
        yield
