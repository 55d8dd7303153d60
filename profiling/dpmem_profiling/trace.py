"""A training step without data and without a GPU: what it would allocate, in order.

The job's own code runs on fake tensors, which have shapes and no memory, under the tracker that
also measures real steps. What CUDA does differently from the CPU is in `cuda_semantics` and
`cuda_scratch`, what the CPU takes beside its results in `cpu_scratch`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from threading import RLock
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    _BypassDispatchCache,
)
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dpmem_profiling.attribution import Attribution, Owned
from dpmem_profiling.cpu_scratch import cpu_scratch
from dpmem_profiling.cuda_scratch import CudaScratch
from dpmem_profiling.cuda_semantics import Architecture, cuda_semantics
from dpmem_profiling.in_place import InPlaceGradients
from dpmem_profiling.job import Job, build_model, equip, make_batch
from dpmem_profiling.named_devices import cuda_is_here, here
from dpmem_profiling.record import Category
from dpmem_profiling.stand_in import StandIn, as_with_data, copies_stay_fake
from dpmem_profiling.stepping import Stepper, raw_gradients_claimed
from dpmem_profiling.tracker import Change, MemoryTracker, ScratchOf, StorageInfo
from dpmem_profiling.unknowns import CompiledRegions, history_of_lbfgs, recurrent, sharded

# The first makes the optimizer's state, the second runs with it; no later one was seen to raise a
# peak.
STEPS = 2

_CPU = torch.device("cpu")
# What is patched while a step is traced is patched for all threads.
_ONE_AT_A_TIME = RLock()


class Untraceable(ValueError):  # noqa: N818 - reads as what it is
    """A job whose step needs data, or does what fake tensors cannot: says what and what to do."""


class _Fakes(FakeTensorMode):
    """Fake tensors that are all on the trace's device, and whose cache keeps no storage alive.

    The cache's keys are the arguments. What hands a storage to an operator (a saved tensor restored
    over memory that is still there) would see it, and all that it is counted as, live on in a key.
    """

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": here(kwargs["device"])}
        return super().dispatch(func, types, args, kwargs)

    def _cache_key(self, state: Any, func: Any, args: Any, kwargs: Any) -> Any:
        if any(isinstance(argument, torch.UntypedStorage) for argument in args):
            raise _BypassDispatchCache("a storage is an argument")
        return super()._cache_key(state, func, args, kwargs)


class Kernels(NamedTuple):
    """What of a GPU decides which kernels run and what they take: one trace serves all that share
    it. `architecture` is the compute capability, as (8, 6), None for a GPU that has none."""

    architecture: Architecture | None
    cublas_workspace_bytes: int


@dataclass(frozen=True)
class Trace:
    """Every allocation and release from the model's arrival on the device to the last step's end.

    storages     what was allocated, by number; `categories` in the same order
    changes      gains and losses of the storages in the bytes that were asked for, in order, and
                 the edges of phases
    step_starts  index into `changes` where each step begins; what is before is building
    possible     workspaces that cuDNN may take for a moment and need not: index into `changes`, and
                 bytes at most
    emptied      index into `changes` before which the allocator's cache is emptied, as it is when
                 cuDNN has tried its kernels
    notes        sentences a reader needs to judge the figures
    """

    name: str
    batch_size: int
    storages: tuple[StorageInfo, ...]
    categories: tuple[Category, ...]
    changes: tuple[Change, ...]
    step_starts: tuple[int, ...]
    possible: tuple[tuple[int, int], ...]
    emptied: tuple[int, ...]
    notes: tuple[str, ...]


def between(low: Trace, high: Trace, batch_size: int) -> Trace | None:
    """The trace at `batch_size` from two others of the same job, without running it.

    Where both made the same allocations in the same order, every size is a line in the batch: a
    constant for what the model holds, a multiple for what the samples need. None where they did
    not, or where a size is no such line; a workspace may be one to a rounding.
    """
    if len(low.changes) != len(high.changes) or len(low.possible) != len(high.possible):
        return None
    if low.emptied != high.emptied:
        return None
    span = high.batch_size - low.batch_size
    steps = batch_size - low.batch_size
    changes = []
    sizes: Counter[int] = Counter()
    for one, other in zip(low.changes, high.changes, strict=True):
        if (one.phase, one.storage) != (other.phase, other.storage):
            return None
        gain_bytes = other.delta_bytes - one.delta_bytes
        if gain_bytes % span and low.categories[one.storage or 0] != "workspace":
            return None
        # Towards zero: what is released is what was taken.
        delta_bytes = one.delta_bytes + int(gain_bytes * steps / span)
        if one.storage is not None:
            sizes[one.storage] += delta_bytes
            if sizes[one.storage] < 0:
                return None
        changes.append(one._replace(delta_bytes=delta_bytes))
    possible = []
    for (index, least_bytes), (same, most_bytes) in zip(low.possible, high.possible, strict=True):
        if index != same:
            return None
        possible.append((index, least_bytes + (most_bytes - least_bytes) * steps // span))
    return replace(low, batch_size=batch_size, changes=tuple(changes), possible=tuple(possible))


def trace(
    job: Job,
    batch_size: int,
    kernels: Kernels | None,
    *,
    steps: int = STEPS,
    owned: Owned | None = None,
    around: AbstractContextManager[Any] | None = None,
) -> Trace:
    """Run `steps` steps of `job` on fake tensors as a GPU would run them.

    kernels  the GPU's; None traces what this machine's CPU would do
    owned    as for `measure`
    around   entered while the job is built and runs: a fake process group, say

    Several threads may trace, one after the other; none may use torch otherwise meanwhile.

    Raises InvalidJob where a factory of the job breaks its promise, Untraceable where its step
    needs data, and whatever the job raises.
    """
    mode = _Fakes(allow_non_fake_inputs=True)
    scratch: ScratchOf = cpu_scratch if kernels is None else CudaScratch(*kernels)
    semantics = nullcontext() if kernels is None else cuda_semantics(kernels.architecture)
    # Sizes as asked for: what rounds them is the allocator, and what interpolates wants them exact.
    tracker = MemoryTracker(_CPU, block_bytes=1, scratch=scratch, fakes=True)
    attribution = Attribution(tracker, owned, wrapped=job.wrap is not None)
    stand_in, in_place, compiled = StandIn(tracker), InPlaceGradients(), CompiledRegions()
    with (
        _ONE_AT_A_TIME,
        torch.random.fork_rng(devices=[]),
        around or nullcontext(),
        semantics,
        copies_stay_fake(),
        cuda_is_here(),
        compiled,
    ):
        model = _fake_model(job, mode).train()
        with mode, _data_needed_is_said(), as_with_data(), tracker, stand_in, in_place:
            with tracker.paused():
                in_place.calibrate()
            _arrive(model, tracker)
            built = equip(job, model)
            tracker.module_names = {
                id(module): name for name, module in built.model.named_modules()
            }
            stepper = Stepper(job, built, _CPU, tracker, attribution)
            starts = []
            with raw_gradients_claimed(built, attribution):
                for _ in range(steps):
                    starts.append(len(tracker.changes))
                    stepper.step(lambda: _fake_batch(job, batch_size, mode, tracker))
            elsewhere = set() if kernels is None else _on_the_host(built.optimizer, tracker)
    return Trace(
        name=job.name,
        batch_size=batch_size,
        storages=tuple(tracker.storages),
        categories=tuple(map(attribution.category_of, range(len(tracker.storages)))),
        changes=_releases_in_order(
            change if change.storage not in elsewhere else change._replace(delta_bytes=0)
            for change in tracker.changes
        ),
        step_starts=tuple(starts),
        possible=tuple(tracker.possible),
        emptied=tuple(tracker.emptied),
        notes=(
            *stand_in.notes(),
            *compiled.notes(),
            *history_of_lbfgs(built.optimizer),
            *(() if kernels is None else (*recurrent(built.model), *sharded(built.model))),
        ),
    )


def _on_the_host(optimizer: Optimizer | None, tracker: MemoryTracker) -> set[int]:
    """An optimizer's counters of steps, by number, where they are not on the device.

    Source: _init_group of each optimizer, such as torch/optim/adam.py; asgd.py alone keeps its
    counter on the device, and nadam.py a product of its momenta beside the counter.
    """
    if optimizer is None or isinstance(optimizer, torch.optim.ASGD):
        return set()
    counters = (
        optimizer.state.get(parameter, {}).get(name)
        for group in optimizer.param_groups
        if not (group.get("capturable") or group.get("fused"))
        for parameter in group["params"]
        for name in ("step", "mu_product")
    )
    return {n for counter in counters if isinstance(counter, Tensor) for n in tracker.see(counter)}


def _releases_in_order(changes: Iterable[Change]) -> tuple[Change, ...]:
    """The changes, with releases that follow each other by the storages' numbers.

    What goes at once goes in any order: autocast's cache empties by address. One order makes traces
    of two batches comparable.
    """
    result: list[Change] = []
    for releasing, group in groupby(changes, lambda change: change.delta_bytes < 0):
        run = list(group)
        if releasing:
            run.sort(key=lambda change: change.storage or 0)
        result += run
    return tuple(result)


def _fake_model(job: Job, mode: FakeTensorMode) -> nn.Module:
    """The job's model with fake parameters.

    Built under the mode, where that allocates nothing. Some constructors compute with the values of
    tensors: those are built for real, but without the random numbers of weights.
    """
    try:
        with mode, _fake_parameters_may_be_cast(), _nothing_is_rejected():
            return build_model(job)
    except (DataDependentOutputException, DynamicOutputShapeException):
        with _MeansForRandomNumbers():
            model = build_model(job)
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for held in tables:
            for name, tensor in held.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    held[name] = mode.from_tensor(tensor)
    return model


class _MeansForRandomNumbers(TorchDispatchMode):
    """Fills with a distribution's mean what random numbers would fill, which takes far longer.

    Rejection, as of a truncated normal distribution, ends on it.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.uniform_.default:
            low = args[1] if len(args) > 1 else 0.0
            high = args[2] if len(args) > 2 else 1.0
            return args[0].fill_((low + high) / 2)
        if func is torch.ops.aten.normal_.default:
            return args[0].fill_(args[1] if len(args) > 1 else 0.0)
        return func(*args, **(kwargs or {}))


