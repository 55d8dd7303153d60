"""What compression costs in time on the CPU: forward and backward, and Python per saved tensor.

python examples/activations/overhead.py [--rounds 20]

The byte-level GPT, fp32, one thread: ratios of forward and backward with 4 bits over exact, run in
turns. Python per saved tensor: chains of tiny layers, of which nothing is compressed, so that all
that is added is deciding; over the same chain, in turns. Once as they are, smaller than what a
policy looks at; once with a policy that looks at everything and keeps it exact, each storage once:
what a large tensor costs before its first value is touched. Processor time of this process, so
that others on the machine weigh less. Writes reports/bench/activations-overhead.{md,json}.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import dpmem
from dpmem.activations import Policy
from dpmem.text_gpt import ByteGPT, GPTSize, next_byte_loss

OUT = Path(__file__).parents[2] / "reports" / "bench"
# Width of the model and the ratio that is asked for.
ASKED = {128: 1.25, 384: 1.12}
ASKED_PYTHON_US = 15.0


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of `work`."""
    start = time.process_time()
    work()
    return time.process_time() - start


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median, and the ranks around it that hold it in 95 of 100 cases."""
    ordered, n = sorted(values), len(values)
    reach = 1.96 * n**0.5 / 2
    low, high = max(0, int(n / 2 - reach)), min(n - 1, int(n / 2 + reach))
    return statistics.median(ordered), ordered[low], ordered[high]


def gpt(width: int, rounds: int) -> list[float]:
    """Ratios of 4 bits over exact."""
    torch.manual_seed(0)
    model = ByteGPT(GPTSize(layers=2, width=width, heads=4, context=256))
    windows = torch.randint(0, 256, (8, 257))
    compressed = dpmem.compress(model, "4bit")

    def exact() -> None:
        next_byte_loss(model, windows).backward()
        model.zero_grad()

    def ours() -> None:
        with compressed:
            loss = next_byte_loss(model, windows)
        loss.backward()
        model.zero_grad()

    exact(), ours()
    return [seconds(ours) / seconds(exact) for _ in range(rounds)]


def python(rounds: int, layer: type[nn.Module], policy: str | Policy) -> tuple[list[float], float]:
    """Microseconds added per saved tensor, and the chain's own per saved tensor."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), layer()) for _ in range(50)))
    x = torch.randn(4, 8)
    saved = [0]

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved[0] += 1
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(x)
    compressed = dpmem.compress(model, policy)

    def exact() -> None:
        model(x).sum().backward()

    def ours() -> None:
        with compressed:
            y = model(x)
        y.sum().backward()

    exact(), ours()
    pairs = [(seconds(ours), seconds(exact)) for _ in range(10 * rounds)]
    return (
        [1e6 * (a - b) / saved[0] for a, b in pairs],
        1e6 * statistics.median(b for _, b in pairs) / saved[0],
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = []
    for width, asked in ASKED.items():
        median, low, high = interval(gpt(width, rounds))
        rows.append((f"4bit over exact, width {width}", median, low, high, f"≤ {asked}"))
    # Sigmoid's result is saved twice and never computed again, which would be no deciding.
    everything = Policy(linear_bits=None, nonlinear_bits=None, minimum_numel=0)
    for what, layer, policy in (
        ("small", nn.GELU, "4bit"),
        ("looked at in full", nn.Sigmoid, everything),
    ):
        added, own = python(rounds, layer, policy)
        asked = f"≤ {ASKED_PYTHON_US}"
        rows.append((f"µs of Python per saved tensor, {what}", *interval(added), asked))
        rows.append(("µs of the same chain without, per saved tensor", own, own, own, "–"))
    for row in rows:
        print(row)
    OUT.mkdir(parents=True, exist_ok=True)
    keys = ("what", "median", "low", "high", "asked")
    table = [dict(zip(keys, row, strict=True)) for row in rows]
    (OUT / "activations-overhead.json").write_text(json.dumps({"rows": table}, indent=1) + "\n")
    lines = [
        "# What compression costs on the CPU",
        "",
        f"Made by `python examples/activations/overhead.py --rounds {rounds}`, one thread, torch",
        f"{torch.__version__}: medians of pairs run in turns, processor time. Beside Python's rows",
        "the measure of the machine: what torch itself takes per saved tensor of that chain. A",
        "large tensor is looked at in full before its values are touched.",
        "",
        "| what | median | 95% of the median | asked |",
        "|---|---|---|---|",
        *(f"| {row[0]} | {row[1]:.3f} | {row[2]:.3f}–{row[3]:.3f} | {row[4]} |" for row in rows),
    ]
    (OUT / "activations-overhead.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
