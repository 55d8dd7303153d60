"""PyTorch's own DistributedDataParallel tests, against dpmem.DataParallel.

behaviour.txt and hooks.txt name those of torch/testing/_internal/distributed/distributed_test.py
that use no private interface and that DistributedDataParallel itself passes on a CPU over gloo.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
IN_EVERY_RUN = {
    "test_DistributedDataParallelCPU_grad_is_view",
    "test_ddp_create_graph",
    "test_ddp_grad_div_uneven_inputs",
    "test_ddp_join_model_equivalence",
    "test_ddp_shared_grad_acc_unused_params",
    "test_grads_same_across_ranks_with_no_sync",
    "test_output_unused_in_loss_dict_module",
    "test_stateless_api_with_ddp",
    "test_static_graph_multi_forward",
    "test_accumulate_gradients_no_sync_allreduce_with_then_hook",
}
NAMES = [*(HERE / "behaviour.txt").read_text().split(), *(HERE / "hooks.txt").read_text().split()]


def _parameters() -> list[object]:
    slow = pytest.mark.slow
    return [name if name in IN_EVERY_RUN else pytest.param(name, marks=slow) for name in NAMES]


def test_the_lists_are_whole() -> None:
    assert len(NAMES) == len(set(NAMES)) == 43 + 8
    assert set(NAMES) >= IN_EVERY_RUN
    assert len(IN_EVERY_RUN) == 10


@pytest.fixture(scope="session")
def wrong(request: pytest.FixtureRequest) -> dict[str, str]:
    """What went wrong in each of the tests asked for, which run in one process after each other."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    names = [call.params["name"] for call in calls if call and call.params.get("name") in NAMES]
    done = subprocess.run(
        [sys.executable, HERE / "on_cpu.py", *names],
        capture_output=True,
        text=True,
        timeout=60 * len(names),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="the lists are those of torch 2.13"
)
@pytest.mark.parametrize("name", _parameters())
def test_torchs_own(wrong: dict[str, str], name: str) -> None:
    assert wrong[name] == ""
