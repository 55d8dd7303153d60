"""A saved tensor's role: gradients keep their mean, and what must be exact is."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpmem.activations import PRESETS, ActivationStore, Policy
from dpmem.activations.calls import FunctionCall
from dpmem.activations.roles import ROLES, Role, Use, use_of

# Small enough for tests: everything above 256 values is compressed.
FOUR_BITS = Policy(linear_bits=4, nonlinear_bits=8, minimum_numel=256)


def store_for(model: nn.Module, policy: Policy = FOUR_BITS, seed: int = 1) -> ActivationStore:
    return ActivationStore(model, policy, seed=seed)


def stored_bytes(store: ActivationStore) -> int:
    return sum(t.untyped_storage().nbytes() for t in store.compressed_tensors())


def test_mean_gradient_is_unbiased() -> None:
    """For a linear layer's input the mean over noise must reach the exact gradient.

    Per value the error has a standard deviation of at most scale/2 (Bernoulli rounding), so the
    weight gradient's, over n draws, is bounded by scale/2 * ||g|| / sqrt(n); 6 of those over 4096
    gradient values are exceeded by chance once in 10^5 runs. Rounding to nearest is off by more.
    """
    torch.manual_seed(0)
    layer = nn.Linear(64, 16, bias=False)
    # Skewed within the steps of 4 bits, so that round-to-nearest errs in one direction.
    x = torch.rand(32, 64).mul(0.3).floor() + 0.02
    x[:, 0], x[:, 1] = 0.0, 1.0
    weights = torch.randn(32, 16)
    (layer(x) * weights).sum().backward()
    exact = layer.weight.grad.clone()
    draws, total = 256, torch.zeros_like(exact, dtype=torch.float64)
    store = store_for(layer)
    for _ in range(draws):
        layer.zero_grad()
        with store:
            y = layer(x)
        (y * weights).sum().backward()
        total += layer.weight.grad
    scale = 1.02 / 15 * (1 + 2**-7)
    bound = 6 * (scale / 2) * weights.square().sum(0).sqrt()[:, None] / draws**0.5
    assert bool(((total / draws - exact).abs() <= bound).all())
    nearest = ((x / scale).round() * scale).T
    biased = (nearest @ weights).T
    assert not bool(((biased - exact).abs() <= bound).all())


@pytest.mark.parametrize("boolean", [True, False])
def test_attention_masks_stay_exact(boolean: bool) -> None:
    """The CPU's attention saves a mask of 0 and -inf as floats: compressed, it would be NaN."""
    torch.manual_seed(0)
    mask = torch.ones(64, 64, dtype=torch.bool).tril().expand(2, 1, 64, 64)
    if not boolean:
        mask = torch.zeros(2, 1, 64, 64).masked_fill(~mask, -torch.inf)
    x = torch.randn(3, 2, 4, 64, 32, requires_grad=True)

    def attend() -> Tensor:
        query, key, value = (x * 1.0).unbind(0)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    (exact,) = torch.autograd.grad(attend().square().sum(), x)
    store = store_for(nn.Linear(1, 1))
    with store:
        y = attend()
    assert stored_bytes(store) > 0
    (restored,) = torch.autograd.grad(y.square().sum(), x)
    # 8 bits for query, key and value and 4 for the output, far from what a lost mask would do.
    assert float((restored - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("exponent", [-1.0, 0.5, 2.5])
def test_powers_stay_exact(exponent: float) -> None:
    """A negative power of a value rounded to zero would be infinite."""
    torch.manual_seed(0)
    x = torch.rand(4096).add(1e-4).requires_grad_()
    (exact,) = torch.autograd.grad((x**exponent).sum(), x)
    with store_for(nn.Linear(1, 1)):
        y = x**exponent + torch.pow(x * 1.0, exponent)
    (restored,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(restored, 2 * exact)


def test_statistics_stay_exact() -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(64)
    x = torch.randn(512, 64, requires_grad=True)
    store = store_for(norm)
    with store:
        norm(x).sum()
    # The input alone, 4 bits a value and 4 bytes a group; mean and rstd have 512 values each.
    assert stored_bytes(store) == 0
    with store:
        y = norm(x * 1.0)
    assert stored_bytes(store) == 512 * 64 // 2 + 512 * 64 // 256 * 4
    y.sum().backward()


def test_presets_and_table_are_consistent() -> None:
    assert set(PRESETS) == {"lossless", "8bit", "4bit", "2bit", "offload"} | {
        f"{bits}bit+offload" for bits in (8, 4, 2)
    }
    for policy in PRESETS.values():
        for role in get_args(Role):
            if role not in ("linear_input", "nonlinear_input"):
                assert policy.bits(Use(role, "")) is None
    assert "div" not in ROLES
    assert use_of(torch.zeros(1), FunctionCall("log_softmax", (), {})).role == "statistics"


NORMS = {
    "layer": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms": lambda x: F.rms_norm(x, x.shape[-1:]),
    "group": lambda x: F.group_norm(x.view(-1, 4, x.shape[-1]), 4).view(x.shape),
    "batch": lambda x: F.batch_norm(x.mT, None, None, training=True).mT,
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("bits", "width"), [(4, 8), (4, 32), (2, 64), (2, 512)])
def test_norms_bias_is_below_the_rounding_of_bf16(kind: str, bits: int, width: int) -> None:
    """The gradient through a norm, narrow or just wide enough, keeps its mean to 2^-9.

    Of each draw we take the slope of the gradient's error on the incoming gradient, whose mean is
    the share that is lost. In groups of 256, at 4 bits the share would be 0.8 % at width 8, and at
    2 bits 1.0 % at width 64; the standard error over 20 draws is held below 2^-9 / 5 = 0.04 %.
    So the true share passes by chance, or 0.8 % goes unseen, only at 5 standard errors and more.
    """
    torch.manual_seed(0)
    x = torch.randn(2**16 // width, width, requires_grad=True)
    incoming = torch.randn(x.shape)
    norm = NORMS[kind]
    (exact,) = torch.autograd.grad(norm(x), x, incoming)
    store = store_for(nn.Linear(1, 1), Policy(linear_bits=bits, minimum_numel=256, group_size=256))
    slopes = []
    for _ in range(20):
        with store:
            y = norm(x)
        (restored,) = torch.autograd.grad(y, x, incoming)
        slopes.append(((restored - exact) * incoming).sum() / (exact * incoming).sum())
    mean, error = torch.stack(slopes).mean(), torch.stack(slopes).std() / 20**0.5
    assert 0 < error < 2**-9 / 5
    assert abs(float(mean)) + 5 * float(error) < 2**-9


def test_narrow_norms_are_kept_at_more_bits() -> None:
    x = torch.randn(64, 16, requires_grad=True)
    call = FunctionCall("layer_norm", (x, (16,)), {})
    use = use_of(x, call)
    assert (use.role, use.least_bits) == ("linear_input", 8)
    assert Policy(linear_bits=4).bits(use) == 8
    assert Policy(linear_bits=2).bits(use._replace(least_bits=4)) == 4
    assert Policy(linear_bits=None).bits(use) is None


def test_a_learned_attention_mask_stays_exact() -> None:
    """GPU kernels save a mask that needs a gradient; padded, it is a copy with its own graph."""
    query = torch.randn(2, 4, 16, 16, requires_grad=True)
    mask = torch.full((2, 4, 16, 16), -torch.inf).triu(1).requires_grad_()
    padded = F.pad(mask, (0, 8))[..., :16]
    call = FunctionCall("scaled_dot_product_attention", (query, query, query, mask), {})
    assert use_of(query, call).role == "nonlinear_input"
    for saved in (mask, mask[:], padded):
        assert use_of(saved, call).role == "other"


def test_relu_passes_a_gradient_where_its_output_is_nan() -> None:
    """As autograd's own ReLU does, so that a lossless store hides no non-finite gradient."""
    torch.manual_seed(0)
    x = torch.randn(512)
    x[3], x[5] = torch.nan, 0.0
    x.requires_grad_()
    (exact,) = torch.autograd.grad(F.relu(x), x, torch.ones(512))
    store = store_for(nn.Linear(1, 1))
    with store:
        y = F.relu(x)
    assert stored_bytes(store) > 0
    (restored,) = torch.autograd.grad(y, x, torch.ones(512))
    assert torch.equal(restored, exact)
    assert (float(exact[3]), float(exact[5])) == (1.0, 0.0)


EXACT_OPERATIONS = {
    "max_pool": lambda x: F.max_pool1d(x, 2),
    "gather": lambda x: x.gather(1, torch.arange(64).flip(0).expand(64, 64)),
    "index": lambda x: x[torch.arange(64).flip(0)],
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "in-place relu": lambda x: F.relu(x, inplace=True),
    "masked_fill": lambda x: x.masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -1e9),
    "multiplied mask": lambda x: x * torch.ones(64, 64, dtype=torch.bool).triu(1),
    "dropout of nothing": lambda x: F.dropout(x, 0.0),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.arange(64)),
    "sparse product": lambda x: torch.eye(64).to_sparse() @ x,
    "float64": lambda x: F.gelu(x.double() @ x.double()),
    "complex": lambda x: torch.view_as_real(x.to(torch.complex64) @ x.to(torch.complex64)),
}


@pytest.mark.parametrize("name", EXACT_OPERATIONS)
def test_indices_masks_and_sensitive_operations_are_exact(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 64, requires_grad=True)

    def run() -> Tensor:
        return EXACT_OPERATIONS[name](x + 0.0).square().sum()

    (exact,) = torch.autograd.grad(run(), x)
    with store_for(nn.Linear(1, 1)):
        y = run()
    (restored,) = torch.autograd.grad(y, x)
    assert torch.equal(restored, exact)


def _gelu_by_hand(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


RECOMPUTED = {
    "gelu": F.gelu,
    "gelu by hand": _gelu_by_hand,
    "silu": F.silu,
    "gated": lambda x: F.silu(x) * (2.0 * x + 1.0),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_functions_leave_the_mean_of_gradients(name: str) -> None:
    """What is computed again from 8 bits is off by the curvature times the noise's variance.

    Over 200 draws the squared error of the mean, in units of its own standard error, averages 1
    over the weights' 4096 entries (standard deviation sqrt(2 / 4096) = 0.02; correlated entries
    make it a few times that). A bias as large as the standard error would make it 2, and GELU's
    input at 2
    bits does more.
    """
    torch.manual_seed(0)
    function = RECOMPUTED[name]
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    model = nn.ModuleList([first, second])
    x, incoming = torch.randn(64, 64), torch.randn(64, 64)

    def gradient(store: ActivationStore | None) -> Tensor:
        with store or nullcontext():
            y = second(function(first(x)))
        return torch.stack(torch.autograd.grad(y, [first.weight, second.weight], incoming)).double()

    def misfit(policy: Policy) -> float:
        store = store_for(model, policy)
        draws = torch.stack([gradient(store) for _ in range(200)])
        error = draws.mean(0) - gradient(None)
        variance = draws.var(0) / len(draws)
        known = variance > 0
        return float((error.square()[known] / variance[known]).mean())

    assert misfit(FOUR_BITS) < 1.3
    if name == "gelu":
        assert misfit(Policy(linear_bits=2, nonlinear_bits=2, minimum_numel=256)) > 1.6


@pytest.mark.parametrize("cube", [lambda x: x * x * x, lambda x: x.mul(x) * x, lambda x: x**3])
def test_a_cube_is_a_cube_however_it_is_written(cube: Callable[[Tensor], Tensor]) -> None:
    """At 2 bits the factors' shared noise made the products' gradient 43 % too large."""
    torch.manual_seed(0)
    x = torch.randn(64, 64, requires_grad=True)
    store = ActivationStore(nn.Linear(1, 1), Policy(linear_bits=2, minimum_numel=256), seed=1)
    total, draws = 0.0, 20
    for _ in range(draws):
        with store:
            loss = cube(x).sum()
        total += float(torch.autograd.grad(loss, x)[0].sum())
    exact = float((3 * x.detach() ** 2).sum())
    # A draw's sum has a standard deviation of 0.7 % at most.
    assert abs(total / draws / exact - 1) < 0.01
