"""DistributedDataParallel in a forecast: the tensors it makes, by rule.

Its C++ reducer reads memory, which fake tensors do not have, and wants ranks. Inside `by_rule` the
class makes the same tensors in Python instead: buckets, at first one for all gradients (several
where parameters may be unused), which after the first backward give way to those of `bucket_cap_mb`
in the order of arrival; gradients beside them or as their views; and what its broadcasts flatten.
tests/distributed/test_ddp_rule.py holds the rule to the real one, byte for byte.

Source: torch/nn/parallel/distributed.py, torch/csrc/distributed/c10d/reducer.cpp.
"""

import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _compute_bucket_assignment_by_size as assign_buckets
from torch.nn.parallel import DistributedDataParallel

from dpmem.layout import dense_strides

_FIRST_BUCKET_BYTES = 1 << 20
_BUCKET_CAPACITY_MIB = 25
_BROADCAST_BYTES = 250 << 20
# Flattened at once while the modules' states are broadcast (c10d/comm.cpp).
_BROADCASTS_IN_FLIGHT = 2
# Arguments that change no memory.
_WITHOUT_MEMORY = (
    *("device_ids", "output_device", "dim", "process_group", "check_reduction", "device_mesh"),
    *("delay_all_reduce_named_params", "skip_all_reduce_unused_params", "batched_grad_copy"),
)


@contextmanager
def by_rule() -> Iterator[None]:
    """Within, DistributedDataParallel and its subclasses only make the tensors.

    FullyShardedDataParallel is refused, and fully_shard where there are no ranks to shard over.
    """
    replaced: dict[str, Any] = {
        "__init__": _init,
        "forward": _forward,
        "register_comm_hook": _refuse_hook,
    }
    try:
        with mock.patch.multiple(DistributedDataParallel, **replaced):
            yield
    except Exception as error:
        files = list(_files(error))
        if any("fsdp/fully_sharded_data_parallel.py" in file for file in files):
            raise ValueError(
                "a forecast has no rule for FullyShardedDataParallel; received a model that is "
                "sharded by it; use fully_shard, or measure this job on its GPU"
            ) from error
        if not dist.is_initialized() and any("/fsdp/_fully_shard/" in file for file in files):
            raise ValueError(
                "fully_shard shards over the ranks of a process group; received world_size=1; "
                "forecast with the number of ranks, world_size=2 or more"
            ) from error
        raise


def bucket_tensors(model: nn.Module) -> list[Tensor]:
    """The buckets of a DistributedDataParallel made by rule."""
    rule = model.__dict__.get("_rule")
    return [] if rule is None else rule.buckets


