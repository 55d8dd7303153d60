"""One row of evidence for each case and target: compile it, read its code, execute its PTX."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from verify.aot import compile_case, is_nvidia, read_ptx, report_on
from verify.cases import KernelCase, MismatchError
from verify.model import issue_time_ratio
from verify.ptx import PtxError


@dataclass(frozen=True)
class Row:
    """None stands where a thing does not apply: a target whose code is not executed, a kernel
    without a hot path, a GPU that the model has not.

    `load_bits` and `store_bits` are the payload's on the hot path; `bytes_per_element` are the
    distinct bytes counted while the PTX executes (ptx/counts.py); `issue_time_ratio` is model.py's,
    a ratio of lower bounds and no measurement.
    """

    kernel: str
    variant: str
    target: str
    compiled: bool
    registers: int | None = None
    spills: int | None = None
    load_bits: int | None = None
    store_bits: int | None = None
    instructions_per_element: float | None = None
    bytes_per_element: float | None = None
    floor_bytes_per_element: float | None = None
    issue_time_ratio: float | None = None
    ptx_matches_reference: bool | None = None

    @property
    def name(self) -> str:
        """The case's."""
        return f"{self.kernel} {self.variant}".strip()


def group_key(case: KernelCase) -> str:
    """Equal for cases that are one compiled kernel, of which each looks at another path."""
    source = case.source()
    return repr((source.function.__name__, source.signature, source.constexprs, source.aligned,
                 source.enable_fp_fusion, case.num_warps))  # fmt: skip


def start_worker(cache: str) -> None:
    """Make this process one of several that call `prove`, with Triton's cache in a folder."""
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


def prove(target: str, cases: Sequence[KernelCase]) -> tuple[list[Row], list[str]]:
    """The rows of cases that are one compiled kernel, and what went wrong in words.

    What a case's `check` executes does not depend on the path that the case looks at, so the first
    case's stands for all.
    """
    first = cases[0]
    try:
        compiled = compile_case(first, target)
    except (TritonError, RuntimeError) as error:
        messages = [f"{target} {first.name}: {error}"]
        return [Row(case.kernel, case.variant, target, compiled=False) for case in cases], messages
    messages = []
    matches = None
    if is_nvidia(target):
        ptx = read_ptx(compiled)
        try:
            first.check(ptx)
            matches = True
        except (MismatchError, PtxError) as error:
            messages.append(f"{target} {first.name}: {error}")
            matches = False
    rows = []
    for case in cases:
        report, work = report_on(case, target, compiled), case.work()
        counted = case.moved(ptx) if matches else None
        floor = None if work is None else work.floor_bytes_per_element
        ratio = None
        if report.instructions_per_element is not None and floor is not None:
            ratio = issue_time_ratio(target, report.instructions_per_element, floor)
        row = Row(
            case.kernel,
            case.variant,
            target,
            compiled=True,
            **asdict(report),
            bytes_per_element=None if counted is None else counted.bytes_per_element,
            floor_bytes_per_element=floor,
            issue_time_ratio=ratio,
            ptx_matches_reference=matches,
        )
        rows.append(row)
    return rows, messages


def read_rows(path: Path) -> list[Row]:
    """The rows of a verify.json."""
    data: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**fields) for fields in data["rows"]]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """A verify.json: one line for each row, numbers to four decimals."""
    lines = []
    for row in rows:
        fields = {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in asdict(row).items()
        }
        lines.append(json.dumps(fields))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"rows": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
