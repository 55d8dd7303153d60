"""Executes compiled PTX on the CPU: no GPU, no driver, only NumPy.

    program = parse(kernel.asm["ptx"])
    counts = run(program, (num_blocks,), [x, y, n], shared_bytes=kernel.metadata.shared)
    counts.loaded_bytes, counts.stored_bytes

What is exact: integers, bits, memory, every IEEE operation and conversion in fp64, fp32, fp16,
bf16 and fp8, bit for bit including denormals, signed zeros, saturation and the canonical NaN of
fp32 and below. Out-of-bounds and misaligned accesses, stores to read-only arrays, reads of
registers never written, and warps or blocks that meet a barrier or shuffle incompletely all raise,
as does every opcode and modifier without a definition.

What is not modelled:
- tensor cores, TMA, cp.async, clusters, generic addresses: unsupported, they raise;
- time, and races: threads of a batch run in lockstep, where a missing barrier may go unseen;
- approximate functions (ex2.approx, rcp.approx, div.full, sin …): computed to the nearest value,
  more exactly than a GPU does. div.full in particular is IEEE here and not there;
- NaN payloads of fp64; the bits of fp32 abs and neg of a NaN.

Nothing here was compared with a GPU: the source is the PTX ISA manual.

Files    parse.py (text to Program), machine.py (registers, divergence, run), memory.py, counts.py,
         operations.py (the table and its decorators), formats.py (rounding), and the operations
         themselves: integer.py, floating.py, convert.py, access.py, warp.py.
"""

from .counts import Counts
from .errors import (
    DivergenceError,
    MemoryFault,
    ParseError,
    PtxError,
    Trap,
    UninitialisedRegister,
    UnsupportedInstruction,
)
from .machine import run
from .memory import GlobalMemory
from .parse import Program, parse

__all__ = [
    "Counts",
    "DivergenceError",
    "GlobalMemory",
    "MemoryFault",
    "ParseError",
    "Program",
    "PtxError",
    "Trap",
    "UninitialisedRegister",
    "UnsupportedInstruction",
    "parse",
    "run",
]
