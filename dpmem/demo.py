"""`dpmem demo`: the main job on real data, with no GPU needed.

Two ranks train one small GPT twice, step by step in turn: as DistributedDataParallel does and as
`dpmem.wrap` does, from the same weights on the same text. Then the largest batch under a budget is
found, and a report of where the bytes went is written.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import ProcessException, spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from dpmem.config import Activations, Precision
from dpmem.finder import find_batch_size
from dpmem.jobs import (
    checked_budget,
    default_device,
    measure_job,
)
from dpmem.precision import autocast
from dpmem.text_gpt import ByteGPT, StandardLibraryText, next_byte_loss
from dpmem.wrapper import wrap
from dpmem_profiling import (
    BatchSizeResult,
    Job,
    MemoryRecord,
    Probe,
    ReportFiles,
    format_bytes,
    write_report,
)

WORLD_SIZE = 2
STEPS = 20
BATCH_SIZE = 6
LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0
ACTIVATIONS: Activations = "4bit"
# The first steps compile, allocate and rebuild buckets: not timed.
_UNTIMED_STEPS = 3
# A rank that says nothing for this long is taken for dead.
_SILENCE_LIMIT_S = 120.0

# Told what the demo is doing, and how far it is: (message, fraction of 1).
Progress = Callable[[str, float], None]
AsDataParallel = Callable[
    [nn.Module, torch.optim.Optimizer | None], tuple[nn.Module, torch.optim.Optimizer | None]
]


class RankFailed(RuntimeError):  # noqa: N818 - reads as what it is
    """A rank of the demo raised, died or fell silent; `rank_traceback` is what it left, or ""."""

    def __init__(self, message: str, rank_traceback: str = "") -> None:
        super().__init__(message)
        self.rank_traceback = rank_traceback


@dataclass(frozen=True)
class Run:
    """One way of training, after its 20 steps: rank 0's view."""

    losses: tuple[float, ...]
    step_s: float
    record: MemoryRecord


@dataclass(frozen=True)
class DemoResult:
    """All that the demo found."""

    precision: Precision
    precision_reason: str
    device: str
    ddp: Run
    dpmem: Run
    plain_batch: BatchSizeResult
    dpmem_batch: BatchSizeResult
    too_small: str | None
    files: ReportFiles
    seconds: float


class AutocastDDP(nn.Module):
    """Stock DistributedDataParallel in the demo's precision: the run dpmem is held against."""

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.ddp = DistributedDataParallel(model)
        self.precision = precision
        self.device = next(model.parameters()).device

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with autocast(self.precision, self.device):
            logits: torch.Tensor = self.ddp(tokens)
        return logits.float()


