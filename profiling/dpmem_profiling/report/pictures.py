"""A report's pictures, as PNG bytes. Drawn with matplotlib's objects: no global figure state."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from dpmem_profiling.record import BatchSizeResult, Category, MemoryRecord
from dpmem_profiling.report.wording import LABELS, STACK, category_rows, record_names
from dpmem_profiling.units import format_bytes

# Okabe and Ito's colour-blind safe palette, with greys and two darker tones for the rare ones.
COLORS: dict[Category, str] = {
    "parameter": "#0072B2",
    "buffer": "#003B5C",
    "optimizer_state": "#009E73",
    "gradient": "#D55E00",
    "bucket": "#CC79A7",
    "input": "#F0E442",
    "activation": "#E69F00",
    "compressed": "#56B4E9",
    "workspace": "#6B4E2E",
    "temporary": "#A7ADB3",
    "unknown": "#3A3F44",
}
INK = "#22262A"
FAINT = "#7A8188"
ALARM = "#B00020"
DPI = 160
WIDTH_IN = 9.0


def timeline_png(records: Sequence[MemoryRecord]) -> bytes:
    """Stacked live bytes over the recorded step: a panel per record, one scale for all."""
    figure = Figure(figsize=(WIDTH_IN, 0.9 + 2.5 * len(records)), layout="constrained")
    reserved_bytes = [size for record in records for _, size in _reserved(record)]
    top_bytes = max(*[r.peak_allocated_bytes for r in records], *reserved_bytes, 0) * 1.18 or 1
    panels = figure.subplots(len(records), 1, sharey=True, squeeze=False)[:, 0]
    for axes, record, name in zip(panels, records, record_names(records), strict=True):
        _draw_timeline(axes, record, name, top_bytes)
    panels[-1].set_xlabel("allocations and releases, in order", color=FAINT)
    handles = _patches([category for category in STACK if _ever(records, category)])
    if reserved_bytes:
        handles.append(Line2D([], [], color=INK, linewidth=1.2, label="reserved"))
    _legend(figure, handles)
    return _png(figure)


def peak_png(records: Sequence[MemoryRecord]) -> bytes:
    """What each record holds at its peak: one stacked bar per record."""
    figure = Figure(figsize=(WIDTH_IN, 1.3 + 0.7 * len(records)), layout="constrained")
    axes = figure.subplots()
    rows = category_rows(records)
    left = [0] * len(records)
    widest = max(record.peak_allocated_bytes for record in records) or 1
    for category, sizes in rows:
        axes.barh(
            range(len(records)),
            sizes,
            left=left,
            color=COLORS[category],
            height=0.62,
            edgecolor="white",
            linewidth=0.6,
        )
        for row, size_bytes in enumerate(sizes):
            if size_bytes > 0.085 * widest:
                axes.text(
                    left[row] + size_bytes / 2,
                    row,
                    format_bytes(size_bytes),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=_readable_on(COLORS[category]),
                )
        left = [start + size_bytes for start, size_bytes in zip(left, sizes, strict=True)]
    for row, total_bytes in enumerate(left):
        axes.text(
            total_bytes + 0.012 * widest,
            row,
            format_bytes(total_bytes),
            va="center",
            fontweight="bold",
            color=INK,
        )
    axes.set_yticks(range(len(records)), record_names(records))
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.15)
    _scale_bytes(axes.xaxis, widest)
    _plain(axes, grid="x")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    _legend(figure, _patches([category for category, _ in rows]))
    return _png(figure)


def batch_size_png(result: BatchSizeResult) -> bytes:
    """The probed peaks over the batch size, against the limit and the safe limit."""
    figure = Figure(figsize=(WIDTH_IN, 3.6), layout="constrained")
    axes = figure.subplots()
    safe_bytes = result.limit_bytes - result.margin_bytes
    failed = [probe.batch for probe in result.probes if probe.outcome != "fits"]
    batches = [batch for batch, _ in result.curve]
    peaks = [peak_bytes for _, peak_bytes in result.curve]
    top_bytes = 1.15 * max([result.limit_bytes, *peaks])
    axes.axhspan(safe_bytes, result.limit_bytes, color=ALARM, alpha=0.10, linewidth=0)
    axes.axhline(result.limit_bytes, color=ALARM, linewidth=1.2)
    if result.margin_bytes:
        axes.axhline(safe_bytes, color=ALARM, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.plot(batches, peaks, color=COLORS["parameter"], linewidth=1.6, marker="o")
    axes.plot(failed, [result.limit_bytes] * len(failed), "x", color=ALARM, markersize=8, mew=2)
    for batch, peak_bytes in result.curve:
        if batch == result.largest_safe:
            axes.annotate(
                f"largest safe batch: {batch}\n{format_bytes(peak_bytes)}",
                (batch, peak_bytes),
                xytext=(0, -56),
                textcoords="offset points",
                ha="center",
                fontweight="bold",
                color=INK,
                arrowprops={"arrowstyle": "-", "color": FAINT},
            )
    axes.set_xlim(0, 1.12 * max(probe.batch for probe in result.probes))
    axes.set_ylim(0, top_bytes)
    axes.set_xlabel("batch size", color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _scale_bytes(axes.yaxis, top_bytes)
    _plain(axes, grid="y")
    handles = [
        Line2D([], [], color=COLORS["parameter"], marker="o", label="peak, probed"),
        Line2D([], [], color=ALARM, label=f"limit {format_bytes(result.limit_bytes)}"),
    ]
    if result.margin_bytes:
        safe = f"safe limit {format_bytes(safe_bytes)}"
        handles.append(Line2D([], [], color=ALARM, linestyle=(0, (4, 3)), label=safe))
    if failed:
        cross = Line2D([], [], color=ALARM, marker="x", linestyle="", mew=2, label="did not fit")
        handles.append(cross)
    _legend(figure, handles)
    return _png(figure)


def _draw_timeline(axes: Axes, record: MemoryRecord, name: str, top_bytes: float) -> None:
    events = [point.event for point in record.timeline]
    shown = [category for category in STACK if _ever([record], category)]
    stacks = [
        [point.live_bytes.get(category, 0) for point in record.timeline] for category in shown
    ]
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_ylim(0, top_bytes)
    _scale_bytes(axes.yaxis, top_bytes)
    axes.set_xticks([])
    _plain(axes, grid="y")
    if not events:
        axes.text(0.5, 0.5, "no timeline", transform=axes.transAxes, ha="center", color=FAINT)
        return
    axes.set_xlim(events[0], max(events[-1], 1))
    axes.stackplot(
        events,
        stacks,
        colors=[COLORS[category] for category in shown],
        step="post",
        linewidth=0,
        zorder=2,
    )
    reserved = _reserved(record)
    if reserved:
        axes.step(*zip(*reserved, strict=True), where="post", color=INK, linewidth=1.2, zorder=3)
    _shade_phases(axes, record, top_bytes)
    peak = max(record.timeline, key=lambda point: sum(point.live_bytes.values()))
    seen_bytes = sum(peak.live_bytes.values())
    axes.plot(peak.event, seen_bytes, "v", color=INK, markersize=6, zorder=4)
    near_end = peak.event > (events[0] + events[-1]) / 2
    axes.annotate(
        f"peak {format_bytes(seen_bytes)}",
        (peak.event, seen_bytes),
        xytext=(-7 if near_end else 7, 1),
        textcoords="offset points",
        ha="right" if near_end else "left",
        fontweight="bold",
        color=INK,
        zorder=4,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
    )


def _reserved(record: MemoryRecord) -> list[tuple[int, int]]:
    """Where the caching allocator's memory is known: (event, bytes)."""
    return [
        (point.event, point.reserved_bytes)
        for point in record.timeline
        if point.reserved_bytes is not None
    ]


