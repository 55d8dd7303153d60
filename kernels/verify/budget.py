"""The bars that a kernel's machine code and traffic are held to, and the figures on record.

budgets.toml holds, as a person reads and changes it:

[ceilings]   instructions per element that the hot path may cost on sm_90, by kind of kernel
[figures]    for every case and target [registers, instructions per element] as last accepted, and
             why they are what they are. A figure more than TOLERANCE away from them, up or down,
             fails until the record is changed: `python -m verify --record "REASON"`.
[[missed]]   bars that are missed, with the reason. A kernel over a bar fails without an entry here,
             and an entry without such a kernel fails too. The table shows them.

What nothing excuses: code that does not compile, and PTX that disagrees with its reference.
"""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from verify.cases import KernelCase
from verify.model import GPUS
from verify.rows import Row

PATH = Path(__file__).with_name("budgets.toml")
TOLERANCE = 0.1
# Counted bytes may differ from the floor by this part.
BYTES_TOLERANCE = 0.01
CEILING_TARGET = "sm_90"

Bar = Literal["spills", "width", "instructions", "issue time", "bytes"]
_HEADER = """\
# The kernels' budgets: verify/budget.py says what this means and when it has to change.
# Figures are [registers per thread, instructions per element on the hot path].
"""


@dataclass(frozen=True)
class Figure:
    """What is on record of one case on one target; None where there is no hot path to count."""

    registers: int
    instructions_per_element: float | None

    def is_near(self, row: Row) -> bool:
        """Whether `row` is within TOLERANCE."""
        pairs: tuple[tuple[float | None, float | None], ...] = (
            (self.registers, row.registers),
            (self.instructions_per_element, row.instructions_per_element),
        )
        return all(
            (old is None) == (new is None)
            and (old is None or new is None or abs(new - old) <= TOLERANCE * old)
            for old, new in pairs
        )


@dataclass(frozen=True)
class Missed:
    """`cases` miss `bar` on `target`, for a reason."""

    bar: Bar
    target: str
    cases: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Budgets:
    """The contents of budgets.toml. `figures` is by case name, then target."""

    ceilings: dict[str, float]
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    missed: tuple[Missed, ...] = ()

    def excused(self, bar: Bar, row: Row) -> str | None:
        """The reason on record for missing `bar`, if there is one."""
        for missed in self.missed:
            if (missed.bar, missed.target) == (bar, row.target) and row.name in missed.cases:
                return missed.reason
        return None


@dataclass(frozen=True)
class Problem:
    """What `row` fails. `bar` is None for what nothing excuses."""

    row: Row
    bar: Bar | None
    message: str

    def __str__(self) -> str:
        return f"{self.row.target} {self.row.name}: {self.message}"


def missed_bars(case: KernelCase, row: Row, budgets: Budgets) -> list[Problem]:
    """The bars that a compiled row misses, excused or not."""
    problems: list[Problem] = []

    def require(holds: bool, bar: Bar, message: str) -> None:
        if not holds:
            problems.append(Problem(row, bar, message))

    nvidia = row.target.startswith("sm_")
    require(row.spills == 0, "spills", f"{row.spills} accesses to spilled registers; 0 are allowed")
    work = case.work()
    if nvidia and work is not None:
        for what, bits, least in (
            ("loads", row.load_bits, work.load_bits),
            ("stores", row.store_bits, work.store_bits),
        ):
            needed = least is not None and (what == "loads" or work.written_bytes is not None)
            message = f"the payload's {what} are {bits} bits wide; {least} are needed"
            require(not needed or (bits or 0) >= (least or 0), "width", message)
    instructions, ceiling = row.instructions_per_element, budgets.ceilings.get(case.bar or "")
    if row.target == CEILING_TARGET and ceiling is not None:
        message = f"{_rounded(instructions)} instructions per element; {ceiling} are allowed"
        require(instructions is not None and instructions <= ceiling, "instructions", message)
    gpu = GPUS.get(row.target)
    launched = case.bar is not None and not (case.portable and nvidia)
    if gpu is not None and gpu.largest_ratio is not None and launched and work is not None:
        ratio, limit = row.issue_time_ratio, gpu.largest_ratio
        message = (
            f"issue time is {_rounded(ratio)} of bandwidth time on {gpu.name}; {limit} is allowed"
        )
        require(ratio is not None and ratio <= limit, "issue time", message)
    if row.bytes_per_element is not None and row.floor_bytes_per_element is not None:
        excess = row.bytes_per_element / row.floor_bytes_per_element - 1
        message = f"{row.bytes_per_element:.4f} bytes per element counted; the floor is "
        message += f"{row.floor_bytes_per_element:.4f}"
        require(abs(excess) <= BYTES_TOLERANCE, "bytes", message)
    return problems


