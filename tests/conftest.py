"""For all tests: a stub driver, and Triton's interpreter, chosen before dpmem is imported."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"

NVML_STUB = Path(__file__).parent / "profiling" / "nvml_stub.c"


@pytest.fixture(scope="session")
def compile_nvml_stub(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: preprocessor names -> the folder of a libnvidia-ml.so.1 built with them."""

    def compile_stub(*defines: str) -> Path:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("the stub driver library needs a C compiler")
        folder = tmp_path_factory.mktemp("nvml")
        flags = ["-shared", "-fPIC", "-Wall", "-Werror", *(f"-D{name}" for name in defines)]
        subprocess.run(
            [compiler, *flags, "-o", folder / "libnvidia-ml.so.1", NVML_STUB], check=True
        )
        return folder

    return compile_stub
