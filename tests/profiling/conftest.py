"""A record made by hand, for tests of what reads records; the path to what tests import."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpmem_profiling import MemoryRecord
from dpmem_profiling.record import TensorAtPeak, TimelinePoint

sys.path.insert(0, str(Path(__file__).parent))

MIB = 2**20


@pytest.fixture
def make_record() -> Callable[..., MemoryRecord]:
    """A function that makes a small record, with the given fields changed."""

    def make(**changes: Any) -> MemoryRecord:
        weights = {"parameter": 40 * MIB}
        full = {**weights, "activation": 60 * MIB}
        fields: dict[str, Any] = {
            "name": "plain",
            "source": "measured",
            "batch_size": 8,
            "world_size": 1,
            "device": "CPU",
            "torch_version": "2.13.0",
            "peak_allocated_bytes": 100 * MIB,
            "peak_reserved_bytes": None,
            "device_bytes": None,
            "limit_bytes": None,
            "at_peak": full,
            "peak_by_category": full,
            "peak_by_phase": {"forward": sum(full.values()), "backward": sum(full.values())},
            "persistent_bytes": weights,
            "timeline": (
                TimelinePoint(0, 0.0, None, weights),
                TimelinePoint(1, 0.1, "forward", weights),
                TimelinePoint(2, 0.2, "forward", full),
                TimelinePoint(3, 0.3, "backward", weights),
            ),
            "tensors_at_peak": (
                TensorAtPeak(60 * MIB, (15, MIB), "float32", "activation", "net.0", "aten.mm"),
            ),
            "step_s": 0.25,
            "notes": (),
        }
        return MemoryRecord(**{**fields, **changes})

    return make
