"""Loads, stores and atomics, and the instructions that only order or hint at them.

Cache operators, eviction priorities and L2 policies change no value and are accepted and ignored;
so are fences, since every thread sees memory as it is. Threads of one batch execute in lockstep.

Source   PTX ISA, "ld", "ld.global.nc", "st", "atom", "red", "Memory Consistency Model".
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np

from .errors import UnsupportedInstruction
from .formats import DTYPES, UNSIGNED, Array, bits_of, decode, encode, flush_denormals
from .memory import Banks, GlobalMemory
from .operations import Active, operation
from .parse import Address, Instruction, Operand, Vector

if TYPE_CHECKING:
    from .machine import Machine

_TYPES = ".b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64"
_ORDER = "[.volatile|weak|relaxed|acquire|release] [.cta|cluster|gpu|sys]"
_HINTS = (
    "[.ca|cg|cs|cv|lu|wb|wt] [.L1::evict_first|L1::evict_last|L1::no_allocate|L1::evict_normal|"
    "L1::evict_unchanged] [.L2::evict_first|L2::evict_last|L2::evict_normal] [.L2::cache_hint] "
    "[.L2::64B|L2::128B|L2::256B]"
)


def no_operation(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """Nothing that this model can see."""


operation(
    "fence .sc|acq_rel .cta|cluster|gpu|sys",
    "membar .cta|gl|sys",
    "griddepcontrol .wait",
    "griddepcontrol .launch_dependents",
)(no_operation)


@operation("createpolicy .fractional .L2::evict_first|L2::evict_last|L2::evict_normal .b64")
def _createpolicy(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """A cache policy, which no access here reads: 0."""
    machine.write(instruction.operands[0], np.zeros(1, np.uint64), active)


@operation(f"ld .param {_TYPES}")
def _ld_param(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """d = a kernel parameter."""
    destination, address = instruction.operands
    assert isinstance(address, Address), instruction
    name = getattr(address.base, "name", None)
    if address.offset_bytes or name not in machine.parameters:
        raise UnsupportedInstruction(f"only whole parameters are read: {instruction.text}")
    bits = machine.parameters[name]
    if bits.dtype.itemsize * 8 != bits_of(instruction.type):
        raise UnsupportedInstruction(f"only whole parameters are read: {instruction.text}")
    machine.write(destination, bits.view(DTYPES[instruction.type]), active)


def _space(instruction: Instruction) -> str:
    return instruction.pick("global", "shared", "shared::cta", "local").split(":")[0]


def byte_address(
    machine: "Machine", instruction: Instruction, operand: Operand, space: str, active: Active
) -> Array:
    """Byte addresses in `space`: uint64 for global memory, int64 offsets for the banks."""
    assert isinstance(operand, Address), operand
    if space == "global":
        base = machine.read(operand.base, "u64", active)
        machine.require_defined(instruction, active)
        return base + np.uint64(operand.offset_bytes & 2**64 - 1)
    width = getattr(operand.base, "bits", None) or 32
    base = machine.read(operand.base, f"u{width}", active)
    machine.require_defined(instruction, active)
    return base.astype(np.int64) + operand.offset_bytes


def _locate(
    machine: "Machine",
    instruction: Instruction,
    operand: Operand,
    size_bytes: int,
    active: Active,
    *,
    writing: bool,
) -> tuple[GlobalMemory | Banks, Array]:
    """The memory accessed and the active threads' offsets in it, checked."""
    space, text = _space(instruction), instruction.text
    lanes = machine.lanes(active)
    addresses = machine.spread(byte_address(machine, instruction, operand, space, active))[lanes]
    if space == "global":
        located = machine.memory.locate(addresses, size_bytes, writing=writing, text=text)
        return machine.memory, located
    if space == "shared":
        bank = machine.block_of_lane[lanes]
        return machine.shared, machine.shared.locate(bank, addresses, size_bytes, text=text)
    return machine.local, machine.local.locate(lanes, addresses, size_bytes, text=text)


