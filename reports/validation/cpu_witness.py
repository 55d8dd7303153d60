"""Forecast twelve jobs on this machine's CPU, and ask torch's own allocator what they took.

Each job is trace()d as the CPU would run it, on tensors without data, and then run for real under
torch.profiler with profile_memory=True, whose events are the CPU allocator's. Nothing of dpmem
watches the real step. Each job as it is and under `dpmem.wrap(activations="4bit")`; networks of
convolutions in channels_last, too, whose maps oneDNN takes as they are. Peaks of the last of STEPS
steps. Writes cpu_witness.json and cpu_witness.md beside this file; minutes on one core.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cpu_witness_jobs import JOBS, Kind, channels_last

import dpmem
from dpmem.jobs import owned_tensors
from dpmem_profiling import Job, StepContext
from dpmem_profiling.job import build, make_batch, run_step
from dpmem_profiling.trace import STEPS, trace
from dpmem_profiling.tracker import Change

HERE = Path(__file__).parent
CPU = torch.device("cpu")
# How far the witness may be from the forecast: which of its kernels computes a convolution, and
# with what buffers beside copies of its operands, oneDNN decides for each CPU.
BARS: dict[Kind, float] = {"transformer": 0.01, "convolutions": 0.10}
# What operators and kernels allocate with; what calls them is of interest.
_ALLOCATING = {"aten::empty", "aten::empty_strided", "aten::empty_like"}
# One operator for autograd, and for a forecast, whatever it calls within.
_WHOLE = {"aten::convolution_backward", "aten::max_pool2d_with_indices_backward"}


class Witnessed(NamedTuple):
    """What the allocator's events say of a step's peak.

    tensor_bytes   the peak of what operators return: without what each gives back itself
    operator       what ran at `peak_bytes`, the innermost; empty where none did
    scratch_bytes  the blocks it held then, and gave back before it returned
    """

    peak_bytes: int
    tensor_bytes: int
    operator: str
    scratch_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A job's forecast beside the witness, whose last fields are those of `Witnessed`."""

    job: str
    kind: Kind
    batch_size: int
    wrapped: bool
    predicted_bytes: int
    predicted_tensor_bytes: int
    witnessed_bytes: int
    tensor_bytes: int
    operator_at_peak: str
    scratch_bytes: tuple[int, ...]

    @property
    def gap(self) -> float:
        """(witnessed - predicted) / predicted."""
        return self.witnessed_bytes / self.predicted_bytes - 1

    @property
    def tensor_gap(self) -> float:
        """The same, of what operators return."""
        return self.tensor_bytes / self.predicted_tensor_bytes - 1

    @property
    def is_within(self) -> bool:
        """Whether the gap is as small as it may be."""
        return abs(self.gap) <= BARS[self.kind]


def predicted(job: Job, batch_size: int) -> tuple[int, int]:
    """The peak of the traced job's last step, on this machine's CPU: of all, and of tensors."""
    traced = trace(job, batch_size, None, owned=owned_tensors)

    def is_scratch(change: Change) -> bool:
        return change.storage is not None and traced.categories[change.storage] == "workspace"

    def peak_bytes(sizes: Iterable[int]) -> int:
        return max(list(accumulate(sizes))[max(traced.step_starts[-1] - 1, 0) :])

    return (
        peak_bytes(change.delta_bytes for change in traced.changes),
        peak_bytes(0 if is_scratch(change) else change.delta_bytes for change in traced.changes),
    )


def witness(job: Job, batch_size: int) -> Witnessed:
    """The peak of the real job's last step, by the events of the CPU's allocator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.random.fork_rng(devices=[]),
        torch.profiler.profile(
            activities=activities, profile_memory=True, acc_events=True
        ) as profiler,
    ):
        built = build(job, CPU)
        for step in range(STEPS):
            with torch.profiler.record_function(f"step {step}"):
                batch = make_batch(job, batch_size, CPU)
                run_step(job, StepContext(built.model, batch, built.optimizer, CPU))
                del batch
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return at_peak(events, f"step {STEPS - 1}")


def at_peak(events: Iterable[Any], recorded: str) -> Witnessed:
    """The peak within the event called `recorded`, of a profile with the memory's events."""
    ordered = sorted(events, key=lambda event: event.start_ns())
    (step,) = (event for event in ordered if event.name() == recorded)
    blocks = list(_blocks(ordered))
    scratch = _given_back(blocks)
    live_bytes = tensor_bytes = peak_bytes = peak_tensor_bytes = peak = 0
    for index, block in enumerate(blocks):
        live_bytes += block.size_bytes
        tensor_bytes += 0 if index in scratch else block.size_bytes
        if step.start_ns() <= block.time_ns <= step.end_ns():
            peak_tensor_bytes = max(peak_tensor_bytes, tensor_bytes)
            if live_bytes > peak_bytes:
                peak_bytes, peak = live_bytes, index
    held = tuple(
        blocks[taken].size_bytes
        for taken, given in scratch.items()
        if taken <= peak < given and blocks[taken].operator is blocks[peak].operator
    )
    operator = blocks[peak].operator
    name = "" if operator is None else operator.name()
    return Witnessed(peak_bytes, peak_tensor_bytes, name, held)


