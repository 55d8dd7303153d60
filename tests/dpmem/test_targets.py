"""TARGET strings: what loads, and what people are told where it does not."""

from pathlib import Path

import pytest

from dpmem.targets import TargetError, load_job

GOOD = """
import torch
from dpmem import Job
import neighbour

def job():
    return Job(
        model=lambda: torch.nn.Linear(neighbour.WIDTH, 1),
        batch=lambda n: torch.randn(n, neighbour.WIDTH),
        loss=lambda model, batch: model(batch).sum(),
        name="linear",
    )

def wrong():
    return 3

def raises():
    raise KeyError("no such thing")
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    path = tmp_path / "my_job.py"
    path.write_text(GOOD)
    return path


def test_file_target(job_file: Path) -> None:
    assert load_job(f"{job_file}:job").name == "linear"


def test_module_target(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(job_file.parent))
    assert load_job("my_job:job").name == "linear"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_job", "must be file.py:function or package.module:function; received 'my_job'"),
        (":job", "must be file.py:function"),
        ("{dir}/absent.py:job", "there is no file"),
        ("no.such.module:job", "does not import: raised ModuleNotFoundError"),
        ("{dir}/my_job.py:jbo", "has no function 'jbo'; it has job, wrong, raises"),
        ("{dir}/my_job.py:wrong", "must return a dpmem.Job; received int"),
        ("{dir}/my_job.py:raises", r"raised KeyError: 'no such thing' \(.*my_job.py:18\)"),
        ("{dir}/broken.py:job", "does not import: raised SyntaxError"),
    ],
)
def test_errors_say_what_and_where(job_file: Path, target: str, message: str) -> None:
    (job_file.parent / "broken.py").write_text("def job(:\n")
    with pytest.raises(TargetError, match=message):
        load_job(target.format(dir=job_file.parent))
