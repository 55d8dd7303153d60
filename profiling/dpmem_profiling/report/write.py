"""Records to files: one offline HTML page, its pictures, and the figures as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpmem_profiling.record import BatchSizeResult, MemoryRecord
from dpmem_profiling.report import wording
from dpmem_profiling.report.pictures import COLORS, batch_size_png, peak_png, timeline_png
from dpmem_profiling.units import format_bytes

HTML_NAME = "report.html"
JSON_NAME = "report.json"
PICTURE_NAMES = ("timeline.png", "peak.png", "batch_size.png")


@dataclass(frozen=True)
class ReportFiles:
    """Where a report lies: the page, the figures, the pictures (also inside the page)."""

    html: Path
    json: Path
    pictures: tuple[Path, ...]


def write_report(
    records: Sequence[MemoryRecord],
    out: Path,
    *,
    title: str,
    batch_size: BatchSizeResult | None = None,
    facts: Sequence[tuple[str, str]] = (),
) -> ReportFiles:
    """Write report.html, report.json and the PNG pictures into the folder `out`.

    The first record is the one that the others are compared with. `facts` are (what, text) rows
    for the page. The page needs no network and no script. All files are complete before the first
    one appears in `out`; those of an earlier report are replaced.

    Raises ValueError for no records, OSError where `out` cannot be written.
    """
    if not records:
        raise ValueError("a report needs at least one record; got none")
    pictures = {"timeline.png": timeline_png(records), "peak.png": peak_png(records)}
    if batch_size is not None:
        pictures["batch_size.png"] = batch_size_png(batch_size)
    data = {
        "title": title,
        "records": [record.to_json() for record in records],
        "batch_size": None if batch_size is None else batch_size.to_json(),
        "facts": dict(facts),
    }
    contents = {
        **pictures,
        JSON_NAME: (json.dumps(data, indent=2) + "\n").encode(),
        HTML_NAME: _page(records, title, batch_size, facts, pictures).encode(),
    }
    try:
        _write_all(contents, out)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the report's folder must be writable; {out}: {error.strerror}. Choose another",
        ) from error
    return ReportFiles(
        html=out / HTML_NAME,
        json=out / JSON_NAME,
        pictures=tuple(out / name for name in pictures),
    )


def _write_all(contents: dict[str, bytes], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.mkdir(exist_ok=True)
    # Inside `out`, so that every replace below stays within one file system and one permission.
    with tempfile.TemporaryDirectory(dir=out, prefix=".report-") as temporary:
        for name, content in contents.items():
            (Path(temporary) / name).write_bytes(content)
        for name in contents:
            os.replace(Path(temporary) / name, out / name)
    for name in set(PICTURE_NAMES) - set(contents):
        (out / name).unlink(missing_ok=True)


def _page(
    records: Sequence[MemoryRecord],
    title: str,
    batch_size: BatchSizeResult | None,
    facts: Sequence[tuple[str, str]],
    pictures: dict[str, bytes],
) -> str:
    environment = Environment(
        loader=PackageLoader("dpmem_profiling", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = format_bytes
    names = wording.record_names(records)
    return environment.get_template("report.html.j2").render(
        title=title,
        finding=wording.finding(records, batch_size),
        how=wording.how(records),
        names=names,
        records=list(zip(names, records, strict=True)),
        categories=wording.category_rows(records),
        summary=wording.summary_rows(records),
        labels=wording.LABELS,
        colors=COLORS,
        batch_size=batch_size,
        facts=facts,
        picture={
            name.removesuffix(".png"): Markup("data:image/png;base64," + b64encode(png).decode())
            for name, png in pictures.items()
        },
    )
