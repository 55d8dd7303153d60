"""Gradients in flight: hook -> pack -> collective -> epilogue.

autograd leaves `parameter.grad`; a post-accumulate hook counts it into its bucket; when the
bucket is full, and every bucket before it has been launched, one kernel packs it (times
1/world_size), its gradients leave `parameter.grad` and an asynchronous all-reduce starts. At the
end of backward the collectives are awaited, the gradients come back as views of the buckets and,
where somebody clips, each bucket is read once for its sum of squares and its finite flag.

A gradient that travels is nobody's `.grad`: what is zeroed or read after a backward that raised is
never memory that a collective still writes.

Buckets are launched in one fixed order on every rank, so collectives always match. A bucket's
memory belongs to the gradients that are views of it: once they are set to None it is released at
the next forward, so activations never share the peak with gradients nobody reads.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dpmem.buckets import Bucket, BucketPlan
from dpmem.layout import dense_gradient, dense_strides, flatten_dense, writable_gradient
from dpmem_kernels import GradStats, PackPlan, bucket_pack, grad_stats

# DistributedDataParallel's figures: small first bucket, so that the first collective starts early.
FIRST_BUCKET_BYTES = 1 << 20

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_BACKWARD = -1


@dataclass
class _BucketState:
    """What one backward knows about one bucket."""

    plan: Bucket
    waiting: int = 0
    flat: Tensor | None = None
    # Of the last backward: which gradients are present seldom changes.
    pack_plan: PackPlan | None = None
    work: dist.Work | None = None
    stats: GradStats | None = None
    # The flat buffer's version when its stats were taken: views share the counter, so any
    # later write to a gradient shows.
    stats_version: int = -1
    members: list[int] = field(default_factory=list)
    # The members that had a gradient when it was launched.
    present: list[int] = field(default_factory=list)


class LocalGradients:
    """World size 1: nothing travels, so gradients stay where autograd left them."""

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        self._parameters = [parameter for _, parameter in parameters]

    def prepare(self, *, synchronize: bool) -> None:
        """Nothing to prepare."""

    def follow(self, outputs: list[Tensor], *, synchronize: bool) -> None:
        """Nothing to follow."""

    def release(self) -> None:
        """Nothing to release."""

    def bucket_tensors(self) -> list[Tensor]:
        """No buckets."""
        return []

    def gradients(self) -> list[Tensor]:
        """Every gradient once, flat, sharing memory with `parameter.grad`."""
        return [
            writable_gradient(parameter)
            for parameter in self._parameters
            if parameter.grad is not None
        ]

    def stats(self) -> list[GradStats]:
        """Sum of squares and finite flag of all gradients, read now."""
        gradients = self.gradients()
        return [grad_stats(gradients)] if gradients else []


class _AtTheEnd:
    """What autograd calls when a backward ends. It is gone, uncalled, where the backward raised."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def __call__(self) -> None:
        self._finish()


def _hook(reducer: "weakref.ref[Reducer]", index: int) -> Callable[[Tensor], None]:
    def on_gradient(_: Tensor) -> None:
        alive = reducer()
        if alive is not None:
            alive._on_gradient(index)

    return on_gradient


