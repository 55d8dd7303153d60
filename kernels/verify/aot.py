"""Compile every kernel for GPUs that are not here, and read what the compiler made of it.

    python -m verify.aot sm_80 sm_90 --cases grad_stats pack_bf16 > report.jsonl

prints one JSON line per kernel and target, for all of both without arguments. Triton's wheel brings
ptxas and its disassemblers, so no driver is needed. TRITON_INTERPRET must be unset: Triton reads it
when a kernel is decorated.

A compiled kernel is proof that it compiles, fits its registers and moves memory in wide accesses.
It is not a run.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from verify.cases import GRADIENT_CASES, KernelCase, activation_cases

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
    """What the machine code of one kernel for one target shows.

    `registers` is per thread (vector registers on AMD), `spills` counts accesses to registers
    spilled to memory, `loads` and `stores` the global accesses in the code by their width in bits.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]

    @property
    def load_bits(self) -> int:
        return max(self.loads, default=0)

    @property
    def store_bits(self) -> int:
        return max(self.stores, default=0)


def cases_for(target: str) -> tuple[KernelCase, ...]:
    """Every case that the launchers would ask for on `target`."""
    return GRADIENT_CASES + activation_cases(assembly=TARGETS[target].backend == "cuda")


def compile_case(case: KernelCase, target: str) -> Any:
    """Triton's compiled kernel; its `asm` holds the PTX and the cubin, or the AMD assembly."""
    position = {name: i for i, name in enumerate(case.kernel.arg_names)}
    types = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    source = ASTSource(
        case.kernel,
        {name: types[name] for name in position},
        constexprs=dict(case.constexprs),
        attrs={(position[name],): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": case.num_warps, **case.options}
    return triton.compile(source, target=TARGETS[target], options=options)


def compile_for(case: KernelCase, target: str) -> Report:
    """Compile one case for one of TARGETS and report on its machine code."""
    compiled = compile_case(case, target)
    if TARGETS[target].backend == "cuda":
        found = _read_nvidia(compiled.asm["cubin"])
    else:
        found = _read_amd(compiled.asm["amdgcn"])
    return Report(case.name, target, shared_bytes=compiled.metadata.shared, **found)


def _count(widths: Iterator[int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for width in widths:
        counts[width] = counts.get(width, 0) + 1
    return counts


def _read_nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)

    def widths(instruction: str) -> Iterator[int]:
        for line in re.finditer(rf"\b{instruction}\.(\S+)", code):
            size = re.search(r"(?:^|\.)[US]?(8|16|64|128)(?:\.|$)", line[1])
            yield int(size[1]) if size else 32

    registers = re.search(r"REG:(\d+)", usage)
    assert registers, f"cuobjdump reported no registers: {usage}"
    return {
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": _count(widths("LDG")),
        "stores": _count(widths("STG")),
    }


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _read_amd(assembly: str) -> dict[str, Any]:
    sizes = {"dwordx4": 128, "b128": 128, "dwordx3": 96, "b96": 96, "dwordx2": 64, "b64": 64}
    sizes |= {"short": 16, "u16": 16, "b16": 16, "byte": 8, "u8": 8, "b8": 8, "ubyte": 8}
    sizes |= {"ushort": 16}

    def widths(instruction: str) -> Iterator[int]:
        for line in re.finditer(rf"\b(?:global|buffer)_{instruction}_(\w+)", assembly):
            yield next((sizes[part] for part in line[1].split("_") if part in sizes), 32)

    def field(name: str) -> int:
        value = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert value, f"the assembly states no {name}"
        return int(value[1])

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "loads": _count(widths("load")),
        "stores": _count(widths("store")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m verify.aot", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--cases", nargs="+", help="names as in verify.cases; all without it")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.targets) - set(TARGETS))
    if unknown:
        parser.error(f"unknown targets: {', '.join(unknown)}; known: {', '.join(TARGETS)}")
    for target in arguments.targets or TARGETS:
        cases = {case.name: case for case in cases_for(target)}
        unknown = sorted(set(arguments.cases or ()) - set(cases))
        if unknown:
            parser.error(f"unknown cases: {', '.join(unknown)}; known: {', '.join(cases)}")
        for name in arguments.cases or cases:
            print(json.dumps(asdict(compile_for(cases[name], target))), flush=True)


if __name__ == "__main__":
    main()
