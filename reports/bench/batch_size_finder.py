"""Batch-size searches side by side on a simulated device: probes, failures, answer over truth.

`python reports/bench/batch_size_finder.py` writes batch-size-finder.md and .json beside itself. A
job is a list of allocations and releases; the device is dpmem_profiling.CachingAllocator with a
capacity. The truth is the largest B such that every batch up to B fits, by trying all of them.

A trial tells what a step tells on a GPU: whether it ran, its peaks, and what it asked of the
allocator, block by block, as torch.cuda's memory history has it. That a replay of those requests
reserves what the device does is so here by construction; of ten recordings of real GPUs the model's
peak was theirs to the byte (tests/profiling/test_extrapolate.py).

dpmem's search runs blind, as it does of a step or of a run under way, and with a forecast, as it
does of a Job on a GPU. The forecast is the allocator's model too, with activations that are right,
or 4.8 % too low or too high: nine of ten forecasts of real runs were closer
(reports/validation/table.md). It knows of no leak.

Accelerate's is its own decorator, from 128. Lightning's by its source, src/lightning/pytorch/tuner/
batch_size_scaling.py: from 2, doubled up to 25 times; binsearch then bisects between the last that
ran and the first that did not, without its 5% margin, which would only lower its answer.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import find_executable_batch_size

from dpmem.growth import note_of_a_leak
from dpmem_profiling import CachingAllocator, OutOfDeviceMemory, Probe, format_bytes, search
from dpmem_profiling.allocator_settings import AllocatorSettings
from dpmem_profiling.extrapolate import Recorder

HERE = Path(__file__).parent
MIB = 1 << 20
STEPS = 3
# How wrong the forecast's activations are; None for no forecast.
ERRORS = {"dpmem, blind": None, "forecast right": 0.0, "4.8 % low": -0.048, "4.8 % high": 0.048}


class Simulated(NamedTuple):
    """Bytes of a step: weights, optimizer states per weight byte, and activations of a layer.

    A capacity of None has no end. Below some batch each layer takes scratch in backward, as kernels
    do that add up few samples in two passes; and copies its activation, as a dimension of one
    sample may make it.
    """

    name: str
    weights_bytes: int
    layers: int
    activation_bytes: Callable[[int], int]
    capacity_bytes: int | None
    states: int = 2
    leak_bytes: int = 0
    scratch_below: int = 0
    copies_below: int = 0


def linear(per_sample_bytes: int) -> Callable[[int], int]:
    return lambda batch: per_sample_bytes * batch


JOBS = [
    Simulated("transformer, small", 120 * MIB, 12, linear(1_700_000), 4096 * MIB),
    Simulated("transformer, medium", 700 * MIB, 24, linear(3_300_000), 16384 * MIB),
    Simulated("transformer, long", 250 * MIB, 16, linear(21_000_000), 12288 * MIB),
    Simulated("transformer, frozen", 900 * MIB, 24, linear(900_000), 8192 * MIB, states=0),
    Simulated("convolutions, small", 45 * MIB, 18, linear(310_000), 2048 * MIB),
    Simulated("convolutions, wide", 100 * MIB, 50, linear(760_000), 8192 * MIB),
    Simulated("convolutions, deep", 230 * MIB, 101, linear(410_000), 12288 * MIB),
    Simulated("perceptron", 8 * MIB, 4, linear(130_000), 512 * MIB),
    Simulated("optimizer-dominated", 1500 * MIB, 12, linear(200_000), 6400 * MIB),
    Simulated("steps of 16", 120 * MIB, 12, lambda batch: 16_000_000 * -(-batch // 16), 4096 * MIB),
    Simulated("quadratic", 60 * MIB, 8, lambda batch: 20_000 * batch * batch, 4096 * MIB),
    Simulated("leak", 120 * MIB, 12, linear(1_700_000), 4096 * MIB, leak_bytes=40 * MIB),
    Simulated("scratch", 120 * MIB, 12, linear(1_700_000), 4096 * MIB, scratch_below=50),
    Simulated("one is apart", 120 * MIB, 12, linear(1_700_000), 4096 * MIB, copies_below=2),
]


class Recorded(CachingAllocator):
    """Keeps a history of what it is asked for."""

    def __init__(self, capacity_bytes: int | None) -> None:
        super().__init__(capacity_bytes=capacity_bytes)
        self.history = Recorder(AllocatorSettings())

    def malloc(self, size_bytes: int, stream: int = 0) -> int:
        address = super().malloc(size_bytes, stream)
        self.history.takes(address, size_bytes, stream)
        return address

    def free(self, address: int) -> None:
        super().free(address)
        self.history.gives(address)


def run(job: Simulated, batch: int) -> Probe:
    """STEPS steps on an empty device; an allocator that had to give back did not fit."""
    device = Recorded(capacity_bytes=job.capacity_bytes)
    part_bytes = job.weights_bytes // job.layers
    peaks: dict[str, int] = {}
    reserved_bytes: list[int] = []
    live_bytes: list[int] = []

    def phase_ends(name: str) -> None:
        peaks[name] = device.peak_allocated_bytes
        reserved_bytes.append(device.peak_reserved_bytes)
        device.reset_peaks()

    try:
        for _ in range(job.layers):
            device.malloc(part_bytes)
        for step in range(STEPS):
            size_bytes = job.activation_bytes(batch)
            activations = [device.malloc(size_bytes) for _ in range(job.layers)]
            phase_ends("forward")
            gradients = []
            for address in reversed(activations):
                if job.states:
                    gradients.append(device.malloc(part_bytes))
                temporary = device.malloc(size_bytes)
                if batch < job.scratch_below:
                    device.free(device.malloc(8 * MIB))
                copies = [device.malloc(size_bytes)] if batch < job.copies_below else []
                device.free(temporary)
                for copy in copies:
                    device.free(copy)
                device.free(address)
            phase_ends("backward")
            if step == 0:
                for _ in range(job.states * job.layers):
                    device.malloc(part_bytes)
            phase_ends("step")
            for address in gradients:
                device.free(address)
            if job.leak_bytes:
                device.malloc(job.leak_bytes)
            phase_ends("outside")
            live_bytes.append(device.allocated_bytes)
    except OutOfDeviceMemory:
        return Probe(batch, "oom")
    if device.n_retries:
        return Probe(batch, "retry")
    return Probe(
        batch,
        "fits",
        allocated_bytes=max(peaks.values()),
        reserved_bytes=max(reserved_bytes),
        peak_by_phase=peaks,
        growth_bytes=live_bytes[-1] - live_bytes[-2],
        requests=device.history.requests(),
    )


class Answer(NamedTuple):
    batch: int | None
    probes: int
    failures: int


class Counted:
    """A trial of one batch size, counted."""

    def __init__(self, job: Simulated) -> None:
        self.job, self.probes, self.failures = job, 0, 0

    def __call__(self, batch: int) -> Probe:
        done = run(self.job, batch)
        self.probes += 1
        self.failures += done.outcome != "fits"
        return done

    def fits(self, batch: int) -> bool:
        return self(batch).outcome == "fits"

    def answer(self, batch: int | None) -> Answer:
        return Answer(batch, self.probes, self.failures)


def truth(job: Simulated, limit_bytes: int) -> int:
    batch = 0
    while True:
        done = run(job, batch + 1)
        if done.outcome != "fits" or (done.reserved_bytes or 0) > limit_bytes:
            return batch
        batch += 1


def forecast(job: Simulated, error: float) -> Callable[[int], float]:
    """What the allocator would reserve for `job`, were its activations larger by `error`."""

    def activation_bytes(batch: int) -> int:
        return int((1 + error) * job.activation_bytes(batch))

    foreseen = job._replace(activation_bytes=activation_bytes, capacity_bytes=None, leak_bytes=0)

    @cache
    def reserved_bytes(batch: int) -> float:
        return run(foreseen, batch).reserved_bytes or 0

    return reserved_bytes


def ours(job: Simulated, error: float | None) -> Answer:
    trial = Counted(job)
    expected = None if error is None else forecast(job, error)
    assert job.capacity_bytes is not None
    result = search(trial, limit_bytes=job.capacity_bytes, margin_bytes=0, forecast=expected)
    return trial.answer(result.largest_fitting)


def accelerate(job: Simulated) -> Answer:
    trial = Counted(job)

    @find_executable_batch_size(starting_batch_size=128)
    def train(batch_size: int) -> int:
        if not trial.fits(batch_size):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return batch_size

    return trial.answer(train())


def lightning(job: Simulated, bisect: bool) -> Answer:
    trial, low, high = Counted(job), 1, 2
    for _ in range(25):
        if not trial.fits(high):
            break
        low, high = high, 2 * high
    while bisect and high - low > 1:
        middle = (low + high) // 2
        if trial.fits(middle):
            low = middle
        else:
            high = middle
    return trial.answer(low)


def main() -> None:
    algorithms: dict[str, Callable[[Simulated], Answer]] = {
        **{name: partial(ours, error=error) for name, error in ERRORS.items()},
        "Accelerate": accelerate,
        "Lightning power": lambda job: lightning(job, bisect=False),
        "Lightning binsearch": lambda job: lightning(job, bisect=True),
    }
    rows = []
    for job in JOBS:
        assert job.capacity_bytes is not None
        largest = truth(job, job.capacity_bytes)
        margin_bytes = job.capacity_bytes // 50
        both = {
            name: search(
                Counted(job),
                limit_bytes=job.capacity_bytes,
                margin_bytes=margin_bytes,
                forecast=None if error is None else forecast(job, error),
            )
            for name, error in ERRORS.items()
        }
        safe = both["forecast right"]
        largest_safe = truth(job, job.capacity_bytes - margin_bytes)
        answers = {name: find(job) for name, find in algorithms.items()}
        rows.append(
            {
                "job": job.name,
                "capacity_bytes": job.capacity_bytes,
                "truth": largest,
                "safe_truth": largest_safe,
                "safe": {name: result.largest_safe for name, result in both.items()},
                "probes_for_both": {name: len(result.probes) for name, result in both.items()},
                "said": note_of_a_leak(safe),
            }
            | {name: answer._asdict() for name, answer in answers.items()}
        )
        print(job.name, format_bytes(job.capacity_bytes), largest, answers)
    (HERE / "batch-size-finder.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    lines = [
        "# Batch-size searches on a simulated device",
        "",
        "Each cell: answer ÷ truth, trials, trials that ran out of memory. No GPU took part: the",
        "device is the allocator's model with a capacity. Made by `batch_size_finder.py`. Last:",
        "dpmem with a margin of 2 %, `largest_safe` ÷ truth at worst, and the trials for both",
        "answers in each of its four ways. Forecasts are the same model, with activations right or",
        "wrong by 4.8 %.",
        "",
        "A trial tells dpmem what a step on a GPU tells: whether it ran, its peaks, and what it",
        "asked of the allocator. dpmem replays that through the same model, so here by",
        "construction it reserves what the device does. Of ten recordings of real GPUs",
        "the model's peak was theirs to the byte, and two of them told that of a third",
        "(`tests/profiling/test_extrapolate.py`).",
        "",
        "| job | truth | " + " | ".join(algorithms) + " | dpmem's safe | trials for both |",
        "|---|---:|" + "---|" * len(algorithms) + "---|---|",
    ]
    for row in rows:
        cells = []
        for name in algorithms:
            answer = row[name]
            share = (answer["batch"] or 0) / row["truth"]
            cells.append(f"{share:.3f}, {answer['probes']}, {answer['failures']}")
        shares = [(batch or 0) / row["safe_truth"] for batch in row["safe"].values()]
        assert max(shares) <= 1
        cells += [f"{min(shares):.3f}", ", ".join(map(str, row["probes_for_both"].values()))]
        lines.append(f"| {row['job']} | {row['truth']} | " + " | ".join(cells) + " |")
    lines += ["", *(f"Said of “{row['job']}”: {said}." for row in rows for said in row["said"])]
    (HERE / "batch-size-finder.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
