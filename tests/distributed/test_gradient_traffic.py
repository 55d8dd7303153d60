"""Passes over gradients, counted while a step runs: red when one is added."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "data_parallel" / "gradient_traffic.py"
FP16 = "dpmem, precision='fp16'"
DDP = "DistributedDataParallel + GradScaler + clip_grad_norm_"
VIEWS = "the same, gradient_as_bucket_view"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("what", "ranks", "step", "fp32_bytes"),
    [
        # Pack 8, check and norm 4, the fused update's own reading 4; clipping there 4.
        ("dpmem", 2, "does not clip", 16),
        ("dpmem", 2, "clips", 20),
        ("dpmem", 1, "does not clip", 8),
        ("dpmem", 1, "clips", 12),
        # The update divides by the loss scale in every step.
        (FP16, 2, "does not clip", 20),
        (FP16, 2, "clips", 20),
        (DDP, 2, "does not clip", 40),
        (DDP, 2, "clips", 40),
        (VIEWS, 2, "clips", 32),
        (DDP, 1, "clips", 24),
    ],
)
@pytest.mark.parametrize(("dtype", "share"), [("float32", 1.0), ("bfloat16", 0.5)])
def test_bytes_per_gradient_element(
    rows: list[dict[str, Any]],
    what: str,
    ranks: int,
    step: str,
    fp32_bytes: int,
    dtype: str,
    share: float,
) -> None:
    (row,) = (
        row
        for row in rows
        if (row["what"], row["ranks"], row["step"], row["dtype"]) == (what, ranks, step, dtype)
    )
    # The executed PTX of our kernels also reads tables and writes partial sums.
    assert row["bytes_per_element"] == pytest.approx(fp32_bytes * share, rel=0.02), row["parts"]
