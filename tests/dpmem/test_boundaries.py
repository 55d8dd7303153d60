"""Who may import what, where import-linter cannot say it: torch.distributed stays in dpmem."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOWER_PACKAGES = [ROOT / "kernels" / "dpmem_kernels", ROOT / "profiling" / "dpmem_profiling"]


def mentions_torch_distributed(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        if any(
            name == "torch.distributed" or name.startswith("torch.distributed.") for name in names
        ):
            return True
    return False


@pytest.mark.parametrize("package", LOWER_PACKAGES, ids=lambda path: path.name)
def test_torch_distributed_stays_in_dpmem(package: Path) -> None:
    files = sorted(package.rglob("*.py"))
    assert files
    offenders = [
        str(f.relative_to(ROOT)) for f in files if mentions_torch_distributed(f.read_text())
    ]
    assert offenders == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed",
        "import torch.distributed.fsdp as f",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "def f():\n    torch.distributed.barrier()",
    ],
)
def test_the_check_sees_every_way_in(line: str) -> None:
    assert mentions_torch_distributed(line)
