"""TARGET strings: what loads, and what people are told where it does not."""

import queue
import sys
from collections.abc import Iterator
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

def exits():
    raise SystemExit(0)

def interrupted():
    raise KeyboardInterrupt

def silent():
    assert False
"""


@pytest.fixture(autouse=True)
def imports_restored() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("dpmem_target_", "neighbour", "my_job")):
            del sys.modules[name]


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n")
    path = tmp_path / "my_job.py"
    path.write_text(GOOD)
    return path


def test_file_target(job_file: Path) -> None:
    assert load_job(f"{job_file}:job").name == "linear"


def test_module_target_in_the_working_folder(
    job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(job_file.parent)
    # The console script's sys.path does not hold the working folder.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert load_job("my_job:job").name == "linear"


def test_a_job_file_takes_no_modules_name(job_file: Path) -> None:
    path = job_file.with_name("queue.py")
    path.write_text(GOOD + "\nimport dataclasses\n@dataclasses.dataclass\nclass D:\n    x: int\n")
    assert load_job(f"{path}:job").name == "linear"
    assert sys.modules["queue"] is queue
    assert sys.path[0] == str(path.parent)


@pytest.mark.parametrize(
    ("name", "function"),
    [("broken.py", "job"), ("exiting.py", "job"), ("my_job.py", "jbo"), ("my_job.py", "raises")],
)
def test_an_error_leaves_the_imports_as_they_were(job_file: Path, name: str, function: str) -> None:
    job_file.with_name("broken.py").write_text("1 / 0\n")
    job_file.with_name("exiting.py").write_text("import sys\nsys.exit()\n")
    before = list(sys.path)
    with pytest.raises(TargetError):
        load_job(f"{job_file.with_name(name)}:{function}")
    assert sys.path == before
    assert "dpmem_target_broken" not in sys.modules
    assert "dpmem_target_exiting" not in sys.modules


def test_an_interrupt_stays_an_interrupt(job_file: Path) -> None:
    before = list(sys.path)
    with pytest.raises(KeyboardInterrupt):
        load_job(f"{job_file}:interrupted")
    stopped = job_file.with_name("stopped.py")
    stopped.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_job(f"{stopped}:job")
    assert sys.path == before
    assert "dpmem_target_stopped" not in sys.modules


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_job", "must be file.py:function or package.module:function; received 'my_job'"),
        (":job", "must be file.py:function"),
        ("{dir}/absent.py:job", "there is no file"),
        ("no.such.module:job", "does not import: raised ModuleNotFoundError"),
        (
            "{dir}/my_job.py:jbo",
            "must name a function; there is no 'jbo' among .*my_job.py: job, wrong, raises",
        ),
        ("{dir}/my_job.py:wrong", "must return a dpmem.Job; received int"),
        ("{dir}/my_job.py:raises", r"raised KeyError: 'no such thing' \(.*my_job.py:18\)"),
        ("{dir}/my_job.py:silent", r"raised AssertionError \(.*my_job.py:27\)"),
        ("{dir}/my_job.py:exits", r"its function called sys.exit\(0\) \(.*my_job.py:21\)"),
        ("{dir}/broken.py:job", "does not import: raised SyntaxError"),
        ("{dir}/exiting.py:job", r"does not import: called sys.exit\('why'\) \(.*exiting.py:2\)"),
    ],
)
def test_errors_say_what_and_where(job_file: Path, target: str, message: str) -> None:
    (job_file.parent / "broken.py").write_text("def job(:\n")
    (job_file.parent / "exiting.py").write_text("import sys\nsys.exit('why')\n")
    with pytest.raises(TargetError, match=message):
        load_job(target.format(dir=job_file.parent))
