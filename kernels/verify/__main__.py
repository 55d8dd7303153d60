"""Prove every kernel as far as a machine without a GPU can.

    python -m verify [--record "REASON"]

compiles every case for every target, executes the PTX on the CPU, holds machine code and traffic to
budgets.toml, and writes reports/kernels/verify.json and the table in kernels/README.md. It ends
with status 1 if anything fails a requirement. --record accepts the figures as they are now, with
the reason for the change. TRITON_INTERPRET must be unset.
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from verify import budget, table
from verify.aot import TARGETS
from verify.registry import cases_for
from verify.rows import Row, group_key, prove, read_rows, start_worker, write_rows

REPORT = Path(__file__).parents[2] / "reports" / "kernels" / "verify.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m verify", description=__doc__)
    parser.add_argument("--record", metavar="REASON", help="accept today's figures, and why")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    started_s = time.monotonic()
    # Neighbours that are one compiled kernel are proven together.
    work = [
        (target, list(group))
        for target in TARGETS
        for _, group in itertools.groupby(cases_for(target), key=group_key)
    ]
    targets, groups = [target for target, _ in work], [group for _, group in work]
    rows: list[Row] = []
    messages: list[str] = []
    workers = len(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (cache,)) as pool,
    ):
        for done, (new_rows, new_messages) in enumerate(pool.map(prove, targets, groups), 1):
            rows += new_rows
            messages += new_messages
            if done % 50 == 0 or done == len(groups):
                elapsed_s = time.monotonic() - started_s
                print(f"{done} of {len(groups)} kernels, {elapsed_s:.0f} s", flush=True)
    budgets = budget.read()
    if arguments.record is not None:
        budgets = budget.record(rows, budgets, arguments.record)
        budget.write(budgets)
    cases = [case for group in groups for case in group]
    problems = budget.judge(cases, rows, budgets)
    write_rows(rows, REPORT)
    # From the report, whose numbers are rounded: rounded again, others might differ from them.
    table.insert(read_rows(REPORT), budgets)
    for line in [*messages, *problems]:
        print(line)
    print(f"{len(rows)} rows, {len(problems)} problems, {time.monotonic() - started_s:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
