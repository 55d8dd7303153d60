"""A forecast runs the compressed step on fake tensors: it must see the real step's bytes."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dpmem
from dpmem.text_gpt import ByteGPT, GPTSize, next_byte_loss


class Net(nn.Module):
    """Convolutions, pooling, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(32, 8, 3), nn.SiLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(1152, 5)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def net() -> tuple[nn.Module, Tensor]:
    return Net(), torch.randn(8, 3, 32, 32)


def gpt() -> tuple[nn.Module, Tensor]:
    model = ByteGPT(GPTSize(layers=2, width=128, heads=2, context=64))
    return model, torch.zeros(8, 65, dtype=torch.long)


def stored(model: nn.Module, batch: Tensor, policy: str) -> list[tuple[tuple[int, ...], int]]:
    """Shapes and bytes of what two forwards keep; backwards run."""
    wrapped, _ = dpmem.wrap(model, activations=policy)
    found = []
    for _ in range(2):
        loss = (
            next_byte_loss(wrapped, batch)
            if isinstance(model, ByteGPT)
            else wrapped(batch).square().sum()
        )
        held = wrapped.owned_tensors()["compressed"]
        found += sorted((tuple(t.shape), t.untyped_storage().nbytes()) for t in held)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
    return found


@pytest.mark.parametrize("policy", ["lossless", "8bit", "4bit", "2bit", "4bit+offload", "2MiB"])
@pytest.mark.parametrize("build", [net, gpt])
def test_fake_tensors_are_stored_as_real_ones(build: object, policy: str) -> None:
    torch.manual_seed(0)
    model, batch = build()
    real = stored(model, batch, policy)
    with FakeTensorMode():
        model, batch = build()
        fake = stored(model, batch, policy)
    assert real or (build is gpt and policy == "lossless")
    if policy == "2MiB":
        # Bits follow from values, which fakes have not; the first forward's do not.
        half = len(real) // 2
        assert sum(size for _, size in fake) <= 2 * (2 << 20)
        assert real[:half][:1] == fake[:1]
    else:
        assert fake == real
