"""What a row of the table is."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.pairs import Work


@dataclass(frozen=True)
class Row:
    """`ours` beside `theirs`, once `check` has passed.

    check         raises AssertionError where our result is wrong: the row then gets no figure
    moved_bytes   what `ours` must read and write at least; None where bytes are not the point
    at_most       the ratio of times that was asked for; None where the row only informs
    """

    name: str
    beside: str
    ours: Work
    theirs: Work
    check: Callable[[], None]
    moved_bytes: int | None = None
    at_most: float | None = None
