"""Compile every kernel for GPUs that are not here, and read what the compiler made of it.

    python -m verify.aot sm_90 gfx942

compiles every case for those targets, for all without arguments, and prints what budget.py judges,
a line for each; a case that does not compile ends it with Triton's error. Triton's wheel brings
ptxas and its disassemblers, so no driver is needed. TRITON_INTERPRET must be unset: Triton reads it
when a kernel is decorated.

A compiled kernel is proof that it compiles, fits its registers and moves memory in wide accesses.
It is not a run.
"""

import argparse
import pickle
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from verify import machine_code
from verify.cases import KernelCase
from verify.launch import CompiledKernel
from verify.registry import cases_for

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What the machine code of one case for one target shows.

    `registers` is per thread (vector registers on AMD), `spills` counts accesses to registers
    spilled to memory. `load_bits` and `store_bits` are the width of the payload's accesses on the
    hot path, or of the widest access in code that has no hot path. `instructions_per_element` is
    the hot path's, machine_code.py says how it is counted; None where there is none.
    """

    registers: int
    spills: int
    load_bits: int | None
    store_bits: int | None
    instructions_per_element: float | None


def is_nvidia(target: str) -> bool:
    return TARGETS[target].backend == "cuda"


def compile_case(case: KernelCase, target: str) -> Any:
    """Triton's compiled kernel; its `asm` holds the PTX and the cubin, or the AMD assembly."""
    source = case.source()
    position = {name: i for i, name in enumerate(source.function.arg_names)}
    types = {**source.signature, **dict.fromkeys(source.constexprs, "constexpr")}
    ast = ASTSource(
        source.function,
        {name: types[name] for name in position},
        constexprs=dict(source.constexprs),
        attrs={(position[name],): [["tt.divisibility", 16]] for name in source.aligned},
    )
    # Stated, because Triton is about to change its default.
    options = {"num_warps": case.num_warps, "enable_fp_fusion": source.enable_fp_fusion}
    return triton.compile(ast, target=TARGETS[target], options=options)


def read_ptx(compiled: Any) -> CompiledKernel:
    """What the executor needs of a kernel compiled for NVIDIA."""
    return CompiledKernel(compiled.asm["ptx"], compiled.metadata.shared)


def report_on(case: KernelCase, target: str, compiled: Any) -> Report:
    """Read the machine code that `compile_case` gave."""
    if is_nvidia(target):
        registers, spills, blocks = _read_nvidia(compiled.asm["cubin"])
    else:
        registers, spills, blocks = _read_amd(compiled.asm["amdgcn"])
    work = case.work()
    threads = case.num_warps * TARGETS[target].warp_size
    path = None
    if work is not None:
        path = machine_code.hot_path(
            blocks, _bits_per_thread(work.read_bytes, threads),
            _bits_per_thread(work.written_bytes, threads),
        )  # fmt: skip
    if path is None or work is None:
        loads, stores = machine_code.widths(blocks)
        return Report(registers, spills, max(loads, default=None), max(stores, default=None), None)
    per_element = path.instructions * threads / work.elements
    return Report(registers, spills, path.load_bits, path.store_bits, per_element)


def _bits_per_thread(total_bytes: int | None, threads: int) -> int | None:
    return None if total_bytes is None else 8 * total_bytes // threads


def _read_nvidia(cubin: bytes) -> tuple[int, int, list[machine_code.Block]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, f"cuobjdump reported no registers: {usage}"
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return int(registers[1]), spills, machine_code.parse_sass(code)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _read_amd(assembly: str) -> tuple[int, int, list[machine_code.Block]]:
    def field(name: str) -> int:
        value = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert value, f"the assembly states no {name}"
        return int(value[1])

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    return field("vgpr_count"), spills, machine_code.parse_amdgcn(assembly)


def serve() -> None:
    """The other side of launch.compile_kernels: cases from standard input, kernels to output."""
    target, cases = pickle.load(sys.stdin.buffer)
    kernels = [read_ptx(compile_case(case, target)) for case in cases]
    pickle.dump(kernels, sys.stdout.buffer)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m verify.aot", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.targets) - set(TARGETS))
    if unknown:
        parser.error(f"unknown targets: {', '.join(unknown)}; known: {', '.join(TARGETS)}")
    for target in arguments.targets or TARGETS:
        for case in cases_for(target):
            report = report_on(case, target, compile_case(case, target))
            print(f"{target:8} {case.name:40} {report}", flush=True)


if __name__ == "__main__":
    main()
