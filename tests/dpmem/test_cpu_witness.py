"""The forecast of a step on this CPU against the events of torch's own allocator."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

HERE = Path(__file__).parents[2] / "reports/validation"
FAST = {"byte GPT", "VGG"}
NAMES = [
    "GPT-2", "GPT-2, checkpoints", "GPT-2, LoRA", "BERT", "ViT", "byte GPT", "Llama", "T5",
    "resnet18", "U-Net", "VGG", "mobilenet_v2",
]  # fmt: skip


@pytest.fixture(scope="module")
def witness() -> Iterator[ModuleType]:
    for library in ("torchvision", "transformers"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    sys.path.insert(0, str(HERE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield importlib.import_module("cpu_witness")
    finally:
        sys.path.remove(str(HERE))
        torch.set_num_threads(threads)


# What transformers and torch's profiler say of themselves.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES],
)
def test_a_forecast_is_what_the_allocator_gave(witness: ModuleType, name: str) -> None:
    kind, batch_size, make_job = witness.JOBS[NAMES.index(name)]
    job = make_job()
    assert job.name == name
    for row in witness.rows_of(kind, batch_size, job):
        # The only difference there may be is what an operator takes and gives back itself: named,
        # and for convolutions alone. Of it copies are forecast; buffers of oneDNN's own are not, so
        # a bar on them would be a bar on the machine.
        assert abs(row.tensor_gap) <= 0.01, row
        if kind == "transformer":
            assert row.is_within, row
        if not row.is_within:
            assert row.operator_at_peak == "aten::convolution_backward"
            assert row.witnessed_bytes - row.predicted_bytes <= sum(row.scratch_bytes)


def event(name: str, start_ns: int, end_ns: int, size_bytes: int = 0) -> Any:
    return SimpleNamespace(
        name=lambda: name,
        start_ns=lambda: start_ns,
        end_ns=lambda: end_ns,
        nbytes=lambda: size_bytes,
    )


def memory(time_ns: int, size_bytes: int) -> Any:
    return event("[memory]", time_ns, time_ns, size_bytes)


def test_what_an_operator_gives_back_itself_is_told_apart(witness: ModuleType) -> None:
    """Before the step 100 B; in it an operator takes 40 B and 30 B, and returns the 40 B."""
    events = [
        memory(1, 100),
        event("step 1", 10, 100),
        event("aten::outer", 20, 60),
        event("aten::inner", 21, 50),
        event("aten::empty", 22, 24),
        memory(23, 40),
        event("aten::empty", 30, 32),
        memory(31, 30),
        memory(45, -30),
        memory(70, -40),
        memory(200, 1000),
    ]
    result = witness.at_peak(reversed(events), "step 1")
    assert result == (170, 140, "aten::inner", (30,))
