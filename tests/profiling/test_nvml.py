"""Real pynvml on a stub driver library: a subprocess finds it through LD_LIBRARY_PATH."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dpmem_profiling

STUB = Path(__file__).parent / "nvml_stub.c"
# The module by itself: its package would import torch in every process, which takes seconds.
SCRIPT = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[2])
import nvml
try:
    found = eval(sys.argv[1], vars(nvml))
except nvml.NvmlUnavailable as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps([dataclasses.asdict(one) for one in found]))
"""
GIB = 2**30


def ask(question: str, library_dir: Path, **environment: str) -> Any:
    """Evaluate `question` in dpmem_profiling.nvml, in a process that sees only this library."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, question, str(Path(dpmem_profiling.__file__).parent)],
        env={**kept, "LD_LIBRARY_PATH": str(library_dir), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout)


def compile_stub(into: Path, *defines: str) -> Path:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("the stub driver library needs gcc to compile")
    flags = [f"-D{define}" for define in defines]
    library = into / "libnvidia-ml.so.1"
    subprocess.run(
        [gcc, "-shared", "-fPIC", "-Wall", "-Werror", *flags, "-o", library, STUB], check=True
    )
    return into


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_stub(tmp_path_factory.mktemp("nvml"))


def test_devices(stub: Path) -> None:
    first, second = ask("device_memory()", stub)
    assert first == {
        "index": 0,
        "uuid": "GPU-00000000-stub",
        "name": "Stub GPU",
        "total_bytes": 80 * GIB,
        "used_bytes": 3 * GIB,
        "free_bytes": 76 * GIB,
        "reserved_bytes": GIB,
    }
    assert (second["index"], second["uuid"]) == (1, "GPU-11111111-stub")


def test_an_old_driver_has_version_1_alone(tmp_path: Path) -> None:
    first, _ = ask("device_memory()", compile_stub(tmp_path, "WITHOUT_V2"))
    # Version 1 counts the driver's own GiB as used.
    assert (first["used_bytes"], first["free_bytes"]) == (4 * GIB, 76 * GIB)
    assert first["reserved_bytes"] is None


def test_processes(stub: Path) -> None:
    assert ask("processes(0)", stub) == [
        {"pid": 41, "used_bytes": 2 * GIB},
        {"pid": 42, "used_bytes": None},
    ]


@pytest.mark.parametrize(
    ("setting", "indices"),
    [("1", [1]), ("1,0", [1, 0]), ("GPU-1", [1]), ("0,7,1", [0]), ("", []), ("GPU-", [])],
)
def test_visible_devices(stub: Path, setting: str, indices: list[int]) -> None:
    visible = ask("visible_devices()", stub, CUDA_VISIBLE_DEVICES=setting)
    assert [device["index"] for device in visible] == indices


def test_all_are_visible_where_nothing_is_said(stub: Path) -> None:
    assert len(ask("visible_devices()", stub)) == 2


def test_no_driver(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("this machine has the driver whose absence is tested")
    message = ask("device_memory()", tmp_path)["error"]
    assert "needs the NVIDIA driver" in message
    assert "libnvidia-ml.so.1" in message


def test_an_error_code(tmp_path: Path) -> None:
    message = ask("device_memory()", compile_stub(tmp_path, "LOST"))["error"]
    assert "GPU is lost" in message


def test_an_index_that_does_not_exist(stub: Path) -> None:
    assert "Invalid Argument" in ask("processes(5)", stub)["error"]
