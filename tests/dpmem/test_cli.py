"""The command line as people meet it: exit codes, one line on stderr, nothing half-written."""

import json
import operator
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dpmem.demo
from dpmem_profiling import BatchSizeResult

# 66,112 parameters: 4 bytes each for weights, gradients and two optimizer states.
MODEL_BYTES = (64 * 512 + 512 + 512 * 64 + 64) * 16


# `run` and `job_file` are conftest's.
Command = Callable[..., Any]


def error_line(result: Any) -> str:
    assert result.returncode == 2, result
    lines = result.stderr.strip().split("\n")
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("dpmem: ")
    assert result.stdout == ""
    return lines[0]


def test_find_batch_size(job_file: Path, run: Command) -> None:
    result = run("find-batch-size", f"{job_file}:job", "--budget", "8MiB", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["limit_bytes"] == 8 << 20
    assert 1 < found["largest_safe"] <= found["largest_fitting"]
    assert found["peak_bytes"] <= found["limit_bytes"] - found["margin_bytes"]
    confirmed = [p for p in found["probes"] if p["batch"] == found["largest_safe"]]
    assert confirmed
    assert confirmed[0]["outcome"] == "fits"


def test_the_command_prints_what_the_result_does(job_file: Path, run: Command) -> None:
    options = ("find-batch-size", f"{job_file}:job", "--budget", "8MiB", "--multiple-of", "8")
    found = BatchSizeResult.from_json(json.loads(run(*options, "--json").stdout))
    assert found.largest_safe is not None
    assert found.largest_safe % 8 == 0
    printed = " ".join(run(*options).stdout.split())
    # What was timed differs from run to run.
    same = [row for row in str(found).split("\n") if "/s" not in row and " a step" not in row]
    assert len(same) >= 7
    for row in same:
        assert " ".join(row.split()) in printed


def test_a_batch_that_the_job_refuses_is_passed_over(job_file: Path, run: Command) -> None:
    result = run("find-batch-size", f"{job_file}:needs_two", "--budget", "8KiB")
    assert result.returncode == 0, result.stderr
    assert "batch 1: error\nbatch 2: fits" in result.stderr
    assert "largest safe batch" in result.stdout
    assert "raised ValueError: Expected more than 1 value" in " ".join(result.stdout.split())


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_a_sample_that_the_machine_cannot_hold_is_a_finding(
    job_file: Path, run: Command, json_option: list[str]
) -> None:
    result = run("find-batch-size", f"{job_file}:runs_out", "--budget", "1MiB", *json_option)
    assert result.returncode == 1
    line = result.stderr.strip().split("\n")[-1]
    assert line.startswith("dpmem: does not fit: the budget of 1.00 MiB, ")
    if json_option:
        assert json.loads(result.stdout)["largest_safe"] is None
    report = run("report", f"{job_file}:runs_out", "--batch", "4", *json_option)
    assert report.returncode == 1
    assert report.stderr.startswith("dpmem: batch 4 does not fit: TARGET ")
    assert report.stdout == ""


def test_a_job_that_fails_at_every_batch_says_so_once(job_file: Path, run: Command) -> None:
    result = run("find-batch-size", f"{job_file}:fails_by_value", "--budget", "1GiB", "--json")
    assert result.returncode == 2
    assert result.stdout == ""
    *progress, line = result.stderr.strip().split("\n")
    assert progress == [f"batch {batch}: error" for batch in (1, 2, 4, 8)]
    assert ":fails_by_value': its job raised ValueError: unlucky (" in line
    assert result.stderr.count("unlucky") == 1


def test_an_interrupt_ends_with_130(job_file: Path, run: Command) -> None:
    result = run("report", f"{job_file}:interrupted", "--batch", "2")
    assert (result.returncode, result.stdout, result.stderr.strip()) == (130, "", "")


def test_budget_below_the_model_is_a_finding(job_file: Path, run: Command) -> None:
    result = run("find-batch-size", f"{job_file}:job", "--budget", "500KiB")
    assert result.returncode == 1
    line = result.stderr.strip().split("\n")[-1]
    assert "does not fit: the budget of 500" in line
    assert "below the model's own size" in line
    assert "optimizer_state 5" in line
    assert "what would help: a smaller model" in line


def test_report_is_written_and_offline(job_file: Path, tmp_path: Path, run: Command) -> None:
    out = tmp_path / "out"
    result = run("report", f"{job_file}:job", "--batch", "16", "--out", str(out), "--json")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["schema_version"] == 1
    assert record["batch_size"] == 16
    assert (
        record["at_peak"]["parameter"] + record["at_peak"]["optimizer_state"]
        >= MODEL_BYTES * 3 // 4
    )
    html = next(out.glob("*.html")).read_text()
    assert "http://" not in html
    assert "https://" not in html
    assert list(out.glob("*.png"))


def test_report_for_a_gpu_is_predicted(job_file: Path, tmp_path: Path, run: Command) -> None:
    out = tmp_path / "out"
    options = ("--batch", "16", "--gpu", "a100-40gb", "--out", str(out), "--json")
    result = run("report", f"{job_file}:job", *options)
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["source"] == "predicted"
    assert "A100" in record["device"]
    assert record["peak_reserved_bytes"] >= record["peak_allocated_bytes"]
    html = next(out.glob("*.html")).read_text()
    assert "Predicted: not run" in html
    assert "The whole GPU takes" in html
    assert list(out.glob("*.png"))


def test_a_predicted_step_that_does_not_fit_is_a_finding(
    job_file: Path, tmp_path: Path, run: Command
) -> None:
    out = tmp_path / "out"
    options = ("--batch", "50000000", "--gpu", "rtx-3060-12gb", "--out", str(out))
    result = run("report", f"{job_file}:job", *options)
    assert result.returncode == 1, result.stderr
    assert "batch 50000000 would take" in result.stdout + result.stderr
    assert list(out.glob("*.html"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["find-batch-size", "{job}:job", "--budget", "many"], "received 'many'"),
        (["find-batch-size", "{job}:job", "--budget", "-3GiB"], "received '-3GiB'"),
        (["find-batch-size", "nowhere.py:job", "--budget", "1GiB"], "there is no file nowhere.py"),
        (["find-batch-size", "{job}:ignores_size", "--budget", "1GiB"], "must return 1 samples"),
        (["find-batch-size", "{job}:job", "--budget", "1000TiB"], "this machine has; received"),
        (["find-batch-size", "{job}:job", "--budget", "1MiB", "--safety", "1"], "0<=x<1"),
        (["find-batch-size", "{job}:job", "--budget", "1MiB", "--max-step-s", "0"], "x>0"),
        (["find-batch-size", "{job}:job", "--gpu", "t4", "--timed-batches", "2"], "no times"),
        (["find-batch-size", "{job}:job", "--isolate"], "must be importable"),
        (["report", "{job}:fails", "--batch", "2"], ":fails': its job raised RuntimeError: mat1"),
        (["report", "{job}:fails_by_value", "--batch", "2"], "its job raised ValueError: unlucky"),
        (["report", "{job}:fails_by_file", "--batch", "2"], "its job raised FileNotFoundError"),
        (["report", "{job}:exits", "--batch", "2"], ":exits': its job called sys.exit(0)"),
        (["find-batch-size", "{job}:exits", "--budget", "1MiB"], "its job called sys.exit(0)"),
        (["report", "{job}:exits_at_once", "--batch", "2"], "its function called sys.exit(0)"),
        (["report", "{job}:ignores_size", "--batch", "2"], ":ignores_size': Job.batch(2) must"),
        (["report", "{job}:job"], "--batch"),
        (["report", "{job}:job", "--batch", "0"], "0 is not in the range"),
        (["report", "{job}:job", "--batch", "2", "--out", "{job}/x"], "job.py"),
        (["demo", "--out", "{job}/x"], "job.py"),
        (["no-such-command"], "No such command"),
        (["demo", "--colour", "blue"], "--colour"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    job_file: Path, run: Command, arguments: list[str], message: str
) -> None:
    result = run(*(argument.format(job=job_file) for argument in arguments))
    assert message in error_line(result)
    assert sorted(p.name for p in job_file.parent.iterdir() if p.suffix) == ["job.py"]


def test_budget_is_needed_without_a_gpu(job_file: Path, run: Command) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so the budget has a default")
    line = error_line(run("find-batch-size", f"{job_file}:job"))
    assert "pass budget_bytes (--budget 8GiB)" in line


def test_doctor(run: Command) -> None:
    result = run("doctor", "--json")
    assert result.returncode == 0, result.stdout
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert {"Python", "torch", "triton", "numba", "GPU", "NVML", "kernels"} == set(findings)
    assert "agrees with reference" in findings["kernels"]["detail"]


def test_doctor_calls_kernels_that_raise_broken(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    monkeypatch.setattr("dpmem.doctor.quantize", quantize)
    result = run("doctor", "--json")
    assert result.returncode == 1
    (kernels,) = (f for f in json.loads(result.stdout) if f["what"] == "kernels")
    assert kernels["verdict"] == "broken"
    assert kernels["detail"].startswith("cpu: raised RuntimeError: Failed to find C compiler. (")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(run: Command, arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    for command in ("demo", "find-batch-size", "report", "top", "doctor"):
        assert f"\n  {command} " in result.stdout


def test_the_installed_command(job_file: Path) -> None:
    """As a process of its own: a job in the working folder, exit codes that reach the shell."""
    script = Path(sys.executable).with_name("dpmem")
    result = subprocess.run(
        [script, "report", "job:exits_at_once", "--batch", "2"],
        capture_output=True,
        text=True,
        cwd=job_file.parent,
        timeout=300,
    )
    assert "'job:exits_at_once': its function called" in error_line(result)


@pytest.mark.slow
def test_a_rank_that_raises_is_one_line_under_its_traceback(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Importable in the ranks, and raises for their arguments.
    monkeypatch.setattr(dpmem.demo, "_rank_main", operator.index)
    result = run("demo", "--out", "out", "--json")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback (most recent call last):" in result.stderr
    line = result.stderr.strip().split("\n")[-1]
    assert line.startswith("dpmem: all ranks of the demo must finish; rank ")
    assert "TypeError: " in line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("error", "traceback", "words"),
    [
        (
            torch.multiprocessing.ProcessExitedException(
                "process 1 terminated with signal SIGKILL", 1, 1234, -9, "SIGKILL"
            ),
            [],
            "rank 1 did not: process 1 terminated with signal SIGKILL; see",
        ),
        (
            torch.multiprocessing.ProcessRaisedException(
                "\n\n-- Process 0 terminated with the following error:\nTraceback (most recent "
                'call last):\n  File "x.py", line 3\nRuntimeError: no connection\n',
                0,
                1234,
            ),
            ["-- Process 0 terminated with the following error:"],
            "rank 0 did not: RuntimeError: no connection; see",
        ),
    ],
    ids=["dies", "raises"],
)
def test_a_failing_rank_is_one_line_under_its_traceback(
    run: Command,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    traceback: list[str],
    words: str,
) -> None:
    class Failing:
        processes = ()

        def join(self, timeout: float) -> bool:
            raise error

    monkeypatch.setattr(dpmem.demo, "spawn", lambda *_, **__: Failing())
    result = run("demo", "--out", "out")
    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.strip().split("\n")
    assert lines[:-1][:1] == traceback
    assert lines[-1].startswith("dpmem: all ranks of the demo must finish; ")
    assert words in lines[-1]
    assert not Path("out").exists()


def test_an_impossible_demo_budget_is_refused_before_the_training(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpmem.demo, "spawn", None)
    assert "this machine has; received" in error_line(run("demo", "--budget", "1000TiB"))


@pytest.mark.slow
def test_demo(run: Command, tmp_path: Path) -> None:
    result = run("demo", "--out", str(tmp_path / "out"), "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for name in ("ddp", "dpmem"):
        ran = found["runs"][name]
        assert len(ran["losses"]) == 20
        # ln 256 = 5.545 is what a model that knows nothing scores.
        assert ran["losses"][0] > 5.4
        assert ran["losses"][-1] < 3.5
        assert ran["record"]["step_s"] == ran["step_s"]
    peaks = {name: ran["record"]["peak_allocated_bytes"] for name, ran in found["runs"].items()}
    assert peaks["dpmem"] < 0.6 * peaks["ddp"]
    batches = found["batch_size"]
    assert batches["dpmem"]["largest_safe"] > 2 * batches["plain"]["largest_safe"]
    assert Path(found["report"]).is_file()
