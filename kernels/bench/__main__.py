"""Time every kernel beside its alternatives and write the table.

    python -m bench --threads 1 2 --out reports/bench

A row whose result is wrong gets no figure. Exit code 1 where a row is wrong or misses what was
asked of it.
"""

import argparse
import json
import platform
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bench import activations, gradients
from bench.pairs import compare, copy_bandwidth_bytes_s, recycle_host_memory


def measure(device: torch.device, pairs: int) -> list[dict[str, Any]]:
    """One dict a row: names, the paired figures, and what share of copy_'s bandwidth it reached."""
    bandwidth = copy_bandwidth_bytes_s(device)
    measured = []
    for row in chain(gradients.rows(device), activations.rows(device)):
        entry: dict[str, Any] = {
            "name": row.name,
            "beside": row.beside,
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "at_most": row.at_most,
        }
        try:
            row.check()
        except AssertionError as error:
            measured.append(entry | {"wrong": str(error) or "result differs"})
            continue
        paired = compare(row.ours, row.theirs, pairs=pairs, device=device)
        share = None
        if row.moved_bytes is not None:
            share = row.moved_bytes / (paired.ours_ms / 1e3) / bandwidth
        measured.append(entry | asdict(paired) | {"share_of_copy_bandwidth": share, "wrong": None})
        print(_line(measured[-1]), file=sys.stderr, flush=True)
    return measured


def _line(row: dict[str, Any]) -> str:
    threads = "" if row["threads"] is None else f"{row['threads']} | "
    if row["wrong"] is not None:
        return f"| {threads}{row['name']} | {row['beside']} | wrong: {row['wrong']} | | | | |"
    interval = f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}"
    asked, met = "–", ""
    if row["at_most"] is not None:
        asked = f"≤ {row['at_most']:.2f}"
        met = "met" if row["ratio"] <= row["at_most"] else "missed"
    share = row["share_of_copy_bandwidth"]
    return (
        f"| {threads}{row['name']} | {row['beside']} | {row['ratio']:.2f} | {interval} | {asked} | "
        f"{met} | {'–' if share is None else f'{share:.0%}'} |"
    )


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The table as Markdown."""
    threads = "threads | " if rows[0]["threads"] is not None else ""
    columns = [
        "what",
        "beside",
        "ratio of times",
        "95% of the median",
        "asked",
        "",
        "of copy_'s B/s",
    ]
    heading = f"| {threads}{' | '.join(columns)} |"
    rule = "|" + "---|" * (heading.count("|") - 1)
    where = ", ".join(f"{key} {value}" for key, value in machine.items())
    return "\n".join(
        [
            "# Kernels beside their alternatives",
            "",
            f"Made by `{' '.join(['python -m bench', *sys.argv[1:]])}` on {where}.",
            "Each ratio is the median of pairs run in turns: ours over theirs, below 1 is faster.",
            "A row is timed only after its result was checked. Freed host memory is recycled.",
            "",
            heading,
            rule,
            *map(_line, rows),
            "",
        ]
    )


def _machine(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        name = next(named, platform.machine())
    return {"device": name, "torch": torch.__version__, "Python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="on the CPU, in turn")
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path("reports/bench"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        recycle_host_memory()
    rows: list[dict[str, Any]] = []
    for threads in arguments.threads if device.type == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        rows += measure(device, arguments.pairs)
    machine = _machine(device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"kernels-{device.type}"
    report = {"machine": machine, "argv": sys.argv[1:], "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(rows, machine))
    bad = [row for row in rows if row["wrong"] is not None]
    missed = [r for r in rows if r["wrong"] is None and r["at_most"] and r["ratio"] > r["at_most"]]
    print(f"{stem}.md: {len(rows)} rows, {len(bad)} wrong, {len(missed)} missed", file=sys.stderr)
    sys.exit(1 if bad or missed else 0)


if __name__ == "__main__":
    main()
