"""Does training end where it would with exact activations? Real data, paired by seed.

python examples/activations/loss_parity.py [--steps 300]

A byte-level GPT on the standard library's source and a conv net on scikit-learn's digits, each
from five seeds: the same initial weights and batches with exact and with compressed activations,
and the loss on held-out data at the end. Beside them, as the measure of what the comparison can
see, exact training from weights that are a ten-thousandth larger. Writes
reports/bench/activations-loss.{md,json}. Needs scikit-learn.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dpmem
from dpmem.text_gpt import ByteGPT, GPTSize, StandardLibraryText, next_byte_loss

SEEDS = range(5)
# Student's t for 95 % on both sides with four degrees of freedom.
T_4 = 2.776
LEAST_NUMEL = 2048
# Without, one seed of five leaves the first plateau earlier or later by its noise alone.
WARMUP_STEPS = 30
NUDGE = 1e-4
NUDGED = "exact, weights nudged"
# Of 64 bytes each: few would add their own noise to each pair.
HELD_OUT_WINDOWS = 1024
OUT = Path(__file__).parents[2] / "reports" / "bench"

Loss = Callable[[nn.Module, Tensor], Tensor]


class Task:
    """A model, its training batches and its held-out ones."""

    def __init__(self, name: str, build: Callable[[], nn.Module], loss: Loss) -> None:
        self.name, self.build, self.loss = name, build, loss

    def batch(self, generator: torch.Generator) -> Tensor:
        """A training batch."""
        raise NotImplementedError

    def held_out(self) -> Tensor:
        """Data that no training batch has."""
        raise NotImplementedError


class Text(Task):
    """The byte-level GPT, two layers of width 64, windows of 64 bytes."""

    def __init__(self) -> None:
        size = GPTSize(layers=2, width=64, heads=2, context=64)
        super().__init__("byte-level GPT", partial(ByteGPT, size), next_byte_loss)
        self.text = StandardLibraryText(context=64, limit_bytes=1 << 20)
        # The end is held out.
        self.last = len(self.text) - HELD_OUT_WINDOWS

    def batch(self, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(0, self.last, (32,), generator=generator).tolist()
        return torch.stack([self.text[i] for i in chosen])

    def held_out(self) -> Tensor:
        return torch.stack([self.text[self.last + i] for i in range(HELD_OUT_WINDOWS)])


class Digits(Task):
    """A conv net with batch norm and pooling on 8 x 8 digits; a row is 64 pixels and the class."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        super().__init__("conv net on digits", self._net, self._loss)
        data = load_digits()
        pixels = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
        rows = torch.cat((pixels, torch.tensor(data.target, dtype=torch.float32)[:, None]), 1)
        self.rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]

    @staticmethod
    def _net() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(1024, 64), nn.GELU(), nn.Linear(64, 10)),
        )

    @staticmethod
    def _loss(model: nn.Module, rows: Tensor) -> Tensor:
        # Smoothed: plain cross-entropy falls to nearly 0, where a percent says nothing.
        logits = model(rows[:, :64].view(-1, 1, 8, 8))
        return F.cross_entropy(logits, rows[:, 64].long(), label_smoothing=0.1)

    def batch(self, generator: torch.Generator) -> Tensor:
        return self.rows[torch.randint(0, 1300, (64,), generator=generator)]

    def held_out(self) -> Tensor:
        return self.rows[1300:]


def train(
    task: Task, seed: int, steps: int, policy: dpmem.Policy | None, nudge: float = 0.0
) -> float:
    """The held-out loss after `steps` steps of AdamW, its rate rising, then falling to 0.

    `nudge` enlarges the initial weights by that part.
    """
    torch.manual_seed(seed)
    model = task.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + nudge)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / steps)
    )
    wrapped, optimizer = dpmem.wrap(model, optimizer, activations=policy)
    for _ in range(steps):
        task.loss(wrapped, task.batch(generator)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return float(task.loss(model, task.held_out()))


def budgeted(task: Task) -> dpmem.Policy:
    """2 bits with sensitivity: an eighth more bytes than 2 bits everywhere, placed by variance."""
    torch.manual_seed(0)
    fewest = dpmem.Policy(linear_bits=2, minimum_numel=LEAST_NUMEL)
    model, rows = task.build(), task.batch(torch.Generator().manual_seed(0))
    stored_bytes = dpmem.audit(model, rows, fewest, loss=task.loss).bytes_after
    return replace(fewest, budget_bytes=stored_bytes * 9 // 8, refresh_forwards=25)


def main() -> None:
    """Train all, write the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    rows = []
    for task in (Text(), Digits()):
        fixed = {
            f"{bits}bit": dpmem.Policy(linear_bits=bits, minimum_numel=LEAST_NUMEL)
            for bits in (4, 2)
        }
        exact = [train(task, seed, steps, None) for seed in SEEDS]
        ways = {NUDGED: None} | fixed | {"2bit with sensitivity": budgeted(task)}
        for name, policy in ways.items():
            nudge = NUDGE if name == NUDGED else 0.0
            losses = [train(task, seed, steps, policy, nudge) for seed in SEEDS]
            percent = [100 * (a / b - 1) for a, b in zip(losses, exact, strict=True)]
            mean = statistics.mean(percent)
            half = T_4 * statistics.stdev(percent) / len(percent) ** 0.5
            asked = {"4bit": 0.5, "2bit with sensitivity": 1.0}.get(name)
            met = None if asked is None else max(abs(mean - half), abs(mean + half)) <= asked
            rows.append(
                {
                    "task": task.name,
                    "policy": name,
                    "steps": steps,
                    "exact_losses": exact,
                    "losses": losses,
                    "mean_difference_percent": mean,
                    "interval_95_percent": [mean - half, mean + half],
                    "asked_percent": asked,
                    "met": met,
                }
            )
            print(f"{task.name:20}{name:24}{mean:+.3f} ± {half:.3f} %  {met}", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "activations-loss.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    lines = [
        "# Held-out loss with compressed activations, beside exact ones",
        "",
        f"Made by `python examples/activations/loss_parity.py --steps {steps}` on a CPU, torch",
        f"{torch.__version__}: {len(SEEDS)} seeds, the same weights and batches in each pair. The",
        "difference is relative to the exact run's loss; the interval is Student's over the seeds.",
        "",
        "| task | policy | exact loss | difference | 95% interval | asked within | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval_95_percent"]
        asked = "–" if row["asked_percent"] is None else f"±{row['asked_percent']}%"
        met = {None: "", True: "met", False: "missed"}[row["met"]]
        lines.append(
            f"| {row['task']} | {row['policy']} | {statistics.mean(row['exact_losses']):.4f} "
            f"| {row['mean_difference_percent']:+.3f}% | {low:+.3f}% to {high:+.3f}% "
            f"| {asked} | {met} |"
        )
    (OUT / "activations-loss.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
