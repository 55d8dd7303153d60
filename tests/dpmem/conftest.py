"""What tests of several files need."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
