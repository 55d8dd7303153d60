"""The command line as people meet it: exit codes, one line on stderr, nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

JOB = """
import torch
from dpmem import Job

def job(batch=lambda n: torch.randn(n, 64)):
    return Job(
        model=lambda: torch.nn.Sequential(
            torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 64)
        ),
        batch=batch,
        loss=lambda model, x: model(x).square().mean(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters),
        name="mlp",
    )

def ignores_size():
    return job(lambda n: torch.randn(4, 64))

def fails():
    return Job(model=lambda: torch.nn.Linear(3, 3), batch=lambda n: torch.randn(n, 7),
               loss=lambda model, x: model(x).sum())
"""
# 66,112 parameters: 4 bytes each for weights, gradients and two optimizer states.
MODEL_BYTES = (64 * 512 + 512 + 512 * 64 + 64) * 16


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


def dpmem(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dpmem.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result
    lines = result.stderr.strip().split("\n")
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("dpmem: ")
    assert result.stdout == ""
    return lines[0]


def test_find_batch_size(job_file: Path) -> None:
    result = dpmem("find-batch-size", f"{job_file}:job", "--budget", "8MiB", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["limit_bytes"] == 8 << 20
    assert 1 < found["largest_safe"] <= found["largest_fitting"]
    assert found["peak_bytes"] <= found["limit_bytes"] - found["margin_bytes"]
    confirmed = [p for p in found["probes"] if p["batch"] == found["largest_safe"]]
    assert confirmed
    assert confirmed[0]["outcome"] == "fits"


def test_budget_below_the_model_is_a_finding(job_file: Path) -> None:
    result = dpmem("find-batch-size", f"{job_file}:job", "--budget", "500KiB")
    assert result.returncode == 1
    line = result.stderr.strip().split("\n")[-1]
    assert "does not fit: the budget of 500" in line
    assert "below the model's own size" in line
    assert "optimizer_state 5" in line
    assert "what would help: a smaller model" in line


def test_report_is_written_and_offline(job_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = dpmem("report", f"{job_file}:job", "--batch", "16", "--out", str(out), "--json")
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["find-batch-size", "{job}:job", "--budget", "many"], "received 'many'"),
        (["find-batch-size", "{job}:job", "--budget", "-3GiB"], "received '-3GiB'"),
        (["find-batch-size", "nowhere.py:job", "--budget", "1GiB"], "there is no file nowhere.py"),
        (["find-batch-size", "{job}:ignores_size", "--budget", "1GiB"], "must return 1 samples"),
        (["find-batch-size", "{job}:fails", "--budget", "1GiB"], "its job raised RuntimeError"),
        (["report", "{job}:job"], "--batch"),
        (["report", "{job}:job", "--batch", "0"], "0 is not in the range"),
        (["report", "{job}:job", "--batch", "2", "--out", "{job}/x"], "job.py"),
        (["demo", "--out", "{job}/x"], "job.py"),
        (["no-such-command"], "No such command"),
        (["demo", "--colour", "blue"], "--colour"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    job_file: Path, arguments: list[str], message: str
) -> None:
    result = dpmem(*(argument.format(job=job_file) for argument in arguments), cwd=job_file.parent)
    assert message in error_line(result)
    assert sorted(p.name for p in job_file.parent.iterdir() if p.suffix) == ["job.py"]


def test_budget_is_needed_without_a_gpu(job_file: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so the budget has a default")
    line = error_line(dpmem("find-batch-size", f"{job_file}:job"))
    assert "pass budget_bytes (--budget 8GiB)" in line


def test_doctor() -> None:
    result = dpmem("doctor", "--json")
    assert result.returncode == 0, result.stdout
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert {"Python", "torch", "triton", "numba", "GPU", "NVML", "kernels"} == set(findings)
    assert "agrees with reference" in findings["kernels"]["detail"]


def test_help_names_every_command() -> None:
    result = dpmem("--help")
    assert result.returncode == 0
    for command in ("demo", "find-batch-size", "report", "top", "doctor"):
        assert command in result.stdout
