"""Records made readable: an offline HTML page with pictures and JSON, and a terminal table."""

from dpmem_profiling.report.terminal import terminal_table
from dpmem_profiling.report.write import ReportFiles, write_report

__all__ = ["ReportFiles", "terminal_table", "write_report"]
