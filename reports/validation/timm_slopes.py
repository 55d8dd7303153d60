"""Forecast what a further sample costs timm's models, beside what an A100 took.

Nobody stated the recipe of these runs, nor the offset that the context and libraries add, so a
model's slope is compared: bytes per sample from its smallest to its largest measured batch. One
recipe is assumed for all, timm's own training script as it comes; README.md says why.

Models come in one shuffled order, so that any number of them is a sample of all. timm_slopes.json
is written after each model; `--resume` keeps what is in it. Table: timm_slopes.md.
"""

import argparse
import json
import os
import random
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import torch
from jobs import TimmRow, timm_job, timm_rows
from validate import summary

from dpmem_profiling import AllocatorSettings, Forecast, Job
from dpmem_profiling.allocator import CachingAllocator
from dpmem_profiling.gpus import GPUS

HERE = Path(__file__).parent
RESULTS = HERE / "timm_slopes.json"
# The first version that has all models which were run; later ones changed what some of them save.
TIMM = "1.0.9"
RECIPE = (
    f"timm {TIMM} and its train.py as it comes, that is fp32, SGD with momentum, cudnn.benchmark, "
    "the model's own image size and batches that are prefetched"
)
# What costs less than this part of what a sample cost before is no training run: see `ended_early`.
LEAST_GROWTH = 0.25


@dataclass(frozen=True)
class Slope:
    """Bytes per sample of one model; the forecast is None where `reason` says why."""

    model: str
    first_batch: int
    last_batch: int
    measured_bytes: float
    forecast_bytes: float | None
    reason: str = ""

    def error(self) -> float:
        """(forecast - measured) / measured."""
        assert self.forecast_bytes is not None
        return self.forecast_bytes / self.measured_bytes - 1


def runs() -> dict[str, list[TimmRow]]:
    """Each model's runs, the smallest batch first; models that were run once are left out."""
    found: dict[str, list[TimmRow]] = {}
    for row in sorted(timm_rows(), key=lambda row: (row.model, row.batch_size)):
        found.setdefault(row.model, []).append(row)
    return {model: rows for model, rows in found.items() if len(rows) > 1}


def shuffled_models() -> list[tuple[TimmRow, TimmRow]]:
    """Each model's runs of the smallest and the largest batch."""
    ends = [(rows[0], rows[-1]) for rows in runs().values()]
    random.Random(0).shuffle(ends)
    return ends


def ended_early() -> set[str]:
    """Models whose memory all but stops growing with the batch, by the measurements alone.

    Rows of runs that ran out of memory were dropped from the figures, but only where that was
    recorded. A run that died before its peak shows as a slope that collapses.
    """
    models = set()
    for model, rows in runs().items():
        slopes = [measured_slope(*pair) for pair in pairwise(rows)]
        if any(after < LEAST_GROWTH * before for before, after in pairwise(slopes)):
            models.add(model)
    return models


def off_the_line(models: set[str]) -> list[float]:
    """How far batches between a model's first and last are off the line between those, as parts of
    its rise: what no forecast that is a line can foresee."""
    parts = []
    for model, rows in runs().items():
        if model in models:
            first, last = rows[0], rows[-1]
            rise = last.whole_gpu_bytes - first.whole_gpu_bytes
            for row in rows[1:-1]:
                on_line = measured_slope(first, last) * (row.batch_size - first.batch_size)
                parts.append((row.whole_gpu_bytes - first.whole_gpu_bytes - on_line) / rise)
    return parts


def measured_slope(first: TimmRow, last: TimmRow) -> float:
    """Measured bytes per sample."""
    return (last.whole_gpu_bytes - first.whole_gpu_bytes) / (last.batch_size - first.batch_size)


def forecast_bytes(first: TimmRow, last: TimmRow) -> float:
    """The slope of what the allocator reserves at its peak on the A100."""
    torch.set_num_threads(1)
    # As train.py does.
    torch.backends.cudnn.benchmark = True
    gpu = GPUS["a100-40gb"]
    job = timm_job(first.model)
    forecast = Forecast(job)
    low, high = (
        forecast.reserved_bytes(row.batch_size, gpu) + prefetched_bytes(job, row.batch_size)
        for row in (first, last)
    )
    return (high - low) / (last.batch_size - first.batch_size)


