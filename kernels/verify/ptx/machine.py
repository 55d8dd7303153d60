"""Executes a parsed program for a grid of thread blocks, many blocks at a time.

Every register is one NumPy array over the threads of a batch of blocks, or of length 1 where all
threads hold the same value. Threads that took different branches wait at their program counters;
the group furthest behind runs first, until it meets the next one. That reconverges as soon as the
program allows, so warp instructions see whole warps wherever hardware guarantees it.

Compilers let threads compute with registers they never wrote when nothing comes of it. So reading
one is no error: what it touches becomes undefined too, and an undefined address, guard, branch or
stored value raises.
"""

import math
import numbers
from collections.abc import Sequence
from typing import cast

import numpy as np

from . import access, convert, floating, integer, warp  # noqa: F401  (they fill the table)
from .counts import Counts, Footprint
from .errors import ParseError, UninitialisedRegister, UnsupportedInstruction
from .formats import DTYPES, UNSIGNED, Array, bits_of
from .memory import Banks, GlobalMemory
from .operations import Active, Execute, lookup
from .parse import Immediate, Instruction, Operand, Program, Register, Symbol, variable_layout

WARP_SIZE = 32
# Registers of a batch this size stay in a core's cache; larger and smaller batches are slower.
BATCH_THREADS = 16384
_NO_BIT = np.uint64(0)
_BRANCHES = ("bra", "ret", "exit")


