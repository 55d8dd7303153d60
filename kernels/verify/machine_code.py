"""What a compiled kernel does per element, read from its machine code.

A kernel's code has several ways through it: whole blocks and the ragged last one, aligned data and
not, one for each dtype. The *hot path* is the way that large aligned data takes. It is found, not
guessed:

1. The code is cut into basic blocks at labels and after every instruction that can transfer
   control. A guarded branch or exit continues at either place; a call is not followed.
2. A case states its payload, the bytes that one program reads and writes of the tensors (Work in
   cases.py). A path from the entry to an exit *carries* it if the accesses along it that are at
   least w bits wide move, per thread, at least the payload and at most SLACK_BITS more: room for
   metadata, while an fp32 path cannot pass for a bf16 one. Loads and stores each have their w, the
   widest for which such a path exists. Guarded accesses count: the data decides, not the code.
3. The cheapest such path is one way. Without the blocks that hold its accesses there may be another
   (fp16 beside bf16), and so on until none is left. The figure is the dearest way's.

The cost of a path is its instructions, each loop run as often as the payload asks. On NVIDIA that
is every instruction but NOP, since each takes an issue slot of the warp. On AMD it is every vector
ALU instruction: a compute unit issues scalar, memory and branch instructions of other waves beside
them. Both are per thread, so divided by the elements of a thread they compare among block sizes.
"""

import heapq
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SLACK_BITS = 256
# Bits loaded and stored by one thread.
_Bits = tuple[int, int]
_END = -1


@dataclass(frozen=True)
class Instruction:
    """`target` is the label that it may branch to, `falls_through` whether the next may follow."""

    opcode: str
    counted: bool = True
    target: str | None = None
    falls_through: bool = True
    ends: bool = False
    loaded_bits: int = 0
    stored_bits: int = 0

    @property
    def transfers(self) -> bool:
        return self.target is not None or self.ends or not self.falls_through


@dataclass(frozen=True)
class Block:
    """Instructions that run one after another, and the blocks that may follow (-1: the end)."""

    instructions: tuple[Instruction, ...]
    successors: tuple[int, ...]

    @property
    def cost(self) -> int:
        return sum(instruction.counted for instruction in self.instructions)

    def loaded_bits(self, at_least: int) -> int:
        """By one thread, in accesses of `at_least` that many bits."""
        return sum(i.loaded_bits for i in self.instructions if i.loaded_bits >= at_least)

    def stored_bits(self, at_least: int) -> int:
        """By one thread, in accesses of `at_least` that many bits."""
        return sum(i.stored_bits for i in self.instructions if i.stored_bits >= at_least)


@dataclass(frozen=True)
class HotPath:
    """Instructions per thread, and the width in bits of the narrowest access that is needed."""

    instructions: int
    load_bits: int | None
    store_bits: int | None


_SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.?[\w$.]+):")


def parse_sass(text: str) -> list[Block]:
    """The basic blocks of `nvdisasm -c` for one kernel.

    Raises ValueError for an indirect branch, whose targets the text does not tell.
    """
    lines: list[Instruction | str] = []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            lines.append(label[1])
            continue
        found = _SASS_LINE.match(line)
        if found:
            lines.append(_sass_instruction(bool(found[1]), found[2], found[3]))
    return _cut(lines)


def _sass_instruction(guarded: bool, opcode: str, operands: str) -> Instruction:
    name = opcode.split(".")[0]
    if name in ("BRX", "JMX", "BRXU"):
        raise ValueError(f"indirect branches have no known targets; found {opcode} {operands}")
    if name in ("BRA", "JMP"):
        target = re.search(r"`\((\S+)\)", operands)
        assert target, f"no label in {opcode} {operands}"
        conditional = guarded or not operands.startswith("`")
        return Instruction(opcode, target=target[1], falls_through=conditional)
    if name == "EXIT":
        return Instruction(opcode, falls_through=guarded, ends=True)
    if name in ("RET", "CALL", "KILL"):
        return Instruction(opcode, falls_through=False)
    bits = _sass_bits(opcode)
    return Instruction(
        opcode,
        counted=name != "NOP",
        loaded_bits=bits if name == "LDG" else 0,
        stored_bits=bits if name == "STG" else 0,
    )


def _sass_bits(opcode: str) -> int:
    size = re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", opcode)
    return int(size[1]) if size else 32


_AMD_BITS = {"dwordx4": 128, "b128": 128, "dwordx3": 96, "b96": 96, "dwordx2": 64, "b64": 64}
_AMD_BITS |= {"short": 16, "ushort": 16, "sshort": 16, "u16": 16, "i16": 16, "b16": 16}
_AMD_BITS |= {"byte": 8, "ubyte": 8, "sbyte": 8, "u8": 8, "i8": 8, "b8": 8}
_AMD_LINE = re.compile(r"^\s+([vs]_\w+|(?:global|buffer|flat|ds|scratch)_\w+)\s*(\S*)")


