"""Forecast the peaks of six recorded language-model runs, whose code is run beside ours.

`python reports/validation/recorded_peaks.py --wedsonlin FOLDER --magma27 FOLDER` writes
recorded_peaks.md beside this file. The folders are `cs336-basics` of the repositories
Wedsonlin/assignment2-systems and MAGMA27/assignment2-systems on GitHub; they need einops, einx and
jaxtyping. The peaks are torch.cuda.max_memory_allocated() of the recordings, or that of their
trace; their GPU is not stated, and every one with compute capability 8.x takes the same here.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import dpmem
from dpmem_profiling import StepContext

HERE = Path(__file__).parent
GPU = "a100-80gb"


@dataclass(frozen=True)
class Run:
    """A recorded run: its source, what it trained, and the most that it had allocated."""

    source: str
    layers: int
    context: int
    vocabulary: int
    batch_size: int
    measured_bytes: int
    autocast: bool = False
    with_optimizer: bool = True

    @property
    def name(self) -> str:
        optimizer = "AdamW" if self.with_optimizer else "no optimizer, gradients and logits kept"
        precision = "bf16 autocast" if self.autocast else "fp32"
        return (
            f"{self.layers} layers, vocabulary {self.vocabulary}, {self.batch_size} x "
            f"{self.context} tokens, {precision}, {optimizer}"
        )


RUNS = [
    Run("wedsonlin", 24, 128, 10_000, 4, 7_021_691_392),
    Run("wedsonlin", 24, 256, 10_000, 4, 9_112_392_188),
    Run("wedsonlin", 24, 512, 10_000, 4, 12_435_476_996, autocast=True),
    Run("wedsonlin", 24, 1024, 10_000, 4, 24_211_100_164, autocast=True),
    # Recorded by bcrafton/assignment2-systems; the model's code is the same.
    Run("wedsonlin", 12, 128, 50_257, 1, 3_857_685_760),
    Run("magma27", 12, 256, 10_000, 32, 13_927_832_064, with_optimizer=False),
]
# Width, feed-forward width and heads by the number of layers.
SIZES = {12: (768, 3072, 12), 24: (1024, 4096, 16)}


def job_of(run: Run) -> dpmem.Job:
    """The run's training step. Its code must be importable."""
    from cs336_basics.model import BasicsTransformerLM
    from cs336_basics.nn_utils import cross_entropy
    from cs336_basics.optimizer import AdamW

    width, inner, heads = SIZES[run.layers]
    kept: dict[str, Tensor] = {}

    def make_model() -> nn.Module:
        model: nn.Module = BasicsTransformerLM(
            vocab_size=run.vocabulary,
            context_length=run.context,
            d_model=width,
            num_layers=run.layers,
            num_heads=heads,
            d_ff=inner,
            rope_theta=10_000,
        )
        return model

    def make_batch(n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(n, run.context, dtype=torch.long)
        return tokens, tokens.clone()

    def step(context: StepContext) -> None:
        tokens, targets = context.batch
        with context.phase("forward"), torch.autocast("cuda", torch.bfloat16, run.autocast):
            logits = context.model(tokens)
            if not run.with_optimizer:
                # A loop's names outlive its turn.
                kept["logits"] = logits
            loss = cross_entropy(logits, targets)
        with context.phase("backward"):
            loss.backward()
        if context.optimizer is not None:
            with context.phase("step"):
                context.optimizer.step()
            with context.phase("zero_grad"):
                context.optimizer.zero_grad()

    optimizer: Callable[..., torch.optim.Optimizer] | None = AdamW if run.with_optimizer else None
    return dpmem.Job(make_model, make_batch, step=step, optimizer=optimizer, name=run.name)


def main() -> None:
    """Each run in a process of its own: the repositories' packages have one name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wedsonlin", type=Path, required=True)
    parser.add_argument("--magma27", type=Path, required=True)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    if options.only is not None:
        run = RUNS[options.only]
        sys.path.insert(0, str(getattr(options, run.source)))
        found = dpmem.estimate(job_of(run), batch_size=run.batch_size, gpu=GPU)
        print(found.peak_allocated_bytes)
        return
    lines = [
        "# Forecasts beside recorded peaks of allocated memory",
        "",
        "Made by `recorded_peaks.py`. Asked: within 2 %.",
        "",
        "| recorded by | run | measured bytes | forecast bytes | error |",
        "|---|---|---:|---:|---:|",
    ]
    for number, run in enumerate(RUNS):
        command = [sys.executable, *sys.argv, "--only", str(number)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        forecast_bytes = int(said.splitlines()[-1])
        error = forecast_bytes / run.measured_bytes - 1
        lines.append(
            f"| {run.source} | {run.name} | {run.measured_bytes:,} | {forecast_bytes:,} "
            f"| {100 * error:+.2f} % |"
        )
        print(lines[-1], flush=True)
    (HERE / "recorded_peaks.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
