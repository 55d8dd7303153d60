"""The table in kernels/README.md, made of verify.json and budgets.toml."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from verify.budget import Budgets
from verify.model import GPUS
from verify.rows import Row

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- begin: made by `make verify` -->"
END = "<!-- end -->"
_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
_HEAD = """\
One line for each kernel and variant. **PTX**: executed on the CPU for sm_80, sm_90, sm_100 and
sm_120, it equals the reference. **Bytes**: counted while executing, and the floor, per element.
**Registers**, **load/store** (bits of the payload's accesses) and **instructions** per element are
sm_90's; instructions on sm_80 and sm_100 follow. **Spills**: of all six targets together. **Issue ÷
bandwidth time**: bounds from a static model (`verify/model.py`), lower bounds on time for {gpus};
never a measurement.
"""
_COLUMNS = (
    "kernel",
    "PTX",
    "bytes / floor",
    "registers",
    "load/store",
    "instructions (sm_80, sm_100)",
    "issue ÷ bandwidth time",
    "spills",
)


def render(rows: Sequence[Row], budgets: Budgets) -> str:
    """The text between the markers."""
    names = list(dict.fromkeys(row.name for row in rows))
    by_place = {(row.name, row.target): row for row in rows}
    gpus = ", ".join(gpu.name for gpu in GPUS.values())
    lines = [_HEAD.format(gpus=gpus), _line(_COLUMNS), _line("---" for _ in _COLUMNS)]
    for name in names:
        here = [by_place[name, t] for t in _TARGETS if (name, t) in by_place]
        lines.append(_line(_cells(name, {row.target: row for row in here})))
    lines += ["", "Bars that are missed:", ""]
    for missed in budgets.missed:
        cases = ", ".join(f"`{name}`" for name in missed.cases)
        lines.append(f"- {missed.bar}, {missed.target}: {cases}. {missed.reason}")
    if not budgets.missed:
        lines[-2:] = ["No bar is missed."]
    return "\n".join(lines) + "\n"


def _cells(name: str, rows: dict[str, Row]) -> list[str]:
    def of(target: str, column: str, digits: int) -> str:
        value = getattr(rows[target], column) if target in rows else None
        return "–" if value is None else f"{value:.{digits}f}"

    executed = [
        r.ptx_matches_reference for r in rows.values() if r.ptx_matches_reference is not None
    ]
    matches = ("equal" if all(executed) else "DIFFERS") if executed else "–"
    on_sm_90, on_sm_80, on_sm_100 = (
        of(target, "instructions_per_element", 1) for target in ("sm_90", "sm_80", "sm_100")
    )
    floor = next(iter(rows.values())).floor_bytes_per_element
    return [
        f"`{name}`",
        matches,
        f"{of('sm_90', 'bytes_per_element', 3)} / " + ("–" if floor is None else f"{floor:.3f}"),
        of("sm_90", "registers", 0),
        f"{of('sm_90', 'load_bits', 0)}/{of('sm_90', 'store_bits', 0)}",
        f"{on_sm_90} ({on_sm_80}, {on_sm_100})",
        ", ".join(of(target, "issue_time_ratio", 2) for target in GPUS),
        str(sum(row.spills or 0 for row in rows.values())),
    ]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def between_markers(text: str) -> str:
    """What stands in `text` between BEGIN and END."""
    return text.split(BEGIN)[1].split(END)[0]


def insert(rows: Sequence[Row], budgets: Budgets, path: Path = README) -> None:
    """Put the table where `path` has the markers. Raises ValueError where it has not."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} must hold one {BEGIN} and one {END}; add them")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    table = render(rows, budgets)
    path.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")