@contextmanager
def _nothing_is_rejected() -> Iterator[None]:
    """Let a truncated normal distribution, which rejects by value, leave weights as they are."""

    def leave(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    with mock.patch.object(nn.init, "_no_grad_trunc_normal_", leave):
        yield


@contextmanager
def _fake_parameters_may_be_cast() -> Iterator[None]:
    """Let `model.to(torch.bfloat16)` work: it swaps fake parameters, and refuses to swap a tensor
    that is weakly referenced, as the fake mode's own cache does."""
    unreferenced = SimpleNamespace(getweakrefs=lambda tensor: [])
    with mock.patch.object(torch.utils, "weakref", unreferenced):
        yield


def _arrive(model: nn.Module, tracker: MemoryTracker) -> None:
    # A function of its own, so that the last tensor is not held: fully_shard lets go of them all.
    for tensor in _in_order_of_arrival(model):
        tracker.see(tensor)


def _in_order_of_arrival(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers in the order in which Module.to moves them, children first."""
    for child in model.children():
        yield from _in_order_of_arrival(child)
    for held in (model._parameters, model._buffers):
        yield from (tensor for tensor in held.values() if tensor is not None)


def _fake_batch(job: Job, batch_size: int, mode: FakeTensorMode, tracker: MemoryTracker) -> Any:
    """The job's batch, as tensors that arrive on the device one after the other."""
    with tracker.paused():
        batch = make_batch(job, batch_size, _CPU)

    def arrive(tensor: Tensor) -> Tensor:
        with tracker.paused():
            # Dense, as Tensor.to makes it: an expanded tensor arrives at full size.
            copy = torch.empty_like(tensor, requires_grad=False)
        tracker.see(copy)
        return copy

    return tree_map_only(Tensor, arrive, batch)


@contextmanager
def _data_needed_is_said() -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise Untraceable(
            "a forecast runs the step without data, so no shape or decision may depend on values; "
            f"{error.func} does. Measure this job on its GPU, or give a Job.step without it."
        ) from error
