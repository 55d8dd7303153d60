"""`wrap`, and DataParallel: the module that users hold."""

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpmem.activations.policy import Policy
from dpmem.activations.store import ActivationStore
from dpmem.config import Activations, Offload, Precision, Shard, WrapConfig
from dpmem.precision import GradientClip, autocast, check_clippable, upcast_outputs
from dpmem.reducer import LocalGradients, Reducer
from dpmem_profiling import Category

# DistributedDataParallel's default bucket.
_BUCKET_CAPACITY_MIB = 25.0


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    precision: Precision = "fp32",
    activations: Activations | Policy | None = None,
    max_grad_norm: float | None = None,
    shard: Shard = "none",
    offload: Offload = "none",
    process_group: dist.ProcessGroup | None = None,
) -> "tuple[DataParallel, torch.optim.Optimizer | None]":
    """Make `model` data parallel and small; the training loop does not change.

    model          on its device already; its parameters are broadcast from rank 0
    optimizer      the one that updates it; needed where max_grad_norm is given
    precision      "fp32", or "bf16": forward under autocast, outputs that torch's pytree sees
                   returned as fp32
    activations    "lossless", "8bit", "4bit", "2bit", "offload", "4bit+offload" (any bits), a
                   byte budget such as "6GiB", or a `Policy`: how activations are stored between
                   forward and backward; None leaves them to autograd
    max_grad_norm  clip the global 2-norm of the gradients to this before each step
    shard, offload "none" in this version
    process_group  ranks to average over; default: all. Under torchrun the default group is
                   initialised here if it is not yet (nccl for a model on CUDA, gloo otherwise);
                   without torchrun and without a group, world size is 1.

    Returns the wrapped model and the same optimizer, hooked.

    Raises ValueError for unknown or contradictory options, TypeError for parameters that cannot be
    clipped or averaged, NotImplementedError for values this version does not have, RuntimeError
    where ranks hold different models.

    Example:
        model, optimizer = dpmem.wrap(model, optimizer, activations="4bit", max_grad_norm=1.0)
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    """
    config = WrapConfig(precision, activations, max_grad_norm, shard, offload)
    if config.max_grad_norm is not None and optimizer is None:
        raise ValueError(
            "max_grad_norm is applied at the optimizer's step, so wrap needs the optimizer; "
            "received none; call wrap(model, optimizer, max_grad_norm=...)"
        )
    if optimizer is not None and config.max_grad_norm is not None:
        check_clippable(optimizer, model)
    if process_group is None:
        _initialise_from_torchrun(model)
    wrapped = DataParallel(model, process_group=process_group)
    wrapped.configure(config, optimizer)
    return wrapped, optimizer


def compress(model: nn.Module, policy: Activations | Policy, *, seed: int = 0) -> ActivationStore:
    """A context in which what autograd saves of `model` is stored compressed.

    For training loops that do not use `wrap`. Backward may run outside the context. Made once and
    entered for every forward, each draws fresh noise; a byte budget needs that, because it learns
    from one forward for the next.

    policy   a preset's name, a byte budget such as "6GiB", or a `Policy`
    seed     keys the rounding noise; a context made anew each step needs another one each time

    Raises ValueError for an unknown preset; on entering, RuntimeError inside other saved-tensor
    hooks and where a budget cannot be met, NotImplementedError for compiled code.

    Example:
        compressed = dpmem.compress(model, "4bit")
        for inputs, targets in loader:
            with compressed:
                loss = loss_fn(model(inputs), targets)
            loss.backward()
    """
    resolved = WrapConfig(activations=policy).policy
    if resolved is None:
        raise ValueError("compress needs a policy; received None; use a preset such as '4bit'")
    return ActivationStore(model, resolved, seed=seed)


