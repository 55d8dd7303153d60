"""Gradients in flight: hook -> pack -> collective -> epilogue.

autograd leaves `parameter.grad`; a post-accumulate hook counts it into its bucket; when the
bucket is full, and every bucket before it has been launched, one kernel packs it (times
1/world_size), its gradients leave `parameter.grad` and an asynchronous all-reduce starts. Not
before: a bucket that is filled as gradients come takes all of its memory while activations still
hold most of theirs. At the end of backward the collectives are awaited, the gradients come back as
views of the buckets and, where somebody clips, each bucket is read once for its sum of squares and
its finite flag.

A gradient that travels is nobody's `.grad`: what is zeroed or read after a backward that raised is
never memory that a collective still writes.

Buckets are launched in one order on every rank, so collectives always match: first that of
registration, reversed; after the first backward the one in which rank 0 saw its gradients, which
it tells the others once. A bucket's memory belongs to the gradients that are views of it: once they
are set to None it is released at the next forward, so activations never share the peak with
gradients nobody reads.
"""

import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dpmem.arguments import ReducerOptions
from dpmem.arrivals import Arrivals
from dpmem.backward import NO_BACKWARD, AtTheEnd, is_whole_backward, running_backward
from dpmem.bucket_buffer import BucketBuffer
from dpmem.bucket_layout import BucketLayout, kinds_of
from dpmem.buckets import BucketPlan
from dpmem.comm_hooks import CommHook, GradBucket
from dpmem.lockstep import Lockstep
from dpmem.plan_check import PlanCheck
from dpmem.turns import Turns
from dpmem_kernels import GradStats

_NO_GRAPH = (
    "backward(create_graph=True) of a model whose gradients are averaged: averages are computed "
    "outside of autograd, so no .grad has a graph; differentiate with torch.autograd.grad(..., "
    "create_graph=True), and call backward() on what you make of it"
)

Named = Sequence[tuple[str, nn.Parameter]]


def _hook(reducer: "weakref.ref[Reducer]", index: int) -> Callable[[Tensor], None]:
    def on_gradient(_: Tensor) -> None:
        alive = reducer()
        if alive is not None:
            alive._on_gradient(index)

    return on_gradient


def _raised(reducer: "weakref.ref[Reducer]") -> Callable[[], None]:
    def on_exception() -> None:
        alive = reducer()
        if alive is not None:
            alive._lockstep.failed(None, "the backward")

    return on_exception


