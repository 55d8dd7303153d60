"""Run the kernels' compiled PTX on the CPU: every launch of dpmem_kernels, without its GPU.

    variant = Variant("quantize_bf16_4bit")
    kernel = compile_kernels("sm_90", [variant])[variant]
    (codes, meta), counts = quantize(kernel, x, noise.words)

The functions take and return CPU tensors as the ops do, and allocate what the launchers allocate,
filled with a poison that no result holds by chance. Memory, arithmetic and the limits of both are
those of verify.ptx. Triton compiles in a process of its own, with TRITON_INTERPRET unset: it reads
that when a kernel is decorated.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpmem_kernels.mask import BLOCK_BOOLS, BLOCK_BYTES
from dpmem_kernels.quantize import Quantized
from dpmem_kernels.tensor_table import CHUNK, Walk, chunk_table
from verify.aot import cases_for, compile_case
from verify.cases import KernelCase
from verify.ptx import Counts, GlobalMemory, Program, parse, run

# The bits that stand for a float's: NumPy has no bfloat16.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_POISON_BYTE = 0xA5


@dataclass(frozen=True)
class Variant:
    """A case of verify.cases by name, and where a launch may differ from it.

    `group_size`: another number of elements in a group; None is the case's. `wide` False: the
    first tensor lies at an address that 16 does not divide. `index`: how Triton passes n, which is
    "i32" below 2^31 elements.
    """

    case: str
    group_size: int | None = None
    wide: bool = True
    index: str = "i64"

    def of(self, case: KernelCase) -> KernelCase:
        """`case`, as this variant has it compiled."""
        constexprs, signature, aligned = dict(case.constexprs), dict(case.signature), case.aligned
        if self.group_size is not None:
            constexprs["ROWS"] = constexprs["ROWS"] * constexprs["G"] // self.group_size
            constexprs["G"] = self.group_size
        if not self.wide:
            assert "WIDE" in constexprs, f"{case.name} reads at any address with one variant"
            constexprs["WIDE"] = False
            first = next(iter(signature))
            aligned = tuple(name for name in aligned if name != first)
        if signature.get("n") == "i64":
            signature["n"] = self.index
        return replace(case, constexprs=constexprs, signature=signature, aligned=aligned)


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel's PTX, and what its launcher knows of it.

    `group_size` and `bits` are None for kernels that do not quantize.
    """

    ptx: str
    shared_bytes: int
    elements_per_program: int
    group_size: int | None
    bits: int | None

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


def bits_of(x: Tensor) -> npt.NDArray[np.generic]:
    """x's memory as NumPy integers of the same size; int64 as it is."""
    return (x if x.itemsize == 8 else x.view(_BITS[x.itemsize])).numpy()


def compile_kernels(target: str, variants: Iterable[Variant]) -> dict[Variant, CompiledKernel]:
    """Compile for a target of verify.aot, "sm_80" to "sm_120".

    Raises subprocess.CalledProcessError, after Triton's own message, where it does not compile.
    """
    variants = list(variants)
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = cache
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-m", "verify.execute", target],
            input=json.dumps([asdict(variant) for variant in variants]),
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    kernels = [CompiledKernel(**json.loads(line)) for line in done.stdout.splitlines()]
    return dict(zip(variants, kernels, strict=True))


def _compile(target: str, variant: Variant) -> CompiledKernel:
    (named,) = (case for case in cases_for(target) if case.name == variant.case)
    case = variant.of(named)
    compiled = compile_case(case, target)
    return CompiledKernel(
        compiled.asm["ptx"],
        compiled.metadata.shared,
        case.elements_per_program,
        case.constexprs.get("G"),
        case.constexprs.get("BITS"),
    )


def _poisoned(numel: int, dtype: torch.dtype) -> Tensor:
    return torch.full((numel * dtype.itemsize,), _POISON_BYTE, dtype=torch.uint8).view(dtype)


def _place(x: Tensor, misalignment_bytes: int) -> GlobalMemory:
    memory = GlobalMemory()
    memory.map("the input", bits_of(x), misalignment_bytes=misalignment_bytes)
    return memory


