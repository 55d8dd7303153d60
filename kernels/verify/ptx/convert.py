"""Moves and conversions: mov, cvt, cvta.

Source   PTX ISA, "Data Movement and Conversion Instructions": mov, cvt, cvta.
"""

from typing import TYPE_CHECKING

import numpy as np

from .errors import UnsupportedInstruction
from .formats import (
    DTYPES,
    FLOAT_FORMATS,
    UNSIGNED,
    Array,
    bits_of,
    decode,
    encode,
    flush_denormals,
    round_to,
    saturate,
)
from .operations import Active, elementwise, operation
from .parse import Instruction, Vector

if TYPE_CHECKING:
    from .machine import Machine

_INTEGERS = "u8|s8|u16|s16|u32|s32|u64|s64"
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@operation("mov .pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64")
def _mov(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """d = a. With a vector on one side, packs or unpacks equal parts, the lowest first."""
    destination, source = instruction.operands
    own = instruction.type
    if isinstance(source, Vector):
        bits = bits_of(own)
        part_bits, wide = bits // len(source.elements), UNSIGNED[bits].type
        packed: Array = np.zeros(1, wide)
        taints: list[Array] = []
        for index, element in enumerate(source.elements):
            machine.taint = None
            part = machine.read(element, f"b{part_bits}", active).astype(wide)
            packed = packed | (part << wide(index * part_bits))
            if machine.taint is not None:
                taints.append(machine.taint << np.uint64(index * part_bits))
        machine.taint = np.bitwise_or.reduce(taints) if taints else None
        machine.write(destination, packed, active, precise=True)
    elif isinstance(destination, Vector):
        value = machine.read(source, f"b{bits_of(own)}", active)
        part_bits = bits_of(own) // len(destination.elements)
        taint = machine.taint
        for index, element in enumerate(destination.elements):
            part = value >> value.dtype.type(index * part_bits)
            if taint is not None:
                machine.taint = taint >> np.uint64(index * part_bits) & np.uint64(2**part_bits - 1)
            machine.write(element, part.astype(UNSIGNED[part_bits]), active, precise=True)
    else:
        machine.write(destination, machine.read(source, own, active), active, precise=True)


@elementwise("cvta .global .u64", "cvta .to.global .u64")
def _cvta(_: Instruction, a: Array) -> Array:
    """Between a generic and a global address, which are the same number."""
    return a


@operation(f"cvt .{_INTEGERS} .{_INTEGERS}")
def _cvt_integer(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """Truncates, or extends by the source's sign."""
    destination, source = instruction.operands
    target, own = instruction.modifiers[-2:]
    if bits_of(target) < bits_of(own):
        # Read as the narrower type: the bits dropped may be undefined.
        own = target
    value = machine.read(source, own, active).astype(DTYPES[target])
    machine.write(destination, value, active, precise=own == target)


@elementwise(f"cvt .sat .{_INTEGERS} .{_INTEGERS}")
def _cvt_integer_sat(instruction: Instruction, a: Array) -> Array:
    """Clamped to the destination's range."""
    target = DTYPES[instruction.modifiers[-2]]
    limits, own = np.iinfo(target), np.iinfo(a.dtype)
    return np.clip(a, max(limits.min, own.min), min(limits.max, own.max)).astype(target)


@elementwise(f"cvt .rn|rz|rm|rp [.ftz] [.sat] .f16|bf16|f32|f64 .{_INTEGERS}")
def _cvt_integer_to_float(instruction: Instruction, a: Array) -> Array:
    """The nearest number of the format, or the next one in the direction asked for.

    2**24 + 1 becomes 2**24 in fp32 by .rn, 2**24 + 2 by .rp.
    """
    target, rounding = instruction.modifiers[-2], instruction.modifiers[0]
    if target == "f64" or a.dtype.itemsize == 8:
        if rounding != "rn" or target in ("f16", "bf16"):
            raise UnsupportedInstruction(f"64-bit integers round by .rn only: {instruction.text}")
        converted = a.astype(DTYPES[target])
    else:
        converted = a.astype(np.float64)
    return _to_float(instruction, converted, target, rounding)


@elementwise(f"cvt .rni|rzi|rmi|rpi [.ftz] [.sat] .{_INTEGERS} .f16|bf16|f32|f64")
def _cvt_float_to_integer(instruction: Instruction, a: Array) -> Array:
    """The integer in the direction asked for, clamped to the range.

    NaN becomes 0, or the top bit alone where the source is .f64 or the destination has 64 bits.
    """
    target = DTYPES[instruction.modifiers[-2]]
    (value,) = decode(instruction.type, a)
    if "ftz" in instruction.modifiers and instruction.type == "f32":
        value = flush_denormals(value)
    whole = _TO_INTEGER[instruction.modifiers[0]](value.astype(np.float64))
    limits = np.iinfo(target)
    inside = (whole >= limits.min) & (whole < float(limits.max) + (target.itemsize < 8))
    clamped = np.where(whole > 0, limits.max, limits.min).astype(target)
    converted = np.where(inside, np.where(inside, whole, 0).astype(target), clamped)
    wide = instruction.type == "f64" or target.itemsize == 8
    for_nan = 1 << (target.itemsize * 8 - 1) if wide else 0
    nan_value = np.array([for_nan], UNSIGNED[target.itemsize * 8]).view(target)
    return np.where(np.isnan(value), nan_value, converted)


@elementwise(
    "cvt [.rni|rzi|rmi|rpi] [.ftz] [.sat] .f32 .f32",
    "cvt [.rni|rzi|rmi|rpi] [.sat] .f16 .f16",
    "cvt [.rni|rzi|rmi|rpi] [.sat] .f64 .f64",
    "cvt [.ftz] [.sat] .f32 .f16|bf16",
    "cvt .f64 .f16|f32",
    "cvt .rn|rz|rm|rp [.ftz] [.sat] .f32 .f64",
    "cvt .rn|rz|rm|rp .f16|bf16 .f64",
    "cvt .rn|rz|rm|rp [.ftz] [.sat] .f16|bf16 .f32",
    "cvt .rn|rz|rm|rp .bf16 .f16",
    "cvt .rn|rz|rm|rp .f16 .bf16",
)
def _cvt_float(instruction: Instruction, a: Array) -> Array:
    """To a wider format exactly, to a narrower one rounded, or to a whole number within one."""
    target = instruction.modifiers[-2]
    (value,) = decode(instruction.type, a)
    if "ftz" in instruction.modifiers and instruction.type == "f32":
        value = flush_denormals(value)
    rounding = instruction.modifiers[0]
    if rounding in _TO_INTEGER:
        value = _TO_INTEGER[rounding](value)
    return _to_float(instruction, value, target, rounding if rounding in _ROUNDINGS else "rn")


_ROUNDINGS = ("rn", "rz", "rm", "rp")


def _to_float(instruction: Instruction, value: Array, target: str, rounding: str) -> Array:
    if rounding != "rn":
        value = round_to(value.astype(np.float64), FLOAT_FORMATS[target], rounding)
    if target in ("f32", "f64"):
        value = value.astype(DTYPES[target])
    if "ftz" in instruction.modifiers and target == "f32":
        value = flush_denormals(value)
    if "sat" in instruction.modifiers:
        value = saturate(value)
    return encode(target, (value,))


@elementwise("cvt .rn [.relu] .f16x2|bf16x2 .f32", "cvt .rn .satfinite [.relu] .e4m3x2|e5m2x2 .f32")
def _cvt_pack(instruction: Instruction, high: Array, low: Array) -> Array:
    """Two fp32 numbers rounded into one register, the first operand in its upper half."""
    if "relu" in instruction.modifiers:
        low, high = (np.where(value < 0, np.float32(0), value) for value in (low, high))
    return encode(instruction.modifiers[-2], (low, high))


@elementwise("cvt .rn .satfinite .e4m3x2|e5m2x2 .f16x2", "cvt .rn .f16x2 .e4m3x2|e5m2x2")
def _cvt_packed(instruction: Instruction, a: Array) -> Array:
    """Both halves of a packed register, to or from fp8."""
    low, high = decode(instruction.type, a)
    return encode(instruction.modifiers[-2], (low, high))
