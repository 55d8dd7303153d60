"""Forecast every measured run and say how far off each was: `make validation`.

Writes forecasts.json (a row per run), table.md and scatter.png beside this file. No row, model or
GPU has a constant of its own; gradients are dropped where the runs' loop dropped them by default,
at the start of the step, and before backward for comparison.
"""

import argparse
import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from jobs import Row, job, rows
from matplotlib.figure import Figure

from dpmem_profiling import AllocatorSettings, Forecast
from dpmem_profiling.estimate import ASSUMED_CONTEXT_BYTES
from dpmem_profiling.gpus import GPUS
from dpmem_profiling.job import ZeroGrad
from dpmem_profiling.trace_replay import replay_allocations

HERE = Path(__file__).parent
CARDS = {
    "NVIDIA GeForce RTX 3060": "rtx-3060-12gb",
    "NVIDIA GeForce RTX 4060": "rtx-4060",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
}
# data/README of the measurements: repeats of these differ by far more than the others'.
NOISY = {
    ("MnasNet", "SGD", 300),
    ("MnasNet", "SGD", 323),
    ("MnasNet", "AdamW", 200),
    ("EleutherAI/gpt-neo-125M", "AdamW", 20),
    ("cerebras/Cerebras-GPT-111M", "SGD", 10),
}
POSITIONS: tuple[ZeroGrad, ...] = ("start", "before_backward")


@dataclass(frozen=True)
class Forecasted:
    """One run and its forecasts, the first of which is the one that counts.

    reserved_bytes   by the position of zero_grad; None where the card is too small
    retries          how often the allocator gave its cache back, likewise
    workspace_bytes  what cuDNN's workspaces for convolutions would add at most
    """

    row: Row
    reserved_bytes: dict[str, int | None]
    retries: dict[str, int]
    workspace_bytes: int

    def error(self, position: ZeroGrad = "start") -> float:
        """(forecast - measured) / measured."""
        forecast_bytes, measured_bytes = self.reserved_bytes[position], self.row.measured_bytes
        assert measured_bytes is not None
        if forecast_bytes is None:
            return float("inf")
        return (forecast_bytes - measured_bytes) / measured_bytes

    @property
    def is_noisy(self) -> bool:
        """Whether repeats of this very run differ by more than forecasts should."""
        return (self.row.model, self.row.optimizer, self.row.batch_size) in NOISY


def forecast(row: Row) -> Forecasted:
    """Trace the run's step and replay it on its card."""
    torch.set_num_threads(1)
    card = GPUS[CARDS[row.gpu]]
    reserved_bytes: dict[str, int | None] = {}
    retries: dict[str, int] = {}
    for position in POSITIONS:
        traced = Forecast(job(row, zero_grad=position)).trace(row.batch_size, card)
        capacity_bytes = card.total_bytes - (card.context_bytes or ASSUMED_CONTEXT_BYTES)
        peaks = replay_allocations(traced, AllocatorSettings(), capacity_bytes)
        reserved_bytes[position], retries[position] = peaks.reserved_bytes, peaks.retries
    without, with_all = (
        replay_allocations(traced, AllocatorSettings(), None, with_possible=possible)
        for possible in (False, True)
    )
    assert without.reserved_bytes is not None
    assert with_all.reserved_bytes is not None
    workspace_bytes = max(with_all.reserved_bytes - without.reserved_bytes, 0)
    print(row.model, row.optimizer, row.batch_size, reserved_bytes, flush=True)
    return Forecasted(row, reserved_bytes, retries, workspace_bytes)