def prefetched_bytes(job: Job, batch_size: int) -> int:
    """What timm/data/loader.py's PrefetchLoader reserves, on a stream of its own, beside the batch
    that the step has.

    While the next batch arrives, as bytes that become floats, the loader holds the one whose turn
    it is and train.py's loop the one before.
    """
    image, _ = job.batch(1)
    arriving_bytes = batch_size * image.numel()
    floats_bytes = arriving_bytes * image.element_size()
    pool = CachingAllocator(AllocatorSettings(), capacity_bytes=None)
    for size_bytes in (arriving_bytes, floats_bytes, floats_bytes):
        pool.malloc(size_bytes)
    return pool.peak_reserved_bytes


def main() -> None:
    """Forecast the first `--models` of the shuffled models, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--models", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if (found := version("timm")) != TIMM:
        raise SystemExit(
            f"The runs were of timm {TIMM}; here is {found}. "
            f"`make validation` puts {TIMM} in a folder of its own and that in PYTHONPATH."
        )
    kept = json.loads(RESULTS.read_text()) if options.resume else []
    slopes = [Slope(**row) for row in kept]
    done = {slope.model for slope in slopes}
    wanted = [ends for ends in shuffled_models()[: options.models] if ends[0].model not in done]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        futures = {pool.submit(forecast_bytes, *ends): ends for ends in wanted}
        for future in as_completed(futures):
            first, last = futures[future]
            failed = future.exception()
            slopes.append(
                Slope(
                    first.model,
                    first.batch_size,
                    last.batch_size,
                    measured_slope(first, last),
                    None if failed else future.result(),
                    f"{type(failed).__name__}: {str(failed).splitlines()[0]}" if failed else "",
                )
            )
            write(slopes)


def write(slopes: list[Slope]) -> None:
    """timm_slopes.json and timm_slopes.md."""
    RESULTS.write_text(json.dumps([asdict(slope) for slope in slopes], indent=1) + "\n")
    (HERE / "timm_slopes.md").write_text("\n".join(table(slopes)) + "\n")


def table(slopes: list[Slope]) -> list[str]:
    """What was found, as Markdown."""
    found = [slope for slope in slopes if slope.forecast_bytes is not None]
    died = ended_early()
    complete = [slope for slope in found if slope.model not in died]
    told = {model for model, rows in runs().items() if len(rows) > 2}
    seen_complete = [slope for slope in complete if slope.model in told]
    lines = [
        "# Forecast slopes beside measured ones: timm on an A100 40 GB",
        "",
        f"Made by `timm_slopes.py`. Assumed of every model: {RECIPE}. Of "
        f"{len(shuffled_models())} models, in a shuffled order, {len(slopes)} were tried.",
        "",
        "| models | n | median | p90 | max | under-predicted | median signed |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, chosen in (
        ("all", found),
        ("… without those that ended early", complete),
        ("… nor those of two batches, which do not tell", seen_complete),
    ):
        if not chosen:
            continue
        errors = [slope.error() for slope in chosen]
        figures = " | ".join(f"{100 * figure:.1f}%" for figure in summary(errors))
        signed = f"{100 * statistics.median(errors):+.1f}%"
        lines.append(f"| {title} | {len(chosen)} | {figures} | {signed} |")
    lines += ["", *straightness({slope.model for slope in complete})]
    lines += [
        "",
        "Ended early: a run whose samples cost less than a quarter of what they cost at the batch "
        "before, which is a run that died before its peak.",
        "",
        "| model | batches | measured MiB/sample | forecast MiB/sample | error |",
        "|---|---|---|---|---|",
    ]
    for slope in sorted(slopes, key=lambda slope: slope.model):
        forecast, error = "–", slope.reason
        if slope.forecast_bytes is not None:
            forecast = f"{slope.forecast_bytes / 2**20:.2f}"
            error = f"{100 * slope.error():+.1f}%"
            error += " (ended early)" if slope.model in died else ""
        lines.append(
            f"| {slope.model} | {slope.first_batch}–{slope.last_batch} | "
            f"{slope.measured_bytes / 2**20:.2f} | {forecast} | {error} |"
        )
    return lines


def straightness(models: set[str]) -> list[str]:
    """What the measurements themselves leave open, as Markdown."""
    parts = off_the_line(models)
    if not parts:
        return []
    median, ninetieth, largest, _ = (f"{100 * figure:.1f}%" for figure in summary(parts))
    return [
        f"The measurements are no lines themselves. Of models that did not end early, the "
        f"{len(parts)} batches between the first and the last are off the line between those by a "
        f"median of {median} of the rise, p90 {ninetieth}, at most {largest}."
    ]


if __name__ == "__main__":
    main()
