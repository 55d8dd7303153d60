"""DataParallel: the module that users hold."""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.utils._pytree import tree_leaves, tree_map_only

from dpmem.activations.store import ActivationStore
from dpmem.arguments import (
    ReducerOptions,
    capacities_bytes,
    check_devices,
    device_of,
    group_of,
    refuse,
    refuse_to_leave_out,
    sparse_weights,
)
from dpmem.config import WrapConfig
from dpmem.join import Shadow, active_ranks, any_synchronizes
from dpmem.local_gradients import LocalGradients
from dpmem.optimizer_step import GradientStep
from dpmem.precision import autocast, upcast_outputs
from dpmem.reducer import Reducer
from dpmem.replicas import (
    broadcast,
    check_ranks_agree,
    check_same,
    check_same_bits,
    highest_rank,
    maximum,
)
from dpmem.scaling import LossScaler, scaled_inputs, scaled_outputs
from dpmem.state_dict import register_plain_keys
from dpmem_profiling import Category

_IGNORED = "_ddp_params_and_buffers_to_ignore"


class DataParallel(nn.Module, Joinable):
    """Data parallelism over a process group; stands in for DistributedDataParallel.

    module                       the model; its attributes stay reachable as `.module`
    device_ids, output_device    at most one device, the module's own; with device_ids, tensors
                                 among the inputs are moved there
    dim                          0: the outputs of one device are not gathered
    broadcast_buffers            torch's older name of forward_sync_buffers
    init_sync                    parameters and buffers are broadcast from rank 0 now
    process_group                default: the default group; world size 1 where there is none
    bucket_cap_mb                MiB after which a bucket is full (25); 0: one gradient in each.
                                 While one is packed, its gradients exist twice: smaller buckets
                                 lower that part of the peak
    find_unused_parameters       parameters that received no gradient in a backward on this rank
                                 get the others' average, and stay as they are where no rank had one
    check_reduction              no effect, there as here
    gradient_as_bucket_view      True: gradients are views of the buckets; False: tensors of their
                                 own, which takes their size more for a moment
    static_graph                 every backward brings the same gradients, equally often: then some
                                 may stay without at no cost, and reentrant checkpoints may run a
                                 module several times
    device_mesh                  one-dimensional, instead of a process_group
    bucket_cap_mb_list           MiB of the first bucket, the second, ...; the last holds for the
                                 rest
    batched_grad_copy            no effect: a bucket is always filled by one launch
    forward_sync_buffers         rank 0's buffers reach all ranks at each synchronized forward that
                                 is differentiated, in training and in evaluation mode (True)
    wire_dtype                   what gradients travel as; None: as they are

    Gradients are averaged, exposed as views of the buckets when the backward ends, and their
    memory is released at the first forward after they are set to None. Whoever holds on to a
    `.grad` sees it overwritten by the next backward. Writing to a gradient through `.data` is not
    seen by clipping; write to `.grad` itself.

    A backward is averaged when it reaches the outputs of a forward outside `no_sync`; one that
    reaches no output that torch's pytree sees (a plain dataclass's, a view edited in place) goes by
    the last forward. autograd.grad of other tensors than parameters is this rank's own. A
    backward() that reaches no parameter on this rank alone is an error at its next forward, unless
    parameters may be unused (on CUDA neither is known: there such a rank is not waited for).

    Where a forward or backward raises on some ranks, the others get an error in the same step that
    names the first and what it raised (torch.OutOfMemoryError where it was one). No rank has
    gradients then; correct the cause, or set gradients to None on all ranks and go on. A rank that
    died or hangs is named within the process group's timeout. (On the CPU. On CUDA, NCCL's watchdog
    ends processes whose collectives are late; it names no rank's exception.)

    Parameters may be frozen and unfrozen between steps, on all ranks alike. One that should have
    received a gradient and did not is named in an error at the next forward, as in
    DistributedDataParallel; until then all ranks hold the same averages.

    State dicts have the module's own keys, without `module.`; both forms load. Pickled and copied
    wrappers join the default group, and train there once every rank has made the same; `wrap`'s
    max_grad_norm, which belongs to an optimizer, is not copied.

    Raises ValueError for a module on several devices, for devices that are not the module's and
    for arguments that are not honoured, RuntimeError where no parameter requires a gradient or
    ranks hold different models.

    Source: torch/nn/parallel/distributed.py for what arguments and methods mean.
    """

    _gradients: LocalGradients | Reducer
    _store: ActivationStore | None
    _step: GradientStep | None
    _scaler: LossScaler | None

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[int | torch.device] | None = None,
        output_device: int | torch.device | None = None,
        dim: int = 0,
        broadcast_buffers: bool | None = None,
        init_sync: bool = True,
        process_group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
        delay_all_reduce_named_params: object = None,
        param_to_hook_all_reduce: object = None,
        mixed_precision: object = None,
        device_mesh: Any = None,
        skip_all_reduce_unused_params: bool = False,
        bucket_cap_mb_list: Sequence[float] | None = None,
        batched_grad_copy: bool = False,
        forward_sync_buffers: bool | None = None,
        *,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        Joinable.__init__(self)
        refuse("dim", dim, 0, "one process drives one device, so nothing is gathered")
        at_once = "a gradient travels with its bucket"
        refuse("delay_all_reduce_named_params", delay_all_reduce_named_params, None, at_once)
        refuse("param_to_hook_all_reduce", param_to_hook_all_reduce, None, at_once)
        refuse("mixed_precision", mixed_precision, None, "use dpmem.wrap(..., precision='bf16')")
        refuse(
            "skip_all_reduce_unused_params",
            skip_all_reduce_unused_params,
            False,
            "buckets travel before it is known what is unused everywhere",
        )
        if broadcast_buffers is not None:
            warnings.warn(
                "broadcast_buffers is torch's older name; pass forward_sync_buffers instead",
                FutureWarning,
                stacklevel=2,
            )
            if forward_sync_buffers is None:
                forward_sync_buffers = broadcast_buffers
        self.forward_sync_buffers = forward_sync_buffers is not False
        self.parameters_to_ignore = set(getattr(module, _IGNORED, ()))
        self.module = module
        self.device = device_of(parameter for _, parameter in self._named_parameters())
        check_devices(self.device, device_ids, output_device)
        self.device_ids = None if device_ids is None else list(device_ids)
        self.device_mesh = device_mesh
        self.process_group = group_of(process_group, device_mesh)
        self.require_backward_grad_sync = True
        # As DistributedDataParallel has it, for callers of torch's _sync_module_states.
        self.broadcast_bucket_size = 250 * 2**20
        self.bucket_bytes_cap_list = [int(mib * 2**20) for mib in bucket_cap_mb_list or ()]
        self._options = ReducerOptions(
            capacities_bytes(bucket_cap_mb, bucket_cap_mb_list),
            find_unused_parameters,
            static_graph,
            gradient_as_bucket_view,
            wire_dtype,
        )
        self._config = WrapConfig()
        if self.process_group is not None and dist.get_world_size(self.process_group) > 1:
            check_ranks_agree(self._named_parameters(), self.process_group)
            if init_sync:
                broadcast(self._replicated(buffers=True), self.process_group)
        self._connect()
        register_plain_keys(self)

    @staticmethod
    def _set_params_and_buffers_to_ignore_for_model(
        module: nn.Module, params_and_buffers_to_ignore: Iterable[str]
    ) -> None:
        """Leave these, by name, alone. DistributedDataParallel's, on which other libraries call."""
        module.__dict__[_IGNORED] = list(params_and_buffers_to_ignore)

    @property
    def grad_norm(self) -> Tensor | None:
        """The global gradient norm before clipping, of the last step: an fp32 scalar on the device.

        Measured by steps and by `unscale_`, without a pass of its own. None before the first, and
        with neither max_grad_norm nor precision="fp16".
        """
        return None if self._step is None else self._step.norm

    @property
    def scaler(self) -> LossScaler | None:
        """The loss scale, its counters and its state; None unless precision is "fp16"."""
        return self._scaler

    def scale(self, loss: Tensor) -> Tensor:
        """`loss`, unchanged in value: for a part of the loss that does not come from outputs.

        Its gradients take the loss scale on here; without fp16 there is none to take on.
        """
        if self._scaler is None:
            return loss
        assert self._step is not None
        return scaled_outputs(loss, self._step.enter)

    def unscale_(self) -> None:
        """Take the loss scale off `.grad` now, before looking at or changing gradients.

        Sets `grad_norm`. Once per step, after the last backward: further ones put the scale back
        on. Without fp16 gradients carry none.
        """
        if self._scaler is not None:
            assert self._step is not None
            self._step.unscale_()

    def check_replicas(self) -> None:
        """See that all ranks hold the same parameters and buffers, bit for bit. All must call it.

        One read of the model, and eight bytes to the other ranks for each tensor. Buffers count
        where forwards broadcast them.

        Raises RuntimeError on every rank that names a rank and a tensor that differ.
        """
        if self.process_group is not None:
            buffers = self._named_buffers() if self.forward_sync_buffers else []
            check_same_bits([*self._named_parameters(), *buffers], self.process_group)

    def configure(self, config: WrapConfig, optimizer: torch.optim.Optimizer | None) -> None:
        """Apply `wrap`'s options. Called once, by `wrap`."""
        self._config = config
        self._open_store()
        self._open_step(config.max_grad_norm)
        if self._step is not None and optimizer is not None:
            self._step.attach(optimizer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, under the configured precision and activation storage."""
        differentiated = torch.is_grad_enabled()
        synchronize = differentiated and self.require_backward_grad_sync
        self._gradients.release()
        if differentiated:
            # First: it completes what a step that failed left on the way.
            self._gradients.prepare(synchronize=synchronize)
        if self._join_config.enable:
            self._announce(synchronize)
        if synchronize:
            self._sync_buffers()
        if self.device_ids:
            args, kwargs = tree_map_only(Tensor, self._to_device, (args, kwargs))
        saving = self._store if differentiated else None
        with self._reporting(synchronize):
            scaling = self._step if self._scaler is not None else None
            if scaling is not None and differentiated:
                args, kwargs = scaled_inputs((args, kwargs), scaling.leave)
            with autocast(self._config.precision, self.device), saving or nullcontext():
                outputs = self.module(*args, **kwargs)
            if scaling is not None:
                outputs = scaled_outputs(outputs, scaling.enter)
            elif self._config.precision == "bf16":
                outputs = upcast_outputs(outputs)
        if differentiated:
            tensors = [output for output in tree_leaves(outputs) if isinstance(output, Tensor)]
            self._gradients.follow(tensors, synchronize=synchronize)
        return outputs

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forwards inside accumulate gradients locally; the next one outside averages them all."""
        before = self.require_backward_grad_sync
        self.require_backward_grad_sync = False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    def register_comm_hook(
        self, state: object, hook: Callable[[Any, Any], torch.futures.Future[Tensor]]
    ) -> None:
        """Let `hook(state, bucket)` reduce each bucket of gradients, and divide it.

        `bucket` is a `dpmem.GradBucket`, with the methods of torch.distributed.GradBucket, so
        torch's own hooks (torch.distributed.algorithms.ddp_comm_hooks) work. The future that `hook`
        returns holds the reduced tensor.

        Raises RuntimeError for a second hook, and where there is no process group.
        """
        if isinstance(self._gradients, LocalGradients):
            raise RuntimeError(  # noqa: TRY004 - the ranks are wrong, not the argument
                "a communication hook reduces gradients over ranks; received one for a model that "
                "one rank trains alone; start several ranks, or leave the hook out"
            )
        self._gradients.register_comm_hook(partial(hook, state))

    def join(
        self,
        divide_by_initial_world_size: bool = True,
        enable: bool = True,
        throw_on_early_termination: bool = False,
    ) -> AbstractContextManager[Any]:
        """A context for a training loop in which ranks may run out of inputs before others.

        A rank that has left the loop takes part in the averages of the others with zeros, until
        all have, and takes the model of the last. Inside, every forward outside `no_sync` that is
        differentiated needs one backward.

        divide_by_initial_world_size  divide by all ranks, so that every sample counts the same;
                                      False: by those that still have inputs, which waits for the
                                      device once a step
        throw_on_early_termination    raise RuntimeError on all ranks when the first has run out
        """
        if self.process_group is None:
            return nullcontext()
        return Join(
            [self],
            enable,
            throw_on_early_termination,
            divide_by_initial_world_size=divide_by_initial_world_size,
        )

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For torch.distributed.algorithms.join.Join."""
        self._divide_by_initial_world_size = kwargs.get("divide_by_initial_world_size", True)
        return Shadow(self)

    @property
    def join_device(self) -> torch.device:
        """For torch.distributed.algorithms.join.Join."""
        return self.device

    @property
    def join_process_group(self) -> dist.ProcessGroup | None:
        """For torch.distributed.algorithms.join.Join."""
        return self.process_group

    def shadow_step(self) -> None:
        """Match the collectives of one forward and backward of ranks that still have inputs."""
        assert self.process_group is not None
        if not any_synchronizes(self.process_group, self.device, mine=False):
            return
        self._sync_buffers(joined=True)
        if isinstance(self._gradients, Reducer):
            self._gradients.shadow()

    def take_final_model(self, *, is_last: bool) -> None:
        """Take parameters and buffers of the rank that ran out of inputs last."""
        assert self.process_group is not None
        source = highest_rank(self.process_group, self.device, among=is_last)
        broadcast(self._replicated(buffers=self.forward_sync_buffers), self.process_group, source)
        if self._scaler is not None:
            broadcast(self._scaler.tensors(), self.process_group, source)

    def owned_tensors(self) -> dict[Category, list[Tensor]]:
        """The memory dpmem itself holds now, by category: buckets and compressed activations."""
        compressed = [] if self._store is None else self._store.compressed_tensors()
        return {"bucket": self._gradients.bucket_tensors(), "compressed": compressed}

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group not in (None, dist.group.WORLD):
            raise RuntimeError(
                "a wrapper is pickled or copied only where it averages over all ranks; this one "
                "has a process group of its own, which cannot be pickled; pickle its .module"
            )
        state = self.__dict__.copy()
        for name in ("process_group", "_gradients", "_store", "_step"):
            del state[name]
        state["_scaler"] = None if self._scaler is None else self._scaler.state_dict()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.process_group = group_of(None, None)
        self._connect()
        self._open_store()
        self._open_step(max_norm=None)
        if self._scaler is not None:
            self._scaler.restore(state["_scaler"])

    def _connect(self) -> None:
        """The reducer. No collective: one rank may make a copy of its own."""
        self._store = None
        self._step = None
        self._scaler = None
        self._divide_by_initial_world_size = True
        named = self._named_parameters()
        if self.process_group is None or dist.get_world_size(self.process_group) == 1:
            self._gradients = LocalGradients(named)
            return
        sparse = sparse_weights(self.module)
        self._gradients = Reducer(
            named,
            self.process_group,
            self._options,
            sparse=[i for i, (_, parameter) in enumerate(named) if id(parameter) in sparse],
        )
        weakref.finalize(self, self._gradients.retire).atexit = False

    def _open_store(self) -> None:
        if self._config.policy is None:
            return
        agree, rank = None, 0
        if self.process_group is not None:
            agree = partial(maximum, self.process_group, self.device)
            rank = dist.get_rank(self.process_group)
        seed = torch.initial_seed()
        self._store = ActivationStore(
            self.module, self._config.policy, seed=seed, rank=lambda: rank, agree=agree
        )

    def _open_step(self, max_norm: float | None) -> None:
        if self._config.precision == "fp16":
            group = self.process_group
            agree = None if group is None else partial(check_same, group)
            self._scaler = LossScaler(self.device, agree)
        if max_norm is None and self._scaler is None:
            return
        refuse_to_leave_out(self.module, self.parameters_to_ignore)
        self._step = GradientStep(self.module, self._gradients, max_norm, self._scaler)
        if isinstance(self._gradients, Reducer):
            self._gradients.collect_stats = True

    @contextmanager
    def _reporting(self, synchronize: bool) -> Iterator[None]:
        """Tell the other ranks where an exception ends a forward whose backward they will await."""
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            if synchronize and not succeeded:
                self._gradients.forward_failed(sys.exception())

    def _announce(self, synchronize: bool) -> None:
        """Inside join: tell ranks without inputs what this forward brings."""
        assert self.process_group is not None
        work = Join.notify_join_context(self)
        any_synchronizes(self.process_group, self.device, mine=synchronize)
        if isinstance(self._gradients, Reducer):
            contributing = dist.get_world_size(self.process_group)
            if work is not None and not self._divide_by_initial_world_size:
                contributing = active_ranks(work)
            self._gradients.scale = 1.0 / contributing

    def _sync_buffers(self, *, joined: bool = False) -> None:
        if not self.forward_sync_buffers or isinstance(self._gradients, LocalGradients):
            return
        assert self.process_group is not None
        buffers = self._named_buffers()
        source = 0
        if self._join_config.enable:
            source = highest_rank(self.process_group, self.device, among=not joined)
        values = [buffer for _, buffer in buffers]
        broadcast(values, self.process_group, source, wait=self._gradients.wait)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        ignored = self.parameters_to_ignore
        return [(n, p) for n, p in self.module.named_parameters() if n not in ignored]

    def _named_buffers(self) -> list[tuple[str, Tensor]]:
        ignored = self.parameters_to_ignore
        return [(n, b) for n, b in self.module.named_buffers() if n not in ignored]

    def _replicated(self, *, buffers: bool) -> list[Tensor]:
        tensors: list[Tensor] = [parameter for _, parameter in self._named_parameters()]
        return tensors + [buffer for _, buffer in self._named_buffers() if buffers]
