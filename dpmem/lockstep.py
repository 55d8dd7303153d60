"""What each rank has done, told to the others through the store, and read when something is late.

Collectives do not say who is missing, and a rank that raised does not say so to those that wait for
it. Here each rank notes in the process group's store which averaged backward it has begun (one
write a step, nothing is read), and, where its forward or backward raised, what it raised. A rank
that waits longer than `GLANCE_S` for a collective reads these notes: then a failure of one rank is
an error on all, which names that rank, and all of them may go on with the next step.

This is for collectives on the CPU. On CUDA a wait does not hold the host, and late collectives are
the matter of NCCL's own watchdog.
"""

import threading
import time
import weakref
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dpmem.failures import Failure, StepFailed, StepOutOfMemory, is_out_of_memory
from dpmem.notes import Note, Notes

# A step is shorter; whoever waits longer has a look at the notes.
GLANCE_S = 1.0
# How long the survivors of a lost connection have to say that they live.
_ROLL_CALL_S = 5.0
_POLL_S = 0.05


class Member(Protocol):
    """What averages over a group: one wrapper's part."""

    def launch_lost(self, *, begun: bool) -> None:
        """Launch what is left of a failed backward, with nothing; this rank began it or did not."""

    def complete_lost(self) -> None:
        """Complete it, where this rank has not."""