def as_ddp(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, *, precision: Precision
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Wrap with torch's DistributedDataParallel; clip in a step pre-hook, where dpmem does."""
    assert optimizer is not None
    wrapped = AutocastDDP(model, precision)

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(wrapped.parameters(), MAX_GRAD_NORM)

    optimizer.register_step_pre_hook(clip)
    return wrapped, optimizer


def as_dpmem(precision: Precision) -> AsDataParallel:
    """`dpmem.wrap` as the demo uses it."""
    return partial(wrap, precision=precision, activations=ACTIVATIONS, max_grad_norm=MAX_GRAD_NORM)


def build_job(wrap_job: AsDataParallel | None, name: str, text: StandardLibraryText) -> Job:
    """The demo's training step as a Job."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return ByteGPT()

    return Job(
        model=model,
        batch=text.batch,
        loss=next_byte_loss,
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE),
        wrap=wrap_job,
        name=name,
    )


def run_demo(out: Path, budget_bytes: int, progress: Progress) -> DemoResult:
    """Run all of it.

    Raises OSError where `out` cannot be written, ValueError for an impossible budget, RankFailed
    where a rank fails, RuntimeError where the interpreter came without its sources.
    """
    started = time.perf_counter()
    checked_budget(budget_bytes, default_device())
    _check_writable(out)
    text = StandardLibraryText(context=ByteGPT().position.num_embeddings)
    measured = _train(progress)
    precision: Precision = measured["precision"]

    def on_probe(probe: Probe, which: str) -> None:
        peak = "unknown" if probe.allocated_bytes is None else format_bytes(probe.allocated_bytes)
        progress(f"{which}: batch {probe.batch} -> {probe.outcome}, {peak}", 0.9)

    plain_job = build_job(None, "plain PyTorch", text)
    if precision == "bf16":
        plain_job = replace(plain_job, wrap=partial(wrap, precision=precision))
    plain_batch = find_batch_size(
        plain_job, budget_bytes=budget_bytes, on_probe=partial(on_probe, which="plain")
    )
    dpmem_job = build_job(as_dpmem(precision), "dpmem", text)
    dpmem_batch = find_batch_size(
        dpmem_job, budget_bytes=budget_bytes, on_probe=partial(on_probe, which="dpmem")
    )
    ddp, ours = _run(measured["ddp"]), _run(measured["dpmem"])
    progress("writing the report", 0.98)
    files = write_report(
        [ddp.record, ours.record],
        out,
        title="dpmem demo: a small GPT on two ranks",
        batch_size=dpmem_batch,
        facts=_facts(measured, ddp, ours, plain_batch, dpmem_batch),
    )
    return DemoResult(
        precision=precision,
        precision_reason=measured["precision_reason"],
        device=measured["device"],
        ddp=ddp,
        dpmem=ours,
        plain_batch=plain_batch,
        dpmem_batch=dpmem_batch,
        too_small=dpmem_batch.explanation,
        files=files,
        seconds=time.perf_counter() - started,
    )


def _facts(
    measured: dict[str, Any],
    ddp: Run,
    ours: Run,
    plain_batch: BatchSizeResult,
    dpmem_batch: BatchSizeResult,
) -> list[tuple[str, str]]:
    budget = format_bytes(dpmem_batch.limit_bytes)
    return [
        ("Model", f"byte-level GPT, {measured['parameters'] / 1e6:.1f} M parameters, AdamW"),
        ("Data", "source text of Python's standard library, a shard a rank"),
        ("Ranks", f"{WORLD_SIZE} ({measured['backend']}), {BATCH_SIZE} windows of 256 bytes each"),
        ("Precision", f"{measured['precision']}: {measured['precision_reason']}"),
        (f"Loss over {STEPS} steps, DDP", f"{ddp.losses[0]:.4f} -> {ddp.losses[-1]:.4f}"),
        (f"Loss over {STEPS} steps, dpmem 4-bit", f"{ours.losses[0]:.4f} -> {ours.losses[-1]:.4f}"),
        ("Step time, DDP", f"{ddp.step_s:.3f} s"),
        ("Step time, dpmem", f"{ours.step_s:.3f} s ({measured['step_ratio']:.2f}x, paired)"),
        (f"Largest safe batch in {budget}, plain", _batch_words(plain_batch)),
        (f"Largest safe batch in {budget}, dpmem 4-bit", _batch_words(dpmem_batch)),
    ]


def _batch_words(result: BatchSizeResult) -> str:
    largest = "none" if result.largest_safe is None else str(result.largest_safe)
    return f"{largest} ({len(result.probes)} probes)"


def _run(data: dict[str, Any]) -> Run:
    # The steps of the training, taken in turn, say more about speed than the one that was measured.
    record = replace(MemoryRecord.from_json(data["record"]), step_s=data["step_s"])
    return Run(tuple(data["losses"]), data["step_s"], record)


def _check_writable(out: Path) -> None:
    """Fail before two minutes of work, not after."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent):
        pass


def _train(progress: Progress) -> dict[str, Any]:
    """Run the ranks, pass on what they say, return rank 0's findings."""
    scratch = Path(tempfile.mkdtemp(prefix="dpmem-demo-"))
    messages = get_context("spawn").Queue()
    ranks = spawn(_rank_main, args=(str(scratch), messages), nprocs=WORLD_SIZE, join=False)
    assert ranks is not None
    try:
        heard = time.monotonic()
        while not ranks.join(timeout=0.2):
            while not messages.empty():
                progress(*messages.get())
                heard = time.monotonic()
            if time.monotonic() - heard > _SILENCE_LIMIT_S:
                raise RankFailed(
                    f"the demo's ranks must report at least every {_SILENCE_LIMIT_S:.0f} s; they "
                    "fell silent; run it again on a machine that is less busy"
                )
        return dict(json.loads((scratch / "result.json").read_text()))
    except ProcessException as error:
        # "-- Process 1 terminated with the following error:", the traceback, and at its end what
        # was raised; or one line about a signal or an exit code.
        report = str(error).strip()
        lines = report.split("\n")
        raise RankFailed(
            f"all ranks of the demo must finish; rank {error.error_index} did not: {lines[-1]}; "
            "see what `dpmem doctor` finds",
            report if len(lines) > 1 else "",
        ) from error
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.terminate()
                process.join()
        shutil.rmtree(scratch)


def _rank_main(rank: int, scratch: str, messages: Any) -> None:
    on_cuda = torch.cuda.device_count() >= WORLD_SIZE
    backend = "nccl" if on_cuda else "gloo"
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    # One thread a rank, so that two ranks on two cores do not fight; numba's loops follow torch's.
    torch.set_num_threads(1)
    dist.init_process_group(
        backend, init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )

    def say(message: str, fraction: float) -> None:
        if rank == 0:
            messages.put((message, fraction))

    try:
        findings = _train_both(rank, device, say)
        findings["backend"] = backend
        if rank == 0:
            Path(scratch, "result.json").write_text(json.dumps(findings))
    finally:
        dist.destroy_process_group()


def _train_both(rank: int, device: torch.device, say: Progress) -> dict[str, Any]:
    text = StandardLibraryText(context=ByteGPT().position.num_embeddings)
    say("timing a step in fp32 and in bf16", 0.02)
    precision, reason = _choose_precision(device, text)
    say(f"precision {precision}: {reason}", 0.08)
    wraps: dict[str, AsDataParallel] = {
        "ddp": partial(as_ddp, precision=precision),
        "dpmem": as_dpmem(precision),
    }
    losses: dict[str, list[float]] = {name: [] for name in wraps}
    seconds: dict[str, list[float]] = {name: [] for name in wraps}
    trained = {}
    for name, wrapping in wraps.items():
        torch.manual_seed(0)
        unwrapped = ByteGPT().to(device)
        trained[name] = wrapping(
            unwrapped, torch.optim.AdamW(unwrapped.parameters(), lr=LEARNING_RATE)
        )
    sampler: DistributedSampler[torch.Tensor] = DistributedSampler(text, WORLD_SIZE, rank, seed=0)
    loader = DataLoader(text, batch_size=BATCH_SIZE, sampler=sampler)
    for step, windows in zip(range(STEPS), loader, strict=False):
        # In turn, first one then the other leading, so that neither has the warmer machine.
        order = list(wraps) if step % 2 == 0 else list(reversed(wraps))
        for name in order:
            model, optimizer = trained[name]
            loss, taken_s = _step(model, optimizer, windows.to(device))
            losses[name].append(loss)
            seconds[name].append(taken_s)
        say(
            f"step {step + 1}/{STEPS}: loss {losses['ddp'][-1]:.3f} DDP, "
            f"{losses['dpmem'][-1]:.3f} dpmem",
            0.1 + 0.6 * (step + 1) / STEPS,
        )
    parameters = sum(parameter.numel() for parameter in trained["ddp"][0].parameters())
    trained.clear()
    findings: dict[str, Any] = {
        "precision": precision,
        "precision_reason": reason,
        "parameters": parameters,
        "step_ratio": _median(
            [ours / theirs for ours, theirs in zip(seconds["dpmem"], seconds["ddp"], strict=True)][
                _UNTIMED_STEPS:
            ]
        ),
    }
    names = {"ddp": "DistributedDataParallel", "dpmem": "dpmem, 4-bit activations"}
    for name, wrapping in wraps.items():
        say(f"measuring the memory of {names[name]}", 0.75)
        job = build_job(wrapping, names[name], text)
        record = measure_job(job, BATCH_SIZE, device=device, world_size=WORLD_SIZE)
        # All ranks' mean, as one loss over the whole batch would be.
        mean = torch.tensor(losses[name], dtype=torch.float64, device=device)
        dist.all_reduce(mean)
        findings[name] = {
            "losses": (mean / WORLD_SIZE).tolist(),
            "step_s": _median(seconds[name][_UNTIMED_STEPS:]),
            "record": record.to_json(),
        }
        findings["device"] = record.device
    return findings


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, windows: torch.Tensor
) -> tuple[float, float]:
    """One training step: the loss before it, and its seconds."""
    assert optimizer is not None
    dist.barrier()
    started = time.perf_counter()
    loss = next_byte_loss(model, windows)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    value = loss.item()
    return value, time.perf_counter() - started


