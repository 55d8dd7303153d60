"""Real pynvml on a stub driver library: a subprocess finds it through LD_LIBRARY_PATH."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dpmem_profiling
from dpmem_profiling import nvml

# The module by itself: its package would import torch in every process, which takes seconds.
SCRIPT = """
import dataclasses, json, sys, threading, time
sys.path.insert(0, sys.argv[2])
import nvml
from nvml import *

def sampled(uuid, at_least, every_s=0.001):
    with Sampler(uuid, every_s) as sampler:
        threads = [thread.name for thread in threading.enumerate()]
        end_s = time.perf_counter() + 30
        while len(sampler.samples) < at_least and time.perf_counter() < end_s:
            if sampler._error is not None:
                break
            time.sleep(0.001)
    left = [thread.name for thread in threading.enumerate()]
    times_s = [sample.time_s for sample in sampler.samples]
    return {
        "sampling": "nvml-sampler" in threads and "nvml-sampler" not in left,
        "ordered": times_s == sorted(times_s),
        "used_bytes": [sample.used_bytes for sample in sampler.samples],
        "peak_bytes": sampler.peak_bytes,
    }

try:
    found = eval(sys.argv[1])
except (nvml.NvmlUnavailable, ValueError) as error:
    found = {"error": str(error), "kind": type(error).__name__}
else:
    if isinstance(found, tuple):
        found = [dataclasses.asdict(one) for one in found]