def quantize(
    kernel: CompiledKernel, x: Tensor, noise: Sequence[int], *, misalignment_bytes: int = 0
) -> tuple[Quantized, Counts]:
    """dpmem_kernels.quantize, of a flat x that starts `misalignment_bytes` past a boundary."""
    assert kernel.group_size is not None
    assert kernel.bits is not None
    n = x.numel()
    groups = -(-n // kernel.group_size)
    out = Quantized(
        _poisoned(groups * kernel.group_size * kernel.bits // 8, torch.uint8),
        _poisoned(groups, torch.int32),
    )
    programs = -(-groups // (kernel.elements_per_program // kernel.group_size))
    memory = _place(x, misalignment_bytes)
    return out, kernel.launch(programs, x, *out, n, *noise, memory=memory)


def dequantize(
    kernel: CompiledKernel, quantized: Quantized, numel: int, dtype: torch.dtype
) -> tuple[Tensor, Counts]:
    """dpmem_kernels.dequantize; `dtype` is the one that the kernel was compiled for."""
    out = _poisoned(numel, dtype)
    programs = -(-numel // kernel.elements_per_program)
    return out, kernel.launch(programs, *quantized, out, numel)


def pack_mask(
    kernel: CompiledKernel, mask: Tensor, *, misalignment_bytes: int = 0
) -> tuple[Tensor, Counts]:
    """dpmem_kernels.pack_mask, of a flat mask that starts past a boundary."""
    bits = _poisoned(-(-mask.numel() // BLOCK_BOOLS) * BLOCK_BYTES, torch.uint8)
    programs = -(-mask.numel() // kernel.elements_per_program)
    memory = _place(mask, misalignment_bytes)
    return bits, kernel.launch(programs, mask, bits, mask.numel(), memory=memory)


def unpack_mask(
    kernel: CompiledKernel, bits: Tensor, numel: int, *, misalignment_bytes: int = 0
) -> tuple[Tensor, Counts]:
    """dpmem_kernels.unpack_mask, as the bytes of its bools: uint8 [numel]."""
    mask = _poisoned(numel, torch.uint8)
    programs = -(-numel // kernel.elements_per_program)
    memory = _place(bits, misalignment_bytes)
    return mask, kernel.launch(programs, bits, mask, numel, memory=memory)


class Walked(NamedTuple):
    """What a walk leaves besides the tensors: fp32 [chunks], fp32 [], and the traffic."""

    partials: Tensor
    found_inf: Tensor
    counts: Counts


def walk(kernel: CompiledKernel, walk: Walk, memory: GlobalMemory) -> Walked:
    """One pass of tensor_table.py over tensors at addresses of `memory`.

    `walk.scale` is what the kernel was compiled for: a tensor, a number, or None for neither.
    """
    chunks = chunk_table(walk.numels, walk.dtypes, torch.device("cpu"))
    words = torch.zeros(len(walk.sources), 2, dtype=torch.int64)
    words[:, 0] = torch.tensor(walk.sources)
    if walk.destinations is not None:
        words[:, 1] = torch.tensor(walk.destinations)
    partials, found_inf = _poisoned(len(chunks), torch.float32), torch.zeros(1)
    scale = () if walk.scale is None else (walk.scale,)
    assert kernel.elements_per_program == CHUNK
    counts = kernel.launch(
        len(chunks), chunks, words.view(-1), *scale, found_inf, partials, memory=memory
    )
    return Walked(partials, found_inf[0], counts)


def add_partials(kernel: CompiledKernel, partials: Tensor) -> Tensor:
    """The second launch of a walk, "sum": fp32 []."""
    total = _poisoned(1, torch.float32)
    kernel.launch(1, partials, partials.numel(), total)
    return total[0]


def main() -> None:
    """Variants from standard input, kernels to standard output: the other side of compile."""
    for fields in json.load(sys.stdin):
        print(json.dumps(asdict(_compile(sys.argv[1], Variant(**fields)))), flush=True)


if __name__ == "__main__":
    main()
