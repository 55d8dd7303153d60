"""PTX text to a `Program`: instructions with resolved registers, labels, parameters, variables.

Reads what Triton's NVPTX backend prints: one entry function, inline-assembly blocks in braces
with registers of their own, module-level constants, shared and local arrays. Debug sections and
source locations are skipped. Opcodes are not judged here; see operations.py.

Source   PTX ISA, "Syntax", "State Spaces, Types, and Variables", "Instruction Operands".
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .errors import ParseError


@dataclass(frozen=True)
class Register:
    """A virtual register. `bits` is 1 for a predicate; `negated` is `!` before a predicate."""

    name: str
    bits: int
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    """A literal. `bits` is None for an integer, which takes the width it is read with."""

    value: int
    bits: int | None = None


@dataclass(frozen=True)
class Symbol:
    """The address of a variable, or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset_bytes]"""

    base: Register | Symbol | Immediate
    offset_bytes: int


@dataclass(frozen=True)
class Vector:
    """{a, b, …}"""

    elements: tuple[Register | Immediate | None, ...]


Operand = Register | Immediate | Symbol | Address | Vector | None  # None is the sink `_`


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard opcode operands;` with opcode = name.modifier.….type"""

    text: str
    opcode: str
    guard: Register | None
    operands: tuple[Operand, ...]

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])

    @property
    def type(self) -> str:
        """The last modifier: the type of the operation."""
        return self.modifiers[-1]

    def pick(self, *choices: str) -> str:
        """The one modifier among `choices` that the instruction carries."""
        (chosen,) = (modifier for modifier in self.modifiers if modifier in choices)
        return chosen


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str


@dataclass(frozen=True)
class Variable:
    """A module or function array. `size_bytes` is None where the launch decides (extern)."""

    name: str
    space: str
    align_bytes: int
    size_bytes: int | None
    initial: bytes | None


@dataclass
class Program:
    """One entry function, ready for `run`."""

    name: str
    parameters: tuple[Parameter, ...]
    num_threads: int
    variables: dict[str, Variable]
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_TYPE_BITS = {"pred": 1} | {f"{k}{n}": n for k in "bsuf" for n in (8, 16, 32, 64)}
_SPECIAL = tuple(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz")
SPECIAL_REGISTERS = frozenset((*_SPECIAL, "%laneid", "%warpid"))

_ENTRY = re.compile(r"\.entry\s+([\w$.]+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
_VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak)\s+)?\.(?P<space>shared|local|global)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>[busf]\d+)\s+(?P<name>[\w$%]+)"
    r"(?P<array>\[(?P<count>\d*)\])?\s*(?:=\s*\{(?P<values>[^}]*)\})?\s*$"
)
_PARAMETER = re.compile(r"\.param\s+\.(?P<type>[busf]\d+)\s+(?:\.ptr[^,]*\s)?(?P<name>[\w$]+)$")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_LABEL = re.compile(r"([$\w]+)\s*:(?!:)")
_INSTRUCTION = re.compile(r"(?:@(!?)\s*([%$\w]+)\s+)?([a-z]\w*(?:\.[\w:]+)*)\s*(.*)", re.DOTALL)
_INTEGER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|\d+)U?$")
_DECIMAL = re.compile(r"[-+]?\d+\.\d*$")
_HEX_FLOAT = re.compile(r"0(?:[fF]([0-9a-fA-F]{8})|[dD]([0-9a-fA-F]{16}))$")


def parse(ptx_text: str) -> Program:
    """The entry function in `ptx_text`.

    Raises ParseError where there is not exactly one entry, no .reqntid or .maxntid, or a statement
    that cannot be read: an undeclared register, an aggregate parameter, a device function.
    """
    text = re.sub(r"/\*.*?\*/", " ", ptx_text, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file)\s[^\n]*$", "", text, flags=re.MULTILINE)
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise ParseError(f"expected one .entry function; found {len(entries)}")
    name, parameters, directives = entries[0].groups()
    if re.search(r"\.func\b", text):
        raise ParseError("device functions (.func) are not supported; inline them")
    threads = re.search(
        r"\.(?:reqntid|maxntid)\s+(\d+)\s*(?:,\s*(\d+))?\s*(?:,\s*(\d+))?", directives
    )
    if threads is None:
        raise ParseError(f"entry {name} states neither .reqntid nor .maxntid")
    if any(n not in (None, "1") for n in threads.groups()[1:]):
        raise ParseError(f"blocks of threads must be one-dimensional: {threads.group(0).strip()}")
    program = Program(
        name=name,
        parameters=tuple(_parameters(parameters)),
        num_threads=int(threads.group(1)),
        variables={},
    )
    for statement in text[: entries[0].start()].split(";")[:-1]:
        declaration = re.search(r"\.(extern|visible|shared|local|global)\b.*", statement, re.DOTALL)
        if declaration:
            _declare_variable(program, " ".join(declaration.group(0).split()))
    _Body(program).read(text[entries[0].end() :])
    return program


def _parameters(text: str) -> Iterator[Parameter]:
    for declaration in filter(None, (" ".join(part.split()) for part in text.split(","))):
        match = _PARAMETER.match(declaration)
        if match is None:
            raise ParseError(f"parameters must be scalars or pointers: {declaration}")
        yield Parameter(match["name"], match["type"])


