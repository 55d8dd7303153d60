"""Peak memory and time of a whole training step: compressed, exact, save_on_cpu, checkpointed.

python examples/activations/step_peak.py [--batch 16] [--rounds 5]

The byte-level GPT in fp32 with AdamW, on the CPU, one thread. Peaks are the meter's: all tensors
alive at once, parameters, gradients and optimizer state included; on the CPU save_on_cpu's copies
count too, as its "host" is the same memory. Times are of forward and backward, the variants in
turns. Writes reports/bench/activations-peak.{md,json,png}.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dpmem
from dpmem.text_gpt import ByteGPT, GPTSize, StandardLibraryText, next_byte_loss
from dpmem_profiling import measure

mpl.use("Agg")
from matplotlib import pyplot as plt

SIZE = GPTSize(layers=6, width=384, heads=6, context=256)
OUT = Path(__file__).parents[2] / "reports" / "bench"


class Checkpointed(nn.Module):
    """A block that is recomputed in backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def checkpointed() -> ByteGPT:
    """The same model with every block checkpointed."""
    model = ByteGPT(SIZE)
    model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    return model


def loss_saved_on_cpu(model: nn.Module, windows: Tensor) -> Tensor:
    """The loss, its saved tensors copied by torch's own hooks."""
    with torch.autograd.graph.save_on_cpu():
        return next_byte_loss(model, windows)


def jobs() -> dict[str, dpmem.Job]:
    """What is compared."""
    plain = partial(ByteGPT, SIZE)
    batch = StandardLibraryText(context=SIZE.context, limit_bytes=1 << 20).batch

    def job(
        model: Callable[[], nn.Module],
        activations: str | None = None,
        loss: Callable[[nn.Module, Tensor], Tensor] = next_byte_loss,
    ) -> dpmem.Job:
        return dpmem.Job(
            model=model,
            batch=batch,
            loss=loss,
            optimizer=partial(torch.optim.AdamW, lr=1e-3),
            wrap=None if activations is None else partial(dpmem.wrap, activations=activations),
        )

    return {
        "exact": job(plain),
        "lossless": job(plain, "lossless"),
        "8bit": job(plain, "8bit"),
        "4bit": job(plain, "4bit"),
        "2bit": job(plain, "2bit"),
        "save_on_cpu": job(plain, loss=loss_saved_on_cpu),
        "checkpoint per block": job(checkpointed),
    }


class Step:
    """Forward and backward of a job's model."""

    def __init__(self, job: dpmem.Job, batch: int) -> None:
        torch.manual_seed(0)
        self.job, self.windows = job, job.batch(batch)
        self.model = job.model()
        if job.wrap is not None:
            self.model, _ = job.wrap(self.model, None)

    def seconds(self) -> float:
        """How long one takes."""
        start = time.perf_counter()
        self.job.loss(self.model, self.windows).backward()
        elapsed = time.perf_counter() - start
        self.model.zero_grad()
        return elapsed


def main() -> None:
    """Measure all, write table and picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compared = jobs()
    peaks = {
        name: measure(job, options.batch, device="cpu", warmup_steps=1).peak_allocated_bytes
        for name, job in compared.items()
    }
    steps = {name: Step(job, options.batch) for name, job in compared.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):
        for name, step in steps.items():
            elapsed = step.seconds()
            if turn:
                seconds[name].append(elapsed)
    rows = [
        {
            "variant": name,
            "peak_bytes": peaks[name],
            "peak_share": peaks[name] / peaks["exact"],
            "seconds": statistics.median(seconds[name]),
            "time_ratio": statistics.median(
                a / b for a, b in zip(seconds[name], seconds["exact"], strict=True)
            ),
        }
        for name in compared
    ]
    for row in rows:
        print(row)
    OUT.mkdir(parents=True, exist_ok=True)
    write(rows, options.batch, options.rounds)


def write(rows: list[dict], batch: int, rounds: int) -> None:
    """The table, its figures and the picture."""
    (OUT / "activations-peak.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    lines = [
        "# A training step's peak and time",
        "",
        f"Made by `python examples/activations/step_peak.py --batch {batch} --rounds {rounds}` on",
        f"one thread of a CPU, torch {torch.__version__}: byte-level GPT, 6 layers of width 384,",
        "context 256, fp32, AdamW. Peak: all tensors alive at once in a step, as the meter counts",
        "them; save_on_cpu copies within the same memory here. Time: forward and backward, median",
        "of ratios of variants run in turns.",
        "",
        "| variant | peak MiB | of exact | time, s | of exact |",
        "|---|---|---|---|---|",
        *(
            f"| {row['variant']} | {row['peak_bytes'] / 2**20:.0f} | {row['peak_share']:.2f} "
            f"| {row['seconds']:.2f} | {row['time_ratio']:.2f} |"
            for row in rows
        ),
        "",
        "![peak and time](activations-peak.png)",
    ]
    (OUT / "activations-peak.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
    names = [row["variant"] for row in rows][::-1]
    for axis, key, title in zip(
        axes, ("peak_share", "time_ratio"), ("peak bytes / exact", "time / exact"), strict=True
    ):
        axis.barh(names, [row[key] for row in rows][::-1], color="#0072B2")
        axis.axvline(1.0, color="#888888", linewidth=1)
        axis.set_xlabel(title)
    figure.savefig(OUT / "activations-peak.png", dpi=110)


if __name__ == "__main__":
    main()
