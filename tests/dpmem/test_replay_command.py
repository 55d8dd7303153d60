"""`dpmem replay`: exit codes, and what it says in both forms."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpmem.cli import main

MIB = 2**20
BASE = 2**40
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`dpmem replay` with these arguments: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "120")

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dpmem", "replay", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return (ended.value.code or 0, *capfd.readouterr())

    return command


def event(action: str, address: int, size_bytes: int) -> dict[str, Any]:
    key = "device_free" if action == "oom" else "addr"
    return {"action": action, key: address, "size": size_bytes, "stream": 0}


def snapshot(folder: Path, *events: dict[str, Any], address: int = BASE) -> str:
    """40 MiB cached, of which 5 are in use; `events` after 30 MiB came and went in a segment."""
    blocks = [
        {
            "address": address,
            "size": 5 * MIB,
            "requested_size": 5 * MIB,
            "state": "active_allocated",
        },
        {"address": address + 5 * MIB, "size": 35 * MIB, "requested_size": 0, "state": "inactive"},
    ]
    segment = {
        "device": 0,
        "address": address,
        "total_size": 40 * MIB,
        "stream": 0,
        "segment_type": "large",
        "blocks": blocks,
    }
    trace = [
        event("alloc", BASE + 5 * MIB, 30 * MIB),
        event("free_requested", BASE + 5 * MIB, 30 * MIB),
        event("free_completed", BASE + 5 * MIB, 30 * MIB),
        *events,
    ]
    path = folder / "snapshot.pickle"
    path.write_bytes(pickle.dumps({"segments": [segment], "device_traces": [trace]}))
    return str(path)


def test_a_recording_that_the_model_meets(run: Run, tmp_path: Path) -> None:
    code, stdout, stderr = run(snapshot(tmp_path))
    assert (code, stderr) == (0, "")
    words = " ".join(stdout.split())
    assert "│ peak allocated │ 35.0 MiB │" in words
    assert "│ peak reserved │ 40.0 MiB │" in words
    assert "│ of it fragments │ 5.00 MiB │" in words
    assert "3 events; addresses as recorded: 1 of 1; segments as recorded: 0 of 0" in words


def test_json(run: Run, tmp_path: Path) -> None:
    path = snapshot(tmp_path)
    code, stdout, stderr = run(path, "--json", "--allocator", "expandable_segments:True")
    assert (code, stderr) == (0, "")
    document = json.loads(stdout)
    assert document["snapshot"] == path
    (device,) = document["devices"]
    assert device["run"]["peak_reserved_bytes"] == 40 * MIB
    timeline = [(at["event"], at["allocated_bytes"] // MIB) for at in device["run"]["timeline"]]
    assert timeline == [(0, 5), (1, 35), (2, 5), (3, 5)]
    # 5 MiB anew take 20, and 30 behind them 20 more, either way.
    same, other = device["what_if"]["recorded_settings"], device["what_if"]["other_settings"]
    assert (same["peak_reserved_bytes"], other["peak_reserved_bytes"]) == (50 * MIB, 40 * MIB)
    assert other["settings"]["expandable_segments"] is True


def test_a_model_that_differs_is_a_finding(run: Run, tmp_path: Path) -> None:
    # A request that the free 35 MiB would serve was given new memory.
    address = BASE + 100 * MIB
    path = snapshot(
        tmp_path,
        event("segment_alloc", address, 20 * MIB),
        event("alloc", address, 20 * MIB),
        event("free_requested", address, 20 * MIB),
        event("free_completed", address, 20 * MIB),
        event("segment_free", address, 20 * MIB),
    )
    code, stdout, stderr = run(path)
    assert code == 1
    assert stderr == "dpmem: device 0: the model differs from the recording from event 5 of 8 on\n"
    assert "addresses as recorded: 1 of 2" in " ".join(stdout.split())


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        # 40 MiB reserved and 16 free: 56. 5 and 50 MiB need 60 in pages of 20, 56 in pages of 14.
        (
            "expandable_segments:True",
            1,
            "out of memory under expandable_segments:True, too: 1 of 1",
        ),
        ("expandable_segments:True,large_segment_size_mb:14", 0, ""),
        # 5 MiB in 28 leave no 30.
        ("large_segment_size_mb:28", 1, "out of memory under large_segment_size_mb:28 at event 1"),
    ],
)
def test_what_if_of_an_out_of_memory_error(
    run: Run, tmp_path: Path, settings: str, code: int, words: str
) -> None:
    path = snapshot(tmp_path, event("oom", 16 * MIB, 50 * MIB))
    found, stdout, stderr = run(path, "--allocator", settings)
    assert found == code
    assert stderr == (f"dpmem: device 0: {words}\n" if words else "")
    assert "the device can give 56.0 MiB" in " ".join(stdout.split())


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("absent.pickle", "", "No such file or directory"),
        ("text", "", "is not a memory snapshot"),
        ("snapshot.pickle", "max_split_mb:3", "unknown allocator setting 'max_split_mb'; known:"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, tmp_path: Path, name: str, settings: str, words: str
) -> None:
    (tmp_path / "text").write_text("hello")
    snapshot(tmp_path)
    code, stdout, stderr = run(str(tmp_path / name), "--allocator", settings)
    assert (code, stdout) == (2, "")
    assert stderr.startswith("dpmem: ")
    assert words in stderr
    assert stderr.count("\n") == 1
