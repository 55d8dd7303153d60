"""What a case is: one kernel, compiled as one launch asks for it, and what it must do.

Each family of kernels has a file with its cases: activations.py, masks.py, walks.py and so on. A
case is plain data, so that it can be sent to the process that compiles it. It says what Triton
compiles, what one program moves, how the compiled PTX is launched on the CPU, and what the results
must be. Sizes are passed as Triton passes them, "i32" below 2^31 and "i64" from there on, and are
never specialised on: no case knows what divides n.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from verify.launch import CompiledKernel, Moved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class MismatchError(Exception):
    """A compiled kernel did something else than its reference."""


@dataclass(frozen=True)
class Source:
    """What Triton compiles.

    `signature` gives the run-time arguments' types as Triton writes them ("*bf16", "i64"),
    `constexprs` the rest; `aligned` names the arguments that 16 divides.
    """

    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...]
    enable_fp_fusion: bool = False


@dataclass(frozen=True)
class Work:
    """What one program does on the main path.

    `read_bytes` and `written_bytes` are the payload, without metadata and tables; None for a side
    that has none. On NVIDIA it must move in accesses of `load_bits` and `store_bits`; None asks
    for no width. `floor_bytes_per_element` is what has to move: payload, metadata and tables.
    """

    elements: int
    read_bytes: int | None
    written_bytes: int | None
    floor_bytes_per_element: float
    load_bits: int | None = 128
    store_bits: int | None = 128


@dataclass(frozen=True, kw_only=True)
class KernelCase(ABC):
    """One compiled variant of one kernel.

    `num_warps` is what the launcher asks for, and so is `assembly`, ASM in dpmem_kernels: which of
    NVIDIA's instructions are there. Without any the case is `portable`: what AMD runs, and on
    NVIDIA a twin that must do the same.
    """

    num_warps: int = 4
    assembly: int = 80

    @property
    def portable(self) -> bool:
        return self.assembly == 0

    @property
    @abstractmethod
    def kernel(self) -> str:
        """The operation's name."""

    @property
    @abstractmethod
    def variant(self) -> str:
        """What tells this case from the others of the kernel."""

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.variant}".strip()

    @property
    def bar(self) -> str | None:
        """The ceiling of budgets.toml that holds; None for what serves unaligned data, and for
        twins without one."""
        return self.kernel

    @abstractmethod
    def source(self) -> Source:
        """What Triton compiles."""

    @abstractmethod
    def work(self) -> Work | None:
        """What a program does; None for a kernel whose time does not depend on tensors' sizes."""

    @abstractmethod
    def check(self, kernel: CompiledKernel) -> None:
        """Execute the PTX over awkward sizes and values; raises MismatchError."""

    @abstractmethod
    def moved(self, kernel: CompiledKernel) -> Moved | None:
        """The traffic of the PTX, executed on a large input; None where there is none to count."""


def require(condition: bool, what: str) -> None:
    """Raises MismatchError unless `condition`."""
    if not condition:
        raise MismatchError(what)