@operation(
    f"ld {_ORDER} .global|local|shared|shared::cta [.nc] {_HINTS} [.v2|v4|v8] {_TYPES}",
)
def _ld(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """d = the word at the address, or {d0, d1, …} = consecutive words, aligned to them all."""
    destination, operand = instruction.operands[:2]
    targets = destination.elements if isinstance(destination, Vector) else (destination,)
    bits, dtype = bits_of(instruction.type), DTYPES[instruction.type]
    size_bytes = bits // 8 * len(targets)
    memory, offsets = _locate(machine, instruction, operand, size_bytes, active, writing=False)
    if memory is machine.memory:
        machine.counts.loads[size_bytes] += offsets.size
        machine.loaded.add(machine.block_of_lane[machine.lanes(active)], offsets)
    words = memory.load(offsets, bits, len(targets))
    for index, target in enumerate(targets):
        if active is None:
            loaded = np.ascontiguousarray(words[:, index])
        else:
            loaded = np.zeros(machine.num_lanes, UNSIGNED[bits])
            loaded[active] = words[:, index]
        machine.write(target, loaded.view(dtype), active)


@operation(f"st {_ORDER} .global|local|shared|shared::cta {_HINTS} [.v2|v4|v8] {_TYPES}")
def _st(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """The word at the address = a, or consecutive words = {a0, a1, …}, aligned to them all."""
    operand, source = instruction.operands[:2]
    elements = source.elements if isinstance(source, Vector) else (source,)
    bits = bits_of(instruction.type)
    size_bytes = bits // 8 * len(elements)
    memory, offsets = _locate(machine, instruction, operand, size_bytes, active, writing=True)
    if memory is machine.memory:
        machine.counts.stores[size_bytes] += offsets.size
        machine.stored.add(machine.block_of_lane[machine.lanes(active)], offsets)
    lanes = machine.lanes(active)
    words = [machine.spread(machine.read(e, f"b{bits}", active))[lanes] for e in elements]
    machine.require_defined(instruction, active)
    memory.store(offsets, np.stack(words, axis=1))


_UPDATE: dict[str, Callable[..., Array]] = {
    "add": lambda old, a: old + a,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, a: a,
    "cas": lambda old, compare, a: cast(Array, np.where(old == compare, a, old)),
}
_WHERE = ".global|shared [.cta|cluster|gpu|sys] [.relaxed|acquire|release|acq_rel]"
_ATOMIC_FORMS = (
    f"{_WHERE} .add .u32|s32|u64|f32|f64",
    f"{_WHERE} .add .noftz .f16|f16x2|bf16|bf16x2",
    f"{_WHERE} .min|max .u32|s32|u64|s64",
    f"{_WHERE} .and|or|xor .b32|b64",
)


@operation(
    *(f"{name} {form}" for name in ("atom", "red") for form in _ATOMIC_FORMS),
    f"atom {_WHERE} .exch|cas .b32|b64",
    f"atom {_WHERE} .cas .b16",
)
def _atomic(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """The word at the address is updated by each thread in turn, in thread order; d = the old word.

    fp32 additions in global memory flush denormals, as GPUs do.
    """
    operands = instruction.operands
    destination, operand, *sources = (None, *operands) if instruction.name == "red" else operands
    bits = bits_of(instruction.type)
    update = _updater(instruction)
    memory, offsets = _locate(machine, instruction, operand, bits // 8, active, writing=True)
    if memory is machine.memory:
        machine.counts.atomics[bits // 8] += offsets.size
    lanes = machine.lanes(active)
    values = [machine.spread(machine.read(s, f"b{bits}", active))[lanes] for s in sources]
    machine.require_defined(instruction, active)
    returned = np.zeros(machine.num_lanes, UNSIGNED[bits])
    for turn in _turns(offsets):
        old = memory.load(offsets[turn], bits, 1)[:, 0]
        returned[lanes[turn]] = old
        new = update(old, *(value[turn] for value in values))
        memory.store(offsets[turn], new.view(UNSIGNED[bits])[:, None])
    machine.write(destination, returned, active)


def _updater(instruction: Instruction) -> Callable[..., Array]:
    """The atomic's function on raw words."""
    update = _UPDATE[instruction.pick(*_UPDATE)]
    own = instruction.type
    flush = own == "f32" and "global" in instruction.modifiers

    def on_words(*words: Array) -> Array:
        decoded = [decode(own, word) for word in words]
        if flush:
            decoded = [(flush_denormals(value),) for (value,) in decoded]
        results = tuple(update(*halves) for halves in zip(*decoded, strict=True))
        if flush:
            results = tuple(flush_denormals(result) for result in results)
        return encode(own, results) if own.startswith(("f", "bf")) else results[0]

    return on_words


def _turns(offsets: Array) -> list[Array]:
    """Groups of distinct offsets: the first thread at each address, then the second, …"""
    order = np.argsort(offsets, kind="stable")
    ordered = offsets[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if ordered.size else order
    rank = np.arange(ordered.size) - np.repeat(starts, np.diff(np.r_[starts, ordered.size]))
    by_rank = np.argsort(rank, kind="stable")
    return np.split(order[by_rank], np.cumsum(np.bincount(rank))[:-1])