def parse_amdgcn(text: str) -> list[Block]:
    """The basic blocks of the AMD assembly of one kernel.

    Raises ValueError for an indirect branch or a call, whose targets the text does not tell.
    """
    lines: list[Instruction | str] = []
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            lines.append(label[1])
            continue
        found = _AMD_LINE.match(line)
        if found:
            lines.append(_amd_instruction(found[1], found[2]))
    return _cut(lines)


def _amd_instruction(opcode: str, operand: str) -> Instruction:
    if opcode.startswith(("s_setpc", "s_swappc")):
        raise ValueError(f"indirect branches have no known targets; found {opcode} {operand}")
    if opcode == "s_branch" or opcode.startswith("s_cbranch_"):
        return Instruction(opcode, False, target=operand, falls_through=opcode != "s_branch")
    if opcode == "s_endpgm":
        return Instruction(opcode, False, falls_through=False, ends=True)
    bits = next((_AMD_BITS[part] for part in opcode.split("_") if part in _AMD_BITS), 32)
    is_global = opcode.startswith(("global_", "buffer_"))
    return Instruction(
        opcode,
        counted=opcode.startswith("v_") and opcode != "v_nop",
        loaded_bits=bits if is_global and "_load_" in opcode else 0,
        stored_bits=bits if is_global and "_store_" in opcode else 0,
    )


def _cut(lines: Sequence[Instruction | str]) -> list[Block]:
    """Blocks from instructions and labels in order."""
    bodies: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for line in lines:
        if isinstance(line, str):
            if bodies[-1]:
                bodies.append([])
            labels[line] = len(bodies) - 1
        else:
            bodies[-1].append(line)
            if line.transfers:
                bodies.append([])
    blocks = []
    for index, body in enumerate(bodies):
        successors = []
        last = body[-1] if body else Instruction("")
        if last.target is not None:
            successors.append(labels[last.target])
        if last.ends:
            successors.append(_END)
        if last.falls_through and index + 1 < len(bodies):
            successors.append(index + 1)
        blocks.append(Block(tuple(body), tuple(successors)))
    return blocks


def widths(blocks: Sequence[Block]) -> tuple[list[int], list[int]]:
    """Bits of the global loads and of the stores anywhere in the code, widest first."""
    every = [instruction for block in blocks for instruction in block.instructions]
    loads = {instruction.loaded_bits for instruction in every} - {0}
    stores = {instruction.stored_bits for instruction in every} - {0}
    return sorted(loads, reverse=True), sorted(stores, reverse=True)


def hot_path(
    blocks: Sequence[Block], read_bits: int | None, written_bits: int | None
) -> HotPath | None:
    """The hot path of a kernel of which one thread reads and writes that much payload.

    None for a side whose width does not matter, as a result where no path carries the payload.
    """
    loads, stores = widths(blocks)
    for load_bits, store_bits in itertools.product(
        loads if read_bits else [None], stores if written_bits else [None]
    ):
        moved = [
            (
                0 if load_bits is None else block.loaded_bits(load_bits),
                0 if store_bits is None else block.stored_bits(store_bits),
            )
            for block in blocks
        ]
        costs = list(_ways(blocks, moved, (read_bits or 0, written_bits or 0)))
        if costs:
            return HotPath(max(costs), load_bits, store_bits)
    return None


def _ways(blocks: Sequence[Block], moved: Sequence[_Bits], payload: _Bits) -> Iterator[int]:
    """The costs of paths that carry the payload and share no block that moves a part of it."""
    taken: frozenset[int] = frozenset()
    while (way := _cheapest(blocks, moved, payload, taken)) is not None:
        cost, carriers = way
        taken |= carriers
        yield cost


def _cheapest(
    blocks: Sequence[Block], moved: Sequence[_Bits], payload: _Bits, taken: frozenset[int]
) -> tuple[int, frozenset[int]] | None:
    """Cost and carrying blocks of the cheapest path that carries the payload outside `taken`.

    `moved` are the bits that each block loads and stores in accesses that count. Dijkstra's
    algorithm over (block, bits loaded, bits stored).
    """
    queue: list[tuple[int, int, _Bits, tuple[int, ...]]] = [(0, 0, (0, 0), ())]
    seen = set()
    while queue:
        cost, index, so_far, carriers = heapq.heappop(queue)
        if (index, so_far) in seen:
            continue
        seen.add((index, so_far))
        if index == _END:
            if all(bits >= least for bits, least in zip(so_far, payload, strict=True)):
                return cost, frozenset(carriers)
            continue
        if any(moved[index]):
            if index in taken:
                continue
            carriers = (*carriers, index)
        now = (so_far[0] + moved[index][0], so_far[1] + moved[index][1])
        if any(bits > least + SLACK_BITS for bits, least in zip(now, payload, strict=True)):
            continue
        for successor in blocks[index].successors:
            heapq.heappush(queue, (cost + blocks[index].cost, successor, now, carriers))
    return None
