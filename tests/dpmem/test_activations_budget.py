"""A byte budget: predicted variances are the measured ones, bits follow them, the budget holds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpmem.activations import ActivationStore, Policy
from dpmem.activations.budget import Candidate, Planner, allocate
from dpmem.activations.sensitivity import sensitivities
from dpmem.activations.slots import stored_bytes
from dpmem.text_gpt import ByteGPT, GPTSize, next_byte_loss


class OneWeight(nn.Module):
    """A function of an input and one weight."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


MODELS = {
    "linear": ((24, 64), (3, 40, 64), F.linear),
    "weight from the left": ((24, 40), (40, 64), lambda x, w: w @ x),
    "conv": (
        (6, 4, 3, 3),
        (2, 8, 16, 16),
        lambda x, w: F.conv2d(x, w, stride=2, padding=1, groups=2),
    ),
    "conv1d": ((6, 8, 5), (4, 8, 40), lambda x, w: F.conv1d(x, w, dilation=2)),
    "layer norm": ((64,), (60, 64), lambda x, w: F.layer_norm(x, (64,), w)),
    "batch norm": (
        (8,),
        (6, 8, 10, 10),
        lambda x, w: F.batch_norm(x, None, None, w, training=True),
    ),
    "product": ((64,), (60, 64), lambda x, w: x * w),
}


@pytest.mark.parametrize("name", MODELS)
def test_predicted_variance_is_the_measured(name: str) -> None:
    """Over 200 draws; a variance summed over k entries then has a relative error of about
    sqrt(2 / (200 k)), at most 5 % here, and the average 1/6 for f (1 - f) holds within a few
    percent at 4 bits. A forgotten factor of 2 or kernel size, or a wrong sum, is far off.
    """
    torch.manual_seed(0)
    shape, input_shape, function = MODELS[name]
    model, x = OneWeight(shape, function), torch.randn(input_shape)
    incoming = torch.randn_like(model(x))
    policy = Policy(linear_bits=4, minimum_numel=1000, budget_bytes=1 << 40, refresh_forwards=1)
    store = ActivationStore(model, policy, seed=1)
    with store:
        y = model(x)
    y.backward(incoming)
    assert store._planner is not None
    assert store._planner.reader is not None
    (predicted,) = [
        float(c) / 15**2 for c in sensitivities(store._planner.reader.readings, 20) if c > 0
    ]
    (exact,) = torch.autograd.grad(model(x), model.weight, incoming)
    fixed = ActivationStore(model, Policy(linear_bits=4, minimum_numel=1000), seed=2)
    total = 0.0
    for _ in range(200):
        with fixed:
            y = model(x)
        (gradient,) = torch.autograd.grad(y, model.weight, incoming)
        total += float((gradient - exact).square().sum())
    assert predicted == pytest.approx(total / 200, rel=0.15)


def gpt() -> tuple[ByteGPT, Tensor]:
    torch.manual_seed(0)
    model = ByteGPT(GPTSize(layers=2, width=64, heads=2, context=32))
    return model, torch.randint(0, 256, (4, 33))


def bytes_of_a_forward(store: ActivationStore, model: nn.Module, windows: Tensor) -> int:
    store.log = []
    log = store.log
    with store:
        loss = next_byte_loss(model, windows)
    loss.backward()
    model.zero_grad()
    return sum(stored_bytes(log).values())


def bytes_at(policy: Policy) -> int:
    model, windows = gpt()
    return bytes_of_a_forward(ActivationStore(model, policy, seed=1), model, windows)


FEWEST = Policy(linear_bits=2, minimum_numel=256)
EXACT = Policy(linear_bits=None, nonlinear_bits=None, minimum_numel=256)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_a_budget_is_met_and_used(share: float) -> None:
    fewest, exact = bytes_at(FEWEST), bytes_at(EXACT)
    budget = int(fewest + share * (exact - fewest))
    model, windows = gpt()
    policy = Policy(linear_bits=2, minimum_numel=256, budget_bytes=budget, refresh_forwards=2)
    store = ActivationStore(model, policy, seed=1)
    sizes = [bytes_of_a_forward(store, model, windows) for _ in range(5)]
    assert sizes[0] == fewest
    assert all(size <= budget for size in sizes)
    # What is left does not pay for the next raise of a large tensor, a quarter at most.
    assert sizes[-1] > fewest + 0.5 * (budget - fewest)
    smaller = bytes_of_a_forward(store, model, windows[:2])
    assert smaller <= budget


def test_a_budget_larger_than_all_is_exact() -> None:
    model, windows = gpt()
    store = ActivationStore(
        model, Policy(linear_bits=2, minimum_numel=256, budget_bytes=1 << 40), seed=1
    )
    bytes_of_a_forward(store, model, windows)
    with store:
        loss = next_byte_loss(model, windows)
    loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    next_byte_loss(model, windows).backward()
    for gradient, p in zip(found, model.parameters(), strict=True):
        assert torch.equal(gradient, p.grad)


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    model, windows = gpt()
    fewest = bytes_at(FEWEST)
    policy = Policy(linear_bits=2, minimum_numel=256, budget_bytes=fewest - 1)
    store = ActivationStore(model, policy, seed=1)
    with pytest.raises(RuntimeError, match=f"with the fewest bits they take {fewest}"), store:
        next_byte_loss(model, windows)
    exactly = ActivationStore(
        model, Policy(linear_bits=2, minimum_numel=256, budget_bytes=fewest), seed=1
    )
    assert bytes_of_a_forward(exactly, model, windows) == fewest


def test_allocation_prefers_what_disturbs_most_a_byte() -> None:
    same = Candidate(numel=1024, exact_bits=32, least_bits=2)
    large = same._replace(numel=4096)
    step_bytes = same.stored_bytes(4, 256) - same.stored_bytes(2, 256)
    start = 2 * same.stored_bytes(2, 256) + large.stored_bytes(2, 256)
    assert allocate([same, same, large], [1.0, 5.0, 5.0], start, 256) == [2, 2, 2]
    assert allocate([same, same, large], [1.0, 5.0, 5.0], start + step_bytes, 256) == [2, 4, 2]
    assert allocate([same, same, large], [0.1, 0.1, 90.0], start + 4 * step_bytes, 256)[2] == 4
    assert allocate([same._replace(least_bits=8)], [1.0], 0, 256) == [8]
    assert allocate([same, same], [0.0, 0.0], 1 << 30, 256) == [32, 32]


def test_ranks_agree_on_the_larger() -> None:
    """Both plan with the maxima; ranks that save different numbers of tensors are told."""
    seen: list[Tensor] = []

    def agree(values: Tensor) -> Tensor:
        seen.append(values)
        return values

    model, windows = gpt()
    policy = Policy(linear_bits=2, minimum_numel=256, budget_bytes=1 << 20, refresh_forwards=2)
    store = ActivationStore(model, policy, seed=1, agree=agree)
    calls = []
    for _ in range(5):
        bytes_of_a_forward(store, model, windows)
        calls.append(len(seen))
    # Forwards 1, 3 (2 after) ... are read; each reading costs two agreements of two messages.
    assert calls == [0, 4, 4, 4, 8]
    planner = Planner(1 << 20, 256, 1, lambda values: torch.tensor([-3.0, 4.0]))
    with pytest.raises(RuntimeError, match="received 3 to 4"):
        planner._maximum([0.0] * 5)
