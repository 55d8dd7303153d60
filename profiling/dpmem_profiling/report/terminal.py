"""A report for the terminal: one table, a column per record."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from dpmem_profiling.record import MemoryRecord
from dpmem_profiling.report.wording import LABELS, category_rows, record_names, summary_rows
from dpmem_profiling.units import format_bytes


def terminal_table(records: Sequence[MemoryRecord]) -> Table:
    """Bytes at the peak by category, then the other figures; a column per record.

    Raises ValueError for no records.
    """
    if not records:
        raise ValueError("a table needs at least one record; got none")
    table = Table(title="Memory of one training step", title_justify="left")
    table.add_column("at the peak")
    for name in record_names(records):
        table.add_column(name, justify="right")
    for category, sizes in category_rows(records):
        table.add_row(LABELS[category], *(format_bytes(size) if size else "–" for size in sizes))
    table.add_section()
    for row, (what, texts) in enumerate(summary_rows(records)):
        table.add_row(what, *texts, style="bold" if row == 0 else None)
    return table
