"""Compile kernels in a process of their own, and run the PTX on the CPU without its GPU.

    kernel = compile_kernels("sm_90", [case])[case]
    case.check(kernel)

The process compiles with TRITON_INTERPRET unset: Triton reads that when a kernel is decorated, and
the tests set it. Memory, arithmetic and the limits of both are those of verify.ptx.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from verify.ptx import Counts, GlobalMemory, Program, parse, run

if TYPE_CHECKING:
    from verify.cases import KernelCase

# The bits that stand for a float's: NumPy has no bfloat16.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_POISON_BYTE = 0xA5


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel's PTX, and the bytes of shared memory that its launch reserves."""

    ptx: str
    shared_bytes: int

    @cached_property
    def program(self) -> Program:
        return parse(self.ptx)

    def launch(
        self,
        num_programs: int,
        *arguments: Tensor | float,
        memory: GlobalMemory | None = None,
    ) -> Counts:
        """Execute on `num_programs` programs; tensors are written in place."""
        return run(
            self.program,
            (num_programs,),
            [bits_of(a) if isinstance(a, Tensor) else a for a in arguments],
            shared_bytes=self.shared_bytes,
            memory=memory,
        )


@dataclass(frozen=True)
class Moved:
    """The global-memory traffic of a launch over `elements` elements."""

    elements: int
    counts: Counts

    @property
    def bytes_per_element(self) -> float:
        """Distinct bytes, as Counts defines them."""
        return self.counts.distinct_bytes / self.elements


def bits_of(x: Tensor) -> npt.NDArray[np.generic]:
    """x's memory as NumPy integers of the same size."""
    return x.view(_BITS[x.itemsize]).numpy()


def poisoned(numel: int, dtype: torch.dtype) -> Tensor:
    """An output to be: bytes that no result holds by chance."""
    return torch.full((numel * dtype.itemsize,), _POISON_BYTE, dtype=torch.uint8).view(dtype)


def placed(x: Tensor, misalignment_bytes: int) -> GlobalMemory:
    """Memory in which x starts that far past a 256-byte boundary."""
    memory = GlobalMemory()
    memory.map("the input", bits_of(x), misalignment_bytes=misalignment_bytes)
    return memory


def same_bits(a: Tensor, b: Tensor) -> bool:
    """The same dtype and bits; a NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    equal = torch.from_numpy(bits_of(a) == bits_of(b))
    if a.dtype.is_floating_point:
        equal |= a.isnan() & b.isnan()
    return bool(equal.all())


_compiled: dict[tuple[str, "KernelCase"], CompiledKernel] = {}


def compile_kernels(
    target: str, cases: Iterable["KernelCase"]
) -> dict["KernelCase", CompiledKernel]:
    """Compile for an NVIDIA target of verify.aot, "sm_80" to "sm_120"; once for each process.

    Raises subprocess.CalledProcessError, after Triton's own message, where one does not compile.
    """
    cases = list(cases)
    missing = [case for case in cases if (target, case) not in _compiled]
    if missing:
        with tempfile.TemporaryDirectory() as cache:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment["TRITON_CACHE_DIR"] = cache
            environment["PYTHONPATH"] = str(Path(__file__).parents[1])
            done = subprocess.run(
                [sys.executable, "-c", "from verify.aot import serve; serve()"],
                input=pickle.dumps((target, missing)),
                env=environment,
                stdout=subprocess.PIPE,
                check=True,
            )
        for case, kernel in zip(missing, pickle.loads(done.stdout), strict=True):
            _compiled[target, case] = kernel
    return {case: _compiled[target, case] for case in cases}
