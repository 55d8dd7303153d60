"""What can go wrong while PTX is read or executed."""

# Named for what happened to the program, as a GPU reports it, so not all end in Error.
# ruff: noqa: N818


class PtxError(Exception):
    """Any failure of the PTX executor that is the program's, not the caller's."""


class ParseError(PtxError):
    """The text is not PTX that this package reads."""


class UnsupportedInstruction(PtxError):
    """An opcode, modifier or operand form that this package does not execute."""


class MemoryFault(PtxError):
    """An access out of bounds, misaligned, or a store to read-only memory."""


class UninitialisedRegister(PtxError):
    """A register was read by a thread that never wrote it."""


class DivergenceError(PtxError):
    """Some threads of a warp or block are at an instruction that needs all of them."""


class Trap(PtxError):
    """A thread executed `trap`, as a failed device-side assertion does."""
