"""The activation store: what is restored, what is never touched, what is refused."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dpmem
import dpmem.activations.store as store_module
from dpmem.activations import PRESETS, ActivationStore, Policy
from dpmem.activations.policy import ROLE_OF_FUNCTION
from dpmem.text_gpt import ByteGPT, GPTSize, next_byte_loss
from dpmem_kernels import dequantize

# Small enough for tests: everything above 256 values is compressed.
FOUR_BITS = Policy(linear_bits=4, nonlinear_bits=8, minimum_numel=256)
LOSSLESS = Policy(linear_bits=None, nonlinear_bits=None, minimum_numel=256)


def store_for(model: nn.Module, policy: Policy = FOUR_BITS, seed: int = 1) -> ActivationStore:
    return ActivationStore(model, policy, seed=seed)


def stored_bytes(store: ActivationStore) -> int:
    return sum(t.untyped_storage().nbytes() for t in store.compressed_tensors())


def gpt() -> tuple[ByteGPT, Tensor]:
    torch.manual_seed(0)
    model = ByteGPT(GPTSize(layers=2, width=64, heads=2, context=32))
    return model, torch.randint(0, 256, (4, 33))


def gradients(model: nn.Module) -> list[Tensor]:
    result = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return result


def exact_gradients(model: nn.Module, windows: Tensor) -> list[Tensor]:
    next_byte_loss(model, windows).backward()
    return gradients(model)


def test_lossless_gradients_are_bit_identical() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 8)
    )
    x = torch.randn(32, 64)
    model(x).square().sum().backward()
    expected = gradients(model)
    store = store_for(model, LOSSLESS)
    with store:
        loss = model(x).square().sum()
    # The ReLU's output as bits: 32 * 256 of them.
    assert stored_bytes(store) >= 32 * 256 // 8
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))


def test_same_seed_same_bits_and_next_forward_fresh_noise() -> None:
    model, windows = gpt()

    def train(seed: int) -> list[list[Tensor]]:
        store = store_for(model, seed=seed)
        runs = []
        for _ in range(2):
            with store:
                loss = next_byte_loss(model, windows)
            loss.backward()
            runs.append(gradients(model))
        return runs

    first, second, other = train(1), train(1), train(2)
    for run_a, run_b in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(run_a, run_b, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first[0], first[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first[0], other[0], strict=True))


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


def test_global_random_state_does_not_move() -> None:
    model, windows = gpt()
    before = torch.get_rng_state()
    with store_for(model):
        next_byte_loss(model, windows).backward()
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_are_close_and_smaller_store_with_fewer_bits() -> None:
    model, windows = gpt()
    expected = exact_gradients(model, windows)
    errors, sizes = [], []
    for bits in (8, 4, 2):
        store = store_for(model, Policy(linear_bits=bits, minimum_numel=256))
        with store:
            loss = next_byte_loss(model, windows)
        sizes.append(stored_bytes(store))
        loss.backward()
        received = gradients(model)
        difference = sum(
            float((a - b).square().sum()) for a, b in zip(received, expected, strict=True)
        )
        errors.append((difference / sum(float(b.square().sum()) for b in expected)) ** 0.5)
    assert sizes[0] > sizes[1] > sizes[2]
    assert 0 < errors[0] < errors[1] < errors[2] < 1


def test_parameters_and_buffers_are_never_compressed() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    model.register_buffer("table", torch.randn(64, 64))
    x = torch.randn(2, 64, requires_grad=True)

    def run(m: nn.Module) -> Tensor:
        return torch.mm(torch.mm(m(x), m.table), m.weight.t()).sum()

    run(model).backward()
    expected = x.grad.clone()
    x.grad = None
    store = store_for(model)
    with store:
        loss = run(model)
    assert store.compressed_tensors() == []
    loss.backward()
    assert torch.equal(x.grad, expected)


def test_autocast_weight_copies_are_never_compressed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(2, 64)
    store = store_for(model)
    with store, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).sum()
    assert store.compressed_tensors() == []
    loss.backward()


def test_one_storage_is_compressed_once() -> None:
    """Query, key and value are views of one buffer, and the buffer's transpose is saved again."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 32)
    query, key, value = x.unbind(1)
    weight = torch.randn(2, 8, 32, requires_grad=True)
    other = torch.randn(2, 8, 3, 32, requires_grad=True)
    store = store_for(nn.Linear(1, 1))
    with store:
        products = [torch.mul(part, weight) for part in (query, key, value)]
        products.append(torch.mul(x.transpose(1, 2), other))
    codes_bytes, groups = x.numel() // 2, x.numel() // 128
    assert stored_bytes(store) == codes_bytes + 4 * groups
    sum(product.sum() for product in products).backward()
    # A 4-bit error is at most one step a value.
    step = float(x.max() - x.min()) / 15 * (1 + 2**-6)
    assert float((weight.grad - x.sum(1)).abs().max()) <= 3 * step
    assert float((other.grad - x.transpose(1, 2)).abs().max()) <= step