def _declare_variable(program: Program, text: str) -> None:
    match = _VARIABLE.match(text)
    if match is None:
        raise ParseError(f"cannot read the variable declaration: {text}")
    item_bytes = _TYPE_BITS[match["type"]] // 8
    if match["array"] is None:
        count: int | None = 1
    else:
        count = int(match["count"]) if match["count"] else None
    initial = None
    if match["values"] is not None:
        values = [int(value, 0) for value in match["values"].split(",")]
        initial = b"".join(value.to_bytes(item_bytes, "little") for value in values)
    size_bytes = None if count is None else count * item_bytes
    program.variables[match["name"]] = Variable(
        match["name"], match["space"], int(match["align"] or item_bytes), size_bytes, initial
    )


class _Body:
    """Reads the statements of a function, keeping the stack of register scopes."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._scopes: list[dict[str, Register]] = [{}]
        self._num_scopes = 0

    def read(self, text: str) -> None:
        position = 0
        while True:
            position = _skip_space(text, position)
            if position == len(text):
                raise ParseError(f"entry {self._program.name} has no closing brace")
            label = _LABEL.match(text, position)
            if text[position] == "{":
                self._num_scopes += 1
                self._scopes.append({})
                position += 1
            elif text[position] == "}":
                self._scopes.pop()
                position += 1
                if not self._scopes:
                    return
            elif text[position] == ";":
                position += 1
            elif label:
                self._program.labels[label.group(1)] = len(self._program.instructions)
                position = label.end()
            else:
                end = text.find(";", position)
                if end < 0:
                    raise ParseError(f"statement without a semicolon: {text[position:][:80]}")
                self._statement(" ".join(text[position:end].split()))
                position = end + 1

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declare_registers(text)
        elif text.startswith((".local", ".shared")):
            _declare_variable(self._program, text)
        elif text.startswith(".pragma"):
            pass
        else:
            self._program.instructions.append(self._instruction(text))

    def _declare_registers(self, text: str) -> None:
        match = _REGISTERS.match(text)
        if match is None or match.group(1) not in _TYPE_BITS:
            raise ParseError(f"cannot read the register declaration: {text}")
        bits = _TYPE_BITS[match.group(1)]
        suffix = f"@{self._num_scopes}" if len(self._scopes) > 1 else ""
        for item in match.group(2).split(","):
            name, _, count = item.strip().rstrip(">").partition("<")
            names = [f"{name}{index}" for index in range(int(count))] if count else [name]
            self._scopes[-1].update({n: Register(n + suffix, bits) for n in names})

    def _instruction(self, text: str) -> Instruction:
        match = _INSTRUCTION.fullmatch(text)
        if match is None:
            raise ParseError(f"cannot read the statement: {text}")
        negated, guard, opcode, operands = match.groups()
        return Instruction(
            text=text,
            opcode=opcode,
            guard=self._predicate(guard, bool(negated)) if guard else None,
            operands=tuple(self._operand(item) for item in _split(operands)),
        )

    def _predicate(self, name: str, negated: bool) -> Register:
        register = self._register(name)
        if register is None or register.bits != 1:
            raise ParseError(f"{name} is not a declared predicate register")
        return Register(register.name, 1, negated)

    def _register(self, name: str) -> Register | None:
        if name in SPECIAL_REGISTERS:
            return Register(name, 32)
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def _operand(self, text: str) -> Operand:
        if text == "_":
            return None
        if text.startswith("{"):
            return Vector(tuple(self._element(item) for item in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip())
        if text.startswith("!"):
            return self._predicate(text[1:].strip(), negated=True)
        return self._value(text)

    def _element(self, text: str) -> Register | Immediate | None:
        element = self._operand(text)
        if element is not None and not isinstance(element, Register | Immediate):
            raise ParseError(f"a vector holds registers and literals; found {text}")
        return element

    def _address(self, text: str) -> Address:
        match = re.fullmatch(r"([%$\w.]+)\s*(?:\+\s*(-?\w+))?", text)
        if match is None:
            raise ParseError(f"cannot read the address [{text}]")
        return Address(self._value(match.group(1)), int(match.group(2) or "0", 0))

    def _value(self, text: str) -> Register | Immediate | Symbol:
        register = self._register(text)
        if register is not None:
            return register
        if _INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if _DECIMAL.match(text):
            return Immediate(int.from_bytes(struct.pack("<f", float(text)), "little"), 32)
        literal = _HEX_FLOAT.match(text)
        if literal:
            digits = literal.group(1) or literal.group(2)
            return Immediate(int(digits, 16), 4 * len(digits))
        if not re.fullmatch(r"[A-Za-z_$][\w$]*", text):
            raise ParseError(f"{text} is no declared register, literal or name")
        return Symbol(text)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _split(text: str) -> list[str]:
    """Operands between top-level commas and bars (`p|q` is two destinations)."""
    items, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character in ",|" and depth == 0:
            items.append(current.strip())
            current = ""
        else:
            current += character
    return [*items, current.strip()] if current.strip() else items


def variable_layout(variables: Mapping[str, Variable], space: str) -> tuple[dict[str, int], int]:
    """Offsets of the variables of `space` ("shared" or "local"), one after another, and their end.

    An extern array comes last, as the hardware places it.
    """
    offsets, end_bytes = {}, 0
    own = [variable for variable in variables.values() if variable.space == space]
    for variable in sorted(own, key=lambda variable: variable.size_bytes is None):
        end_bytes = -(-end_bytes // variable.align_bytes) * variable.align_bytes
        offsets[variable.name] = end_bytes
        end_bytes += variable.size_bytes or 0
    return offsets, end_bytes
