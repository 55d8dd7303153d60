"""The table of operations: which function executes which opcode, and how one is registered.

A pattern names an opcode and its modifiers in order; `[...]` is optional, `|` separates choices:
"add [.rn] [.ftz] .f32|f64". An instruction that no pattern matches is unsupported, so a modifier
that nobody thought of can never be ignored.

Three decorators register a function. `operation` gives it the machine; `elementwise` the bits or
integers of its sources, for a value to be written; `arithmetic` their decoded float values, with
rounding, .ftz, .sat, packing and canonical NaN dealt with around it.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from .errors import UnsupportedInstruction
from .formats import Array, bits_of, decode, encode, flush_denormals, saturate
from .parse import Instruction

if TYPE_CHECKING:
    from .machine import Machine

# None stands for every thread of the batch.
Active = Array | None
Execute = Callable[["Machine", Instruction, Active], None]
ValueFunction = Callable[..., Array]

_OPERATIONS: dict[str, list[tuple[re.Pattern[str], Execute]]] = {}


def operation(*patterns: str) -> Callable[[Execute], Execute]:
    """Registers `function(machine, instruction, active)` for `patterns`."""

    def register(function: Execute) -> Execute:
        for pattern in patterns:
            name, *tokens = pattern.split()
            regex = re.compile(name + "".join(map(_token_regex, tokens)))
            _OPERATIONS.setdefault(name.split(".")[0], []).append((regex, function))
        return function

    return register


def _token_regex(token: str) -> str:
    choices = "|".join(re.escape(choice) for choice in token.strip("[].").split("|"))
    return rf"(?:\.(?:{choices}))" + ("?" if token.startswith("[") else "")


def elementwise(
    *patterns: str, sources: tuple[str, ...] = (), bitwise: bool = False
) -> Callable[[ValueFunction], ValueFunction]:
    """Registers `function(instruction, *sources) -> value`, one array per source operand.

    `sources` are the types the operands are read with; "t" is the instruction's own, and so is
    the type of every operand beyond those listed. `bitwise`: a bit of the result depends on the
    same bit of the sources alone, so undefined bits stay where they are.
    """

    def register(function: ValueFunction) -> ValueFunction:
        @operation(*patterns)
        def execute(machine: "Machine", instruction: Instruction, active: Active) -> None:
            destination, *operands = instruction.operands
            own = (instruction.type,) * len(operands)
            types = [instruction.type if t == "t" else t for t in (*sources, *own[len(sources) :])]
            values = [
                machine.read(operand, type_name, active)
                for operand, type_name in zip(operands, types, strict=True)
            ]
            machine.write(destination, function(instruction, *values), active, precise=bitwise)

        return function

    return register


def arithmetic(
    *patterns: str, sources: tuple[str, ...] = ()
) -> Callable[[ValueFunction], ValueFunction]:
    """Registers `function(*sources) -> value` over float values, for one half of a packed type.

    Each source is float32 or float64 (see formats.decode). The function returns the exact result,
    or float64 that rounds to the instruction's type as the exact result would. `sources` are the
    operands' types where they differ from the result's, which is then the first of the types.
    """

    def register(function: ValueFunction) -> ValueFunction:
        @operation(*patterns)
        def execute(machine: "Machine", instruction: Instruction, active: Active) -> None:
            destination, *operands = instruction.operands
            result_type = instruction.modifiers[-2] if sources else instruction.type
            own = (result_type,) * len(operands)
            types = [instruction.type if t == "t" else t for t in (*sources, *own[len(sources) :])]
            flush = "ftz" in instruction.modifiers
            decoded = [
                [
                    flush_denormals(value) if flush and value.dtype == np.float32 else value
                    for value in decode(type_name, machine.read(operand, type_name, active))
                ]
                for operand, type_name in zip(operands, types, strict=True)
            ]
            results = [function(*halves) for halves in zip(*decoded, strict=True)]
            if result_type.startswith("f32"):
                results = [value.astype(np.float32, copy=False) for value in results]
            if flush:
                results = [flush_denormals(value) for value in results]
            if "sat" in instruction.modifiers:
                results = [saturate(value) for value in results]
            packed = result_type.endswith("x2")
            if packed and machine.taint is not None:
                machine.taint = _smear_halves(machine.taint, bits_of(result_type))
            encoded = encode(result_type, tuple(results))
            machine.write(destination, encoded, active, precise=packed)

        return function

    return register


def _smear_halves(taint: Array, bits: int) -> Array:
    """Undefined bits spread over the half of a packed register that they lie in."""
    low = np.uint64(2 ** (bits // 2) - 1)
    high = np.uint64(2**bits - 1) ^ low
    smeared: Array = np.where(taint & low, low, np.uint64(0)) | np.where(
        taint & high, high, np.uint64(0)
    )
    return smeared


@cache
def _find(opcode: str) -> Execute | None:
    for regex, function in _OPERATIONS.get(opcode.split(".")[0], ()):
        if regex.fullmatch(opcode):
            return function
    return None


def lookup(instruction: Instruction) -> Execute:
    """The function that executes `instruction`; UnsupportedInstruction where there is none."""
    function = _find(instruction.opcode)
    if function is None:
        raise UnsupportedInstruction(f"{instruction.opcode} is not supported: {instruction.text}")
    return function
