"""Bytes for people: powers of 1024, three significant digits."""

from __future__ import annotations


def format_bytes(n_bytes: int | float) -> str:
    """Write a number of bytes in the largest binary unit that keeps it at least 1.

    `format_bytes(1536)` is "1.50 KiB", `format_bytes(512)` is "512 B", `format_bytes(-2**20)` is
    "-1.00 MiB".
    """
    size = abs(float(n_bytes))
    sign = "-" if n_bytes < 0 else ""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1023.5 and unit != "TiB":
        size, unit = size / 1024, next(units)
    digits = 0 if unit == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{sign}{size:.{digits}f} {unit}"
