"""Instructions among the threads of a warp or block: shfl, redux, vote, matrix moves, barriers.

Source   PTX ISA, "shfl.sync", "redux.sync", "vote.sync", "activemask", "bar", "ldmatrix",
         "stmatrix".
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .access import byte_address
from .errors import DivergenceError, Trap, UnsupportedInstruction
from .formats import Array, canonical_nan
from .operations import Active, operation
from .parse import Instruction, Operand, Vector

if TYPE_CHECKING:
    from .machine import Machine

_FULL_WARP = 0xFFFFFFFF


def _ballot(flags: Array) -> Array:
    """[threads] flags -> [threads] the 32 bits of each thread's warp."""
    weights = np.uint32(1) << np.arange(32, dtype=np.uint32)
    words = np.where(flags.reshape(-1, 32), weights, np.uint32(0)).sum(axis=1, dtype=np.uint32)
    return np.repeat(words, 32)


def _require_members(
    machine: "Machine", instruction: Instruction, active: Active, members: Operand
) -> Array:
    """The member masks, after checking that every member of an active thread's mask is active.

    Raises DivergenceError otherwise: on a GPU the warp would wait, perhaps for ever.
    """
    mask = machine.spread(machine.read(members, "b32", active))
    if active is not None or not (mask == _FULL_WARP).all():
        here = machine.spread(np.ones(1, bool)) if active is None else active
        itself = np.uint32(1) << machine.lane_in_warp.astype(np.uint32)
        absent = here & ((mask & ~_ballot(here) != 0) | (mask & itself == 0))
        if absent.any():
            raise DivergenceError(
                f"{int(absent.sum())} threads wait for members of their warp that are not at "
                f"{instruction.text}"
            )
    return mask


