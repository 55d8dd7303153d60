"""The `dpmem` command. Exit 0: done; 1: a finding, such as "does not fit"; 2: bad input."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dpmem import __version__
from dpmem.failures import is_out_of_memory
from dpmem.finder import find_batch_size
from dpmem.forecast import estimate_command, forecast_of
from dpmem.jobs import (
    checked_budget,
    default_device,
    measure_job,
)
from dpmem.options import Options
from dpmem.replay_command import replay_command
from dpmem.targets import TargetError, describe, load_job
from dpmem.terminal import (
    BAD_INPUT,
    FINDING,
    ByteSize,
    as_json,
    finding,
    run_job,
    say,
    two_columns,
)
from dpmem.top import top
from dpmem_profiling import (
    BatchSizeResult,
    MemoryRecord,
    Probe,
    format_bytes,
    terminal_table,
    write_report,
)
from dpmem_profiling.estimate import outside_bytes_of
from dpmem_profiling.gpus import gpu as gpu_named
from dpmem_profiling.report.batch_words import batch_size_rows, probe_words

if TYPE_CHECKING:
    from dpmem.demo import DemoResult

Result = TypeVar("Result")


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(__version__, prog_name="dpmem")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train the biggest batch that fits, and know beforehand what fits."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


cli.add_command(estimate_command)
cli.add_command(replay_command)
cli.add_command(top)


@cli.command()
@click.option(
    "--budget", type=ByteSize(), default="192MiB", show_default=True, help="For the search."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("reports/demo"),
    show_default=True,
)
@as_json
def demo(budget: int, out: Path, as_json: bool) -> int:
    """Wrap a small GPT on two ranks, find its largest batch, write a report."""
    # Imported here: torch.multiprocessing and the model are the demo's alone.
    from dpmem.demo import RankFailed, run_demo

    def run(progress: Callable[[str, float], None]) -> "DemoResult":
        return run_demo(out, budget, progress)

    try:
        result = _with_progress("dpmem demo", run)
    except RankFailed as error:
        if error.rank_traceback:
            click.echo(error.rank_traceback, err=True)
        raise click.ClickException(str(error)) from error
    except RuntimeError as error:
        raise click.ClickException(f"the demo {describe(error)}") from error
    if as_json:
        click.echo(json.dumps(_demo_json(result), indent=2))
    else:
        _print_demo(result)
    return 0 if result.too_small is None else finding(result.too_small)


def _print_demo(result: "DemoResult") -> None:
    console = Console()
    console.print(terminal_table([result.ddp.record, result.dpmem.record]))
    ratio = result.dpmem.record.peak_allocated_bytes / result.ddp.record.peak_allocated_bytes
    budget = format_bytes(result.dpmem_batch.limit_bytes)
    rows = [
        ("precision", f"{result.precision}: {result.precision_reason}"),
        ("loss, DDP", f"{result.ddp.losses[0]:.4f} -> {result.ddp.losses[-1]:.4f}"),
        ("loss, dpmem", f"{result.dpmem.losses[0]:.4f} -> {result.dpmem.losses[-1]:.4f}"),
        ("step, DDP", f"{result.ddp.step_s:.3f} s"),
        ("step, dpmem", f"{result.dpmem.step_s:.3f} s"),
        ("peak, dpmem / DDP", f"{ratio:.2f}"),
        (f"largest safe batch in {budget}, plain", _answer(result.plain_batch)),
        ("the same, dpmem", _answer(result.dpmem_batch)),
        ("report", str(result.files.html)),
        ("took", f"{result.seconds:.0f} s"),
    ]
    console.print(two_columns(rows))


@cli.command("find-batch-size")
@click.argument("target")
@click.option("--budget", type=ByteSize(), help="Bytes a step may hold. Needed without a GPU.")
@click.option("--gpu", help="Predict for this GPU, which need not be here, such as a100-40gb.")
@click.option(
    "--multiple-of",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Answer in multiples: of 8, of the number of ranks.",
)
@click.option(
    "--safety",
    type=click.FloatRange(0, 1, max_open=True),
    help="The fraction of the limit to keep free. [2 %, or what fragments and others take]",
)
@click.option("--max-batch", type=click.IntRange(min=1), default=2**20, help="Try no larger batch.")
@click.option(
    "--max-step-s",
    type=click.FloatRange(0, min_open=True),
    help="No batch whose step takes more seconds.",
)
@click.option(
    "--timed-batches",
    type=click.IntRange(min=0),
    default=0,
    help="Time so many more batches below the safe one, to know which is fastest.",
)
@click.option(
    "--isolate",
    is_flag=True,
    help="Try each batch in a process of its own. On Linux no budget is needed then.",
)
@as_json
def find_batch_size_command(
    target: str,
    budget: int | None,
    gpu: str | None,
    multiple_of: int,
    safety: float | None,
    max_batch: int,
    max_step_s: float | None,
    timed_batches: int,
    isolate: bool,
    as_json: bool,
) -> int:
    """The largest memory-safe batch of TARGET (file.py:function), by a few real steps."""
    options = Options(safety, max_batch, max_step_s, multiple_of, timed_batches, gpu, isolate)
    if gpu is not None and budget is not None:
        raise click.UsageError("--gpu knows its memory; received --budget, too; give one of them")
    job = load_job(target)
    # What is wrong here is the command's fault, not the job's.
    try:
        options.checked(job)
    except TypeError as error:
        raise click.UsageError(str(error)) from error
    if gpu is not None:
        gpu_named(gpu)
    elif not isolate:
        budget = checked_budget(budget, default_device())

    def run(progress: Callable[[str, float], None]) -> BatchSizeResult:
        learnt = ""

        def on_try(batch: int) -> None:
            if Console(stderr=True).is_terminal:
                progress(f"{learnt}trying batch {batch}", 0.5)

        def on_probe(probe: Probe) -> None:
            nonlocal learnt
            learnt = f"batch {probe.batch}: {probe_words(probe)}; "
            progress(learnt[:-2], 0.5)

        return run_job(
            target,
            lambda: find_batch_size(
                job,
                budget_bytes=budget,
                on_try=on_try,
                on_probe=on_probe,
                **options._asdict(),
            ),
        )

    result = _with_progress("finding the batch size", run)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        Console().print(two_columns(batch_size_rows(result)))
    if result.largest_safe is not None:
        return 0
    if result.explanation is not None:
        return finding(result.explanation)
    where = "" if gpu is None else f" on {gpu}"
    return finding(
        f"no batch is safe{where}: {result.limited_by}; what would help: activations='2bit', "
        "shorter or smaller samples, more memory"
    )


@cli.command("report")
@click.argument("target")
@click.option("--batch", type=click.IntRange(min=1), required=True, help="Samples in the step.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("reports/run"),
    show_default=True,
)
@click.option("--gpu", "gpu_name", help="Predict for a GPU that need not be here.")
@as_json
def report_command(target: str, batch: int, out: Path, gpu_name: str | None, as_json: bool) -> int:
    """Write where the bytes of one step of TARGET go, measured here or predicted for a GPU."""
    gpu = None if gpu_name is None else gpu_named(gpu_name)
    job = load_job(target)

    def record_step() -> MemoryRecord:
        return measure_job(job, batch) if gpu is None else forecast_of(job).record(batch, gpu)

    try:
        record = run_job(target, record_step)
    except TargetError as error:
        if error.__cause__ is None or not is_out_of_memory(error.__cause__):
            raise
        return finding(f"batch {batch} does not fit: {error}; try a smaller one")
    files = write_report([record], out, title=job.name or target)
    if as_json:
        click.echo(json.dumps(record.to_json(), indent=2))
    else:
        console = Console()
        console.print(terminal_table([record]))
        console.print(f"report: {files.html}", soft_wrap=True)
    if gpu is None or record.peak_reserved_bytes is None:
        return 0
    needed_bytes = record.peak_reserved_bytes + outside_bytes_of(gpu)
    if needed_bytes <= gpu.total_bytes:
        return 0
    return finding(
        f"batch {batch} would take {format_bytes(needed_bytes)} of the {gpu.title}'s "
        f"{format_bytes(gpu.total_bytes)}; try a smaller one, which "
        f"`dpmem find-batch-size {target} --gpu {gpu_name}` finds"
    )


@cli.command()
@as_json
def doctor(as_json: bool) -> int:
    """What is here, what works, what is missing."""
    from dpmem.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        Console().print(two_columns([(f"{f.what}: {f.verdict}", f.detail) for f in findings]))
    return FINDING if any(finding.verdict == "broken" for finding in findings) else 0


def main() -> None:
    """Entry point: every error is one line on stderr that says what to do."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        code = _fail(error.format_message())
    except (ValueError, OSError) as error:
        code = _fail(str(error))
    sys.exit(code)


def _fail(message: str) -> int:
    say(message)
    return BAD_INPUT


def _with_progress(title: str, run: Callable[[Callable[[str, float], None]], Result]) -> Result:
    """Run with progress on stderr: a bar in a terminal, a line a message elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return run(lambda message, _: console.print(message, soft_wrap=True))
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=1.0)
        return run(lambda message, done: progress.update(task, description=message, completed=done))


def _answer(result: BatchSizeResult) -> str:
    largest = "none" if result.largest_safe is None else str(result.largest_safe)
    return f"{largest}, {len(result.probes)} probes; limited by {result.limited_by}"


def _demo_json(result: "DemoResult") -> dict[str, Any]:
    return {
        "precision": result.precision,
        "device": result.device,
        "runs": {
            name: {
                "losses": run.losses,
                "step_s": run.step_s,
                "record": run.record.to_json(),
            }
            for name, run in (("ddp", result.ddp), ("dpmem", result.dpmem))
        },
        "batch_size": {
            "plain": result.plain_batch.to_json(),
            "dpmem": result.dpmem_batch.to_json(),
        },
        "report": str(result.files.html),
        "seconds": result.seconds,
    }


if __name__ == "__main__":
    main()
