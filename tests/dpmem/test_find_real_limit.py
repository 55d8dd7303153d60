"""Memory that really runs out, on the CPU: a limit on a process's address space.

`real_limit.py` has the job. Its tensors are larger than 32 MiB near the answer: glibc gives each of
these a mapping of its own, so that what a process maps is what its tensors need. Smaller ones share
a heap that fragments differently from run to run of the same loop.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import dpmem
from dpmem.isolation import Room, ask_child, probe_in_child

CPU = torch.device("cpu")
SCRIPT = Path(__file__).parent / "real_limit.py"
ROOM_BYTES = 900 << 20


def run(*arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_answer_trains_and_fifteen_percent_more_does_not() -> None:
    said = run("find", ROOM_BYTES)
    found, limit_bytes = dpmem.BatchSizeResult.from_json(said["found"]), said["limit_bytes"]
    assert found.largest_safe is not None
    assert found.largest_fitting is not None
    # All but a tenth of the room is used.
    assert found.peak_bytes > limit_bytes - ROOM_BYTES // 10
    assert run("train", limit_bytes, found.largest_safe, 20) == {"steps": 20}
    too_many = run("train", limit_bytes, int(1.15 * found.largest_fitting) + 1, 20)
    assert too_many["steps"] < 20
    # Not torch.OutOfMemoryError: that is CUDA's.
    assert too_many["type"] == "RuntimeError"
    assert "DefaultCPUAllocator: can't allocate memory" in too_many["error"]


@pytest.mark.slow
def test_allocations_that_fail_are_out_of_memory() -> None:
    # 1 EiB is more than any address space has. A function that another process can import.
    too_large = partial(torch.empty, 1 << 60, dtype=torch.uint8)
    job = dpmem.Job(too_large, torch.ones, torch.sum)
    done = probe_in_child(job, 1, CPU, Room(1 << 62, None))
    assert (done.outcome, done.error) == ("oom", None)


@pytest.mark.slow
def test_where_the_kernel_must_kill_it_takes_the_trial() -> None:
    score = Path("/proc/self/oom_score_adj")
    assert ask_child(partial(score.read_text)) == "1000\n"
    assert int(score.read_text()) < 1000
