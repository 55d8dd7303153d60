"""What a CPU loop keeps of its callers once it is compiled: nothing."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

from dpmem_kernels.cpu_loop import loop


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without Python's collector, whose turn may come at any time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def copy(source: Any, target: Any) -> None:
    """Of this assignment numba tries several readings, and catches what they raise."""
    target[: source.size] = source[:]


@pytest.mark.usefixtures("no_collector")
def test_the_first_call_keeps_nothing_alive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # An empty cache, so that it compiles.
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    copied = loop()(copy)

    def step() -> weakref.ref[torch.Tensor]:
        local = torch.ones(100)
        copied(np.ones(4), np.ones(5))
        return weakref.ref(local)

    local = step()
    assert copied.stats.cache_misses
    assert local() is None
