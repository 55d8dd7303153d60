"""`find_batch_size`: the search over a job, over a step, or over a run that is under way.

All three are one: a run under way is a job whose factories return what is there, within a block
that puts it back. Where the GPU is not here the probe is a forecast; where it is here a job's
forecast proposes what to probe; where there are many ranks the probe is what they all say of it.

Two probes tell what any other batch takes, by what their steps asked of the allocator. On CUDA
that is its history, recorded from before the model is built to the end of the second step, sizes
alone and no stacks; the step that is timed comes after. Before each probe cuBLAS's workspaces and
what the allocator caches are given up, so that all begin alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpmem.agreement import Ranks
from dpmem.expected import Expected
from dpmem.explain import explain_too_small
from dpmem.failures import is_out_of_memory
from dpmem.forecast import forecast_of
from dpmem.growth import note_of_a_leak, refuse_a_constant_step
from dpmem.isolation import Room, explain_in_child, probe_in_child, room_in_child, why_failed
from dpmem.jobs import (
    checked_budget,
    is_one_of_many,
    measure_within,
)
from dpmem.limits import Drift, search_within
from dpmem.options import Options, refuse_to_differ
from dpmem.restore import undisturbed
from dpmem.targets import describe
from dpmem.under_way import Target, as_job, device_of
from dpmem_profiling import (
    BatchSizeResult,
    InvalidJob,
    Job,
    MemoryLimitExceeded,
    Probe,
    search,
)
from dpmem_profiling.estimate import BAND_ABOVE, outside_bytes_of
from dpmem_profiling.extrapolate import Requests
from dpmem_profiling.gpus import gpu as gpu_named
from dpmem_profiling.tried import Tried, in_multiples, timed_between


def find_batch_size(
    target: Target,
    *,
    batch: Callable[[int], Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    state: Sequence[Any] = (),
    budget_bytes: int | None = None,
    safety: float | None = None,
    max_batch: int = 2**20,
    max_step_s: float | None = None,
    multiple_of: int = 1,
    timed_batches: int = 0,
    device: torch.device | str | None = None,
    gpu: str | None = None,
    isolate: bool = False,
    across_ranks: bool = False,
    timeout_s: float = 60.0,
    on_try: Callable[[int], None] | None = None,
    on_probe: Callable[[Probe], None] | None = None,
) -> BatchSizeResult:
    """The largest batch whose training step stays within memory, by a few steps.

    target        a Job, built anew for every probe, its samples made by Job.longest_batch where it
                  has one: what is safe is then safe for the longest;
                  or (model, optimizer) of a run under way, with `batch` and `loss` as in a Job;
                  or a step: called with n, it makes a batch of n samples and trains on it
    state         what else the target's steps change and is to be put back: for a step its model
                  and optimizer, and any scheduler, scaler, generator
    budget_bytes  tensor bytes a step may hold. On CUDA the default is what the device has free
                  now. Needed on the CPU, where memory is shared with everything else, but not
                  with isolate=True on Linux: then what counts is all that a fresh process is, held
                  to what the host, its control group or `ulimit -v` allow it.
    safety        the fraction of the limit that largest_safe leaves free. By default 2 %, or what
                  CUDA's allocator held beyond the tensors where that is more, and on top what
                  others took of the GPU during the search.
    max_batch     no larger batch is tried
    max_step_s    a batch whose step takes more seconds is no answer; of each batch one step is
                  timed, or the fastest of five short ones
    multiple_of   the answers are multiples of this: of 8, of the number of ranks
    timed_batches try so many more batches below the safe one, spread over the curve: to know better
                  which is fastest
    device        where to train; by default where the model of a run under way is, and else CUDA's
                  current device or, without one, the CPU
    gpu           predict for this GPU, which need not be here ("a100-40gb"); a Job only. The
                  margin is by default the forecast's own.
    isolate       try each batch in a process of its own, which may crash; a Job that pickles only
    across_ranks  every rank of the process group calls this and gets the same answer: all try the
                  same batch, the smallest budget and the worst outcome count
    timeout_s     for how long a rank waits for the others after a probe
    on_try        told of every batch before it is tried
    on_probe      told what came of it

    A step that would exceed the limit is stopped there, before the machine is. Not so across ranks:
    a rank that stopped within a collective would leave the others waiting, so there a step runs to
    its end and is judged afterwards, and one that fails on one rank alone may hold up the others
    for as long as their process group lets them wait. Not so with isolate=True: the processes are
    a group of their own, and the first that fails ends the others.

    A batch at which the target raises is not the end (batch normalization refuses one sample): the
    search goes on with others.

    Model, optimizer and `state` are afterwards as before, bit for bit, and so are the random states
    of torch, Python and NumPy; `dpmem.restore.undisturbed` says what that covers. The training
    data's iterator is not touched: `batch` makes its own samples.

    Where no batch is safe, `explanation` says by how much and why; not so across ranks. Where every
    step leaves memory behind, so that no batch is safe for ever, a note says so.

    Raises ValueError for a budget that is not positive or more than the machine has, for none on
    the CPU, for a safety outside [0, 1), a max_step_s that is not positive, a max_batch or
    multiple_of below 1, an unknown GPU, and, across ranks, for any of these on any rank and for
    options that differ; TypeError for arguments that do not go together; InvalidJob, a ValueError,
    where a factory breaks its promise or a step takes the same memory for whatever batch;
    torch.AcceleratorError where the device is lost; the target's first error where it raised at
    every batch tried; and RuntimeError where a rank says nothing for timeout_s.
    """
    ranks = Ranks(timeout_s) if across_ranks else None
    options = Options(safety, max_batch, max_step_s, multiple_of, timed_batches, gpu, isolate)
    checked = partial(options.checked, target)
    refuse_to_differ([checked()] if ranks is None else ranks.all_say(checked))
    if isinstance(target, Job) and target.longest_batch is not None:
        target = replace(target, batch=target.longest_batch)
    if gpu is not None:
        assert isinstance(target, Job)
        if budget_bytes is not None:
            raise TypeError(
                f"gpu={gpu!r} knows its memory; received budget_bytes, too; give one of them"
            )
        return _predicted(target, gpu, safety, max_batch, multiple_of, on_try, on_probe)
    job, held = as_job(target, batch, loss, state)
    device = device_of(device, [*held, *state])
    # With isolate nothing happens here, and to remember CUDA's random state takes a context.
    with nullcontext(_nothing) if isolate else undisturbed([*held, *state]) as put_back:
        own = room_in_child if isolate else _room_here
        if ranks is None:
            room = own(budget_bytes, device)
        else:
            if budget_bytes is None and device.type == "cpu":
                raise ValueError(
                    "the ranks of a host share its memory, so across ranks on the CPU a budget "
                    "must be stated; received none; pass budget_bytes to each"
                )
            rooms = ranks.all_say(lambda: own(budget_bytes, device))
            room = min(rooms, key=lambda room: room.limit_bytes)
        expected = None
        if (
            device.type == "cuda"
            and isinstance(target, Job)
            and not isolate
            and not is_one_of_many()
        ):
            # What lives already is no fake; with isolate no context of CUDA is to be made here.
            expected = Expected(job, device)
        probe = _Prober(job, device, room, put_back, ranks, isolate, expected, max_step_s)
        tried = Tried(probe, on_probe, on_try)
        result = search_within(
            tried,
            room.limit_bytes,
            safety=safety,
            caching_allocator=device.type == "cuda",
            drift_bytes=probe.drift_bytes,
            max_batch=max_batch,
            forecast=expected,
        )
        if len(probe.failures) == len(result.probes):
            raise probe.failures[0]
        refuse_a_constant_step(result, makes_own_batch=not isinstance(target, Job | tuple))
        too_slow = result.probes[-1].outcome == "slow"
        if result.largest_safe is None and ranks is None and not too_slow:
            explain = explain_in_child if isolate else explain_too_small
            result = replace(result, explanation=explain(job, result, device))
        result = timed_between(in_multiples(result, tried, multiple_of), tried, timed_batches)
        of_forecast = () if expected is None else expected.notes()
        return replace(result, notes=(*result.notes, *of_forecast, *note_of_a_leak(result)))


class _Prober:
    """Tries one batch size after another and leaves no trace of any."""

    def __init__(
        self,
        job: Job,
        device: torch.device,
        room: Room,
        put_back: Callable[[], None],
        ranks: Ranks | None,
        isolate: bool,
        expected: Expected | None,
        max_step_s: float | None,
    ) -> None:
        self._job = job
        self._device = device
        self._room = room
        self._put_back = put_back
        self._ranks = ranks
        self._isolate = isolate
        self._expected = expected
        self._max_step_s = max_step_s or math.inf
        self._drift = Drift(device)
        self.failures: list[Exception] = []

    def __call__(self, batch: int) -> Probe:
        if self._ranks is None:
            done, error = self._try(batch)
        else:
            # Not what each asked of its allocator, which is much to tell and alike on all.
            said = self._ranks.all_say(lambda: self._try(batch)[0].told(), why_failed)
            # In children, others fail for want of the one that failed first.
            failed = self._ranks.first_failed()
            done = max(said, key=_badness) if failed is None else said[failed]
            error = RuntimeError(f"rank {failed} {done.error}")
            # They step together.
            times_s = [other.seconds for other in said if other.seconds is not None]
            if failed is None and times_s:
                done = replace(done, seconds=max(times_s))
        self._drift.sample()
        if done.outcome == "error":
            assert error is not None
            self.failures.append(error)
        if done.outcome == "fits" and self._expected is not None:
            predicted_bytes = self._expected(batch)
            if math.isfinite(predicted_bytes):
                done = replace(done, predicted_bytes=int(predicted_bytes))
        if done.outcome == "fits" and (done.seconds or 0) > self._max_step_s:
            why = f"took {done.seconds:.3g} s, longer than the {self._max_step_s:g} s asked for"
            done = replace(done, outcome="slow", error=why)
        return done

    def drift_bytes(self) -> int:
        """What others took of the device during the probes, on the rank where it is most."""
        if self._ranks is None:
            return self._drift.most_bytes
        return max(self._ranks.all_say(lambda: self._drift.most_bytes))

    def _try(self, batch: int) -> tuple[Probe, Exception | None]:
        if self._isolate:
            done = probe_in_child(self._job, batch, self._device, self._room, self._ranks)
            return done, RuntimeError(f"batch {batch}: the job {done.error}")
        try:
            # A rank that stopped would leave the others waiting in a collective.
            limit_bytes = self._room.limit_bytes if self._ranks is None else None
            return measured_probe(self._job, batch, self._device, limit_bytes), None
        except InvalidJob:
            raise
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                # The device's context is lost: whatever came next would fail for that alone.
                raise
            return Probe(batch, "error", error=describe(error)), error
        finally:
            self._put_back()


def _nothing() -> None:
    """What is to be put back where nothing happens."""


def _room_here(budget_bytes: int | None, device: torch.device) -> Room:
    return Room(checked_budget(budget_bytes, device), None)


def _badness(probe: Probe) -> tuple[bool, int]:
    """Of ranks that all ran: one whose allocator had to ask again counts before any that fits."""
    return probe.outcome == "retry", probe.peak_bytes or 0


def measured_probe(job: Job, batch: int, device: torch.device, limit_bytes: int | None) -> Probe:
    """Run `job` at one batch size. Raises whatever the job does, but not for memory."""
    retries = _allocator_retries(device)
    requests: list[Requests] = []
    try:
        record = measure_within(job, batch, device, limit_bytes, requests.append)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # At least this much: the step was stopped as it crossed the limit.
        live_bytes = error.live_bytes if isinstance(error, MemoryLimitExceeded) else None
        return Probe(batch, "oom", allocated_bytes=live_bytes)
    return Probe(
        batch,
        "fits" if _allocator_retries(device) == retries else "retry",
        allocated_bytes=record.peak_allocated_bytes,
        reserved_bytes=record.peak_reserved_bytes,
        device_bytes=record.device_bytes,
        seconds=record.step_s,
        peak_by_phase=record.peak_by_phase,
        batch_bytes=record.peak_by_category.get("input", 0),
        growth_bytes=record.growth_bytes,
        requests=requests[0] if requests else None,
    )


def _allocator_retries(device: torch.device) -> int:
    """How often CUDA's allocator gave memory back and asked again: the next step may not get it."""
    if device.type != "cuda":
        return 0
    # Absent before the process first uses CUDA.
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def _predicted(
    job: Job,
    gpu: str,
    safety: float | None,
    max_batch: int,
    multiple_of: int,
    on_try: Callable[[int], None] | None,
    on_probe: Callable[[Probe], None] | None,
) -> BatchSizeResult:
    known = gpu_named(gpu)
    forecast = forecast_of(job)
    limit_bytes = known.total_bytes - outside_bytes_of(known)
    by_forecast = limit_bytes - int(limit_bytes / (1 + BAND_ABOVE))
    tried = Tried(
        lambda batch: Probe(batch, "fits", predicted_bytes=forecast.reserved_bytes(batch, known)),
        on_probe,
        on_try,
    )
    result = search(
        tried,
        limit_bytes=limit_bytes,
        margin_bytes=by_forecast if safety is None else int(limit_bytes * safety),
        max_batch=max_batch,
        source="predicted",
    )
    return in_multiples(result, tried, multiple_of)
