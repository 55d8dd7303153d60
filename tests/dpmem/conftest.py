"""What tests of several files need."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dpmem.cli import main

ROOT = Path(__file__).parents[2]

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

def raising(error):
    def loss(model, x):
        raise error
    return Job(model=lambda: torch.nn.Linear(3, 3), batch=lambda n: torch.randn(n, 3), loss=loss)

def fails_by_value():
    return raising(ValueError("unlucky"))

def fails_by_file():
    return raising(FileNotFoundError("no tokens.bin"))

def exits():
    return raising(SystemExit(0))

def interrupted():
    return raising(KeyboardInterrupt())

def runs_out():
    return raising(torch.OutOfMemoryError("CUDA out of memory."))

def exits_at_once():
    raise SystemExit(0)

def needs_two():
    return Job(model=lambda: torch.nn.BatchNorm1d(64), batch=lambda n: torch.randn(n, 64),
               loss=lambda model, x: model(x).sum())
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Result]]:
    """`dpmem` with these arguments in this process, in `tmp_path`; a fresh one takes seconds."""
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)

    def command(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["dpmem", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        stdout, stderr = capfd.readouterr()
        return Result(ended.value.code or 0, stdout, stderr)

    yield command
    sys.path[:] = path


@pytest.fixture(scope="module")
def libraries() -> None:
    """All three libraries; torchvision, which the others import, beside whatever torch is here."""
    for library in ("torchvision", "transformers", "timm"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    sys.path.insert(0, str(ROOT / "reports/validation"))
    try:
        importlib.import_module("torchvision_operators")
    finally:
        sys.path.remove(str(ROOT / "reports/validation"))
