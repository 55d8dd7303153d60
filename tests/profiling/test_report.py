"""The report: complete, offline, truthful, and never half-written."""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dpmem_profiling import (
    BatchSizeResult,
    MemoryRecord,
    Probe,
    search,
    terminal_table,
    write_report,
)
from dpmem_profiling.report.pictures import COLORS, timeline_png
from dpmem_profiling.report.wording import LABELS, STACK, finding, how

MIB = 2**20
Make = Callable[..., MemoryRecord]


@pytest.fixture
def two(make_record: Make) -> list[MemoryRecord]:
    smaller = {"parameter": 40 * MIB, "compressed": 2 * MIB}
    ours = make_record(name="ours", peak_allocated_bytes=42 * MIB, at_peak=smaller)
    return [make_record(name="DDP"), ours]


@pytest.fixture
def batch_size() -> BatchSizeResult:
    def probe(batch: int) -> Probe:
        return Probe(batch, "fits", allocated_bytes=(40 + 5 * batch) * MIB, seconds=0.1)

    return search(probe, limit_bytes=200 * MIB, margin_bytes=4 * MIB)


class Links(HTMLParser):
    """Collects whatever a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links.extend(
            value for name, value in attrs if name in ("src", "href", "srcset") and value
        )

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text())
    return links


def test_a_report_is_complete_and_needs_no_network(
    two: list[MemoryRecord], batch_size: BatchSizeResult, tmp_path: Path
) -> None:
    files = write_report(
        two,
        tmp_path / "made" / "here",
        title="A <title>",
        batch_size=batch_size,
        facts=[("Data", "noise & more")],
    )
    page = read(files.html)
    assert "script" not in page.tags
    assert len(page.links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"https?://|url\(|@import", files.html.read_text())
    for words in ("A <title>", "noise & more", "ours's peak is 0.42× DDP's", "Device: CPU"):
        assert words in page.text
    assert [path.name for path in files.pictures] == ["timeline.png", "peak.png", "batch_size.png"]
    for path in files.pictures:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", data[16:24])
        assert width == 1440
        assert height > 250
    data = json.loads(files.json.read_text())
    assert [MemoryRecord.from_json(record) for record in data["records"]] == two
    assert data["batch_size"]["largest_safe"] == 31
    assert data["facts"] == {"Data": "noise & more"}
    assert sorted(path.name for path in files.html.parent.iterdir()) == [
        "batch_size.png",
        "peak.png",
        "report.html",
        "report.json",
        "timeline.png",
    ]


def test_a_new_report_takes_the_old_ones_place(
    two: list[MemoryRecord], batch_size: BatchSizeResult, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    write_report(two, tmp_path, title="first", batch_size=batch_size)
    files = write_report(two, tmp_path, title="second")
    assert "second" in files.html.read_text()
    assert not (tmp_path / "batch_size.png").exists()
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_folder_that_cannot_be_written(two: list[MemoryRecord], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OSError, match=r"the report's folder must be writable; .*file") as caught:
        write_report(two, blocked / "report", title="no")
    assert "\n" not in str(caught.value)
    assert blocked.read_text() == "in the way"


def test_nothing_is_half_written(
    two: list[MemoryRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(two, tmp_path, title="first")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_bytes = Path.write_bytes

    def disk_full(path: Path, data: bytes) -> int:
        if path.name == "report.html":
            raise OSError(28, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left on device"):
        write_report(two, tmp_path, title="second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_finding_in_words(
    two: list[MemoryRecord], batch_size: BatchSizeResult, make_record: Make
) -> None:
    assert finding(two, batch_size) == [
        "ours's peak is 0.42× DDP's: 42.0 MiB instead of 100 MiB. Most of the difference is "
        "activations: 0 B instead of 60.0 MiB at the peak.",
        "The largest safe batch within 200 MiB, 4.00 MiB of it kept free, is 31, found in 4 probes "
        "(memory: batch 32 was tried and leaves too little of it free).",
    ]
    assert finding([make_record()], None) == [
        "plain peaks at 100 MiB with batch 8: activations 60% and parameters 40% of it."
    ]
    grown = make_record(name="", batch_size=16, peak_allocated_bytes=0, at_peak={})
    assert finding([grown, make_record()], None) == [
        "plain peaks at 100 MiB instead of 0 B, at batch 8 instead of 16."
    ]


def test_nothing_fits_in_words(make_record: Make) -> None:
    nothing = search(
        lambda batch: Probe(batch, "fits", allocated_bytes=3 * MIB),
        limit_bytes=MIB,
        margin_bytes=0,
    )
    assert finding([make_record()], nothing)[1] == (
        "No batch is safe within 1.00 MiB: batch 1 needs 3.00 MiB, 2.00 MiB more than the limit."
    )


def test_cpu_is_named_and_a_gpu_is_not(make_record: Make) -> None:
    assert any("Device: CPU" in sentence for sentence in how([make_record()]))
    assert not any("CPU" in sentence for sentence in how([make_record(device="a GPU")]))


def test_edge_records_still_make_a_report(make_record: Make, tmp_path: Path) -> None:
    empty = make_record(
        peak_allocated_bytes=0, at_peak={}, timeline=(), tensors_at_peak=(), step_s=None
    )
    nothing = search(lambda batch: Probe(batch, "oom"), limit_bytes=MIB, margin_bytes=0)
    files = write_report([empty, empty], tmp_path, title="empty", batch_size=nothing)
    assert len(read(files.html).links) == 3


def test_reserved_memory_is_drawn_where_it_is_known(make_record: Make) -> None:
    plain = make_record()
    reserved = replace(
        plain,
        timeline=tuple(
            replace(point, reserved_bytes=3 * plain.peak_allocated_bytes)
            for point in plain.timeline
        ),
    )
    assert timeline_png([plain]) == timeline_png([plain])
    assert timeline_png([plain]) != timeline_png([reserved])


def test_no_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one record; got none"):
        write_report([], tmp_path, title="none")
    with pytest.raises(ValueError, match="at least one record; got none"):
        terminal_table([])


def test_the_terminal_table(two: list[MemoryRecord]) -> None:
    console = Console(width=100, record=True, file=StringIO())
    console.print(terminal_table(two))
    text = console.export_text()
    assert re.search(r"activations\s+│\s+60.0 MiB │\s+–", text)
    assert re.search(r"compressed activations\s+│\s+– │\s+2.00 MiB", text)
    assert re.search(r"Peak allocated\s+│\s+100 MiB │\s+42.0 MiB", text)
    assert "Peak reserved" not in text


def test_every_category_has_its_own_color_and_label() -> None:
    assert set(STACK) == set(COLORS) == set(LABELS)
    assert len(set(COLORS.values())) == len(set(LABELS.values())) == 11
