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

ROOT = Path(__file__).parents[2]
# For the test that runs each time.
REPRESENTATIVES = (
    "grad_unscale fp32",
    "split_master",
    "quantize bf16 4bit G128",
    "dequantize bf16 4bit G128",
    "pack_mask",
)
_REPORT = """
import json, sys
from dataclasses import asdict
from verify.budget import judge, read
from verify.registry import cases_for
from verify.rows import prove
names = set(json.loads(sys.argv[2]))
cases = [case for case in cases_for(sys.argv[1]) if case.name in names]
rows = [prove(sys.argv[1], [case])[0][0] for case in cases]
print(json.dumps([asdict(row) for row in rows]))
print(json.dumps([str(problem) for problem in judge(cases, rows, read())]))
"""


def _python(program: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT / "kernels")}
    return subprocess.run(
        [sys.executable, *program], env=environment, capture_output=True, text=True
    )


def test_kernels_compile_within_their_budgets(tmp_path: Path) -> None:
    done = _python(["-c", _REPORT, "sm_90", json.dumps(REPRESENTATIVES)], tmp_path)
    assert done.returncode == 0, done.stderr
    rows, problems = (json.loads(line) for line in done.stdout.splitlines())
    found: dict[str, dict[str, Any]] = {f"{r['kernel']} {r['variant']}".strip(): r for r in rows}
    assert sorted(found) == sorted(REPRESENTATIVES)
    assert problems == []
    for row in rows:
        assert (row["compiled"], row["spills"]) == (True, 0), row
        assert row["ptx_matches_reference"], row


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"])
def test_every_variant_compiles(target: str, tmp_path: Path) -> None:
    done = _python(["-m", "verify.aot", target], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_variant_compiles_with_the_next_triton(tmp_path: Path) -> None:
    """In the environment that `make verify-next` makes; it needs a network, so not here."""
    python = Path(sys.prefix) / "triton-next" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs {python}, with the next Triton: run `make verify-next` once")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run(
        [python, "-m", "verify.aot"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