def test_views_saved_together_are_restored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention asks for query, key and value, three views of one storage: one dequantization."""
    calls = []

    def counted(*arguments: object, **options: object) -> Tensor:
        calls.append(arguments)
        return dequantize(*arguments, **options)

    monkeypatch.setattr(store_module, "dequantize", counted)
    torch.manual_seed(0)
    x = torch.randn(2, 16, 3, 4, 32, requires_grad=True)
    with store_for(nn.Linear(1, 1)):
        query, key, value = (x * 1.0).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value)
    y.sum().backward()
    # One for the three inputs, one for the output.
    assert len(calls) == 2


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
    # 8 bits: a few parts in a thousand, far from what a lost mask would do.
    assert float((restored - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("exponent", [-1.0, 0.5, 3])
def test_powers_stay_exact(exponent: float) -> None:
    """A negative power of a value rounded to zero would be infinite."""
    torch.manual_seed(0)
    x = torch.rand(4096).add(1e-4).requires_grad_()
    (exact,) = torch.autograd.grad((x**exponent).sum(), x)
    with store_for(nn.Linear(1, 1)):
        y = x**exponent + torch.pow(x * 1.0, exponent)
    (restored,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(restored, 2 * exact)


def test_more_bits_are_stored_where_a_later_use_needs_them() -> None:
    """A tensor kept at 4 bits for a product is kept at 8 for the nonlinear function after it."""
    torch.manual_seed(0)
    x = torch.randn(512, requires_grad=True)
    store = store_for(nn.Linear(1, 1))
    with store:
        h = x * 1.0
        y = torch.mul(h, torch.randn(512, requires_grad=True)).sum() + torch.sigmoid(h).sum()
        after_product = stored_bytes(store)
        z = F.gelu(h).sum()
    assert stored_bytes(store) - after_product >= 512
    (y + z).backward()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "channels_last", "offset"])
def test_strides_are_restored(layout: str) -> None:
    torch.manual_seed(0)
    base = torch.randn(8, 16, 12, 10)
    x = {
        "transposed": lambda t: t.transpose(1, 3),
        "sliced": lambda t: t[:, ::2],
        "expanded": lambda t: t[:, :1].expand(8, 16, 12, 10),
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "offset": lambda t: t[3:],
    }[layout](base)
    other = torch.randn(x.shape, requires_grad=True)
    with store_for(nn.Linear(1, 1), Policy(linear_bits=8, minimum_numel=1)):
        product = torch.mul(other, x)
    product.sum().backward()
    restored = other.grad
    assert restored.shape == x.shape
    # 8 bits outward rounded: at most one step, of 1/255 of the group's range (1 + 2^-7 for bf16).
    step = (base.max() - base.min()) / 255 * (1 + 2**-6)
    assert float((restored - x).abs().max()) <= float(step)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bits=st.sampled_from([8, 4, 2]),
    group_size=st.sampled_from([64, 128, 256]),
    permute=st.randoms(use_true_random=False),
)
def test_unpacked_tensor_has_the_form_of_the_packed(
    shape: list[int], dtype: torch.dtype, bits: int, group_size: int, permute: object
) -> None:
    torch.manual_seed(0)
    policy = Policy(linear_bits=bits, minimum_numel=1, group_size=group_size)
    store = store_for(nn.Linear(1, 1), policy)
    order = list(range(len(shape)))
    permute.shuffle(order)
    x = torch.randn(shape).to(dtype).permute(order)
    with store:
        store._function.name, store._function.first_argument = "linear", x
        packed = store._pack(x)
    y = packed.restore()
    assert (y.shape, y.stride(), y.dtype, y.device) == (x.shape, x.stride(), x.dtype, x.device)
    span = float(x.float().max() - x.float().min())
    # Scale rounded outward to bf16 (8 significant bits, at most two units), codes off by at most
    # one; zero point outward by one bf16 unit; the result rounded to its dtype.
    unit = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    largest = float(x.float().abs().max())
    step = (span + largest * 2**-7) / (2**bits - 1) * (1 + 2**-6) + 1e-30
    assert float((y.float() - x.float()).abs().max()) <= step + unit * (largest + step)


def test_retain_graph_and_double_backward() -> None:
    model, windows = gpt()
    expected = exact_gradients(model, windows)
    with store_for(model, LOSSLESS):
        loss = next_byte_loss(model, windows)
    loss.backward(retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))
    x = torch.randn(32, 32, requires_grad=True)
    with store_for(model):
        y = (F.linear(x, x.detach()) ** 3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    assert second.shape == x.shape
    assert bool(torch.isfinite(second).all())


def test_changing_a_kept_tensor_in_place_is_an_error() -> None:
    x = torch.randn(40, requires_grad=True)
    with store_for(nn.Linear(1, 1)):
        y = torch.exp(x)
        y.add_(1)
    with pytest.raises(RuntimeError, match="must not change before it is used; one of shape"):
        y.sum().backward()


def test_changing_a_compressed_tensor_in_place_is_right() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(64, 64)
    x[0, 0], x[0, 1] = 4.0, -4.0
    original = x.clone()
    with store_for(nn.Linear(1, 1), Policy(linear_bits=8, minimum_numel=1)):
        y = torch.mm(x, weight)
        x.mul_(100)
        z = torch.mm(x, weight)
    (first,) = torch.autograd.grad(y.sum(), weight)
    (second,) = torch.autograd.grad(z.sum(), weight)
    # 64 values, each off by at most one step of a range of 8 (respectively 800).
    bound = 64 * 8 / 255 * (1 + 2**-6)
    columns = original.sum(0)[:, None].expand(64, 64)
    assert float((first - columns).abs().max()) < bound
    assert float((second - 100 * columns).abs().max()) < 100 * bound


def test_non_finite_values_stay_visible() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(64, 64)
    x[5, 7] = float("inf")
    with store_for(nn.Linear(1, 1)):
        y = torch.mm(x, weight)
    (gradient,) = torch.autograd.grad(y.nan_to_num().sum(), weight)
    assert not bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("kind", ["complex", "sparse", "integer", "parameter subclass", "small"])
def test_what_is_not_compressed_passes_exactly(kind: str) -> None:
    model = nn.Linear(1, 1)
    store = store_for(model)
    tensor = {
        "complex": lambda: torch.randn(32, 32, dtype=torch.complex64),
        "sparse": lambda: torch.eye(32).to_sparse(),
        "integer": lambda: torch.arange(1024),
        "parameter subclass": lambda: nn.Parameter(torch.randn(32, 32)),
        "small": lambda: torch.randn(10),
    }[kind]()
    with store:
        store._function.name = "linear"
        packed = store._pack(tensor)
    restored = packed.restore()
    assert store.compressed_tensors() == []
    assert restored.data_ptr() == tensor.data_ptr() if kind != "sparse" else restored.is_sparse


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
    assert stored_bytes(store) == 512 * 64 // 2 + 512 * 64 // 128 * 4
    y.sum().backward()


def test_checkpoint_inside_keeps_recomputing() -> None:
    model, _ = gpt()
    calls = 0

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = model.blocks[0]

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self._run, x, use_reentrant=False)

        def _run(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.block(x)

    wrapped = Checkpointed()
    x = torch.randn(4, 32, 64, requires_grad=True)
    wrapped(x).sum().backward()
    expected = gradients(wrapped)
    with store_for(wrapped):
        loss = wrapped(x).sum()
    loss.backward()
    assert calls == 4
    assert all(torch.equal(a, b) for a, b in zip(gradients(wrapped), expected, strict=True))


def test_inside_a_checkpoint_is_refused() -> None:
    model, _ = gpt()

    def run(x: Tensor) -> Tensor:
        with store_for(model):
            return model.blocks[0](x)

    with pytest.raises(RuntimeError, match="must be the outermost saved-tensor hooks"):
        checkpoint(run, torch.randn(4, 32, 64, requires_grad=True), use_reentrant=False)


def test_nothing_leaks() -> None:
    model, windows = gpt()
    store = store_for(model)
    with store:
        loss = next_byte_loss(model, windows)
    assert stored_bytes(store) > 0
    gc.disable()
    try:
        del loss
        assert stored_bytes(store) == 0
    finally:
        gc.enable()


def test_compress_is_a_context_manager() -> None:
    model, windows = gpt()
    expected = exact_gradients(model, windows)
    with dpmem.compress(model, Policy(linear_bits=8, minimum_numel=256), seed=3):
        loss = next_byte_loss(model, windows)
    loss.backward()
    received = gradients(model)
    assert any(not torch.equal(a, b) for a, b in zip(received, expected, strict=True))
    with pytest.raises(ValueError, match="received '5bit'"), dpmem.compress(model, "5bit"):
        pass


def test_presets_and_table_are_consistent() -> None:
    assert set(PRESETS) == {"lossless", "8bit", "4bit", "2bit"}
    for policy in PRESETS.values():
        assert policy.bits("exact") is None
        assert policy.bits("sign") is None
    assert "div" not in ROLE_OF_FUNCTION
    assert "log_softmax" not in ROLE_OF_FUNCTION
