"""Measure one training step: bytes by category over time, on the machine at hand.

The figures are the live storages that `MemoryTracker` sees, attributed by `Attribution`. On a CPU
that is all there is. On CUDA the caching allocator's own history and peak are the total, and what
the tracker cannot explain of it stays visible as "unknown"; see `cuda_meter`.
"""

from __future__ import annotations

import gc
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from time import perf_counter

import torch

from dpmem_profiling.allocator_settings import MIN_BLOCK_BYTES
from dpmem_profiling.attribution import Attribution, Owned
from dpmem_profiling.cuda_meter import UNTRACKED, CudaMeter
from dpmem_profiling.extrapolate import Requests, requests_of
from dpmem_profiling.in_place import InPlaceGradients
from dpmem_profiling.job import Built, Job, StepContext, build, make_batch, run_step
from dpmem_profiling.record import Category, MemoryRecord
from dpmem_profiling.stepping import Stepper, raw_gradients_claimed
from dpmem_profiling.timeline import largest_at_peak, replay
from dpmem_profiling.tracker import MemoryTracker

# Schedules that end do not take many steps more.
_TIMED_STEPS = 5


def measure(
    job: Job,
    batch_size: int,
    *,
    device: torch.device | str | None = None,
    warmup_steps: int = 2,
    owned: Owned | None = None,
    limit_bytes: int | None = None,
    world_size: int = 1,
    timing_s: float = 0.0,
    on_requests: Callable[[Requests], None] | None = None,
) -> MemoryRecord:
    """Build the job, run `warmup_steps` steps, record one more, time another, and tear it all down.

    device        where to train; None is the current CUDA device where there is one, else the CPU
    warmup_steps  steps before the recorded one: optimizers make their state in the first,
                  DistributedDataParallel rebuilds its buckets in the second
    owned         model -> {category: tensors}, asked after forward, after backward and between
                  steps for memory that only a wrapper can name, such as "bucket" or "compressed"
    limit_bytes   raise MemoryLimitExceeded as soon as the live tensors are more than this
    world_size    written into the record; the bytes are this process's
    timing_s      time up to five steps within so long, one at least; the fastest counts. How many
                  depends on the clock, so it is not for steps that wait for other processes'.
    on_requests   told what was asked of the allocator, in order: on CUDA by the recorded step and
                  all before it, and on the CPU by its tensors within the recorded step. Not told
                  where CUDA does not say

    Afterwards, also after an error, the memory is free and the random states of torch (CPU and
    CUDA), Python and NumPy are what they were.

    Raises MemoryLimitExceeded; InvalidJob where a factory of the job breaks its promise;
    ValueError for a batch_size, limit_bytes, warmup_steps or world_size out of range; and whatever
    the job raises.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("warmup_steps", warmup_steps, 0),
        ("world_size", world_size, 1),
        ("limit_bytes", 1 if limit_bytes is None else limit_bytes, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    where = _resolve(device)
    with _random_states_kept(), _garbage_collected():
        try:
            return _measure(
                job,
                batch_size,
                where,
                warmup_steps,
                owned,
                limit_bytes,
                world_size,
                timing_s,
                on_requests,
            )
        except BaseException as error:
            # Ctrl-C, too, holds the frames that it interrupted.
            _let_go(error)
            raise


def _let_go(error: BaseException) -> None:
    """Drop the tensors that the frames of `error` hold; its lines stay readable."""
    reasons: list[BaseException | None] = [error]
    seen: set[int] = set()
    while reasons:
        reason = reasons.pop()
        if reason is not None and id(reason) not in seen:
            seen.add(id(reason))
            traceback.clear_frames(reason.__traceback__)
            reasons += [reason.__cause__, reason.__context__]


def _measure(
    job: Job,
    batch_size: int,
    device: torch.device,
    warmup_steps: int,
    owned: Owned | None,
    limit_bytes: int | None,
    world_size: int,
    timing_s: float,
    on_requests: Callable[[Requests], None] | None,
) -> MemoryRecord:
    cuda = _cuda_meter(device)
    block_bytes = 1 if cuda is None else MIN_BLOCK_BYTES
    tracker = MemoryTracker(device, block_bytes=block_bytes, limit_bytes=limit_bytes)
    attribution = Attribution(tracker, owned, wrapped=job.wrap is not None)
    in_place = InPlaceGradients()
    remembering = nullcontext() if cuda is None or on_requests is None else cuda.remembering()
    with remembering, tracker, in_place:
        with tracker.paused():
            in_place.calibrate()
        tracker.stage = "building the model"
        built = build(job, device)
        tracker.module_names = {id(module): name for name, module in built.model.named_modules()}
        stepper = Stepper(job, built, device, tracker, attribution)
        fresh_batch = partial(make_batch, job, batch_size, device)
        with raw_gradients_claimed(built, attribution):
            for number in range(warmup_steps):
                tracker.stage = f"warm-up step {number + 1}"
                stepper.step(fresh_batch)
            tracker.stage = "the recorded step"
            gc.collect()
            before = len(tracker.changes)
            with nullcontext() if cuda is None else cuda.watching():
                live_at_start, start_s = tracker.live(), perf_counter()
                stepper.step(fresh_batch)
            changes = tracker.changes[before:]
            # What waits for the collector was collected before the step, too.
            gc.collect()
            persistent = tracker.live()
    if on_requests is not None:
        requests = requests_of(live_at_start, changes) if cuda is None else cuda.requests
        if requests is not None:
            on_requests(requests)
    cuda_step = None if cuda is None else cuda.step
    if cuda_step is not None:
        live_at_start, changes = cuda_step.with_untracked(live_at_start, changes)
        persistent[UNTRACKED] = live_at_start.get(UNTRACKED, 0) + sum(
            change.delta_bytes for change in changes if change.storage == UNTRACKED
        )

    def category_of(number: int) -> Category:
        return "unknown" if number == UNTRACKED else attribution.category_of(number)

    replayed = replay(live_at_start, changes, category_of, start_s=start_s)
    if cuda_step is not None:
        replayed = cuda_step.with_reserved(replayed, start_s)

    notes = []
    if job.step is not None and not any(change.phase == "forward" for change in changes):
        notes.append(
            "The step marks no forward phase, so activations count as temporary: "
            "put `with context.phase('forward'):` around it."
        )
    peak_bytes, at_peak = replayed.peak_bytes, dict(replayed.at_peak)
    if cuda_step is not None:
        notes.extend(cuda_step.notes)
        unexplained_bytes = max(cuda_step.allocated_bytes - peak_bytes, 0)
        if unexplained_bytes:
            at_peak["unknown"] = at_peak.get("unknown", 0) + unexplained_bytes
            peak_bytes += unexplained_bytes
    persistent_bytes: dict[Category, int] = {}
    for number, size_bytes in persistent.items():
        category = category_of(number)
        persistent_bytes[category] = persistent_bytes.get(category, 0) + size_bytes
    return MemoryRecord(
        name=job.name,
        source="measured",
        batch_size=batch_size,
        world_size=world_size,
        device=device.type.upper() if cuda is None else torch.cuda.get_device_name(device),
        torch_version=torch.__version__,
        peak_allocated_bytes=peak_bytes,
        peak_reserved_bytes=None if cuda_step is None else cuda_step.reserved_bytes,
        device_bytes=None if cuda_step is None else cuda_step.device_bytes,
        limit_bytes=limit_bytes,
        at_peak=at_peak,
        peak_by_category=replayed.peak_by_category,
        peak_by_phase=replayed.peak_by_phase,
        persistent_bytes={name: size for name, size in persistent_bytes.items() if size},
        timeline=replayed.points,
        tensors_at_peak=largest_at_peak(replayed, tracker.storages, category_of),
        step_s=_fastest_step(job, built, batch_size, device, timing_s),
        notes=tuple(notes),
    )


def _cuda_meter(device: torch.device) -> CudaMeter | None:
    return CudaMeter(device) if device.type == "cuda" else None


def _fastest_step(
    job: Job, built: Built, batch_size: int, device: torch.device, timing_s: float
) -> float:
    """Seconds of the fastest step within `timing_s`: what else the machine does only adds."""
    end_s = perf_counter() + timing_s
    times_s = [_timed_step(job, built, batch_size, device)]
    while perf_counter() < end_s and len(times_s) < _TIMED_STEPS:
        times_s.append(_timed_step(job, built, batch_size, device))
    return min(times_s)


def _timed_step(job: Job, built: Built, batch_size: int, device: torch.device) -> float:
    """One step with nothing watching, in seconds; the batch is made beforehand."""
    context = StepContext(built.model, make_batch(job, batch_size, device), built.optimizer, device)
    synchronize: Callable[[], None] = (
        (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    )
    synchronize()
    start_s = perf_counter()
    run_step(job, context)
    synchronize()
    return perf_counter() - start_s


def _resolve(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"measure() knows the devices cpu and cuda; got {device}")
    # A storage on the CPU reports a device without an index.
    return torch.device("cpu") if device.type == "cpu" else device


@contextmanager
def _garbage_collected() -> Iterator[None]:
    """Collect the garbage that the block makes, on the GPU too.

    What is older is set aside meanwhile: to look at all that torch imports takes a third of a
    second, which is longer than the steps of a small model.
    """
    freezing = gc.get_freeze_count() == 0
    if freezing:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if freezing:
            gc.unfreeze()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _random_states_kept() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    python_state = random.getstate()
    cuda_indices = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices=list(cuda_indices)):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