class DataParallel(nn.Module):
    """Data parallelism over a process group, with DistributedDataParallel's constructor.

    module                       the model; its attributes stay reachable as `.module`
    device_ids, output_device    at most one device, the module's own: accepted for compatibility
    dim                          0: the outputs of one device are not gathered
    broadcast_buffers            rank 0's buffers reach all ranks at each synchronized forward that
                                 is differentiated, in training and in evaluation mode
    init_sync                    parameters and buffers are broadcast from rank 0 now
    process_group                default: the default group; world size 1 where there is none
    bucket_cap_mb                MiB of a bucket (25)
    find_unused_parameters       parameters that took no part in a backward count as zeros;
                                 without it, several ranks raise an error that names those
                                 whose gradient is None
    check_reduction              no effect, there as here
    gradient_as_bucket_view      True: gradients are always views of the buckets
    static_graph                 False: this version has no such mode

    Gradients are averaged, exposed as views of the buckets when the backward ends, and their
    memory is released at the first forward after they are set to None. Whoever holds on to a
    `.grad` sees it overwritten by the next backward. Writing to a gradient through `.data` is not
    seen by clipping; write to `.grad` itself.

    A backward is averaged when it reaches the outputs of a forward outside `no_sync`; one that
    reaches no output that torch's pytree sees (a plain dataclass's, a view edited in place) goes by
    the last forward. Where no parameter receives a gradient, no rank waits for this one. A backward
    that raised on all ranks leaves no gradient where one was travelling: set gradients to zero or
    None, and go on. Where some ranks raised, in forward or in backward, stop all: this version does
    not see that the others went on with another average.

    State dicts have the module's own keys, without `module.`; both forms load.

    Not there in this version, unlike in DistributedDataParallel: `join`, `register_comm_hook`.

    Raises ValueError for a module on several devices, for devices that are not the module's, for
    a module without gradients and for arguments with a value other than those above, TypeError for
    parameters that several ranks cannot reduce, RuntimeError where ranks hold different models
    and, at a forward, where a parameter was unfrozen since.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[int | torch.device] | None = None,
        output_device: int | torch.device | None = None,
        dim: int = 0,
        broadcast_buffers: bool = True,
        init_sync: bool = True,
        process_group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float | None = None,
        find_unused_parameters: bool = False,
        check_reduction: bool = False,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
    ) -> None:
        super().__init__()
        _refuse("dim", dim, 0, "one process drives one device, so nothing is gathered")
        _refuse(
            "gradient_as_bucket_view",
            gradient_as_bucket_view,
            True,
            "gradients of their own would take the memory that dpmem is there to save",
        )
        _refuse("static_graph", static_graph, False, "this version learns nothing from a graph")
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(
                "DataParallel averages gradients, so the module must have a parameter that "
                "requires one; received none; use the module as it is"
            )
        devices = sorted({str(parameter.device) for _, parameter in named})
        if len(devices) > 1:
            raise ValueError(
                f"a wrapped module must live on one device; received {', '.join(devices)}; "
                "move it to one of them"
            )
        self.module = module
        self._device = named[0][1].device
        for device in (*(device_ids or ()), *(() if output_device is None else (output_device,))):
            self._check_device(device)
        if device_ids is not None and len(device_ids) > 1:
            raise ValueError(
                f"one process drives one device; received device_ids={list(device_ids)}; "
                "start one process a device with torchrun"
            )
        self._group = process_group
        if process_group is None and dist.is_available() and dist.is_initialized():
            self._group = dist.group.WORLD
        world_size = 1 if self._group is None else dist.get_world_size(self._group)
        self._rank = 0 if self._group is None else dist.get_rank(self._group)
        self._synchronize = True
        self._named = named
        self._frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
        self._config = WrapConfig()
        self._store: ActivationStore | None = None
        self._clip: GradientClip | None = None
        self._gradients: LocalGradients | Reducer
        self._broadcast = broadcast_buffers and world_size > 1
        if world_size == 1 or self._group is None:
            self._gradients = LocalGradients(named)
        else:
            self._check_ranks_agree(self._group)
            if init_sync:
                self._broadcast_from_first((*module.parameters(), *module.buffers()))
            self._gradients = Reducer(
                named,
                self._group,
                bucket_capacity_bytes=int((bucket_cap_mb or _BUCKET_CAPACITY_MIB) * 2**20),
                find_unused_parameters=find_unused_parameters,
            )
            weakref.finalize(self, self._gradients.retire).atexit = False
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    @property
    def grad_norm(self) -> Tensor | None:
        """The global gradient norm before clipping, of the last step: an fp32 scalar on the device.

        None before the first step and without max_grad_norm.
        """
        return None if self._clip is None else self._clip.norm

    def configure(self, config: WrapConfig, optimizer: torch.optim.Optimizer | None) -> None:
        """Apply `wrap`'s options. Called once, by `wrap`."""
        self._config = config
        if config.policy is not None:
            seed = torch.initial_seed()
            agree = None if self._group is None else partial(_maximum, self._group, self._device)
            self._store = ActivationStore(
                self.module, config.policy, seed=seed, rank=self._rank, agree=agree
            )
        if config.max_grad_norm is not None:
            assert optimizer is not None
            self._clip = GradientClip(optimizer, self._gradients, config.max_grad_norm)
            if isinstance(self._gradients, Reducer):
                self._gradients.collect_stats = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, under the configured precision and activation storage."""
        self._gradients.release()
        saving: ActivationStore | None = None
        if torch.is_grad_enabled():
            self._check_still_frozen()
            self._gradients.prepare(synchronize=self._synchronize)
            if self._broadcast and self._synchronize:
                self._broadcast_from_first(tuple(self.module.buffers()))
            saving = self._store
        with autocast(self._config.precision, self._device), saving or nullcontext():
            outputs = self.module(*args, **kwargs)
        if self._config.precision == "bf16":
            outputs = upcast_outputs(outputs)
        if torch.is_grad_enabled():
            tensors = [output for output in tree_leaves(outputs) if isinstance(output, Tensor)]
            self._gradients.follow(tensors, synchronize=self._synchronize)
        return outputs

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Forwards inside accumulate gradients locally; the next one outside averages them all."""
        before = self._synchronize
        self._synchronize = False
        try:
            yield
        finally:
            self._synchronize = before

    def owned_tensors(self) -> dict[Category, list[Tensor]]:
        """The memory dpmem itself holds now, by category: buckets and compressed activations."""
        compressed = [] if self._store is None else self._store.compressed_tensors()
        return {"bucket": self._gradients.bucket_tensors(), "compressed": compressed}

    def _check_still_frozen(self) -> None:
        unfrozen = next((name for name, p in self._frozen if p.requires_grad), None)
        if unfrozen is not None:
            raise RuntimeError(
                "parameters that are to be averaged and clipped must require a gradient when the "
                f"model is wrapped; {unfrozen!r} was unfrozen since; wrap the model again"
            )

    def _check_device(self, device: int | torch.device) -> None:
        wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if wanted != self._device:
            raise ValueError(
                f"device_ids and output_device must name the module's device {self._device}; "
                f"received {wanted}; move the module there first, or leave them out"
            )

    def _check_ranks_agree(self, group: dist.ProcessGroup) -> None:
        mine = [(name, tuple(p.shape), str(p.dtype), p.stride()) for name, p in self._named]
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
        for rank, theirs in enumerate(everyone):
            if theirs == everyone[0]:
                continue
            different = next(
                (pair for pair in zip(everyone[0], theirs, strict=False) if pair[0] != pair[1]),
                (f"{len(everyone[0])} parameters", f"{len(theirs)} parameters"),
            )
            raise RuntimeError(
                "all ranks must wrap the same model; rank 0 and rank "
                f"{rank} differ: {different[0]} against {different[1]}; build it from the same "
                "configuration on every rank"
            )

    def _broadcast_from_first(self, tensors: Sequence[Tensor]) -> None:
        assert self._group is not None
        source = dist.get_global_rank(self._group, 0)
        with torch.no_grad():
            works = [
                dist.broadcast(tensor.detach(), source, group=self._group, async_op=True)
                for tensor in tensors
            ]
            for work in works:
                work.wait()


