"""Budgets fail where they should, and the record changes only with a reason."""

from dataclasses import replace
from pathlib import Path

import pytest

from verify import budget
from verify.activations import QuantizeCase
from verify.budget import Budgets, Figure, Missed, judge, record
from verify.cases import KernelCase
from verify.model import GPUS, issue_time_ratio
from verify.rows import Row
from verify.walks import WalkCase

CASE = QuantizeCase(dtype="bf16", bits=4)
ROW = Row(
    "quantize",
    CASE.variant,
    "sm_90",
    compiled=True,
    registers=80,
    spills=0,
    load_bits=128,
    store_bits=128,
    instructions_per_element=14.0,
    bytes_per_element=2.54,
    floor_bytes_per_element=2.53125,
    issue_time_ratio=0.65,
    ptx_matches_reference=True,
)
BUDGETS = Budgets(
    {"quantize": 15.0, "quantize portable": 18.0, "gradient": 7.5},
    {CASE.name: {"sm_90": Figure(80, 14.0)}},
    {CASE.name: "first"},
)


def _problems(row: Row, budgets: Budgets = BUDGETS, case: KernelCase = CASE) -> list[str]:
    return [problem.message for problem in judge([case], [row], budgets)]


def test_a_row_within_its_budget_passes() -> None:
    assert _problems(ROW) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spills": 2}, "2 accesses to spilled registers"),
        ({"load_bits": 64}, "loads are 64 bits wide; 128 are needed"),
        ({"store_bits": None}, "stores are None bits wide; 128 are needed"),
        ({"bytes_per_element": 2.57}, "2.5700 bytes per element counted; the floor is 2.5312"),
        ({"bytes_per_element": 2.49}, "2.4900 bytes per element counted"),
        ({"issue_time_ratio": 1.01}, "issue time is 1.01 of bandwidth time on H100; 1.0 is"),
        ({"ptx_matches_reference": False}, "disagrees with the reference"),
        ({"registers": 89}, "89 registers, 14.00 instructions; on record is 80 and 14.00"),
        ({"instructions_per_element": 12.5}, "on record is 80 and 14.00"),
        ({"compiled": False}, "does not compile"),
    ],
)
def test_what_is_out_of_budget_fails(changes: dict[str, object], message: str) -> None:
    (problem,) = _problems(replace(ROW, **changes))
    assert message in problem


def test_ten_percent_is_the_limit_either_way() -> None:
    for instructions, fails in ((14.9, False), (12.7, False), (12.59, True)):
        assert bool(_problems(replace(ROW, instructions_per_element=instructions))) == fails


def test_the_ceiling_holds_on_sm_90_whatever_is_on_record() -> None:
    row = replace(ROW, instructions_per_element=15.1)
    budgets = replace(BUDGETS, figures={CASE.name: {"sm_90": Figure(80, 15.1)}})
    assert _problems(row, budgets) == ["15.10 instructions per element; 15.0 are allowed"]
    elsewhere = replace(row, target="sm_80")
    budgets = replace(BUDGETS, figures={CASE.name: {"sm_80": Figure(80, 15.1)}})
    assert _problems(elsewhere, budgets) == []


def test_a_portable_twin_has_its_own_ceiling_and_no_time_bar() -> None:
    twin = replace(CASE, assembly=0)
    row = replace(ROW, variant=twin.variant, instructions_per_element=18.1, issue_time_ratio=1.2)
    budgets = replace(BUDGETS, figures={twin.name: {"sm_90": Figure(80, 18.1)}})
    assert _problems(row, budgets, twin) == ["18.10 instructions per element; 18.0 are allowed"]


def test_unaligned_data_has_no_ceiling() -> None:
    case = replace(CASE, wide=False)
    row = replace(
        ROW, variant=case.variant, instructions_per_element=40.0, load_bits=16, issue_time_ratio=2.0
    )
    budgets = replace(BUDGETS, figures={case.name: {"sm_90": Figure(80, 40.0)}})
    assert _problems(row, budgets, case) == []


def test_reading_alone_needs_no_wide_store() -> None:
    case = WalkCase(op="grad_stats", tensors="fp32")
    row = replace(
        ROW, kernel="grad_stats", variant="fp32", store_bits=None, instructions_per_element=5.0
    )
    budgets = replace(BUDGETS, figures={case.name: {"sm_90": Figure(80, 5.0)}})
    assert _problems(row, budgets, case) == []


def test_a_missed_bar_passes_with_a_reason_and_must_really_be_missed() -> None:
    row = replace(ROW, instructions_per_element=15.1)
    excuse = Missed("instructions", "sm_90", (CASE.name,), "fp16 unpacks with two instructions")
    budgets = replace(BUDGETS, figures={CASE.name: {"sm_90": Figure(80, 15.1)}}, missed=(excuse,))
    assert _problems(row, budgets) == []
    (stale,) = _problems(ROW, budgets)
    assert "meets the bar that budgets.toml says it misses" in stale
    (other,) = _problems(replace(row, spills=1), budgets)
    assert "spilled" in other


def test_nothing_excuses_a_wrong_result() -> None:
    excuses = tuple(
        Missed(bar, "sm_90", (CASE.name,), "no")
        for bar in ("spills", "width", "instructions", "issue time", "bytes")
    )
    wrong = replace(ROW, ptx_matches_reference=False)
    assert any("disagrees" in p for p in _problems(wrong, replace(BUDGETS, missed=excuses)))


def test_recording_keeps_what_changed_little() -> None:
    """Else small changes would add up unseen."""
    new = replace(ROW, variant="new", instructions_per_element=3.0)
    after = record([replace(ROW, instructions_per_element=14.5), new], BUDGETS, "a new kernel")
    assert after.figures[ROW.name] == {"sm_90": Figure(80, 14.0)}
    assert after.figures[new.name] == {"sm_90": Figure(80, 3.0)}
    assert after.reasons == {ROW.name: "first", new.name: "a new kernel"}
    after = record([replace(ROW, instructions_per_element=10.0)], BUDGETS, "fewer permutes")
    assert after.figures == {ROW.name: {"sm_90": Figure(80, 10.0)}}
    assert after.reasons == {ROW.name: "fewer permutes"}


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    budgets = replace(
        BUDGETS,
        figures={CASE.name: {"sm_90": Figure(80, 14.0)}, "sum": {"gfx942": Figure(12, None)}},
        reasons={CASE.name: 'says "why" – twice', "sum": "first"},
        missed=(Missed("spills", "sm_80", (CASE.name, "sum"), "a reason"),),
    )
    path = tmp_path / "budgets.toml"
    budget.write(budgets, path)
    assert budget.read(path) == budgets


def test_the_committed_file_is_in_its_own_form(tmp_path: Path) -> None:
    path = tmp_path / "budgets.toml"
    budget.write(budget.read(), path)
    assert path.read_text() == budget.PATH.read_text()


def test_the_model_on_paper() -> None:
    """The example of model.py: 0.487 ps of issuing over 0.755 ps of moving."""
    ratio = issue_time_ratio("sm_90", 14, 2.53)
    assert ratio == pytest.approx((14 / (132 * 4 * 32 * 1.7e9)) / (2.53 / 3.35e12), rel=1e-12)
    assert ratio == pytest.approx(0.645, abs=5e-4)
    assert issue_time_ratio("sm_120", 14, 2.53) is None
    assert {gpu.name: gpu.largest_ratio for gpu in GPUS.values()} == {
        "A100": 1.0,
        "H100": 1.0,
        "B200": 1.3,
        "MI300X": None,
    }
