"""Forecast what a further sample costs timm's models, beside what an A100 took.

Nobody stated the recipe of these runs, nor the offset that the context and libraries add, so a
model's slope is compared: bytes per sample from its smallest to its largest measured batch. One
recipe is assumed for all: fp32, training mode, SGD, the model's own image size.

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
from multiprocessing import get_context
from pathlib import Path

import torch
from jobs import TimmRow, timm_job, timm_rows
from validate import summary

from dpmem_profiling import Forecast
from dpmem_profiling.gpus import GPUS

HERE = Path(__file__).parent
RESULTS = HERE / "timm_slopes.json"
RECIPE = "fp32, training mode, SGD, the model's own image size"


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


def shuffled_models() -> list[tuple[TimmRow, TimmRow]]:
    """Each model's runs of the smallest and the largest batch."""
    runs: dict[str, list[TimmRow]] = {}
    for row in timm_rows():
        runs.setdefault(row.model, []).append(row)
    ends = []
    for model in sorted(runs):
        ordered = sorted(runs[model], key=lambda row: row.batch_size)
        if len(ordered) > 1:
            ends.append((ordered[0], ordered[-1]))
    random.Random(0).shuffle(ends)
    return ends


def forecast_bytes(first: TimmRow, last: TimmRow) -> float:
    """The slope of the allocator's reserved peak on the A100."""
    torch.set_num_threads(1)
    gpu = GPUS["a100-40gb"]
    forecast = Forecast(timm_job(first.model))
    low, high = (forecast.reserved_bytes(row.batch_size, gpu) for row in (first, last))
    return (high - low) / (last.batch_size - first.batch_size)


def main() -> None:
    """Forecast the first `--models` of the shuffled models, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--models", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
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
                    (last.whole_gpu_bytes - first.whole_gpu_bytes)
                    / (last.batch_size - first.batch_size),
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
    errors = [slope.error() for slope in found]
    lines = [
        "# Forecast slopes beside measured ones: timm on an A100 40 GB",
        "",
        f"Made by `timm_slopes.py`. Assumed of every model: {RECIPE}. Of "
        f"{len(shuffled_models())} models, in a shuffled order, {len(slopes)} were tried.",
        "",
        "| models | median | p90 | max | under-predicted | median signed |",
        "|---|---|---|---|---|---|",
    ]
    if found:
        figures = " | ".join(f"{100 * figure:.1f}%" for figure in summary(errors))
        signed = f"{100 * statistics.median(errors):+.1f}%"
        lines.append(f"| {len(found)} | {figures} | {signed} |")
    lines += [
        "",
        "| model | batches | measured MiB/sample | forecast MiB/sample | error |",
        "|---|---|---|---|---|",
    ]
    for slope in sorted(slopes, key=lambda slope: slope.model):
        forecast, error = "–", slope.reason
        if slope.forecast_bytes is not None:
            forecast = f"{slope.forecast_bytes / 2**20:.2f}"
            error = f"{100 * slope.error():+.1f}%"
        lines.append(
            f"| {slope.model} | {slope.first_batch}–{slope.last_batch} | "
            f"{slope.measured_bytes / 2**20:.2f} | {forecast} | {error} |"
        )
    return lines


if __name__ == "__main__":
    main()