def _running_backward() -> int:
    """Autograd's number for the backward that runs on this thread; -1 where none does."""
    return torch._C._current_graph_task_id()


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class Reducer:
    """Averages the gradients of `parameters` over `process_group` during backward.

    Raises TypeError for parameters that are not float32, bfloat16 or float16: this version
    reduces no others.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        process_group: dist.ProcessGroup,
        *,
        bucket_capacity_bytes: int,
        find_unused_parameters: bool,
    ) -> None:
        for name, parameter in parameters:
            if parameter.dtype not in _DTYPES:
                raise TypeError(
                    "gradients that travel must be float32, bfloat16 or float16; parameter "
                    f"{name!r} is {parameter.dtype}; convert it, or freeze it before wrapping"
                )
        self._names = [name for name, _ in parameters]
        self._parameters = [parameter for _, parameter in parameters]
        self._strides = [dense_strides(parameter) for parameter in self._parameters]
        self._group = process_group
        self._world_size = dist.get_world_size(process_group)
        self._find_unused = find_unused_parameters
        # Set where somebody clips: each bucket is then read once more, right after it arrived.
        self.collect_stats = False
        self.plan = BucketPlan.build(
            [(parameter.numel(), parameter.dtype) for parameter in self._parameters],
            capacity_bytes=bucket_capacity_bytes,
            first_capacity_bytes=min(FIRST_BUCKET_BYTES, bucket_capacity_bytes),
        )
        self._buckets = [
            _BucketState(bucket, members=[slot.parameter for slot in bucket.slots])
            for bucket in self.plan.buckets
        ]
        self._bucket_of = {i: bucket for bucket in self._buckets for i in bucket.members}
        self._offset_of = {
            slot.parameter: slot.offset for bucket in self.plan.buckets for slot in bucket.slots
        }
        self._synchronize = False
        self._local_backward = _NO_BACKWARD
        self._end: weakref.ref[_AtTheEnd] | None = None
        self._reset()
        # The model outlives its wrapper: hooks must not keep a dropped reducer alive, nor at work.
        handles = [
            parameter.register_post_accumulate_grad_hook(_hook(weakref.ref(self), index))
            for index, parameter in enumerate(self._parameters)
        ]
        weakref.finalize(self, _remove, handles).atexit = False

    def prepare(self, *, synchronize: bool) -> None:
        """Before a forward that will be differentiated: shall its backward average gradients?"""
        self._synchronize = synchronize
        # Inside a backward, a checkpoint runs its forward again: nothing of it is over yet.
        if _running_backward() == _NO_BACKWARD:
            self._settle()

    def follow(self, outputs: list[Tensor], *, synchronize: bool) -> None:
        """Average the backward that reaches these outputs, or do not, whatever runs in between.

        One that reaches outputs of both kinds is averaged; one that reaches none (a loss that the
        module keeps as an attribute) goes by the last forward.
        """
        reached = self._begin if synchronize else self._skip
        for output in outputs:
            if output.grad_fn is not None:
                output.register_hook(reached)

    def release(self) -> None:
        """Let go of buckets whose gradients have all been set to None."""
        for bucket in self._buckets:
            travels = bucket.work is not None
            if not travels and all(self._parameters[i].grad is None for i in bucket.members):
                bucket.flat = None
                bucket.stats = None

    def bucket_tensors(self) -> list[Tensor]:
        """The flat buffers that exist now."""
        return [bucket.flat for bucket in self._buckets if bucket.flat is not None]

    def gradients(self) -> list[Tensor]:
        """Every gradient once, flat: a whole bucket where all its gradients are still its views."""
        tensors: list[Tensor] = []
        for bucket in self._buckets:
            if self._is_exposed(bucket):
                assert bucket.flat is not None
                tensors.append(bucket.flat)
            else:
                tensors.extend(self._loose_gradients(bucket))
        return tensors

    def stats(self) -> list[GradStats]:
        """Sums of squares and finite flags that together cover `gradients()`.

        The epilogue's, read while the bucket was warm, as long as nobody wrote to a gradient
        since; read again otherwise.
        """
        result: list[GradStats] = []
        for bucket in self._buckets:
            flat = bucket.flat
            if flat is not None and self._is_exposed(bucket):
                if bucket.stats is None or flat._version != bucket.stats_version:
                    self._take_stats(bucket)
                assert bucket.stats is not None
                result.append(bucket.stats)
            elif gradients := self._loose_gradients(bucket):
                result.append(grad_stats(gradients))
        return result

    def retire(self) -> None:
        """The wrapper is gone: only backwards of its own forwards are averaged from now on."""
        self._synchronize = False

    def _is_averaging(self) -> bool:
        """True from the start of an averaged backward until it ends, well or not."""
        return self._end is not None and self._end() is not None

    def _begin(self, _: Tensor | None = None) -> None:
        """A backward reached an output of a synchronized forward: give gradients back at its end.

        Where this runs in the backward of a reentrant checkpoint, the one around it may have begun.
        """
        if not self._is_averaging():
            self._settle()
            end = _AtTheEnd(self._finish)
            self._end = weakref.ref(end)
            torch.autograd.Variable._execution_engine.queue_callback(end)

    def _skip(self, _: Tensor) -> None:
        """A backward reached an output of a local forward."""
        self._local_backward = _running_backward()

    def _settle(self) -> None:
        """Complete what a backward that raised left: other ranks may wait in its collectives.

        Their gradients are lost: what travelled is discarded, and the rest goes as zeros.
        """
        if self._end is None:
            return
        assert not self._is_averaging()
        for bucket in self._buckets[self._next :]:
            like = self._parameters[bucket.members[0]]
            zeros = torch.zeros(bucket.plan.numel, dtype=like.dtype, device=like.device)
            bucket.work = dist.all_reduce(zeros, group=self._group, async_op=True)
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
        self._reset()

    def _reset(self) -> None:
        self._end = None
        self._next = 0
        self._arrived = [False] * len(self._parameters)
        for bucket in self._buckets:
            bucket.waiting = len(bucket.members)
            bucket.work = None

    def _on_gradient(self, index: int) -> None:
        if not self._is_averaging():
            if not self._synchronize or _running_backward() == self._local_backward:
                return
            self._begin()
        if self._arrived[index]:
            raise RuntimeError(
                "each parameter's gradient must be accumulated once in a backward; that of "
                f"{self._names[index]!r} arrived twice, as it does when a module runs in two "
                "reentrant checkpoints, or in one and outside it; use "
                "checkpoint(..., use_reentrant=False)"
            )
        self._arrived[index] = True
        self._bucket_of[index].waiting -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].waiting == 0:
            self._launch(self._buckets[self._next])
            self._next += 1

    def _launch(self, bucket: _BucketState) -> None:
        """Pack one bucket and start its all-reduce; absent gradients count as zeros."""
        present = [i for i in bucket.members if self._parameters[i].grad is not None]
        bucket.present = present
        first = self._parameters[bucket.members[0]]
        if bucket.flat is None:
            bucket.flat = torch.empty(bucket.plan.numel, dtype=first.dtype, device=first.device)
            # The padding travels too, and stats read the whole buffer.
            for start, end in bucket.plan.gaps:
                bucket.flat[start:end].zero_()
        for slot in bucket.plan.slots:
            if self._parameters[slot.parameter].grad is None:
                bucket.flat[slot.offset : slot.offset + slot.numel].zero_()
        gradients = [
            flatten_dense(dense_gradient(self._parameters[i]), self._strides[i]) for i in present
        ]
        offsets = tuple(self._offset_of[i] for i in present)
        if bucket.pack_plan is None or bucket.pack_plan.offsets != offsets:
            bucket.pack_plan = PackPlan(
                [gradient.numel() for gradient in gradients],
                [gradient.dtype for gradient in gradients],
                offsets,
                bucket.flat.device,
            )
        bucket_pack(bucket.pack_plan, gradients, bucket.flat, scale=1.0 / self._world_size)
        for i in present:
            self._parameters[i].grad = None
        bucket.work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)

    def _finish(self) -> None:
        """End of backward: launch what is left, await everything, give the gradients back."""
        if not any(self._arrived):
            # It went through the outputs to the inputs alone.
            self._reset()
            return
        missing = [
            i
            for i, arrived in enumerate(self._arrived)
            if not arrived and self._parameters[i].grad is None
        ]
        # Whatever is missing here: the other ranks wait in these collectives.
        while self._next < len(self._buckets):
            self._launch(self._buckets[self._next])
            self._next += 1
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
        self._reset()
        if missing and not self._find_unused:
            names = ", ".join(repr(self._names[i]) for i in missing[:8])
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise RuntimeError(
                "every parameter that requires a gradient must receive one in each synchronized "
                f"backward; {len(missing)} received none: {names}{more}; freeze them before "
                "wrapping, use them in the loss, or pass find_unused_parameters=True"
            )
        for bucket in self._buckets:
            for i in bucket.present:
                self._parameters[i].grad = self._view(bucket, i)
            if self.collect_stats:
                self._take_stats(bucket)
        if self._find_unused:
            self._expose_remote(missing)

    def _expose_remote(self, missing: list[int]) -> None:
        """Give parameters unused here, but used on another rank, the gradient of that rank."""
        if not self._parameters:
            return
        used = torch.ones(
            len(self._parameters), dtype=torch.int32, device=self._parameters[0].device
        )
        used[missing] = 0
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self._group)
        for index, is_used in enumerate(used.tolist()):
            if is_used and self._parameters[index].grad is None:
                self._parameters[index].grad = self._view(self._bucket_of[index], index)

    def _take_stats(self, bucket: _BucketState) -> None:
        assert bucket.flat is not None
        bucket.stats = grad_stats([bucket.flat])
        bucket.stats_version = bucket.flat._version

    def _view(self, bucket: _BucketState, index: int) -> Tensor:
        assert bucket.flat is not None
        shape = self._parameters[index].shape
        return bucket.flat.as_strided(shape, self._strides[index], self._offset_of[index])

    def _is_exposed(self, bucket: _BucketState) -> bool:
        """True where every member's gradient is still the bucket's own view of it."""
        return bucket.flat is not None and all(
            (gradient := self._parameters[i].grad) is not None and gradient._base is bucket.flat
            for i in bucket.members
        )

    def _loose_gradients(self, bucket: _BucketState) -> list[Tensor]:
        members = [self._parameters[i] for i in bucket.members]
        return [writable_gradient(p) for p in members if p.grad is not None]