def _remove(handles: dict[int, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()


class Reducer:
    """Averages the gradients of `parameters` over `process_group` during backward.

    parameters  all of the model; those that require a gradient at a forward are averaged
    sparse      indices of those whose gradients are sparse
    """

    def __init__(
        self,
        parameters: Named,
        process_group: dist.ProcessGroup,
        options: ReducerOptions,
        *,
        sparse: Collection[int] = (),
    ) -> None:
        self._names = [name for name, _ in parameters]
        self._parameters = [parameter for _, parameter in parameters]
        self._group = process_group
        self._options = options
        self._sparse = frozenset(sparse)
        self._comm_hook: CommHook | None = None
        self._lockstep = Lockstep.of(process_group)
        # What gradients are multiplied by on their way: divided by the ranks that contribute.
        self.scale = 1.0 / dist.get_world_size(process_group)
        # Set where somebody clips: each bucket is then read once more, right after it arrived.
        self.collect_stats = False
        self._synchronize = False
        self._local_backward = NO_BACKWARD
        self._end: weakref.ref[AtTheEnd] | None = None
        self._turns: Turns | None = None
        # Raised at the next forward, because the ranks that wait need this backward to end well.
        self._complaint: str | None = None
        self._warned = False
        self._handles: dict[int, RemovableHandle] = {}
        self._plan_check = PlanCheck(self._names, self._lockstep)
        self._start_anew()
        # The model outlives its wrapper: hooks must not keep a dropped reducer alive, nor at work.
        weakref.finalize(self, _remove, self._handles).atexit = False

    def prepare(self, *, synchronize: bool) -> None:
        """Before a forward that will be differentiated: shall its backward average gradients?

        Raises RuntimeError where parameters received no gradient in the backward before.
        """
        self._synchronize = synchronize
        # Inside a backward, a checkpoint runs its forward again: nothing of it is over yet. And
        # what one that raised left is completed when the others know of it, not before.
        if not synchronize or running_backward() != NO_BACKWARD:
            return
        self._lockstep.number_of(self)
        self._lockstep.check_empty_backward()
        self._lockstep.recover()
        self._settle()
        complaint, self._complaint = self._complaint, None
        if complaint is not None:
            raise RuntimeError(complaint)
        self._follow_trainable()

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
        if not self._is_averaging():
            self._layout.release()

    def register_comm_hook(self, hook: CommHook) -> None:
        """Let `hook` reduce the buckets from now on. Raises RuntimeError where there is one."""
        if self._comm_hook is not None:
            raise RuntimeError(
                "a model has one communication hook, registered once; this one has another; "
                "wrap the model again to change it"
            )
        self._comm_hook = hook

    def forward_failed(self, error: BaseException | None) -> None:
        """A forward that was to be averaged raised: tell the ranks that will wait for it."""
        if running_backward() == NO_BACKWARD:
            self._lockstep.failed(error, "the forward")

    def wait(self, work: "dist.Work | torch.futures.Future[Tensor]") -> Any:
        """The result of a collective that all ranks of this wrapper take part in."""
        # On CUDA a wait does not hold the host, and NCCL watches its collectives itself.
        watched = self._device().type == "cpu"
        return self._lockstep.wait(work) if watched else work.wait()

    def shadow(self) -> None:
        """Take part in one averaged backward of the other ranks, with nothing to contribute."""
        self._settle()
        self._follow_trainable()
        self._follow_order()
        self._plan_check.tell(self)
        self._lockstep.backward_begins(self)
        self._is_open = True
        self._launch_zeros()
        self._complete_empty(is_lost=False)

    def launch_lost(self, *, begun: bool) -> None:
        """Launch what is left of a backward that failed somewhere, which this rank began or not."""
        if not begun:
            self._follow_order()
            self._is_open = True
        if self._is_open:
            self._launch_zeros()

    def complete_lost(self) -> None:
        """Complete what was lost, and launched on all ranks."""
        if self._is_open:
            self._complete_empty(is_lost=True)

    @property
    def plan(self) -> BucketPlan:
        """Where gradients are laid out now."""
        return self._layout.plan

    def bucket_tensors(self) -> list[Tensor]:
        """The flat buffers that exist now."""
        return self._layout.tensors()

    def gradients(self) -> list[Tensor]:
        """Every gradient once, flat: a whole bucket where all its gradients are still its views."""
        return self._layout.gradients()

    def stats(self) -> list[GradStats]:
        """Sums of squares and finite flags that together cover `gradients()`."""
        return self._layout.stats()

    def own_state(self) -> list[Any]:
        """What belongs to the model, and changes back with it: which parameters have hooks.

        All else is of a piece with what the other ranks are at: what travels, in which order, how
        many averages there were, and which of them failed.
        """
        return [self._handles]

    def retire(self) -> None:
        """The wrapper is gone: only backwards of its own forwards are averaged from now on."""
        self._synchronize = False

    def _follow_trainable(self) -> None:
        """Plan for the parameters that require a gradient now, where these are others than before.

        A plan depends on nothing else but their dtypes, so ranks that freeze alike plan alike.
        """
        if self._layout.kinds != kinds_of(self._parameters):
            self._start_anew()

    def _start_anew(self) -> None:
        self._lay_out(order=None)
        trained = self._layout.trainable
        self._arrivals = Arrivals(
            self._names,
            trained,
            find_unused=self._options.find_unused,
            static_graph=self._options.static_graph,
        )
        self._reset()
        self._plan_check.changed(trained)
        for index in trained:
            if index not in self._handles:
                hook = _hook(weakref.ref(self), index)
                parameter = self._parameters[index]
                self._handles[index] = parameter.register_post_accumulate_grad_hook(hook)

    def _lay_out(self, order: Sequence[int] | None) -> None:
        """`order` counts among the parameters that require a gradient."""
        self._layout = BucketLayout(
            self._parameters,
            capacities_bytes=self._options.capacities_bytes,
            wire_dtype=self._options.wire_dtype,
            sparse=self._sparse,
            order=order,
        )
        self._buffers, self._place_of = self._layout.buffers, self._layout.place_of

    def _is_averaging(self) -> bool:
        """True from the start of an averaged backward until it ends, well or not."""
        end = None if self._end is None else self._end()
        return end is not None and not end.is_over

    def _begin(self, _: Tensor | None = None) -> None:
        """A backward reached an output of a synchronized forward: give gradients back at its end.

        Where this runs in the backward of a reentrant checkpoint, the one around it may have begun.
        """
        if not self._is_averaging():
            # Of another forward, which raised after this one's.
            self._lockstep.recover()
            self._settle()
            self._follow_order()
            try:
                turns = Turns.take(self._group, running_backward(), self)
            except RuntimeError as error:
                self._lockstep.failed(error, "a backward inside another")
                raise
            self._plan_check.tell(self)
            self._lockstep.backward_begins(self)
            self._turns = turns
            self._is_open = True
            end = AtTheEnd(self._finish, _raised(weakref.ref(self)))
            self._end = weakref.ref(end)

    def _skip(self, _: Tensor) -> None:
        """A backward reached an output of a local forward."""
        self._local_backward = running_backward()

    def _settle(self) -> None:
        """Complete what a backward that raised left: other ranks may wait in its collectives.

        Their gradients are lost: what travelled is discarded, and the rest goes as zeros.
        """
        assert not self._is_averaging()
        self.launch_lost(begun=True)
        self.complete_lost()

    def _launch_zeros(self) -> None:
        """Launch what is left of an averaged backward, with nothing to contribute."""
        with torch.no_grad():
            for buffer in self._buffers[self._next :]:
                self._travel(buffer, buffer.pack_zeros())

    def _complete_empty(self, *, is_lost: bool) -> None:
        """Complete, with nothing, an averaged backward whose buckets are all launched."""
        for number, buffer in enumerate(self._buffers):
            self._await(number)
            buffer.release()
        self._arrivals.begin()
        self._agree(self._arrivals.outstanding(), is_lost=is_lost)
        self._reset()
        self._lockstep.backward_ends()

    def _reset(self) -> None:
        # True from the start of an averaged backward until all of its collectives are completed.
        self._is_open = False
        self._end = None
        self._turns = None
        # Who received no gradient; None until the backward is over.
        self._missing: list[int] | None = None
        self._next = 0
        self._arrivals.begin()
        self._waiting = [len(buffer.members) for buffer in self._buffers]
        self._works: list[dist.Work | torch.futures.Future[Tensor]] = []

    def _on_gradient(self, index: int) -> None:
        if index not in self._arrivals:
            return  # frozen when the forward ran
        if not self._is_averaging():
            if not self._synchronize or running_backward() == self._local_backward:
                return
            self._begin()
        if torch.is_grad_enabled() and not self._warned:
            self._warned = True
            warnings.warn(_NO_GRAPH, stacklevel=2)
        if not self._arrivals.has_come(index):
            return
        number, _ = self._place_of[index]
        self._waiting[number] -= 1
        if self._waiting[number] == 0:
            assert self._turns is not None
            self._turns.launch_full()

    def launch_full(self) -> bool:
        """Launch buckets in their order, as far as they are full. Is everything launched?"""
        while self._next < len(self._buffers) and self._waiting[self._next] == 0:
            self._launch()
        return self._next == len(self._buffers)

    def launch_rest(self) -> None:
        """The backward is over: launch what is left, because the other ranks wait for it."""
        may_all_be_unused = is_whole_backward() and self._arrivals.may_be_unused
        if self._arrivals.none() and not may_all_be_unused:
            return
        outstanding = self._arrivals.outstanding()
        self._missing = [i for i in outstanding if self._parameters[i].grad is None]
        while self._next < len(self._buffers):
            self._launch()

    def _launch(self) -> None:
        """Pack the next bucket and start its all-reduce."""
        self._plan_check.ask(self)
        buffer = self._buffers[self._next]
        try:
            with torch.no_grad():
                scale = 1.0 if self._comm_hook is not None else self.scale
                self._travel(buffer, buffer.pack(scale))
        except RuntimeError as error:
            # Out of memory, most likely, of which autograd's error says no more than this.
            self._lockstep.failed(error, "packing a bucket of gradients")
            raise

    def _travel(self, buffer: BucketBuffer, tensor: Tensor) -> None:
        number = self._next
        if self._comm_hook is None:
            work = dist.all_reduce(tensor, group=self._group, async_op=True)
        else:
            is_last = number + 1 == len(self._buffers)
            work = self._comm_hook(GradBucket(number, tensor, buffer.members, is_last))
        # Not where that raised: the others wait for this bucket still.
        self._works.append(work)
        self._next += 1

    def _await(self, number: int) -> Tensor | None:
        """Wait for a bucket; what a communication hook made of it."""
        work = self._works[number]
        reduced = self.wait(work)
        if isinstance(work, dist.Work):
            return None
        if not isinstance(reduced, Tensor):
            raise TypeError(
                "a communication hook's future must hold the reduced tensor; received "
                f"{type(reduced).__name__}; for a list as Work.get_future() gives it, add "
                ".then(lambda future: future.value()[0])"
            )
        return reduced

    def _finish(self) -> None:
        """End of backward: launch what is left, await everything, give the gradients back."""
        assert self._turns is not None
        self._turns.launch_rest()
        missing = self._missing
        if missing is None:
            # It went through the outputs to other tensors alone.
            self._lockstep.backward_was_empty(self, whole=is_whole_backward())
            self._reset()
            return
        with torch.no_grad():
            complaint = self._arrivals.complaint(missing)
            for number, buffer in enumerate(self._buffers):
                buffer.arrive(self._await(number), take_stats=self.collect_stats)
            remote = self._agree(missing)
            self._lockstep.backward_ends()
            self._reset()
            for buffer in self._buffers:
                buffer.expose(as_views=self._options.as_views)
            # Whatever was asked for, no rank goes on with another average than the others.
            for index in remote:
                number, member = self._place_of[index]
                self._buffers[number].expose([member], as_views=self._options.as_views)
            self._complaint = complaint or self._complaint
            if not self._options.as_views:
                for buffer in self._buffers:
                    buffer.release()

    def _agree(self, missing: list[int], *, is_lost: bool = False) -> list[int]:
        """What ranks tell each other after a backward's averages; who of `missing` gets one."""
        return self._arrivals.agree(
            missing, self._group, self._device(), self.wait, is_lost=is_lost
        )

    def _device(self) -> torch.device:
        return self._parameters[0].device

    def _follow_order(self) -> None:
        """Lay the buckets out as agreed after the first backward."""
        order = self._arrivals.take_order()
        if order is not None:
            self._lay_out(order)
            self._reset()
