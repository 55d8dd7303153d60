"""Options: what is unknown or not built yet is refused, with the way out."""

import pytest
import torch
from torch import nn

import dpmem
from dpmem.units import parse_bytes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"precision": "fp8"},
            ValueError,
            "precision must be one of 'fp32', 'bf16', 'fp16'; received 'fp8'",
        ),
        ({"activations": "3bit"}, ValueError, "activations must be one of None, 'lossless'"),
        ({"activations": 4.5}, ValueError, "a budget such as '6GiB', or a Policy; received 4.5"),
        ({"shard": "optimizer"}, NotImplementedError, "needs optimizer-state sharding"),
        ({"shard": "half"}, ValueError, "received 'half'"),
        ({"offload": "optimizer"}, NotImplementedError, "needs host offload"),
        ({"max_grad_norm": 0.0}, ValueError, "must be a positive number or None; received 0.0"),
        ({"max_grad_norm": 1.0}, ValueError, "needs the optimizer; received none"),
    ],
)
def test_refusals(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dpmem.wrap(nn.Linear(2, 2), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_bits": 3}, "linear_bits must be 8, 4, 2 or None"),
        ({"nonlinear_bits": 16}, "nonlinear_bits must be"),
        ({"group_size": 100}, "group_size must be 64, 128 or 256"),
        ({"minimum_numel": -1}, "minimum_numel must be an integer of at least 0"),
    ],
)
def test_policy_refusals(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpmem.Policy(**options)


def test_optimizer_of_another_model_is_refused() -> None:
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="2 belong to no part of the model"):
        dpmem.wrap(nn.Linear(2, 2), stranger, max_grad_norm=1.0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("512 MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("4096", 4096),
        ("2kb", 2000),
    ],
)
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "3 parsecs", "1e3"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="received"):
        parse_bytes(text)