def _refuse(option: str, value: object, only: object, why: str) -> None:
    if value != only:
        raise ValueError(f"{option} must be {only!r}: {why}; received {value!r}; leave it out")


def _initialise_from_torchrun(model: nn.Module) -> None:
    """Join the group that torchrun describes, where nobody has yet."""
    if not dist.is_available() or dist.is_initialized():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    devices = {parameter.device.type for parameter in model.parameters()}
    dist.init_process_group("nccl" if "cuda" in devices else "gloo")


def _maximum(group: dist.ProcessGroup, device: torch.device, values: Tensor) -> Tensor:
    """The elementwise maximum of `values`, a tensor on the host, over the ranks of `group`."""
    on_device = values.to(device, copy=True)
    dist.all_reduce(on_device, dist.ReduceOp.MAX, group)
    return on_device.cpu()


def _drop_prefix(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """State-dict hook: `module.x` becomes `x`."""
    wrapped = prefix + "module."
    own = [key for key in state if key.startswith(wrapped)]
    state.update({prefix + key.removeprefix(wrapped): state.pop(key) for key in own})
    # The versions of the modules' formats, by module path.
    versions = getattr(state, "_metadata", {})
    for key in [key for key in versions if key == wrapped[:-1] or key.startswith(wrapped)]:
        versions[(prefix + key.removeprefix(wrapped[:-1]).lstrip(".")).rstrip(".")] = versions.pop(
            key
        )


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Load hook: the module's plain keys become `module.x`, unless the dict has those already.

    A module may own both `weight` and `module.weight`, so the form is the whole dict's.
    """
    assert isinstance(module, DataParallel)
    plain = [prefix + key for key in module.module.state_dict()]
    wrapped = [prefix + "module." + key.removeprefix(prefix) for key in plain]
    if sum(key in state for key in plain) < sum(key in state for key in wrapped):
        return
    renamed = dict(zip(plain, wrapped, strict=True))
    state.update({renamed[key]: state.pop(key) for key in plain if key in state})