class _Rule:
    """The reducer's tensors."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        capacity_bytes: int,
        *,
        as_views: bool,
        find_unused: bool,
        late: bool,
    ) -> None:
        self._parameters = parameters
        self._capacities = [_FIRST_BUCKET_BYTES, capacity_bytes]
        self._as_views = as_views
        self._order: list[int] | None = [] if late else None
        self.synchronize = True
        self.buckets: list[Tensor] = []
        # Which parameters were used, by this rank and by any.
        self._used = [
            torch.zeros(len(parameters), dtype=torch.int32, device=device)
            for device in (torch.device("cpu"), parameters[0].device)
            if find_unused
        ]
        # In the order of registration; reversed, which no sum of bytes shows.
        self._fill(list(range(len(parameters))), [sys.maxsize] if late else self._capacities)
        for index, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(_hook(weakref.ref(self), index))

    def before_forward(self) -> None:
        """After the first backward, buckets in the order in which its gradients came."""
        if self._order:
            missing = set(range(len(self._parameters))) - set(self._order)
            order, self._order = [*self._order, *sorted(missing)], None
            self.buckets = []
            self._fill(order, self._capacities)

    def arrived(self, index: int) -> None:
        """A gradient is there."""
        if not self.synchronize:
            return
        if self._order is not None:
            self._order.append(index)
        parameter = self._parameters[index]
        bucket, offset = self._places[index]
        if self._as_views and parameter.grad is not None and parameter.grad._base is not bucket:
            parameter.grad = bucket.as_strided(parameter.shape, dense_strides(parameter), offset)

    def _fill(self, order: list[int], capacities: list[int]) -> None:
        assigned, _ = assign_buckets([self._parameters[i] for i in order], capacities)
        self.buckets = []
        self._places: dict[int, tuple[Tensor, int]] = {}
        for members in assigned:
            parameters = [self._parameters[order[member]] for member in members]
            bucket = parameters[0].new_empty(sum(p.numel() for p in parameters))
            self.buckets.append(bucket)
            offset = 0
            for member, parameter in zip(members, parameters, strict=True):
                self._places[order[member]] = bucket, offset
                offset += parameter.numel()


def _hook(rule: "weakref.ref[_Rule]", index: int) -> Callable[[Tensor], None]:
    def on_gradient(_: Tensor) -> None:
        alive = rule()
        if alive is not None:
            alive.arrived(index)

    return on_gradient


def _init(
    self: Any,
    module: nn.Module,
    *positional: Any,
    broadcast_buffers: bool | None = None,
    forward_sync_buffers: bool | None = None,
    init_sync: bool = True,
    bucket_cap_mb: float | None = None,
    find_unused_parameters: bool = False,
    gradient_as_bucket_view: bool = False,
    static_graph: bool = False,
    **options: Any,
) -> None:
    nn.Module.__init__(self)
    unknown = sorted(name for name in options if name not in _WITHOUT_MEMORY)
    if unknown or len(positional) > len(("device_ids", "output_device", "dim")):
        raise ValueError(
            "a forecast knows DistributedDataParallel's memory for its usual options, passed by "
            f"name; received {', '.join(unknown) or 'more positional ones'}; measure this job on "
            "its GPU"
        )
    self.module = module
    self.require_backward_grad_sync = self.require_forward_param_sync = True
    self._sync_buffers_by_rule = False not in (broadcast_buffers, forward_sync_buffers)
    if init_sync:
        buffers = [] if broadcast_buffers is False else module.buffers()
        _flatten_all([*module.parameters(), *buffers])
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise RuntimeError(
            "DistributedDataParallel needs a parameter that requires a gradient; received a model "
            "without; use it as it is"
        )
    self.__dict__["_rule"] = _Rule(
        trainable,
        int((bucket_cap_mb or _BUCKET_CAPACITY_MIB) * 2**20),
        as_views=gradient_as_bucket_view,
        find_unused=find_unused_parameters or static_graph,
        late=static_graph or not find_unused_parameters,
    )


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    rule = self.__dict__["_rule"]
    rule.synchronize = self.require_backward_grad_sync
    if torch.is_grad_enabled() and self.require_backward_grad_sync:
        rule.before_forward()
    if self._sync_buffers_by_rule and self.require_backward_grad_sync:
        _flatten_all(self.module.buffers())
    return self.module(*args, **kwargs)


def _refuse_hook(self: Any, *_: Any, **__: Any) -> None:
    raise ValueError(
        "a forecast does not run DistributedDataParallel's communication hooks; received one; "
        "measure this job on its GPU"
    )


def _files(error: BaseException | None) -> Iterator[str]:
    """Where the code stands that an error, or one that it came from, went through."""
    while error is not None:
        for frame, _ in walk_tb(error.__traceback__):
            yield Path(frame.f_code.co_filename).as_posix()
        error = error.__cause__ or error.__context__


def _flatten_all(tensors: Iterable[Tensor]) -> None:
    """What a broadcast of them flattens, as much at once as is on its way."""
    waiting = [tensor.detach() for tensor in tensors]
    if not waiting:
        return
    on_their_way: deque[Tensor] = deque(maxlen=_BROADCASTS_IN_FLIGHT)
    for members in assign_buckets(waiting, [_BROADCAST_BYTES])[0]:
        on_their_way.append(waiting[members[0]].new_empty(sum(waiting[m].numel() for m in members)))