def judge(cases: Sequence[KernelCase], rows: Sequence[Row], budgets: Budgets) -> list[Problem]:
    """Everything that fails, stale excuses included; `cases` are the rows' cases, in order."""
    problems: list[Problem] = []
    missing: set[tuple[str, str, str]] = set()
    for case, row in zip(cases, rows, strict=True):
        if not row.compiled:
            problems.append(Problem(row, None, "does not compile"))
            continue
        if row.ptx_matches_reference is False:
            problems.append(Problem(row, None, "the PTX disagrees with the reference"))
        for problem in missed_bars(case, row, budgets):
            assert problem.bar is not None
            missing.add((problem.bar, row.target, row.name))
            if budgets.excused(problem.bar, row) is None:
                problems.append(problem)
        figure = budgets.figures.get(row.name, {}).get(row.target)
        if figure is None or not figure.is_near(row):
            now = (
                f"{row.registers} registers, {_rounded(row.instructions_per_element)} instructions"
            )
            was = "nothing" if figure is None else f"{figure.registers} and "
            was += "" if figure is None else _rounded(figure.instructions_per_element)
            fix = 'accept with python -m verify --record "REASON"'
            problems.append(Problem(row, None, f"{now}; on record is {was}; {fix}"))
    known = {(row.target, row.name) for row in rows}
    for missed in budgets.missed:
        for name in missed.cases:
            stale = (missed.bar, missed.target, name) not in missing
            if stale and (missed.target, name) in known:
                row = next(r for r in rows if (r.target, r.name) == (missed.target, name))
                message = f"meets the bar that budgets.toml says it misses ({missed.bar})"
                problems.append(Problem(row, None, message))
    return problems


def _rounded(value: float | None) -> str:
    return "no" if value is None else f"{value:.2f}"


def record(rows: Sequence[Row], budgets: Budgets, reason: str) -> Budgets:
    """`budgets` with the figures of `rows`: those of new cases, and of changed ones.

    Changed means by more than TOLERANCE: smaller changes leave the record as it is, so that they
    cannot add up unseen. Cases and targets that are not among the rows leave the record.
    """
    figures: dict[str, dict[str, Figure]] = {}
    reasons: dict[str, str] = {}
    for row in rows:
        if row.registers is None:
            continue
        old = budgets.figures.get(row.name, {}).get(row.target)
        figure = old
        if old is None or not old.is_near(row):
            per_element = row.instructions_per_element
            figure = Figure(row.registers, None if per_element is None else round(per_element, 2))
            reasons[row.name] = reason
        assert figure is not None
        figures.setdefault(row.name, {})[row.target] = figure
    for name in figures:
        reasons.setdefault(name, budgets.reasons.get(name, reason))
    return replace(budgets, figures=figures, reasons=reasons)


def read(path: Path = PATH) -> Budgets:
    """Raises KeyError or TypeError for a file that is not as described above."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    figures: dict[str, dict[str, Figure]] = {}
    reasons: dict[str, str] = {}
    for name, entry in data.get("figures", {}).items():
        reasons[name] = entry.pop("reason")
        figures[name] = {
            target: Figure(values[0], values[1] if len(values) > 1 else None)
            for target, values in entry.items()
        }
    missed = tuple(
        Missed(entry["bar"], entry["target"], tuple(entry["cases"]), entry["reason"])
        for entry in data.get("missed", ())
    )
    return Budgets(data["ceilings"], figures, reasons, missed)


def write(budgets: Budgets, path: Path = PATH) -> None:
    """The inverse of `read`, in an order that does not change: what differs is what changed."""
    # A JSON string is a TOML basic string.
    quote = json.dumps
    lines = [_HEADER, "[ceilings]"]
    lines += [f"{quote(kind)} = {ceiling}" for kind, ceiling in budgets.ceilings.items()]
    for missed in budgets.missed:
        lines += [
            "",
            "[[missed]]",
            f"bar = {quote(missed.bar)}",
            f"target = {quote(missed.target)}",
        ]
        lines += [f"reason = {quote(missed.reason, ensure_ascii=False)}", "cases = ["]
        lines += [f"    {quote(name)}," for name in missed.cases]
        lines.append("]")
    for name, by_target in budgets.figures.items():
        lines += ["", f"[figures.{quote(name)}]"]
        lines.append(f"reason = {quote(budgets.reasons[name], ensure_ascii=False)}")
        for target, figure in by_target.items():
            values = [figure.registers, figure.instructions_per_element]
            kept = ", ".join(str(value) for value in values if value is not None)
            lines.append(f"{target} = [{kept}]")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
