"""The audit's table: what is saved, what becomes of it, and nothing else changed."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dpmem
from dpmem.activations import Policy


class Net(nn.Module):
    """A bit of everything that has a role."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        return self.head(F.dropout(F.gelu(x.flatten(1)), 0.1, self.training))


POLICY = Policy(minimum_numel=256)
BATCH = torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 4])


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_every_tensor_has_a_row() -> None:
    torch.manual_seed(0)
    audit = dpmem.audit(Net(), BATCH, POLICY, loss=loss)
    found = {(row.module, row.function, row.role, row.decision) for row in audit.rows}
    assert {
        ("conv", "conv2d", "linear_input", "4 bits"),
        ("conv", "conv2d", "model", "exact"),
        ("norm", "batch_norm", "linear_input", "4 bits"),
        ("norm", "batch_norm", "small", "exact"),
        ("", "relu", "sign", "a bit each"),
        ("pool", "max_pool2d", "shape", "shape only"),
        ("pool", "max_pool2d", "pool_index", "a byte or two each"),
        ("", "gelu", "nonlinear_input", "8 bits"),
        ("", "dropout", "mask", "a bit each"),
        ("head", "linear", "linear_input", "4 bits"),
    } <= found
    relu, pooled = (
        next(row for row in audit.rows if row.role == role) for role in ("sign", "shape")
    )
    assert pooled.shared_with == relu.number
    assert (pooled.bytes_before, pooled.bytes_after) == (0, 0)
    assert relu.bytes_after == 4 * 8 * 16 * 16 // 8
    assert relu.bytes_before == 4 * 8 * 16 * 16 * 4
    for row in audit.rows:
        # Noise where codes are, and nowhere else.
        assert (row.predicted_variance or 0) > 0 or not row.decision.endswith("bits")
        assert row.predicted_variance in (0, None) or row.decision.endswith("bits")
    lines = str(audit).splitlines()
    assert len(lines) == len(audit.rows) + 2
    assert lines[-1].endswith(f"{audit.bytes_before / audit.bytes_after:.2f}x")


def test_the_audit_counts_what_a_forward_stores() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    audit = dpmem.audit(model, BATCH[0], POLICY)
    store = dpmem.compress(model, POLICY)
    with store:
        y = model(BATCH[0])
    compressed = sum(t.untyped_storage().nbytes() for t in store.compressed_tensors())
    y.sum().backward()
    exact = sum(
        row.bytes_after for row in audit.rows if row.decision == "exact" and row.role != "model"
    )
    assert audit.bytes_after == compressed + exact
    assert all(row.predicted_variance is None for row in audit.rows)


def test_nothing_else_changes() -> None:
    torch.manual_seed(0)
    model = Net()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    dpmem.audit(model, BATCH, POLICY, loss=loss)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert bool((model.head.weight.grad == 1).all())
    assert model.conv.weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_a_budgets_choice_is_shown() -> None:
    torch.manual_seed(0)
    model = Net()
    fewest = dpmem.audit(model, BATCH, Policy(linear_bits=2, minimum_numel=256), loss=loss)
    budget = fewest.bytes_after + 4096
    policy = Policy(linear_bits=2, minimum_numel=256, budget_bytes=budget)
    audit = dpmem.audit(model, BATCH, policy, loss=loss)
    assert fewest.bytes_after < audit.bytes_after <= budget
    with pytest.raises(ValueError, match="received no loss"):
        dpmem.audit(model, BATCH[0], policy)