def main() -> None:
    """Forecast all rows, write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    with ProcessPoolExecutor(parser.parse_args().processes, get_context("spawn")) as pool:
        forecasts = list(pool.map(forecast, rows()))
    write(forecasts)


def write(forecasts: list[Forecasted]) -> None:
    """forecasts.json, table.md and scatter.png."""
    text = json.dumps([asdict(item) for item in forecasts], indent=1)
    (HERE / "forecasts.json").write_text(text + "\n")
    (HERE / "table.md").write_text("\n".join(table(forecasts)) + "\n")
    scatter(measured(forecasts), HERE / "scatter.png")


def measured(forecasts: list[Forecasted]) -> list[Forecasted]:
    """The rows of the two cards whose versions are known."""
    return [
        item
        for item in forecasts
        if item.row.measured_bytes is not None and "A100" not in item.row.gpu
    ]


def table(forecasts: list[Forecasted]) -> list[str]:
    """What was found, as Markdown."""
    of_cards = measured(forecasts)
    quiet = [item for item in of_cards if not item.is_noisy]
    best, best_quiet = (
        [min((item.error(p) for p in POSITIONS), key=abs) for item in items]
        for items in (of_cards, quiet)
    )
    lines = [
        "# Forecasts beside measured peaks",
        "",
        "Made by `make validation`. Errors are (forecast − measured) / measured of the bytes that "
        "the whole GPU took, without the CUDA context.",
        "",
        "| rows | n | median | p90 | max | under-predicted |",
        "|---|---|---|---|---|---|",
        _summary_line("dpmem, RTX 3060 and 4060", [item.error() for item in of_cards]),
        _summary_line("… without the rows named noisy", [item.error() for item in quiet]),
        _summary_line("… the better of two places of zero_grad", best),
        _summary_line("… that, without the rows named noisy", best_quiet),
        _summary_line("xMem, the same rows", _peer_errors(of_cards, "xmem_bytes")),
        _summary_line("DNNMem, the same rows", _peer_errors(of_cards, "dnnmem_bytes")),
        "",
        _band_line("All rows", of_cards),
        _band_line("Without the rows named noisy", quiet),
        "",
        *fits_lines(forecasts),
        "",
        workspaces_line(quiet),
        "",
        "| model | optimizer | batch | GPU | measured MiB | forecast MiB | error | retries | "
        "before_backward | cuDNN at most MiB | xMem | DNNMem |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in forecasts:
        if item.row.measured_bytes is not None:
            lines.append(_row_line(item))
    return lines


def band(items: list[Forecasted]) -> tuple[float, float]:
    """measured / forecast − 1 at its 5th and 95th percentile, as conformal prediction ranks them:
    for a row that is not among these."""
    ratios = sorted(1 / (1 + item.error()) - 1 for item in items)
    cut = max(int((len(ratios) + 1) * 0.05) - 1, 0)
    return ratios[cut], ratios[-1 - cut]


def leave_one_model_out(items: list[Forecasted]) -> tuple[float, list[float]]:
    """The share of rows inside the band of the other models' rows, and the bands' half-widths."""
    inside, half_widths = 0, []
    for model in {item.row.model for item in items}:
        below, above = band([item for item in items if item.row.model != model])
        half_widths.append((above - below) / 2)
        for item in items:
            if item.row.model == model:
                inside += below <= 1 / (1 + item.error()) - 1 <= above
    return inside / len(items), half_widths


def fits_lines(forecasts: list[Forecasted]) -> list[str]:
    """How often "fits" is said rightly, of runs that ran and of runs that ran out of memory."""
    wrong = []
    for item in forecasts:
        fits = item.reserved_bytes["start"] is not None
        if fits != (item.row.measured_bytes is not None):
            wrong.append(f"{item.row.model} {item.row.optimizer} batch {item.row.batch_size}")
    share = f"{len(wrong)} of {len(forecasts)} ({100 * len(wrong) / len(forecasts):.0f}%)"
    return [f"“Fits” said wrongly at the run's own card: {share}.", *[f"- {row}" for row in wrong]]


def workspaces_line(items: list[Forecasted]) -> str:
    """Where in their interval the workspaces of cuDNN were, as the peaks tell."""
    may = [
        (item.error(), item.workspace_bytes / item.row.measured_bytes)
        for item in items
        if item.workspace_bytes and item.row.measured_bytes is not None
    ]
    shares = sorted(share for _, share in may)
    errors = (
        statistics.median(abs(error + part * share) for error, share in may) for part in (0, 0.5, 1)
    )
    none, half, whole = (f"{100 * error:.1f}%" for error in errors)
    return (
        f"Workspaces of cuDNN may add to {len(may)} of the rows not named noisy, up to "
        f"{100 * shares[-1]:.0f}% (median {100 * statistics.median(shares):.0f}%). Their median "
        f"error is {none} if none of this is taken, {half} if half is, {whole} if all is."
    )


def scatter(items: list[Forecasted], path: Path) -> None:
    """Forecast against measured, in GiB."""
    figure = Figure(figsize=(6, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for kind, colour in (("cnn", "tab:blue"), ("transformer", "tab:orange")):
        sizes_gib = [
            (item.row.measured_bytes / 2**30, forecast_bytes / 2**30)
            for item in items
            if item.row.kind == kind
            and item.row.measured_bytes is not None
            and (forecast_bytes := item.reserved_bytes["start"]) is not None
        ]
        real, forecasted = zip(*sizes_gib, strict=True)
        axes.scatter(real, forecasted, s=18, color=colour, label=kind)
    axes.axline((0, 0), slope=1, color="grey", linewidth=1)
    axes.set_xlabel("measured on the GPU, GiB")
    axes.set_ylabel("forecast without a GPU, GiB")
    axes.legend()
    figure.savefig(path)


def summary(errors: list[float]) -> tuple[float, float, float, float]:
    """Median, 90th percentile and largest of the absolute errors, and the share below zero."""
    sizes = sorted(map(abs, errors))
    ninetieth = sizes[-(-9 * len(sizes) // 10) - 1]
    under = sum(error < 0 for error in errors) / len(errors)
    return statistics.median(sizes), ninetieth, sizes[-1], under


def _summary_line(name: str, errors: list[float]) -> str:
    figures = " | ".join(f"{100 * figure:.1f}%" for figure in summary(errors))
    return f"| {name} | {len(errors)} | {figures} |"


def _band_line(name: str, items: list[Forecasted]) -> str:
    below, above = band(items)
    held, half_widths = leave_one_model_out(items)
    return (
        f"{name}: the 90% band is from {100 * below:+.1f}% to {100 * above:+.1f}% of the forecast; "
        f"with each model left out in turn it held {100 * held:.0f}% of the left-out rows, at a "
        f"median half-width of {100 * statistics.median(half_widths):.1f}%.\n"
    )


def _peer_errors(items: list[Forecasted], peer: str) -> list[float]:
    pairs = [(getattr(item.row, peer), item.row.measured_bytes) for item in items]
    return [(theirs - real) / real for theirs, real in pairs if theirs is not None]


def _row_line(item: Forecasted) -> str:
    row = item.row
    assert row.measured_bytes is not None
    reserved_bytes = item.reserved_bytes["start"]
    peers = [
        "–" if theirs is None else f"{100 * (theirs / row.measured_bytes - 1):+.1f}%"
        for theirs in (row.xmem_bytes, row.dnnmem_bytes)
    ]
    cells = [
        row.model + (" (noisy)" if item.is_noisy else ""),
        row.optimizer,
        str(row.batch_size),
        CARDS[row.gpu],
        f"{row.measured_bytes / 2**20:.0f}",
        "does not fit" if reserved_bytes is None else f"{reserved_bytes / 2**20:.0f}",
        f"{100 * item.error():+.1f}%",
        str(item.retries["start"]),
        f"{100 * item.error('before_backward'):+.1f}%",
        f"{item.workspace_bytes / 2**20:.0f}",
        *peers,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