class Lockstep:
    """The notes of one group's ranks, called by their numbers in the default group.

    All wrappers over the group share them, as they share the order of its collectives: what failed
    in one is completed before another one's begin. They run their first averaged forward in the
    same order on all ranks. (One that is only made, such as a copy that one rank keeps, is none.)
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._notes = Notes(group.group_name)
        self._timeout = self._notes.timeout
        self._rank = dist.get_rank()
        self._ranks = dist.get_process_group_ranks(group)
        # In a forecast there are none.
        is_real = dist.get_backend(group) != "fake"
        self._others = [rank for rank in self._ranks if rank != self._rank and is_real]
        self._members: list[weakref.ref[Member]] = []
        self._attempt = 0
        self._backwards = self._settled = self._empty = 0
        self._open: list[int] = []
        self._lost: list[int] = []
        # How many of the open ones ended well.
        self._ended = 0
        # Which backward each member began last.
        self._begun_at: dict[int, int] = {}
        self._has_unchecked_empty = False
        self._is_waiting = False
        self._has_failed = False
        self._hopeless: RuntimeError | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Lockstep":
        """That of all wrappers over this group."""
        if group not in _locksteps:
            _locksteps[group] = cls(group)
        return _locksteps[group]

    def number_of(self, member: Member) -> int:
        """Its number, the same on all ranks, from its first averaged forward on."""
        for number, reference in enumerate(self._members):
            if reference() is member:
                return number
        self._members.append(weakref.ref(member))
        return len(self._members) - 1

    def backward_begins(self, member: Member) -> None:
        """An averaged backward begins."""
        self._backwards += 1
        number = self.number_of(member)
        self._open.append(number)
        self._begun_at[number] = self._backwards
        self._is_waiting = False
        self._write()

    def backward_ends(self) -> None:
        """One ended well."""
        self._ended += 1
        self._close()

    def _close(self) -> None:
        if self._ended >= len(self._open):
            self._open, self._ended = [], 0

    def backward_was_empty(self, member: Member, *, whole: bool) -> None:
        """What began was none: no parameter received a gradient.

        `whole` where it was backward(), which on other ranks may have been one to average.
        """
        self._is_waiting = False
        self._backwards -= 1
        self._open.remove(self.number_of(member))
        self._close()
        if whole:
            self._empty += 1
            self._has_unchecked_empty = True
        self._write()

    def check_empty_backward(self) -> None:
        """After an empty backward(): was it that on every rank?

        Raises RuntimeError where another rank averages its gradients of that step, and would meet
        the next step's of this one.
        """
        if not self._has_unchecked_empty:
            return
        self._has_unchecked_empty = False
        deadline = time.monotonic() + self._timeout.total_seconds()
        waiting = set(self._others)
        while waiting:
            for rank in sorted(waiting):
                note = self._notes.read(rank)
                if note is None:
                    continue
                if note.failed is not None or note.empty >= self._empty:
                    # It fails anyway, or its backward was empty too, however far it is by now.
                    waiting.remove(rank)
                elif note.backwards > self._backwards and note.is_waiting:
                    # Not where it only began, and may still find that it reaches no parameter.
                    error = RuntimeError(
                        "a backward() outside no_sync() must reach parameters on every rank; on "
                        f"rank {self._rank} it reached none, and rank {rank} waits to average "
                        "those of that step; use torch.autograd.grad for gradients of inputs, or "
                        "pass find_unused_parameters=True"
                    )
                    self.failed(error, "the step after a backward without gradients")
                    raise error
            if waiting and time.monotonic() > deadline:
                raise RuntimeError(
                    f"rank {min(waiting)} did not end its step within {self._timeout}; see whether "
                    "it is alive"
                )
            time.sleep(_POLL_S if waiting else 0)

    def tell_plan(self, member: Member, plan: str) -> None:
        """Before a backward that goes by a new plan: what of it all ranks must have alike."""
        self._notes.write_plan(self._rank, self.number_of(member), plan)

    def plan_of_next(self, member: Member) -> tuple[int, str] | None:
        """The rank after this one, in a ring, and by what plan its part of this backward goes.

        Where plans differ somewhere, one whose plan is new sees it, if all such ask. None where
        there is no other rank, or where it failed.
        """
        if not self._others:
            return None
        rank = next((other for other in self._others if other > self._rank), self._others[0])
        number = self.number_of(member)
        started = time.monotonic()
        pause_s = _POLL_S / 64
        while True:
            note = self._notes.read(rank)
            if note is not None and self._is_of_this_attempt(note):
                if note.failed is not None:
                    return None
                if note.backwards >= self._begun_at[number]:
                    return rank, self._notes.plan(rank, number)
            waited_s = time.monotonic() - started
            if waited_s > GLANCE_S:
                self._tell_that_it_waits()
                self._look_for_failures()
            if waited_s > self._timeout.total_seconds():
                raise RuntimeError(self._who_is_missing())
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _POLL_S)

    def failed(self, error: BaseException | None, where: str, *, waited: bool = False) -> None:
        """This rank's step failed; the first failure of a step is the one that counts."""
        if self._has_failed:
            return
        self._has_failed = True
        what = "an exception" if error is None else f"{type(error).__name__}: {error}"
        self._write(f"{where} raised {what}", error is not None and is_out_of_memory(error), waited)

    def give_up(self, error: RuntimeError, where: str) -> None:
        """This rank's step failed, and there is no going on, for any wrapper over this group."""
        self._hopeless = error
        self.failed(error, where)

    def recover(self) -> None:
        """Before what follows a failed step: complete its collectives, once every rank knows of it.

        Raises RuntimeError where another rank completed the step that failed here, or does not
        answer.
        """
        if self._hopeless is not None:
            raise self._hopeless
        if not self._has_failed:
            return
        deadline = time.monotonic() + self._timeout.total_seconds()
        waiting = set(self._others)
        furthest = (self._backwards, self._open)
        while waiting:
            for rank in sorted(waiting):
                note = self._notes.read(rank)
                if note is None:
                    continue
                if note.attempt > self._attempt:
                    # It knows, and went on.
                    furthest = max(furthest, (note.settled, note.lost))
                    waiting.remove(rank)
                    continue
                if self._open and note.backwards - len(note.open) >= self._backwards:
                    raise RuntimeError(
                        f"the step that failed on rank {self._rank} succeeded on rank {rank}, so "
                        "their models differ now; load a checkpoint on all ranks"
                    )
                if self._is_of_this_attempt(note) and note.failed is not None:
                    furthest = max(furthest, (note.backwards, note.open))
                    waiting.remove(rank)
            if waiting and time.monotonic() > deadline:
                raise RuntimeError(
                    "a step that failed on one rank fails on all before the next; rank "
                    f"{min(waiting)} did not say so within {self._timeout}; see whether it "
                    "is alive"
                )
            time.sleep(_POLL_S if waiting else 0)
        begun = self._backwards
        self._backwards, self._lost = furthest
        self._settled = self._backwards
        self._attempt += 1
        self._open, self._ended = [], 0
        self._has_failed = False
        self._complete(begun)

    def _complete(self, begun: int) -> None:
        """What was lost, in its order, of which this rank had begun all up to this number."""
        members = []
        for index in self._lost:
            member = self._members[index]() if index < len(self._members) else None
            if member is None:
                error = RuntimeError(
                    "wrappers over one group must be trained in the same order on all ranks; the "
                    f"step that failed reached wrapper number {index} on another rank, which rank "
                    f"{self._rank} has not trained or has dropped; run the same forwards on all "
                    "ranks, and start again from a checkpoint"
                )
                self.give_up(error, "recovering")
                raise error
            members.append(member)
        # As in a backward of several: what is told at its end follows the last bucket of all.
        for number, member in enumerate(members, self._backwards - len(members) + 1):
            member.launch_lost(begun=number <= begun)
        for member in members:
            member.complete_lost()

    def wait(self, work: "dist.Work | torch.futures.Future[Tensor]") -> Any:
        """The result of a collective on the CPU.

        Raises RuntimeError, or torch.OutOfMemoryError where that is what it was, naming the rank
        that failed, or has died, or is late.
        """
        try:
            while not _done_within(work, GLANCE_S):
                self._tell_that_it_waits()
                self._look_for_failures()
            return work.wait()
        except Failure:
            raise
        except RuntimeError as error:
            self.failed(error, "waiting for the other ranks", waited=True)
            raise RuntimeError(f"{self._who_is_missing()} ({error})") from error

    def _tell_that_it_waits(self) -> None:
        if self._open and not (self._is_waiting or self._has_failed):
            self._is_waiting = True
            self._write()

    def _look_for_failures(self) -> None:
        for rank in self._others:
            note = self._notes.read(rank)
            if note is None or note.failed is None or not self._is_of_this_attempt(note):
                continue
            if note.waited:
                # It lost a connection; whose fault that was is found out together.
                raise RuntimeError(f"rank {rank} gave up {note.failed.partition(' raised ')[2]}")
            message = (
                f"rank {rank} failed in this step: {note.failed}; its part of the average is "
                "missing, so no rank has gradients; correct the cause there, or set gradients to "
                "None on all ranks and go on with the next step"
            )
            failure = StepOutOfMemory(message) if note.out_of_memory else StepFailed(message)
            self.failed(failure, f"hearing of rank {rank}")
            try:
                raise failure
            finally:
                # Its traceback holds this frame, which must not hold it.
                del failure

    def _is_of_this_attempt(self, note: Note) -> bool:
        return note.attempt == self._attempt

    def _who_is_missing(self) -> str:
        """Those that are behind; else those that do not answer a roll call."""
        deadline = time.monotonic() + _ROLL_CALL_S
        silent = self._others
        notes: dict[int, Note | None] = dict.fromkeys(silent)
        while silent and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            notes = {rank: self._notes.read(rank) for rank in silent}
            silent = [
                rank
                for rank, note in notes.items()
                if note is None or note.failed is None or not self._is_of_this_attempt(note)
            ]
        if not silent:
            return "a collective failed on every rank"
        names = " and ".join(
            f"rank {rank} (its last averaged backward was number {_backwards(notes[rank])})"
            for rank in silent
        )
        return (
            f"averaged backward number {self._backwards} needs all {len(self._ranks)} ranks; "
            f"{names} did not take part and no longer answers; see why it died or hangs"
        )

    def _write(
        self, failed: str | None = None, out_of_memory: bool = False, waited: bool = False
    ) -> None:
        progress = (self._attempt, self._backwards, self._open, self._settled, self._lost)
        note = Note(*progress, self._empty, failed, out_of_memory, waited, self._is_waiting)
        self._notes.write(self._rank, note)


# They last as long as their group: what was noted over it still stands.
_locksteps: "weakref.WeakKeyDictionary[dist.ProcessGroup, Lockstep]" = weakref.WeakKeyDictionary()


def _backwards(note: Note | None) -> int:
    return 0 if note is None else note.backwards


def _done_within(work: "dist.Work | torch.futures.Future[Tensor]", seconds: float) -> bool:
    """Has it ended, well or not?"""
    if isinstance(work, dist.Work):
        if work.is_completed():
            return True
        try:
            return bool(work.wait(timedelta(seconds=seconds)))
        except RuntimeError:
            # Late, or failed: then it is completed.
            return work.is_completed()
    done = threading.Event()
    work.add_done_callback(lambda _: done.set())
    return done.wait(seconds)
