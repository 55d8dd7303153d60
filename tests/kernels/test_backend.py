"""Which backend runs, and what an impossible request is told."""

import re
import subprocess
import sys
from unittest import mock

import pytest
import torch

from dpmem_kernels import backend as backend_module
from dpmem_kernels.backend import resolve_backend

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.mark.parametrize(
    ("device", "has_triton", "has_numba", "expected"),
    [
        (CUDA, True, True, "triton"),
        (CUDA, False, True, "reference"),
        (CPU, True, True, "cpu"),
        (CPU, True, False, "reference"),
        (MPS, True, True, "reference"),
    ],
)
def test_the_choice_without_a_request(
    device: torch.device, has_triton: bool, has_numba: bool, expected: str
) -> None:
    with mock.patch.multiple(backend_module, HAS_TRITON=has_triton, HAS_NUMBA=has_numba):
        assert resolve_backend(device) == expected


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_the_reference_runs_anywhere(device: torch.device) -> None:
    assert resolve_backend(device, "reference") == "reference"


@pytest.mark.parametrize(("device", "requested"), [(CUDA, "triton"), (CPU, "cpu")])
def test_a_request_that_can_be_met_is(device: torch.device, requested: str) -> None:
    assert resolve_backend(device, requested) == requested


def test_triton_serves_cpu_tensors_only_in_its_interpreter() -> None:
    with mock.patch.object(backend_module, "INTERPRETING", True):
        assert resolve_backend(CPU, "triton") == "triton"
    with (
        mock.patch.object(backend_module, "INTERPRETING", False),
        pytest.raises(ValueError, match=r"on cpu; .*TRITON_INTERPRET=1"),
    ):
        resolve_backend(CPU, "triton")


def test_the_interpreter_does_not_serve_other_devices() -> None:
    with (
        mock.patch.object(backend_module, "INTERPRETING", True),
        pytest.raises(ValueError, match="on mps"),
    ):
        resolve_backend(MPS, "triton")


def test_an_unknown_backend_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=re.escape("triton, cpu, reference; received 'cuda'")):
        resolve_backend(CPU, "cuda")


def test_the_cpu_backend_refuses_gpu_tensors() -> None:
    with pytest.raises(ValueError, match="received a tensor on cuda:0"):
        resolve_backend(CUDA, "cpu")


@pytest.mark.parametrize(
    ("requested", "device", "missing"), [("triton", CUDA, "HAS_TRITON"), ("cpu", CPU, "HAS_NUMBA")]
)
def test_a_request_without_its_compiler_raises(
    requested: str, device: torch.device, missing: str
) -> None:
    with (
        mock.patch.object(backend_module, missing, False),
        pytest.raises(RuntimeError, match="not installed"),
    ):
        resolve_backend(device, requested)


def test_the_package_imports_and_works_without_triton_and_numba() -> None:
    program = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("triton", "numba", "llvmlite"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in ("triton", "numba") else find_spec(name)
import torch, dpmem_kernels
stats = dpmem_kernels.grad_stats([torch.tensor([3.0, 4.0])])
assert stats.sum_of_squares == 25 and stats.found_inf == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