class Machine:
    """The state of one batch of blocks: registers, memories, which threads still live."""

    def __init__(
        self,
        program: Program,
        blocks: Array,
        grid: tuple[int, int, int],
        parameters: dict[str, Array],
        memory: GlobalMemory,
        symbols: dict[str, int],
        bank_bytes: dict[str, int],
        counts: Counts,
    ) -> None:
        threads = program.num_threads
        self.num_lanes = blocks.size * threads
        self.threads_per_block = threads
        self.block_of_lane = np.repeat(np.arange(blocks.size), threads)
        self.lane_in_warp = np.arange(self.num_lanes) % WARP_SIZE
        self.live = np.ones(self.num_lanes, bool)
        self.parameters = parameters
        self.memory = memory
        self.shared = Banks("shared", blocks.size, bank_bytes["shared"])
        self.local = Banks("local", self.num_lanes, bank_bytes["local"])
        self.counts = counts
        self.loaded, self.stored = Footprint(), Footprint()
        self._symbols = symbols
        self._program = program
        self._registers = self._special_registers(blocks, grid)
        # [threads] masks of a register's undefined bits, for registers that have any.
        self._undefined: dict[str, Array] = {}
        # [threads] masks of the undefined bits the current instruction read; None means none.
        self.taint: Array | None = None

    def _special_registers(self, blocks: Array, grid: tuple[int, int, int]) -> dict[str, Array]:
        threads, block = self.threads_per_block, np.repeat(blocks, self.threads_per_block)
        thread = np.arange(self.num_lanes) % threads
        registers = {
            "%tid.x": thread,
            "%ntid.x": np.array([threads]),
            "%ctaid.x": block % grid[0],
            "%ctaid.y": block // grid[0] % grid[1],
            "%ctaid.z": block // (grid[0] * grid[1]),
            "%laneid": self.lane_in_warp,
            "%warpid": thread // WARP_SIZE,
            **{f"%tid.{axis}": np.zeros(1) for axis in "yz"},
            **{f"%ntid.{axis}": np.ones(1) for axis in "yz"},
            **{f"%nctaid.{axis}": np.array([size]) for axis, size in zip("xyz", grid, strict=True)},
        }
        return {name: value.astype(np.uint32) for name, value in registers.items()}

    def read(self, operand: Operand, type_name: str, active: Active) -> Array:
        """The operand's value as `type_name`'s dtype, of shape [1] or [threads].

        A register wider than the type is truncated, as st and cvt ask. Threads that never wrote
        the register read 0 and are tainted for this instruction.
        """
        if isinstance(operand, Register):
            return self._read_register(operand, type_name)
        if isinstance(operand, Immediate):
            return _literal(operand, type_name)
        if isinstance(operand, Symbol):
            return np.array([self.symbol(operand)], UNSIGNED[bits_of(type_name)])
        raise UnsupportedInstruction(f"{operand} cannot be read as a {type_name} value")

    def _read_register(self, register: Register, type_name: str) -> Array:
        bits = bits_of(type_name)
        if register.bits < bits or (register.bits == 1) != (bits == 1):
            raise ParseError(f"{register.name} has {register.bits} bits, read as .{type_name}")
        value = self._registers.get(register.name)
        if value is None:
            value = np.zeros(1, bool if bits == 1 else UNSIGNED[register.bits])
            undefined: Array | None = np.full(self.num_lanes, 2**register.bits - 1, np.uint64)
        else:
            undefined = self._undefined.get(register.name)
        if undefined is not None:
            undefined = undefined & np.uint64(2**bits - 1)
            self.taint = undefined if self.taint is None else self.taint | undefined
        if bits == 1:
            return ~value if register.negated else value
        if register.bits > bits:
            value = value.astype(UNSIGNED[bits])
        return value.view(DTYPES[type_name])

    def require_defined(self, instruction: Instruction, active: Active) -> None:
        """UninitialisedRegister where a value just read is undefined for an active thread."""
        if self.taint is None:
            return
        wrong = (self.taint != 0) & (True if active is None else active)
        if wrong.any():
            raise UninitialisedRegister(
                f"{int(wrong.sum())} threads use a value that comes from a register they never "
                f"wrote: {instruction.text}"
            )

    def write(
        self, operand: Operand, value: Array, active: Active, *, precise: bool = False
    ) -> None:
        """Writes `value` for the active threads; `_` discards it.

        An integer narrower than the register is extended by its own sign, as ld and cvt ask.
        A thread tainted by what this instruction read holds an undefined value from here on: all
        of it, or with `precise` the tainted bits alone.
        """
        if operand is None:
            return
        assert isinstance(operand, Register), operand
        name, bits = operand.name, operand.bits
        if bits == 1:
            assert value.dtype == bool, (operand, value.dtype)
        else:
            if value.dtype.itemsize * 8 > bits:
                raise ParseError(f"{name} has {bits} bits; {value.dtype} does not fit")
            if value.dtype.itemsize * 8 < bits:
                value = value.astype(f"{value.dtype.kind}{bits // 8}")
            value = value.view(UNSIGNED[bits])
        every_bit = np.uint64(2**bits - 1)
        undefined = self.taint
        if undefined is not None and not precise:
            undefined = np.where(undefined != 0, every_bit, _NO_BIT)
        if active is not None:
            known = name in self._registers
            stale = self._undefined.get(name, _NO_BIT) if known else every_bit
            if undefined is not None or stale is not _NO_BIT:
                undefined = np.where(active, _NO_BIT if undefined is None else undefined, stale)
            value = np.where(active, value, self._registers.get(name, value.dtype.type(0)))
        self._registers[name] = value
        if undefined is not None and undefined.any():
            self._undefined[name] = undefined
        else:
            self._undefined.pop(name, None)

    def symbol(self, symbol: Symbol) -> int:
        """A variable's address in its own state space."""
        if symbol.name not in self._symbols:
            raise ParseError(f"{symbol.name} is not a declared variable")
        return self._symbols[symbol.name]

    def lanes(self, active: Active) -> Array:
        """Indices of the active threads in the batch."""
        return np.arange(self.num_lanes) if active is None else np.flatnonzero(active)

    def spread(self, value: Array) -> Array:
        """`value` with one entry per thread, where it may have a single one."""
        return np.broadcast_to(value, (self.num_lanes,))

    def execute(self, operations: list[Execute]) -> None:
        """Runs every thread to its end and counts what the blocks touched."""
        waiting = {0: self.live.copy()}
        while waiting:
            position = min(waiting)
            self._advance(position, waiting.pop(position), waiting, operations)
        self.counts.distinct_loaded_sectors += self.loaded.distinct()
        self.counts.distinct_stored_sectors += self.stored.distinct()

    def _advance(
        self, position: int, reached: Array, waiting: dict[int, Array], operations: list[Execute]
    ) -> None:
        """Runs the threads in `reached` until a branch, the end, or the next group's position."""
        stop = min(waiting, default=len(operations))
        count = int(np.count_nonzero(reached))
        everyone: Active = None if count == self.num_lanes else reached
        while position < stop:
            instruction = self._program.instructions[position]
            self.counts.instructions += count
            self.taint = None
            active = self._guarded(instruction, everyone)
            if instruction.name in _BRANCHES:
                self._branch(instruction, position, reached, active, waiting)
                return
            if active is None or active.any():
                operations[position](self, instruction, active)
            position += 1
        if position == len(operations):
            self.live &= ~reached
        else:
            waiting[position] = waiting.get(position, False) | reached

    def _guarded(self, instruction: Instruction, everyone: Active) -> Active:
        if instruction.guard is None:
            return everyone
        guard = self.read(instruction.guard, "pred", everyone)
        self.require_defined(instruction, everyone)
        self.taint = None
        if guard.all():
            return everyone
        return self.spread(guard) if everyone is None else guard & everyone

    def _branch(
        self,
        instruction: Instruction,
        position: int,
        reached: Array,
        active: Active,
        waiting: dict[int, Array],
    ) -> None:
        leaving = reached if active is None else active
        staying = reached & ~leaving
        if staying.any():
            waiting[position + 1] = waiting.get(position + 1, False) | staying
        if not leaving.any():
            return
        if instruction.name != "bra":
            self.live &= ~leaving
            return
        (target,) = instruction.operands
        if not isinstance(target, Symbol) or target.name not in self._program.labels:
            raise ParseError(f"the branch target is no label: {instruction.text}")
        destination = self._program.labels[target.name]
        waiting[destination] = waiting.get(destination, False) | leaving


def _literal(literal: Immediate, type_name: str) -> Array:
    if type_name == "pred":
        return np.array([literal.value != 0])
    bits = bits_of(type_name)
    if literal.bits not in (None, bits):
        raise ParseError(f"a {literal.bits}-bit literal is read as .{type_name}")
    return np.array([literal.value & (2**bits - 1)], UNSIGNED[bits]).view(DTYPES[type_name])