@operation("shfl .sync .up|down|bfly|idx .b32")
def _shfl(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """d = a of another lane, p = whether that lane was in range; out of range it is one's own.

    With c = clamp | segment mask << 8, `up` reads lane - b, `down` lane + b, `bfly` lane ^ b and
    `idx` lane b, within segments whose lanes agree in the bits of the segment mask.
    """
    *destinations, value, distance, clamp, members = instruction.operands
    _require_members(machine, instruction, active, members)
    lane = machine.lane_in_warp
    b = machine.read(distance, "u32", active).astype(np.int64) & 31
    c = machine.read(clamp, "u32", active).astype(np.int64)
    segment = (c >> 8) & 31
    first = lane & segment
    last = first | (c & 31 & ~segment)
    mode = instruction.pick("up", "down", "bfly", "idx")
    if mode == "up":
        source = lane - b
        # In `up` the clamp is the segment's lowest lane.
        valid = source >= last
    else:
        source = {"down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
        valid = source <= last
    source = np.where(valid, source, lane)
    machine.require_defined(instruction, active)
    values = machine.spread(machine.read(value, "b32", active))
    sender = np.arange(machine.num_lanes) - lane + source
    shuffled = values[sender]
    if machine.taint is not None:
        machine.taint = machine.taint[sender]
    for destination, result in zip(destinations, (shuffled, valid), strict=False):
        machine.write(destination, result, active)


_REDUCE: dict[str, Callable[[Array], Array]] = {
    "add": lambda warps: warps.sum(axis=1, dtype=warps.dtype),
    "and": lambda warps: np.bitwise_and.reduce(warps, axis=1),
    "or": lambda warps: np.bitwise_or.reduce(warps, axis=1),
    "xor": lambda warps: np.bitwise_xor.reduce(warps, axis=1),
    "min": lambda warps: warps.min(axis=1),
    "max": lambda warps: warps.max(axis=1),
}


def _require_full_warps(
    machine: "Machine", instruction: Instruction, active: Active, members: Operand
) -> None:
    mask = _require_members(machine, instruction, active, members)
    if not (mask if active is None else mask[active] == _FULL_WARP).all():
        raise UnsupportedInstruction(f"only full member masks are supported: {instruction.text}")


@operation(
    "redux .sync .add|min|max .u32|s32",
    "redux .sync .and|or|xor .b32",
    "redux .sync .min|max [.abs] [.NaN] .f32",
)
def _redux(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """The reduction over the warp, in every lane of it.

    fp32 min and max pass over NaN unless .NaN is given, and order -0 below +0.
    """
    destination, source, members = instruction.operands
    _require_full_warps(machine, instruction, active, members)
    warps = machine.spread(machine.read(source, instruction.type, active)).reshape(-1, 32)
    machine.require_defined(instruction, active)
    kind = instruction.modifiers[1]
    if instruction.type == "f32":
        if "abs" in instruction.modifiers:
            warps = np.abs(warps)
        reduced = _redux_f32(warps, kind, propagate="NaN" in instruction.modifiers)
    else:
        reduced = _REDUCE[kind](warps)
    machine.write(destination, np.repeat(reduced, 32), active)


def _redux_f32(warps: Array, kind: str, *, propagate: bool) -> Array:
    # Sign-magnitude bits as integers that sort like the numbers, -0 before +0.
    bits = warps.view(np.int32)
    keys = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    nan = np.isnan(warps)
    neutral = np.iinfo(np.int32).max if kind == "min" else np.iinfo(np.int32).min
    best = _REDUCE[kind](np.where(nan, np.int32(neutral), keys))
    values = np.where(best < 0, best ^ np.int32(0x7FFFFFFF), best).view(np.float32)
    missing = nan.any(axis=1) if propagate else nan.all(axis=1)
    return canonical_nan(np.where(missing, np.float32(np.nan), values))


@operation("vote .sync .all|any|uni .pred", "vote .sync .ballot .b32")
def _vote(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """Whether all, any, or equally many of the warp's predicates hold; .ballot gives their bits."""
    destination, source, members = instruction.operands
    _require_full_warps(machine, instruction, active, members)
    ballot = _ballot(machine.spread(machine.read(source, "pred", active)))
    machine.require_defined(instruction, active)
    mode = instruction.modifiers[1]
    result = {
        "ballot": ballot,
        "all": ballot == _FULL_WARP,
        "any": ballot != 0,
        "uni": (ballot == 0) | (ballot == _FULL_WARP),
    }[mode]
    machine.write(destination, result, active)


@operation("activemask .b32")
def _activemask(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """The bits of the warp's threads that execute this together."""
    here = machine.spread(np.ones(1, bool)) if active is None else active
    machine.write(instruction.operands[0], _ballot(here), active)


@operation("bar .sync", "barrier .sync [.aligned]", "barrier .cta .sync [.aligned]")
def _bar(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """Every thread of the block that still lives must be here; nothing else to wait for."""
    if len(instruction.operands) > 1:
        raise UnsupportedInstruction(f"barriers of a part of a block: {instruction.text}")
    if active is None:
        return
    shape = (-1, machine.threads_per_block)
    here = active.reshape(shape)
    absent = here.any(axis=1, keepdims=True) & machine.live.reshape(shape) & ~here
    if absent.any():
        raise DivergenceError(
            f"{int(absent.sum())} threads of blocks at a barrier are elsewhere: {instruction.text}"
        )


@operation("bar .warp .sync")
def _bar_warp(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """Every member of the warp must be here."""
    _require_members(machine, instruction, active, instruction.operands[0])


@operation("trap")
def _trap(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """Ends the run, as a failed device-side assertion does."""
    lane = int(machine.lanes(active)[0])
    raise Trap(f"thread {lane % machine.threads_per_block} of a block executed trap")


@operation(
    "ldmatrix .sync .aligned .m8n8 .x1|x2|x4 [.trans] .shared|shared::cta .b16",
    "stmatrix .sync .aligned .m8n8 .x1|x2|x4 [.trans] .shared|shared::cta .b16",
)
def _matrix(machine: "Machine", instruction: Instruction, active: Active) -> None:
    """Moves one, two or four 8x8 matrices of 16-bit words between shared memory and a warp.

    Lane 8m + r holds the address of row r of matrix m. A lane's register m carries the words
    (lane / 4, 2 (lane % 4)) and its right neighbour; with .trans of the transposed matrix.
    """
    loading = instruction.name == "ldmatrix"
    registers, address = instruction.operands if loading else reversed(instruction.operands)
    elements = registers.elements if isinstance(registers, Vector) else (registers,)
    full = np.full(machine.num_lanes, _FULL_WARP, np.uint32)
    here = machine.spread(np.ones(1, bool)) if active is None else active
    if (here & (_ballot(here) != full)).any():
        raise DivergenceError(f"part of a warp is at {instruction.text}")
    lanes = machine.lanes(active)
    lane = machine.lane_in_warp[lanes]
    rows = machine.spread(byte_address(machine, instruction, address, "shared", active))
    row, column = lane // 4, 2 * (lane % 4)
    for matrix, element in enumerate(elements):
        holder = lanes - lane + 8 * matrix
        if "trans" in instruction.modifiers:
            words = [rows[holder + column + i] + 2 * row for i in (0, 1)]
        else:
            words = [rows[holder + row] + 2 * (column + i) for i in (0, 1)]
        offsets = [
            machine.shared.locate(machine.block_of_lane[lanes], word, 2, text=instruction.text)
            for word in words
        ]
        if loading:
            low, high = (machine.shared.load(o, 16, 1)[:, 0].astype(np.uint32) for o in offsets)
            loaded = np.zeros(machine.num_lanes, np.uint32)
            loaded[lanes] = low | (high << np.uint32(16))
            machine.write(element, loaded, active)
        else:
            value = machine.spread(machine.read(element, "b32", active))[lanes]
            machine.require_defined(instruction, active)
            for shift, offset in zip((0, 16), offsets, strict=True):
                half = (value >> np.uint32(shift)).astype(np.uint16)
                machine.shared.store(offset, half[:, None])