class _Block(NamedTuple):
    """Taken from the allocator (+) or given back (-) while `operator` ran, the innermost."""

    time_ns: int
    size_bytes: int
    operator: Any


def _blocks(ordered: Iterable[Any]) -> Iterator[_Block]:
    running: list[Any] = []
    for event in ordered:
        while running and running[-1].end_ns() < event.start_ns():
            running.pop()
        if event.name() == "[memory]":
            operator = running[-1] if running else None
            yield _Block(event.start_ns(), event.nbytes(), operator)
        elif running and running[-1].name() in _WHOLE:
            continue
        elif event.name().startswith("aten::") and event.name() not in _ALLOCATING:
            running.append(event)


def _given_back(blocks: Sequence[_Block]) -> dict[int, int]:
    """Index of a block -> of its return, both ways, where one operator did both.

    The events have no addresses: of two blocks of a size the operator returns the later one.
    """
    pairs: dict[int, int] = {}
    open_blocks: dict[tuple[int, int], list[int]] = {}
    for index, (_, size_bytes, operator) in enumerate(blocks):
        if operator is None:
            continue
        same = open_blocks.setdefault((id(operator), abs(size_bytes)), [])
        if size_bytes > 0:
            same.append(index)
        elif same:
            taken = same.pop()
            pairs |= {taken: index, index: taken}
    return pairs


def row(kind: Kind, batch_size: int, job: Job, *, wrapped: bool) -> Row:
    """One job, forecast and run."""
    if wrapped:
        job = replace(job, wrap=partial(dpmem.wrap, activations="4bit"))
    predicted_bytes, predicted_tensor_bytes = predicted(job, batch_size)
    witnessed = witness(job, batch_size)
    return Row(
        job=job.name,
        kind=kind,
        batch_size=batch_size,
        wrapped=wrapped,
        predicted_bytes=predicted_bytes,
        predicted_tensor_bytes=predicted_tensor_bytes,
        witnessed_bytes=witnessed.peak_bytes,
        tensor_bytes=witnessed.tensor_bytes,
        operator_at_peak=witnessed.operator,
        scratch_bytes=witnessed.scratch_bytes,
    )


def rows_of(kind: Kind, batch_size: int, job: Job) -> Iterator[Row]:
    """A job as it is and wrapped, and so in channels_last where there are convolutions."""
    for laid_out in [job] if kind == "transformer" else [job, channels_last(job)]:
        for wrapped in (False, True):
            yield row(kind, batch_size, laid_out, wrapped=wrapped)


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of cpu_witness.md."""
    n_within = sum(row.is_within for row in rows)
    return [
        "# The forecast beside torch's own allocation events, on a CPU",
        "",
        f"Made by `cpu_witness.py`, torch {torch.__version__}, one thread. Predicted: the traced",
        "step's peak. Witnessed: the events of the real step's allocator (`profile_memory=True`).",
        "Tensors: the same without the blocks that an operator takes and gives back itself. Gaps",
        "are over predicted.",
        "",
        f"{n_within} of {len(rows)} rows are within their bar: {BARS['transformer']:.0%} for",
        f"transformers, {BARS['convolutions']:.0%} for convolutions. The largest gap of tensors is",
        f"{max(abs(row.tensor_gap) for row in rows):.2%}.",
        "",
        "The blocks of the last column are copies, mostly oneDNN's: it computes in layouts of its",
        "own, and copies operands and results into them and back (`torch.backends.mkldnn.verbose`",
        "lists the reorders). They are as large as one layer's maps or weights, whatever is saved",
        "of the other layers, and so weigh more where saved maps are compressed. `cpu_scratch.py`",
        "of dpmem_profiling forecasts them, for vectors as this machine has them:",
        f"{torch.backends.cpu.get_cpu_capability()}. What it does not is what oneDNN takes where",
        "it computes products of matrices in place of a convolution.",
        "",
        "| job | batch | wrapped | predicted B | witnessed B | gap | within | gap of tensors"
        " | at the peak | blocks given back, B |",
        "|---|---:|---|---:|---:|---:|---|---:|---|---|",
        *(
            f"| {row.job} | {row.batch_size} | {'4bit' if row.wrapped else 'no'} "
            f"| {row.predicted_bytes:,} | {row.witnessed_bytes:,} | {row.gap:.2%} "
            f"| {'yes' if row.is_within else '**no**'} | {row.tensor_gap:.2%} "
            f"| {row.operator_at_peak} | {', '.join(f'{size:,}' for size in row.scratch_bytes)} |"
            for row in rows
        ),
    ]


def main() -> None:
    """All jobs; writes the two files."""
    torch.set_num_threads(1)
    rows = []
    for kind, batch_size, make_job in JOBS:
        for row in rows_of(kind, batch_size, make_job()):
            rows.append(row)
            print(row.job, row.wrapped, f"{row.gap:.3%} {row.tensor_gap:.3%}", flush=True)
    content = {"torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    (HERE / "cpu_witness.json").write_text(json.dumps(content, indent=1) + "\n")
    (HERE / "cpu_witness.md").write_text("\n".join(table(rows)) + "\n")


if __name__ == "__main__":
    main()
