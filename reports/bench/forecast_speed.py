"""What a forecast costs: CPU seconds and memory of `estimate` and of the largest batch everywhere.

`python reports/bench/forecast_speed.py` writes forecast-speed.md and .json beside itself. Each
figure is a fresh process with one thread; loading the libraries and the model's code is apart.
Seconds are the process's own CPU time, so that it matters little what else the machine does; memory
is the most that the process had resident, libraries included.

Needs transformers and torchvision.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

HERE = Path(__file__).parent
GPU = "a100-40gb"
EVERYWHERE_BAR_S = 30.0


@dataclass(frozen=True)
class Case:
    """A TARGET at a batch size, and the most that its forecast may take; memory None is no bar."""

    name: str
    target: str
    batch_size: int
    bar_s: float
    bar_bytes: int | None = None


@dataclass(frozen=True)
class Cost:
    """What one process took. `loaded_bytes`: its most memory before the forecast began."""

    seconds: float
    loaded_bytes: int
    peak_bytes: int


CASES = {
    case.name: case
    for case in (
        Case("GPT-2 small", "hf:gpt2", 8, 6.0),
        Case("ResNet-50", "torchvision:resnet50", 32, 6.0),
        Case("ViT-B", "hf:vit-base", 32, 6.0),
        Case("Llama-7B, bf16", "hf:llama-7b?precision=bf16", 1, 15.0, 10**9),
    )
}


def cost(case: Case, everywhere: bool) -> Cost:
    """Forecast `case` in this process: on one GPU, or the largest batch on all of the table."""
    import torch

    # Beside reports/bench; imports torchvision beside whatever torch is here.
    sys.path.insert(0, str(HERE.parent / "validation"))
    import torchvision_operators  # noqa: F401

    from dpmem.forecast import estimate, forecast_of
    from dpmem.targets import load_job
    from dpmem_profiling.gpus import GPUS

    torch.set_num_threads(1)
    job = load_job(case.target)
    loaded_bytes, start_s = _peak_bytes(), process_time()
    if everywhere:
        forecast = forecast_of(job)
        for gpu in GPUS.values():
            forecast.largest_batch(gpu)
    else:
        estimate(job, batch_size=case.batch_size, gpu=GPU)
    return Cost(process_time() - start_s, loaded_bytes, _peak_bytes())


def _peak_bytes() -> int:
    # Linux counts KiB here.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def in_a_process(name: str, everywhere: bool) -> Cost:
    """`cost` in a fresh process."""
    command = [sys.executable, __file__, "--only", name, *(["--everywhere"] if everywhere else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """All cases, `--repeats` processes each: medians and extremes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--everywhere", action="store_true")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(asdict(cost(CASES[options.only], options.everywhere))))
        return
    rows = []
    for case in CASES.values():
        for everywhere in (False, True):
            costs = [in_a_process(case.name, everywhere) for _ in range(options.repeats)]
            seconds = [cost.seconds for cost in costs]
            peak_bytes = max(cost.peak_bytes for cost in costs)
            bar_s = EVERYWHERE_BAR_S if everywhere else case.bar_s
            bar_bytes = None if everywhere else case.bar_bytes
            rows.append(
                {
                    "model": case.name,
                    "target": case.target,
                    "what": "largest batch, all GPUs" if everywhere else f"estimate, {GPU}",
                    "batch_size": None if everywhere else case.batch_size,
                    "cpu_s": statistics.median(seconds),
                    "cpu_s_all": seconds,
                    "bar_s": bar_s,
                    "peak_bytes": peak_bytes,
                    "loaded_bytes": max(cost.loaded_bytes for cost in costs),
                    "bar_bytes": bar_bytes,
                    "within": max(seconds) <= bar_s
                    and (bar_bytes is None or peak_bytes <= bar_bytes),
                }
            )
            print(rows[-1], flush=True)
    facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "repeats": options.repeats}
    (HERE / "forecast-speed.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    lines = [
        "# What a forecast costs",
        "",
        f"Made by `forecast_speed.py` on {facts['machine']}: a fresh process for each of",
        f"{options.repeats} runs, one thread. Seconds of CPU time, median and extremes, without",
        "imports. Memory: the most that was resident, and how much of that before it began.",
        "",
        "| model | what | CPU s | least–most | bar s | MB | MB loaded | bar MB | within |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        seconds = row["cpu_s_all"]
        bar_mb = "–" if row["bar_bytes"] is None else f"{row['bar_bytes'] / 1e6:.0f}"
        lines.append(
            f"| {row['model']} | {row['what']} | {row['cpu_s']:.1f} "
            f"| {min(seconds):.1f}–{max(seconds):.1f} | {row['bar_s']:.0f} "
            f"| {row['peak_bytes'] / 1e6:.0f} | {row['loaded_bytes'] / 1e6:.0f} | {bar_mb} "
            f"| {'yes' if row['within'] else '**no**'} |"
        )
    (HERE / "forecast-speed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
