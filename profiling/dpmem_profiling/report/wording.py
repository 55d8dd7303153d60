"""What a report says in words and tables; no drawing, no files."""

from __future__ import annotations

from collections.abc import Sequence

from dpmem_profiling.record import BatchSizeResult, Category, MemoryRecord
from dpmem_profiling.units import format_bytes

# Bottom of a stack first: what is always there, then what comes and goes.
STACK: tuple[Category, ...] = (
    "parameter",
    "buffer",
    "optimizer_state",
    "gradient",
    "bucket",
    "input",
    "activation",
    "compressed",
    "workspace",
    "temporary",
    "unknown",
)

LABELS: dict[Category, str] = {
    "parameter": "parameters",
    "buffer": "buffers",
    "optimizer_state": "optimizer state",
    "gradient": "gradients",
    "bucket": "gradient buckets",
    "input": "input batch",
    "activation": "activations",
    "compressed": "compressed activations",
    "workspace": "library workspaces",
    "temporary": "temporaries",
    "unknown": "not attributed",
}


def record_names(records: Sequence[MemoryRecord]) -> list[str]:
    """A name for each record, distinct even where the records' own are empty or the same."""
    names = [record.name or "step" for record in records]
    return [
        f"{name} ({position})" if names.count(name) > 1 else name
        for position, name in enumerate(names, 1)
    ]


def finding(records: Sequence[MemoryRecord], batch_size: BatchSizeResult | None) -> list[str]:
    """The report's result in a few sentences; the first record is what the others are held to."""
    names = record_names(records)
    first, rest = records[0], records[1:]
    sentences = [
        _compared(names[0], first, name, other) for name, other in zip(names[1:], rest, strict=True)
    ]
    if not rest:
        largest = [category for category, _ in _by_size(first)][:2]
        shares = " and ".join(
            f"{LABELS[category]} {_percent(first.at_peak[category], first.peak_allocated_bytes)}"
            for category in largest
        )
        sentences.append(
            f"{names[0]} peaks at {format_bytes(first.peak_allocated_bytes)} "
            f"with batch {first.batch_size}" + (f": {shares} of it." if shares else ".")
        )
    if batch_size is not None:
        sentences.append(_largest_batch(batch_size))
    return sentences


def how(records: Sequence[MemoryRecord]) -> list[str]:
    """How the figures came about, and what they leave out."""
    sentences = []
    sources = {record.source for record in records}
    if "measured" in sources:
        sentences.append(
            "Measured: one training step after warm-up, watched operator by operator. Each storage "
            "counts once, from its creation to its release; scratch that one operator allocates "
            "and frees within itself is not seen."
        )
    if "predicted" in sources:
        sentences.append("Predicted: not run on the device named; see the notes for the method.")
    if any(record.source == "measured" and record.device == "CPU" for record in records):
        sentences.append(
            "Device: CPU. These are tensor bytes; a GPU adds its context, library workspaces and "
            "what its allocator rounds up and caches."
        )
    if any(record.world_size > 1 for record in records):
        sentences.append("The bytes are those of one rank.")
    names = record_names(records)
    for name, record in zip(names, records, strict=True):
        sentences.extend(f"{name}: {note}" for note in record.notes)
    return sentences


def category_rows(records: Sequence[MemoryRecord]) -> list[tuple[Category, list[int]]]:
    """(category, its bytes at each record's peak), in stack order, empty categories left out."""
    rows = [(name, [record.at_peak.get(name, 0) for record in records]) for name in STACK]
    return [(category, sizes) for category, sizes in rows if any(sizes)]


def summary_rows(records: Sequence[MemoryRecord]) -> list[tuple[str, list[str]]]:
    """(what, its text for each record): the figures besides the categories, unknown ones as –."""

    def size(n_bytes: int | None) -> str:
        return "–" if n_bytes is None else format_bytes(n_bytes)

    rows: list[tuple[str, list[str]]] = [
        ("Peak allocated", [size(record.peak_allocated_bytes) for record in records]),
        ("Peak reserved", [size(record.peak_reserved_bytes) for record in records]),
        ("Whole device", [size(record.device_bytes) for record in records]),
        ("Limit", [size(record.limit_bytes) for record in records]),
        ("Between steps", [size(sum(record.persistent_bytes.values())) for record in records]),
        (
            "Step time",
            ["–" if record.step_s is None else f"{record.step_s:.3g} s" for record in records],
        ),
        ("Batch size", [str(record.batch_size) for record in records]),
        ("Ranks", [str(record.world_size) for record in records]),
        ("Device", [record.device for record in records]),
        ("Source", [record.source for record in records]),
        ("PyTorch", [record.torch_version for record in records]),
    ]
    return [(what, texts) for what, texts in rows if set(texts) != {"–"}]


def _by_size(record: MemoryRecord) -> list[tuple[Category, int]]:
    return sorted(record.at_peak.items(), key=lambda item: -item[1])


def _percent(part_bytes: int, whole_bytes: int) -> str:
    return f"{100 * part_bytes / whole_bytes:.0f}%"


def _compared(base_name: str, base: MemoryRecord, name: str, other: MemoryRecord) -> str:
    sizes = (
        f"{format_bytes(other.peak_allocated_bytes)} instead of "
        f"{format_bytes(base.peak_allocated_bytes)}"
    )
    if base.batch_size != other.batch_size:
        sizes += f", at batch {other.batch_size} instead of {base.batch_size}"
    if base.peak_allocated_bytes == 0:
        return f"{name} peaks at {sizes}."
    ratio = other.peak_allocated_bytes / base.peak_allocated_bytes
    sentence = f"{name}'s peak is {ratio:.2f}× {base_name}'s: {sizes}."
    change = {
        category: other.at_peak.get(category, 0) - base.at_peak.get(category, 0)
        for category in STACK
    }
    direction = 1 if ratio > 1 else -1
    cause = max(STACK, key=lambda category: direction * change[category])
    if direction * change[cause] <= 0:
        return sentence
    return (
        f"{sentence} Most of the difference is {LABELS[cause]}: "
        f"{format_bytes(other.at_peak.get(cause, 0))} instead of "
        f"{format_bytes(base.at_peak.get(cause, 0))} at the peak."
    )


def _largest_batch(result: BatchSizeResult) -> str:
    limit = format_bytes(result.limit_bytes)
    kept = f", {format_bytes(result.margin_bytes)} of it kept free," if result.margin_bytes else ""
    if result.largest_safe is None:
        return f"No batch is safe within {limit}{kept.rstrip(',')}: {result.limited_by}."
    return (
        f"The largest safe batch within {limit}{kept} is {result.largest_safe}, "
        f"found in {len(result.probes)} probes ({result.limited_by})."
    )