def run(
    program: Program,
    grid: Sequence[int],
    arguments: Sequence[Array | int | float],
    *,
    shared_bytes: int | None = None,
    memory: GlobalMemory | None = None,
) -> Counts:
    """Executes `program` on `grid` (one to three block counts) and writes arrays in place.

    `arguments` follow the kernel's parameters; arrays are passed by address. The scratch pointers
    that Triton appends may be left out and read as null. `shared_bytes` is the size of the dynamic
    shared array, `metadata.shared` of a compiled Triton kernel, which the text does not hold.
    `memory` holds arrays that the program reaches through addresses stored in other arrays.

    Where the program faults no array is changed. Blocks run in order, batch by batch, with
    atomics in thread order.

    Raises ValueError and TypeError for arguments that do not fit the parameters, and PtxError:
    UnsupportedInstruction before anything is executed, the others as threads meet them.
    """
    dims = cast(tuple[int, int, int], (*grid, 1, 1, 1)[:3])
    if not 1 <= len(grid) <= 3 or min(dims) < 0:
        raise ValueError(f"grid must be one to three block counts; received {tuple(grid)}")
    if program.num_threads % WARP_SIZE:
        raise ValueError(
            f"blocks must be whole warps; {program.name} has {program.num_threads} threads"
        )
    operations = [
        lookup(instruction) if instruction.name not in _BRANCHES else access.no_operation
        for instruction in program.instructions
    ]
    memory = GlobalMemory() if memory is None else memory
    parameters = _bind(program, arguments, memory)
    symbols, bank_bytes = _place_variables(program, memory, shared_bytes)
    counts = Counts()
    memory.copy_in()
    total = math.prod(dims)
    step = max(1, BATCH_THREADS // program.num_threads)
    with np.errstate(all="ignore"):
        for first in range(0, total, step):
            blocks = np.arange(first, min(total, first + step))
            machine = Machine(
                program, blocks, dims, parameters, memory, symbols, bank_bytes, counts
            )
            machine.execute(operations)
    memory.copy_out()
    return counts


def _bind(
    program: Program, arguments: Sequence[Array | int | float], memory: GlobalMemory
) -> dict[str, Array]:
    """The bits of every parameter, by name."""
    missing = program.parameters[len(arguments) :]
    if len(arguments) > len(program.parameters) or len(missing) > 2:
        raise ValueError(
            f"{program.name} takes {len(program.parameters)} parameters, the last two of which "
            f"may be scratch pointers to leave out; received {len(arguments)} arguments"
        )
    if any(parameter.type != "u64" for parameter in missing):
        names = ", ".join(f"{parameter.name} (.{parameter.type})" for parameter in missing)
        raise ValueError(f"only scratch pointers may be left out; missing {names}")
    bound = {parameter.name: np.zeros(1, np.uint64) for parameter in missing}
    for parameter, argument in zip(program.parameters, arguments, strict=False):
        bits, kind = bits_of(parameter.type), parameter.type[0]
        if isinstance(argument, np.ndarray):
            if bits != 64 or kind == "f":
                raise TypeError(f"{parameter.name} is .{parameter.type}; received an array")
            value = np.array([memory.map(parameter.name, argument)], np.uint64)
        elif kind == "f" and isinstance(argument, numbers.Real):
            value = np.array([argument], DTYPES[parameter.type])
        elif kind != "f" and isinstance(argument, numbers.Integral):
            number = int(argument)
            if not -(2 ** (bits - 1)) <= number < 2**bits:
                raise ValueError(f"{parameter.name} has {bits} bits; received {number}")
            value = np.array([number & (2**bits - 1)], UNSIGNED[bits])
        else:
            raise TypeError(
                f"{parameter.name} is .{parameter.type}; received {type(argument).__name__}"
            )
        bound[parameter.name] = value.view(UNSIGNED[bits])
    return bound


def _place_variables(
    program: Program, memory: GlobalMemory, shared_bytes: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Addresses of the program's variables, and the bytes of a shared and of a local bank."""
    symbols, local_bytes = variable_layout(program.variables, "local")
    shared, static_bytes = variable_layout(program.variables, "shared")
    symbols |= shared
    dynamic = [v.name for v in program.variables.values() if v.size_bytes is None]
    if dynamic and shared_bytes is None:
        raise ValueError(
            f"{program.name} declares {dynamic[0]}, whose size the launch decides; "
            "pass shared_bytes=kernel.metadata.shared"
        )
    for variable in program.variables.values():
        if variable.space == "global":
            assert variable.size_bytes is not None, variable
            content = np.zeros(variable.size_bytes, np.uint8)
            initial = np.frombuffer(variable.initial or b"", np.uint8)
            content[: initial.size] = initial
            symbols[variable.name] = memory.map(variable.name, content)
    total_shared = static_bytes + (shared_bytes or 0 if dynamic else 0)
    return symbols, {"shared": total_shared, "local": local_bytes}
