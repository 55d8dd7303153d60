"""The committed evidence is whole, meets its budgets, and is what the README shows."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from verify import budget, table
from verify.aot import TARGETS
from verify.cases import KernelCase
from verify.registry import cases_for
from verify.rows import Row, group_key, read_rows, write_rows

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "reports" / "kernels" / "verify.json"
FIELDS = [
    "kernel",
    "variant",
    "target",
    "compiled",
    "registers",
    "spills",
    "load_bits",
    "store_bits",
    "instructions_per_element",
    "bytes_per_element",
    "floor_bytes_per_element",
    "issue_time_ratio",
    "ptx_matches_reference",
]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return read_rows(REPORT)


def _cases() -> list[tuple[str, KernelCase]]:
    return [(target, case) for target in TARGETS for case in cases_for(target)]


def test_the_report_has_a_row_for_every_case_and_target(rows: list[Row]) -> None:
    want = [(target, case.name) for target, case in _cases()]
    assert [(row.target, row.name) for row in rows] == want
    assert max(Counter(want).values()) == 1


def test_the_report_has_the_fields_it_promises() -> None:
    data = json.loads(REPORT.read_text(encoding="utf-8"))
    assert list(data) == ["rows"]
    assert all(list(row) == FIELDS for row in data["rows"])


def test_nulls_stand_where_a_thing_does_not_apply(rows: list[Row]) -> None:
    for row in rows:
        nvidia = row.target.startswith("sm_")
        assert (row.ptx_matches_reference is None) == (not nvidia), row
        assert (row.bytes_per_element is None) == (not nvidia or row.kernel == "sum"), row
        in_model = row.target not in ("sm_120", "gfx1100")
        has_path = row.instructions_per_element is not None
        assert (row.issue_time_ratio is not None) == (in_model and has_path), row


def test_the_report_meets_the_budgets(rows: list[Row]) -> None:
    cases = [case for _, case in _cases()]
    assert [str(problem) for problem in budget.judge(cases, rows, budget.read())] == []


def test_excuses_and_figures_are_of_cases_that_exist(rows: list[Row]) -> None:
    budgets, known = budget.read(), {(row.target, row.name) for row in rows}
    excused = {(m.target, name) for m in budgets.missed for name in m.cases}
    figures = {(target, name) for name, by in budgets.figures.items() for target in by}
    assert excused <= known
    assert figures == known


def test_the_readme_shows_the_report(rows: list[Row]) -> None:
    text = table.README.read_text(encoding="utf-8")
    assert table.between_markers(text) == "\n" + table.render(rows, budget.read())


def test_the_table_tells_what_went_wrong(rows: list[Row]) -> None:
    row = next(row for row in rows if row.target == "sm_90")
    bad = replace(row, ptx_matches_reference=False, spills=3)
    excuse = budget.Missed("spills", "sm_90", (row.name,), "the reason why")
    text = table.render([bad], budget.Budgets({}, missed=(excuse,)))
    assert "DIFFERS" in text
    assert f"- spills, sm_90: `{row.name}`. the reason why" in text
    assert "never a measurement" in text


def test_rows_are_read_as_they_were_written(rows: list[Row], tmp_path: Path) -> None:
    write_rows(rows[:3], tmp_path / "new" / "verify.json")
    assert read_rows(tmp_path / "new" / "verify.json") == rows[:3]


def test_the_markers_must_be_there(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="must hold one"):
        table.insert([], budget.Budgets({}), readme)


def test_cases_that_are_one_kernel_stand_together() -> None:
    """What is compiled and checked once must be neighbours in the list."""
    for target in TARGETS:
        keys = [group_key(case) for case in cases_for(target)]
        starts = [
            key for previous, key in zip([None, *keys], keys, strict=False) if key != previous
        ]
        assert len(starts) == len(set(starts)), target
