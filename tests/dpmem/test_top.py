"""`dpmem top` and the GPUs of `dpmem doctor`: on the stub driver, and on devices made by hand."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dpmem import doctor, top
from dpmem.cli import main
from dpmem_profiling import nvml

GIB = 2**30
WHOLE = nvml.DeviceMemory(0, None, "GPU-a", "One", 80 * GIB, 3 * GIB, 76 * GIB, GIB)
INSTANCE = nvml.DeviceMemory(0, 2, "MIG-b", "One MIG 1g.10gb", 10 * GIB, 2 * GIB, 8 * GIB, 0)
UNIFIED = nvml.DeviceMemory(1, None, "GPU-c", "Two", None, None, None, None, nvml.UNIFIED)
PROCESSES = {
    "GPU-a": None,
    "MIG-b": (nvml.ProcessMemory(41, "python3", GIB), nvml.ProcessMemory(42, None, None)),
    "GPU-c": (),
}


@contextmanager
def opened() -> Iterator[None]:
    yield


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "session", opened)
    monkeypatch.setattr(nvml, "device_memory", lambda: (WHOLE, INSTANCE, UNIFIED))
    monkeypatch.setattr(nvml, "visible_devices", lambda: (INSTANCE,))
    monkeypatch.setattr(nvml, "processes", PROCESSES.__getitem__)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["dpmem", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_table_shows_what_is_known(devices: None) -> None:
    shown = io.StringIO()
    Console(width=120, file=shown).print(top.table(top.look()))
    rows = shown.getvalue().replace("│", " ").splitlines()
    lines = [" ".join(row.split()) for row in rows]
    assert "0 One 3.00 GiB 76.0 GiB 80.0 GiB unknown" in lines
    assert "0/2 One MIG 1g.10gb 2.00 GiB 8.00 GiB 10.0 GiB 41 python3 1.00 GiB" in lines
    assert "42 ? unknown" in lines
    assert "1 Two unknown unknown unknown" in lines
    assert any(line.startswith("GPU 1: this GPU shares the host's memory") for line in lines)


def test_without_a_terminal_the_table_comes_once(
    devices: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not run(monkeypatch, "top")
    assert capfd.readouterr().out.count("python3") == 1


def test_json_has_every_field(
    devices: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not run(monkeypatch, "top", "--json")
    whole, instance, unified = json.loads(capfd.readouterr().out)
    assert (whole["used_bytes"], whole["processes"]) == (3 * GIB, None)
    assert instance["processes"][0] == {"pid": 41, "name": "python3", "used_bytes": GIB}
    assert (unified["total_bytes"], unified["processes"]) == (None, [])


def test_in_a_terminal_it_lives_until_interrupted(
    devices: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not run(monkeypatch, "top")
    assert looks == [top.REFRESH_S] * 3
    assert capfd.readouterr().out.count("python3") >= 3


def test_a_gpu_lost_meanwhile_ends_it_in_one_line(
    devices: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def lost(uuid: str) -> Any:
        raise nvml.NvmlUnavailable("GPU is lost.")

    monkeypatch.setattr(nvml, "processes", lost)
    assert run(monkeypatch, "top", "--once") == 2
    assert capfd.readouterr().err == "dpmem: GPU is lost.\n"


def test_doctor_lists_gpus_and_what_cuda_sees_of_them(devices: None) -> None:
    finding = doctor._nvml()
    assert finding.verdict == "ok"
    assert finding.detail.split("; ")[:2] == [
        "0 One: 3.00 GiB of 80.0 GiB used, not visible to CUDA here",
        "0/2 One MIG 1g.10gb: 2.00 GiB of 10.0 GiB used",
    ]
    assert "1 Two: unknown of unknown used, not visible to CUDA here (this GPU" in finding.detail


def test_doctor_mends_an_ambiguous_setting(devices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def ambiguous() -> Any:
        raise ValueError("set CUDA_DEVICE_ORDER")

    monkeypatch.setattr(nvml, "visible_devices", ambiguous)
    assert doctor._nvml() == doctor.Finding("NVML", "broken", "set CUDA_DEVICE_ORDER")


def test_on_the_stub_driver(compile_nvml_stub: Callable[..., Path]) -> None:
    """The whole way, in a process of its own: pynvml, the driver's library, two GPUs."""
    done = subprocess.run(
        [sys.executable, "-m", "dpmem.cli", "top", "--json"],
        env={**os.environ, "LD_LIBRARY_PATH": str(compile_nvml_stub())},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert (first["name"], first["used_bytes"]) == ("Stub GPU", 3 * GIB)
    assert [process["pid"] for process in second["processes"]] == [41, 42]


def test_without_a_driver_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        nvml.device_memory()
    except nvml.NvmlUnavailable as error:
        message = str(error)
    else:
        pytest.skip("this machine has the driver whose absence is tested")
    assert run(monkeypatch, "top") == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"dpmem: {message}\n")
    assert "Install the NVIDIA driver" in message