def _shade_phases(axes: Axes, record: MemoryRecord, top_bytes: float) -> None:
    """Alternate the background from phase to phase, and name those wide enough to carry a name."""
    spans: list[tuple[str | None, int, int]] = []
    for point, following in zip(record.timeline, record.timeline[1:], strict=False):
        if spans and spans[-1][0] == point.phase:
            spans[-1] = (point.phase, spans[-1][1], following.event)
        else:
            spans.append((point.phase, point.event, following.event))
    whole = record.timeline[-1].event or 1
    named = [span for span in spans if span[0] is not None]
    for position, (phase, first, last) in enumerate(named):
        if position % 2 == 0:
            axes.axvspan(first, last, color="#EEF1F4", zorder=0, linewidth=0)
        axes.axvline(first, color=FAINT, linewidth=0.6, alpha=0.5, zorder=3)
        assert phase is not None
        if (last - first) / whole > 0.008 * len(phase) + 0.02:
            axes.text(
                (first + last) / 2,
                0.975 * top_bytes,
                phase.replace("_", " "),
                ha="center",
                va="top",
                fontsize=8.5,
                color=FAINT,
            )


def _ever(records: Sequence[MemoryRecord], category: Category) -> bool:
    return any(point.live_bytes.get(category, 0) for record in records for point in record.timeline)


def _scale_bytes(axis: Axis, largest_bytes: float) -> None:
    """Mark an axis from 0 in one binary unit, at round numbers of it."""
    unit, scale = "B", 1
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if largest_bytes < 2 * 1024 * scale:
            break
        unit, scale = larger, scale * 1024
    steps = (mantissa * 10**power for power in range(7) for mantissa in (1, 2, 5))
    step = next(step for step in steps if largest_bytes / (step * scale) <= 6)
    axis.set_major_locator(MultipleLocator(step * scale))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / scale:g} {unit}"))


def _readable_on(color: str) -> str:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _plain(axes: Axes, *, grid: str) -> None:
    axes.grid(axis=grid, color="#DDE1E5", linewidth=0.7, zorder=0)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(colors=FAINT, length=0)


def _patches(categories: Sequence[Category]) -> list[Patch | Line2D]:
    return [Patch(color=COLORS[name], label=LABELS[name]) for name in categories]


def _legend(figure: Figure, handles: Sequence[Patch | Line2D]) -> None:
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=5,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.7,
        columnspacing=1.4,
    )


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, dpi=DPI, facecolor="white", format="png")
    return buffer.getvalue()
