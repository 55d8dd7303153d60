"""Every kernel compiles for real GPUs, without spills, and moves memory 16 bytes at a time.

The compiler runs in a process of its own: here TRITON_INTERPRET is set, and Triton reads it when a
kernel is decorated.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
WARP_THREADS = {"gfx942": 64}
# One variant of every kernel, for the tests that run each time.
REPRESENTATIVES = (
    "grad_stats",
    "grad_unscale",
    "pack_bf16",
    "sum",
    "quantize_bf16_4bit",
    "dequantize_bf16_4bit",
    "pack_mask",
    "unpack_mask",
)


def _python(program: list[str], cache: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(KERNELS)}
    done = subprocess.run(
        [sys.executable, *program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _moved_bytes(target: str, cache: Path) -> dict[str, tuple[int | None, int | None]]:
    """What each case's wide paths read and write, from the case list itself."""
    program = (
        "import json; from verify.aot import cases_for; print(json.dumps("
        f"{{c.name: (c.read_bytes, c.written_bytes) for c in cases_for({target!r})}}))"
    )
    return json.loads(_python(["-c", program], cache))


def _check(report: dict[str, Any], read: int | None, written: int | None) -> None:
    assert report["spills"] == 0, report
    threads = 4 * WARP_THREADS.get(report["target"], 32)
    for moved, counts in ((read, report["loads"]), (written, report["stores"])):
        if moved is not None:
            # Fewer than 16 bytes per thread cannot fill one wide access.
            bits = min(128, 8 * moved // threads)
            assert counts.get(str(bits), 0) * bits * threads >= 8 * moved, report


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_kernels_compile_without_spills_and_with_wide_accesses(target: str, tmp_path: Path) -> None:
    moved = _moved_bytes(target, tmp_path)
    lines = _python(["-m", "verify.aot", target, "--cases", *REPRESENTATIVES], tmp_path)
    reports = [json.loads(line) for line in lines.splitlines()]
    assert [report["kernel"] for report in reports] == list(REPRESENTATIVES)
    for report in reports:
        _check(report, *moved[report["kernel"]])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"])
def test_every_variant_compiles(target: str, tmp_path: Path) -> None:
    moved = _moved_bytes(target, tmp_path)
    lines = _python(["-m", "verify.aot", target], tmp_path)
    reports = [json.loads(line) for line in lines.splitlines()]
    assert [report["kernel"] for report in reports] == list(moved)
    for report in reports:
        if target.startswith("sm_"):
            _check(report, *moved[report["kernel"]])
        else:
            assert report["spills"] == 0, report


def test_the_checks_see_narrow_access_and_spills() -> None:
    report = {"target": "sm_90", "spills": 0, "loads": {"128": 4}, "stores": {"128": 2}}
    _check(report, 4 * 16 * 128, 2 * 16 * 128)
    with pytest.raises(AssertionError):
        _check(report, 5 * 16 * 128, None)
    with pytest.raises(AssertionError):
        _check(report | {"stores": {"32": 8}}, None, 2 * 16 * 128)
    with pytest.raises(AssertionError):
        _check(report | {"spills": 1}, None, None)
