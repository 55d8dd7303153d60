"""Runs PyTorch's own DistributedDataParallel tests against dpmem.DataParallel, on the CPU.

    python on_cpu.py test_ddp_create_graph ...

The last line of the output is a JSON object: for each test what went wrong, "" for nothing. The
torch wheel ships these tests for GPUs (torch/testing/_internal/distributed). Before they are
imported, skips for missing GPUs are lifted, devices called cuda are the CPU, and the class in
DistributedDataParallel's place is ours.
"""

import contextlib
import json
import os
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

import torch
import torch.nn.parallel.distributed as torchs
import torch.testing._internal.common_distributed as common
from torch.overrides import TorchFunctionMode

WORLD_SIZE = 2


def _on_cpu(device: Any) -> Any:
    """What a test calls a GPU, by number, name or object, is the CPU."""
    is_number = isinstance(device, int) and not isinstance(device, bool)
    if is_number or (isinstance(device, str | torch.device) and str(device).startswith("cuda")):
        return torch.device("cpu")
    return device


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if name == "to" and len(args) > 1:
            args = (args[0], _on_cpu(args[1]), *args[2:])
        return func(*args, **kwargs)


def _unskipped(*_: Any, **__: Any) -> Any:
    return lambda test: test


def _prepare() -> None:
    scratch = Path(tempfile.mkdtemp())
    (scratch / "barrier").touch()
    defaults = {"BACKEND": "gloo", "WORLD_SIZE": str(WORLD_SIZE), "TEMP_DIR": str(scratch)}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for skip in ("skip_if_lt_x_gpu", "require_n_gpus_for_nccl_backend", "nccl_skip_if_lt_x_gpu"):
        setattr(common, skip, _unskipped)
    common.skip_if_no_gpu = lambda test: test
    common.init_multigpu_helper = lambda world_size, _: {rank: [rank] for rank in range(world_size)}
    # Two functions: torch.compile's tables tell the operations of torch apart by them.
    torch.cuda.set_device = lambda *_: None
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.manual_seed = torch.manual_seed
    plain_to = torch.nn.Module.to

    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        kwargs = {key: _on_cpu(value) for key, value in kwargs.items()}
        return plain_to(module, *map(_on_cpu, args), **kwargs)

    torch.nn.Module.to = to
    torch.nn.Module.cuda = lambda module, *_, **__: module


def _class_under_test() -> type:
    import dpmem

    class OnCPU(dpmem.DataParallel):
        """Without the devices that tests name."""

        def __init__(
            self, module: Any, device_ids: Any = None, output_device: Any = None, *a: Any, **k: Any
        ) -> None:
            super().__init__(module, None, None, *a, **k)

    # Tests pickle instances: the class has to be found under the name it has.
    OnCPU.__name__ = OnCPU.__qualname__ = "DistributedDataParallel"
    OnCPU.__module__ = torchs.__name__
    return OnCPU


_prepare()
torchs.DistributedDataParallel = _class_under_test()
torch.nn.parallel.DistributedDataParallel = torchs.DistributedDataParallel
_CudaIsCpu().__enter__()

from torch.testing._internal.distributed.distributed_test import (  # noqa: E402
    DistributedTest,
    TestDistBackend,
)


class TestDataParallel(TestDistBackend, DistributedTest._DistTestBase):
    def setUp(self) -> None:
        super().setUp()
        # Ranks that are forked need not import all this again.
        self._start_processes(torch.multiprocessing.get_context("fork").Process)


def main(names: list[str]) -> None:
    """Run these tests and say what went wrong in each."""
    result = unittest.TestResult()
    unittest.TestSuite(map(TestDataParallel, names)).run(result)
    wrong = dict.fromkeys(names, "")
    for test, trace in [*result.failures, *result.errors, *result.skipped]:
        wrong[test._testMethodName] = trace
    assert result.testsRun == len(names)
    print(json.dumps(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