def _choose_precision(device: torch.device, text: StandardLibraryText) -> tuple[Precision, str]:
    """Time one forward and backward each way; rank 0 decides for all."""
    torch.manual_seed(0)
    model = ByteGPT().to(device)
    # Short: bf16 takes 30 times as long on a CPU without AMX or AVX-512.
    windows = text.batch(1)[:, :65].to(device)
    taken_s: dict[Precision, float] = {}
    precisions: tuple[Precision, Precision] = ("fp32", "bf16")
    for precision in precisions:
        for _ in range(2):
            started = time.perf_counter()
            with autocast(precision, device):
                logits = model(windows[:, :-1])
            loss = nn.functional.cross_entropy(
                logits.float().flatten(0, 1), windows[:, 1:].flatten()
            )
            loss.backward()
            loss.item()
            taken_s[precision] = time.perf_counter() - started
    times = torch.tensor([taken_s[p] for p in precisions], dtype=torch.float64, device=device)
    dist.broadcast(times, 0)
    fp32_s, bf16_s = times.tolist()
    choice: Precision = "bf16" if bf16_s < fp32_s else "fp32"
    return (
        choice,
        f"64 bytes forward and backward take {fp32_s:.2f} s in fp32, {bf16_s:.2f} s in bf16",
    )


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