print(json.dumps(found))
"""
GIB = 2**30
EVERY_CODE = [code for code in range(1, 31) if code != 12] + [999]


def ask(question: str, library_dir: Path, **environment: str) -> Any:
    """Evaluate `question` in dpmem_profiling.nvml, in a process that sees only this library."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH")
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, question, str(Path(dpmem_profiling.__file__).parent)],
        env={**kept, "LD_LIBRARY_PATH": str(library_dir), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def stub(compile_nvml_stub: Callable[..., Path]) -> Path:
    return compile_nvml_stub()


@pytest.fixture(scope="module")
def old_stub(compile_nvml_stub: Callable[..., Path]) -> Path:
    return compile_nvml_stub("WITHOUT_V2")


def test_devices(stub: Path) -> None:
    first, second = ask("device_memory()", stub)
    assert first == {
        "index": 0,
        "mig_index": None,
        "uuid": "GPU-00000000-stub",
        "name": "Stub GPU",
        "total_bytes": 80 * GIB,
        "used_bytes": 3 * GIB,
        "free_bytes": 76 * GIB,
        "reserved_bytes": GIB,
        "note": None,
    }
    assert (second["index"], second["uuid"]) == (1, "GPU-11111111-stub")


def test_an_old_driver_has_version_1_alone(old_stub: Path) -> None:
    first, _ = ask("device_memory()", old_stub)
    # Version 1 counts the driver's own GiB as used.
    assert (first["used_bytes"], first["free_bytes"]) == (4 * GIB, 76 * GIB)
    assert first["reserved_bytes"] is None


def test_a_driver_that_refuses_version_2_is_asked_for_version_1(stub: Path) -> None:
    first, _ = ask("device_memory()", stub, nvmlDeviceGetMemoryInfo_v2="25")
    assert (first["used_bytes"], first["reserved_bytes"]) == (4 * GIB, None)


@pytest.mark.parametrize("choice", [{"nvmlDeviceGetMemoryInfo_v2": "3"}, {"STUB_ZERO_TOTAL": "1"}])
def test_unified_memory_is_unknown_not_zero(stub: Path, choice: dict[str, str]) -> None:
    for device in ask("device_memory()", stub, **choice):
        sizes = ("total_bytes", "used_bytes", "free_bytes", "reserved_bytes")
        assert [device[size] for size in sizes] == [None] * 4
        assert "shares the host's memory" in device["note"]
        assert device["name"] == "Stub GPU"


def test_processes(stub: Path, old_stub: Path) -> None:
    for library in (stub, old_stub):
        first, second = ask("processes('GPU-00000000-stub')", library)
        assert (first["pid"], first["used_bytes"]) == (41, 2 * GIB)
        assert (second["pid"], second["used_bytes"]) == (42, None)


@pytest.mark.parametrize("code", ["3", "4"])
def test_processes_that_nvml_does_not_list_are_none(stub: Path, code: str) -> None:
    answer = ask(
        "processes('GPU-00000000-stub')", stub, nvmlDeviceGetComputeRunningProcesses_v3=code
    )
    assert answer is None


def test_a_process_has_a_name_on_its_host_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = tmp_path / "self" / "ns" / "pid"
    namespace.parent.mkdir(parents=True)
    (tmp_path / "41").mkdir()
    (tmp_path / "41" / "comm").write_text("python3\n")
    monkeypatch.setattr(nvml, "_PROC", tmp_path)
    assert nvml._process_name(41) is None
    namespace.symlink_to("pid:[4026531836]")
    assert nvml._process_name(41) == "python3"
    assert nvml._process_name(42) is None
    # In a container there is a process 41, too: not the host's.
    namespace.unlink()
    namespace.symlink_to("pid:[4026532573]")
    assert nvml._process_name(41) is None


def test_mig_instances_follow_their_gpu(stub: Path) -> None:
    devices = ask("device_memory()", stub, STUB_MIG="1")
    assert [(d["index"], d["mig_index"], d["uuid"]) for d in devices] == [
        (0, None, "GPU-00000000-stub"),
        (0, 0, "MIG-100-stub"),
        (0, 2, "MIG-102-stub"),
        (1, None, "GPU-11111111-stub"),
    ]
    assert [d["total_bytes"] for d in devices] == [80 * GIB, 10 * GIB, 10 * GIB, 80 * GIB]
    assert devices[1]["name"] == "Stub MIG 1g.10gb"
    assert ask("processes('MIG-102-stub')", stub, STUB_MIG="1") == []


def test_a_gpu_in_mig_mode_may_hide_its_memory(stub: Path) -> None:
    whole, instance, *_ = ask("device_memory()", stub, STUB_MIG="1", STUB_MIG_HIDDEN="1")
    assert (whole["total_bytes"], whole["used_bytes"]) == (None, None)
    assert "in MIG mode" in whole["note"]
    assert instance["used_bytes"] == 2 * GIB
    # A GPU that is not in MIG mode has no reason to hide.
    answer = ask("device_memory()", stub, STUB_MIG_HIDDEN="1")
    assert "Insufficient Permissions" in answer["error"]


@pytest.mark.parametrize(
    ("setting", "indices"),
    [("1", [1]), ("1,0", [1, 0]), ("GPU-1", [1]), ("0,7,1", [0]), ("", []), ("GPU-", [])],
)
def test_visible_devices(stub: Path, setting: str, indices: list[int]) -> None:
    visible = ask("visible_devices()", stub, CUDA_VISIBLE_DEVICES=setting)
    assert [device["index"] for device in visible] == indices


@pytest.mark.parametrize("setting", ["-1", "NoDevFiles", "0x1", "GPU-00000000-stub-and-more"])
def test_what_names_no_device_hides_all(stub: Path, setting: str) -> None:
    assert ask("visible_devices()", stub, CUDA_VISIBLE_DEVICES=setting) == []


def test_all_are_visible_where_nothing_is_said(stub: Path) -> None:
    assert len(ask("visible_devices()", stub)) == 2


@pytest.mark.parametrize(
    ("setting", "uuid"),
    [
        (None, "MIG-100-stub"),
        ("0", "MIG-100-stub"),
        ("GPU-0", "MIG-100-stub"),
        ("MIG-102-stub", "MIG-102-stub"),
        ("MIG-102", "MIG-102-stub"),
        ("1,MIG-102", "MIG-102-stub"),
        ("1", "GPU-11111111-stub"),
    ],
)
def test_a_process_sees_one_mig_instance(stub: Path, setting: str | None, uuid: str) -> None:
    environment = {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}
    visible = ask("visible_devices()", stub, STUB_MIG="1", **environment)
    assert [device["uuid"] for device in visible] == [uuid]


def test_indices_of_different_gpus_need_an_order(stub: Path) -> None:
    mixed = {"STUB_MIXED": "1", "CUDA_VISIBLE_DEVICES": "1"}
    answer = ask("visible_devices()", stub, **mixed)
    assert answer["kind"] == "ValueError"
    assert "set CUDA_DEVICE_ORDER=PCI_BUS_ID" in answer["error"]
    (second,) = ask("visible_devices()", stub, **mixed, CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert second["name"] == "Other"
    by_uuid = {**mixed, "CUDA_VISIBLE_DEVICES": "GPU-1"}
    assert len(ask("visible_devices()", stub, **by_uuid)) == 1


def test_no_driver(tmp_path: Path) -> None:
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("this machine has the driver whose absence is tested")
    message = ask("device_memory()", tmp_path)["error"]
    assert "libnvidia-ml.so.1 cannot be loaded. Install the NVIDIA driver" in message


@pytest.mark.parametrize(
    ("function", "code", "fix"),
    [
        ("nvmlInitWithFlags", 9, "sudo modprobe nvidia"),
        ("nvmlInitWithFlags", 18, "reboot"),
        ("nvmlInitWithFlags", 4, "This user may not ask"),
        ("nvmlDeviceGetCount_v2", 13, "update it"),
        ("nvmlDeviceGetHandleByIndex_v2", 15, "fell off the bus"),
        ("nvmlDeviceGetMemoryInfo_v2", 15, "fell off the bus"),
        ("nvmlDeviceGetMemoryInfo_v2", 4, "This user may not ask"),
        ("nvmlDeviceGetMemoryInfo_v2", 16, "nvidia-smi --gpu-reset"),
    ],
)
def test_an_error_says_what_to_do(stub: Path, function: str, code: int, fix: str) -> None:
    answer = ask("device_memory()", stub, **{function: str(code)})
    assert answer["kind"] == "NvmlUnavailable"
    assert f"(code {code})" in answer["error"]
    assert fix in answer["error"]


def test_every_error_code_becomes_one_line(stub: Path) -> None:
    """One process for all: the codes go through pynvml's own classes."""
    import pynvml

    for code in EVERY_CODE:
        message = str(nvml._unavailable(pynvml, pynvml.NVMLError(code)))
        assert "\n" not in message
        assert f"(code {code})" in message
        assert message.endswith(".")
    assert set(nvml._FIXES) <= set(vars(pynvml))
    # A code that pynvml has no words for, and the library two lines.
    answer = ask("device_memory()", stub, nvmlInitWithFlags="31")
    assert "An error of two lines" in answer["error"]


def test_a_uuid_that_no_device_has(stub: Path) -> None:
    for question in ("processes('GPU-7')", "Sampler('GPU-7').__enter__()"):
        answer = ask(question, stub)
        assert answer["kind"] == "ValueError"
        assert "GPU-00000000-stub, GPU-11111111-stub; received 'GPU-7'" in answer["error"]


@pytest.mark.parametrize("uuid", ["GPU-11111111-stub", "11111111-stub"])
def test_the_sampler_finds_the_peak(stub: Path, uuid: str) -> None:
    sampled = ask(f"sampled({uuid!r}, at_least=7)", stub, STUB_RAMP="1")
    assert sampled["sampling"]
    assert sampled["ordered"]
    # Each reading of the stub finds a GiB more, five times.
    assert sampled["used_bytes"][:6] == [n * GIB for n in (3, 4, 5, 6, 7, 8)]
    assert sampled["peak_bytes"] == 8 * GIB


def test_a_short_block_is_read_twice(stub: Path) -> None:
    sampled = ask("sampled('11111111-stub', at_least=0, every_s=60)", stub, STUB_RAMP="1")
    assert sampled["used_bytes"] == [3 * GIB, 4 * GIB]


def test_the_sampler_reads_a_mig_instance(stub: Path) -> None:
    assert ask("sampled('MIG-102-stub', 3)", stub, STUB_MIG="1")["peak_bytes"] == 2 * GIB


def test_a_gpu_lost_while_sampling_is_an_error(stub: Path) -> None:
    lost = {"nvmlDeviceGetMemoryInfo_v2": "15", "STUB_FAIL_AFTER": "3"}
    answer = ask("sampled('GPU-00000000-stub', 100)", stub, **lost)
    assert answer["kind"] == "NvmlUnavailable"
    assert "GPU is lost" in answer["error"]


def test_unified_memory_cannot_be_sampled(stub: Path) -> None:
    answer = ask("sampled('GPU-00000000-stub', 2)", stub, STUB_ZERO_TOTAL="1")
    assert "shares the host's memory" in answer["error"]


def test_the_sampler_needs_a_period() -> None:
    with pytest.raises(ValueError, match="every_s must be more than 0 seconds; got 0"):
        nvml.Sampler("GPU-0", every_s=0)
