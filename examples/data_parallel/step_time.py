"""The time of a training step on two ranks, dpmem's beside DistributedDataParallel's.

python examples/data_parallel/step_time.py [--pairs 60]

Two processes over gloo train the same model both ways in turns: a step of one, then one of the
other, the order changing. The ratio's median over the pairs and its 95 % interval (order
statistics: no distribution is assumed). Losses are compared first: a row whose two ways do not
train alike is refused. Also the work per parameter, of ours and of theirs. Writes
reports/bench/step-time.{md,json}.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import dpmem
from dpmem.text_gpt import ByteGPT, GPTSize

OUT = Path(__file__).parents[2] / "reports" / "bench" / "step-time"
MAX_NORM = 1.0
Step = Callable[[], float]


def transformer() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A byte-level GPT of 4.8 M parameters, 4 windows of 128 bytes."""
    torch.manual_seed(0)
    model = ByteGPT(GPTSize(layers=6, width=256, heads=4, context=128))
    rank = dist.get_rank()
    tokens = torch.randint(0, 256, (4, 129), generator=torch.Generator().manual_seed(rank))

    def loss(model: nn.Module) -> Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return model, loss


def conv_net() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Convolutions with batch norm, 2.8 M parameters, 16 images of 32 x 32."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 128, 256, 256, 512):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        channels = width
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))
    noise = torch.Generator().manual_seed(dist.get_rank())
    images, labels = (
        torch.randn(16, 3, 32, 32, generator=noise),
        torch.randint(0, 10, (16,), generator=noise),
    )
    return model, lambda model: F.cross_entropy(model(images).float(), labels)


MODELS = {"transformer": transformer, "conv net": conv_net}
WAYS = ("averaging", "clipping", "clipping and scaling")


class InFloat32(nn.Module):
    """A model that computes in float32 whatever autocast says: CPUs emulate fp16, at a tenth of the
    speed, beside which no wrapper's work would show. The gradients are scaled all the same."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.model(*inputs)


def ours(way: str, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Step:
    """A step with dpmem.wrap."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    if way == "averaging":
        wrapped, _ = dpmem.wrap(model)
    elif way == "clipping":
        wrapped, _ = dpmem.wrap(model, optimizer, max_grad_norm=MAX_NORM)
    else:
        model = InFloat32(model)
        wrapped, _ = dpmem.wrap(model, optimizer, max_grad_norm=MAX_NORM, precision="fp16")

    def step() -> float:
        value = loss(wrapped)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def theirs(way: str, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Step:
    """The same with DistributedDataParallel, clip_grad_norm_ and GradScaler."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")

    def scaled_step() -> float:
        value = loss(wrapped)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return value.item()

    def step() -> float:
        value = loss(wrapped)
        value.backward()
        if way == "clipping":
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return scaled_step if way == "clipping and scaling" else step


def pair_up(first: Step, second: Step, pairs: int) -> list[float]:
    """Seconds of `first` over seconds of `second`, in turns."""
    ratios = []
    for turn in range(pairs):
        seconds = {}
        for step in (first, second) if turn % 2 else (second, first):
            dist.barrier()
            start = time.perf_counter()
            step()
            seconds[step] = time.perf_counter() - start
        ratios.append(seconds[first] / seconds[second])
    return sorted(ratios)


class Small(nn.Module):
    """Parameters of 16 elements: a step of it is the work per parameter, and little else."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.small = nn.ParameterList(torch.zeros(16) for _ in range(count))

    def forward(self) -> Tensor:
        return torch.stack(list(self.small)).sum()


def steps_of_small(count: int) -> dict[str, Step]:
    """Forward, backward and zeroing of `count` parameters: alone, with dpmem, with DDP."""

    def step_of(model: nn.Module) -> Step:
        def step() -> float:
            model().backward()
            model.zero_grad()
            return 0.0

        return step

    ours, _ = dpmem.wrap(Small(count))
    theirs = DistributedDataParallel(Small(count), gradient_as_bucket_view=True)
    return {"alone": step_of(Small(count)), "dpmem": step_of(ours), "DDP": step_of(theirs)}


def work_per_parameter_us(few: int = 100, many: int = 600, turns: int = 41) -> dict[str, float]:
    """What dpmem and DDP add to a backward for each parameter: the slope from `few` to `many`."""
    medians: dict[int, dict[str, float]] = {}
    for count in (few, many):
        steps = steps_of_small(count)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(turns + 3):
            for name, step in steps.items():
                dist.barrier()
                start = time.perf_counter()
                step()
                if turn >= 3:
                    seconds[name].append(time.perf_counter() - start)
        medians[count] = {name: statistics.median(times) for name, times in seconds.items()}
    slope = {n: (medians[many][n] - medians[few][n]) / (many - few) for n in medians[many]}
    return {name: 1e6 * (slope[name] - slope["alone"]) for name in ("dpmem", "DDP")}


def measure(rank: int, scratch: str, pairs: int) -> None:
    """One rank's part."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=2
    )
    rows: list[dict[str, Any]] = []
    for name, make in MODELS.items():
        for way in WAYS:
            model, loss = make()
            first, second = ours(way, copy.deepcopy(model), loss), theirs(way, model, loss)
            for _ in range(3):
                mine, other = first(), second()
            if abs(mine / other - 1) > 1e-4:
                raise AssertionError(f"{name}, {way}: losses {mine} and {other}")
            ratios = pair_up(first, second, pairs)
            reach = 1.96 * math.sqrt(pairs) / 2
            rows.append(
                {
                    "model": name,
                    "way": way,
                    "pairs": pairs,
                    "ratio": statistics.median(ratios),
                    "ratio_low": ratios[max(0, math.floor(pairs / 2 - reach))],
                    "ratio_high": ratios[min(pairs - 1, math.ceil(pairs / 2 + reach))],
                    "at_most": 1.05 if way == "averaging" else 1.02,
                }
            )
            if rank == 0:
                print(rows[-1], flush=True)
    measured = {"rows": rows, "us_per_parameter": work_per_parameter_us()}
    if rank == 0:
        (Path(scratch) / "measured.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


def main() -> None:
    """Time, and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=60)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(measure, (scratch, pairs), nprocs=2)  # type: ignore[no-untyped-call]
        measured = json.loads((Path(scratch) / "measured.json").read_text())
    OUT.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n")
    lines = [
        "# Step time on two gloo ranks, as a multiple of DistributedDataParallel's",
        "",
        f"Made by `python examples/data_parallel/step_time.py --pairs {pairs}`, torch",
        f"{torch.__version__}, two processes of one thread on two cores. Asked is the upper end of",
        "the 95 % interval. Scaling is that of fp16, beside GradScaler's; models compute in fp32,",
        "because a CPU's fp16 takes ten times as long.",
        "",
        "| model | the step | ratio | 95 % | asked | |",
        "|---|---|---|---|---|---|",
    ]
    for row in measured["rows"]:
        met = "met" if row["ratio_high"] <= row["at_most"] else "missed"
        lines.append(
            f"| {row['model']} | {row['way']} | {row['ratio']:.3f} "
            f"| {row['ratio_low']:.3f} to {row['ratio_high']:.3f} | at most {row['at_most']} "
            f"| {met} |"
        )
    each = measured["us_per_parameter"]
    lines += [
        "",
        f"What a backward takes longer for each parameter: {each['dpmem']:.1f} us with dpmem, "
        f"{each['DDP']:.1f} us with DistributedDataParallel",
        "(the slope from 100 to 600 parameters of 16 elements, less that of the model alone).",
    ]
    OUT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
