"""Trials in a process of their own: what crashes there does not crash here."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from dpmem.agreement import Ranks, Rendezvous, join
from dpmem.explain import explain_too_small
from dpmem.host import Peak, process_limit, process_peak_bytes
from dpmem.jobs import checked_budget
from dpmem.targets import describe, load_files, loaded_files
from dpmem_profiling import BatchSizeResult, InvalidJob, Job, Probe

Answer = TypeVar("Answer")

# Source: proc(5). Whoever has the highest score is killed first, and raising one's own is allowed.
_KILL_ME_FIRST = (Path("/proc/self/oom_score_adj"), "1000")
_POLL_S = 0.1
# What a child says first, after it imported the main module.
_BEGUN = None


def pickled_job(job: Job) -> bytes:
    """`job` for `_unpickled` in another process. Raises TypeError where it does not pickle."""
    try:
        return pickle.dumps((loaded_files(), pickle.dumps(job)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            "isolate=True sends the job to another process, so its functions must be importable; "
            f"received one that is not ({error}); define them at the top of a module"
        ) from error


class Room(NamedTuple):
    """What a trial may take: of tensors, or where `peak` says which, of all that its process is."""

    limit_bytes: int
    peak: Peak | None


def room_in_child(budget_bytes: int | None, device: torch.device) -> Room:
    """What a trial may take: `budget_bytes` of tensors, or without one what the machine leaves it.

    Asked in a fresh process, because this one's address space is not a child's, and because to ask
    CUDA takes a context, which costs memory.

    Raises ValueError as `dpmem.jobs.checked_budget` does, RuntimeError where the child ends first.
    """
    if budget_bytes is not None and device.type == "cpu":
        # What a child is allowed at most is what this process is.
        return Room(checked_budget(budget_bytes, device), None)
    return ask_child(partial(_room, budget_bytes, device))


def probe_in_child(
    job: Job, batch: int, device: torch.device, room: Room, ranks: Ranks | None = None
) -> Probe:
    """Try `job` at one batch size in a fresh process, with one thread on the CPU.

    The child inherits this process's resource limits. Where the room is for all of a process, the
    probe's reserved bytes are the most that the child ever was. Killed by SIGKILL, as by the kernel
    when memory runs out, is "oom"; any other death is "error". Where the kernel must kill, the
    child is the first to go.

    ranks  where each rank tries the batch: the children are ranks of their own group, and one that
           fails ends them all, wherever they wait for it

    Raises TypeError where the job does not pickle, InvalidJob where it breaks its promise.
    """
    rendezvous = None if ranks is None else ranks.rendezvous()
    question = partial(_probe, pickled_job(job), batch, device, room, rendezvous)
    try:
        if ranks is None:
            return ask_child(question)
        # Told before the child ends: the others' then lose it, and fail for that.
        return ask_child(
            question, heard=lambda probe: ranks.note(why_failed(probe)), until=ranks.is_decided
        )
    except _ChildDied as death:
        if death.exit_code == -signal.SIGKILL:
            return Probe(batch, "oom")
        return Probe(batch, "error", error=str(death))


def why_failed(probe: Probe) -> str | None:
    """What a rank's probe says to ranks that may wait for it; None where it ran."""
    if probe.outcome == "oom":
        return "ran out of memory"
    return probe.error if probe.outcome == "error" else None


def explain_in_child(job: Job, result: BatchSizeResult, device: torch.device) -> str:
    """`dpmem.explain.explain_too_small` in a fresh process, which its step may end."""
    try:
        return ask_child(partial(_explain, pickled_job(job), result, device))
    except _ChildDied as death:
        return f"does not fit: {result.limited_by}; tried with more memory, the job {death}"


class _ChildDied(RuntimeError):  # noqa: N818 - reads as what it is
    """The child ended without an answer."""

    def __init__(self, words: str, exit_code: int | None = None) -> None:
        super().__init__(words)
        self.exit_code = exit_code


def ask_child(
    question: Callable[[], Answer | ValueError],
    heard: Callable[[Answer], None] = lambda answer: None,
    until: Callable[[], bool] = lambda: False,
) -> Answer:
    """What `question` returns in a fresh process.

    heard  told of the answer while the process is still there
    until  asked now and then; True ends the process

    Raises the ValueError that it returns, _ChildDied where the process says nothing, and
    RuntimeError where it does not even begin.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(question, there))
    child.start()
    # Else this process holds the writing end, too, and never hears of the child's death.
    there.close()

    def hear() -> Any:
        while not here.poll(_POLL_S):
            if until():
                raise _ChildDied("was stopped for another rank's")
        return here.recv()

    has_begun = False
    try:
        has_begun = hear() is _BEGUN
        said: Answer | ValueError = hear()
        if not isinstance(said, ValueError):
            heard(said)
    except EOFError:
        child.join()
        words = f"ended its process with exit code {child.exitcode}"
        if not has_begun and child.exitcode == 1:
            raise RuntimeError(
                "isolate=True needs a main module that other processes can import; received one "
                f"that {words}; put what the script does under `if __name__ == '__main__':`"
            ) from None
        raise _ChildDied(words, child.exitcode) from None
    finally:
        # It has said all it had to say, and a process may hang while torch and its threads end.
        child.kill()
        child.join()
        here.close()
    if isinstance(said, ValueError):
        raise said
    return said


def _answer(question: Callable[[], object], out: Connection) -> None:
    path, score = _KILL_ME_FIRST
    if path.is_file():
        path.write_text(score)
    torch.set_num_threads(1)
    out.send(_BEGUN)
    out.send(question())


def _unpickled(pickled: bytes) -> Job:
    files, job = pickle.loads(pickled)
    load_files(files)
    loaded: Job = pickle.loads(job)
    return loaded


def _room(budget_bytes: int | None, device: torch.device) -> Room | ValueError:
    limit = process_limit() if budget_bytes is None and device.type == "cpu" else None
    if limit is not None:
        return Room(*limit)
    try:
        return Room(checked_budget(budget_bytes, device), None)
    except ValueError as error:
        return error


def _probe(
    pickled: bytes, batch: int, device: torch.device, room: Room, rendezvous: Rendezvous | None
) -> Probe | ValueError:
    # Imported here: finder imports this module.
    from dpmem.finder import measured_probe

    try:
        if rendezvous is not None:
            join(rendezvous, device)
        done = measured_probe(_unpickled(pickled), batch, device, room.limit_bytes)
    except InvalidJob as error:
        return error
    except Exception as error:  # noqa: BLE001 - the parent must hear of whatever it is
        return Probe(batch, "error", error=describe(error))
    if room.peak is None or done.outcome != "fits":
        return done
    # What a process is beyond its tensors grows otherwise than by what they ask for.
    return replace(done, reserved_bytes=process_peak_bytes(room.peak), requests=None)


def _explain(pickled: bytes, result: BatchSizeResult, device: torch.device) -> str:
    return explain_too_small(_unpickled(pickled), result, device)
