"""`dpmem find-batch-size` with more options than a budget."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpmem_profiling import BatchSizeResult

# `run` and `job_file` are conftest's.
Command = Callable[..., Any]


def test_batches_are_tried_in_processes_of_their_own(tmp_path: Path, run: Command) -> None:
    (tmp_path / "apart.py").write_text(
        "import os, torch, dpmem\n"
        f"PARENT = {os.getpid()}\n"
        "def model(): return torch.nn.Linear(64, 64)\n"
        "def batch(n):\n"
        "    assert os.getpid() != PARENT\n"
        "    return torch.randn(n, 64)\n"
        "def loss(model, x): return model(x).square().mean()\n"
        "def job(): return dpmem.Job(model, batch, loss)\n"
    )
    options = ("--isolate", "--budget", "1MiB", "--max-batch", "1", "--safety", "0.5", "--json")
    result = run("find-batch-size", "apart.py:job", *options)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["largest_safe"], found["margin_bytes"]) == (1, 1 << 19)


def test_more_batches_are_timed_on_request(job_file: Path, run: Command) -> None:
    result = run(
        "find-batch-size",
        f"{job_file}:job",
        *("--budget", "8MiB", "--max-batch", "64", "--timed-batches", "2", "--json"),
    )
    found = BatchSizeResult.from_json(json.loads(result.stdout))
    assert found.largest_safe == 64
    plain = ("find-batch-size", f"{job_file}:job", "--budget", "8MiB", "--max-batch", "64")
    before = BatchSizeResult.from_json(json.loads(run(*plain, "--json").stdout))
    assert len(found.samples_per_second()) == len(before.samples_per_second()) + 2
