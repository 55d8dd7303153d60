"""DistributedDataParallel by rule, held to the real one by what the meter sees of a step."""

from collections.abc import Callable
from typing import Any

import pytest

Pool = Callable[[int], "Ranks"]  # noqa: F821 - conftest's, which tests cannot import


@pytest.mark.parametrize("warmup_steps", [0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_as_bucket_view": True},
        {"bucket_cap_mb": 0.01, "gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True, "forward_sync_buffers": False},
        {"init_sync": False},
    ],
    ids=str,
)
def test_a_step_takes_the_same_bytes(
    ranks: Pool, options: dict[str, Any], warmup_steps: int
) -> None:
    ((real, by_rule),) = ranks(1).run("ddp_by_rule", options=options, warmup_steps=warmup_steps)
    assert by_rule == real
