"""What the store holds, and in which form it gives it back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import dpmem.activations.forms as forms
from dpmem.activations import ActivationStore, Policy
from dpmem.activations.store import _unpack
from dpmem_kernels import dequantize

# Small enough for tests: everything above 256 values is compressed.
FOUR_BITS = Policy(linear_bits=4, nonlinear_bits=8, minimum_numel=256)


def store_for(model: nn.Module, policy: Policy = FOUR_BITS, seed: int = 1) -> ActivationStore:
    return ActivationStore(model, policy, seed=seed)


def stored_bytes(store: ActivationStore) -> int:
    return sum(t.untyped_storage().nbytes() for t in store.compressed_tensors())


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """The storages of all that was dequantized, in order."""
    storages: list[StorageWeakRef] = []

    def noted(*arguments: object, **options: object) -> Tensor:
        flat = dequantize(*arguments, **options)
        storages.append(StorageWeakRef(flat.untyped_storage()))
        return flat

    monkeypatch.setattr(forms, "dequantize", noted)
    return storages


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
    codes_bytes, groups = x.numel() // 2, x.numel() // 256
    assert stored_bytes(store) == codes_bytes + 4 * groups
    sum(product.sum() for product in products).backward()
    # A 4-bit error is at most one step a value.
    step = float(x.max() - x.min()) / 15 * (1 + 2**-6)
    assert float((weight.grad - x.sum(1)).abs().max()) <= 3 * step
    assert float((other.grad - x.transpose(1, 2)).abs().max()) <= step


def test_what_is_computed_again_and_its_argument_are_restored_at_once(
    restored: list[StorageWeakRef],
) -> None:
    """The product's backward computes gelu again from its input, and gelu's own is the next."""
    torch.manual_seed(0)
    x = torch.randn(16, 64, requires_grad=True)
    contract = nn.Linear(64, 64)
    h = x * 1.0
    with store_for(contract):
        y = contract(F.gelu(h)).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    assert len(restored) == 1
    # Nor is it held longer than that.
    assert restored[0].expired()
    y.backward()
    assert torch.equal(x.grad, first)
    del y
    assert len(restored) == 2
    assert all(storage.expired() for storage in restored)


def test_an_argument_is_not_held_while_backward_goes_another_way(
    restored: list[StorageWeakRef],
) -> None:
    """From the product in silu(gate) * up backward goes to up's layer first, then to silu's."""
    torch.manual_seed(0)
    x, gate_layer, up_layer = torch.randn(16, 64), nn.Linear(64, 96), nn.Linear(64, 96)
    model = nn.ModuleList([gate_layer, up_layer])
    alive: list[bool] = []

    def before_ups_layer(_: Tensor) -> None:
        alive.extend(not storage.expired() for storage in restored)

    with store_for(model):
        activated = F.silu(gate_layer(x))
        up = up_layer(x)
        up.register_hook(before_ups_layer)
        y = (activated * up).sum()
    y.backward()
    # The gate, from which silu is computed again, and the other factor.
    assert alive == [False, False]


def test_an_argument_is_let_go_where_another_branch_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gelu's result goes two ways: after the product's backward comes that of the other branch."""
    restored = []

    def noted(*arguments: object, **options: object) -> Tensor:
        flat = dequantize(*arguments, **options)
        restored.append((flat.numel(), StorageWeakRef(flat.untyped_storage())))
        return flat

    monkeypatch.setattr(forms, "dequantize", noted)
    torch.manual_seed(0)
    layer, branch, product = nn.Linear(64, 96), nn.Linear(96, 32), nn.Linear(96, 64)
    branch.weight.requires_grad_(False)
    model = nn.ModuleList([layer, branch, product])
    alive: list[int] = []

    def in_the_branch(_: Tensor) -> None:
        alive.extend(numel for numel, storage in restored if not storage.expired())

    with store_for(model):
        activated = F.gelu(layer(torch.randn(16, 64)))
        narrow = branch(activated)
        narrow.register_hook(in_the_branch)
        narrow = F.silu(narrow)
        y = narrow.sum() + product(activated).sum()
    y.backward()
    assert restored[0][0] == 16 * 96
    assert 16 * 96 not in alive
    assert sum(numel == 16 * 96 for numel, _ in restored) == 2


def test_views_saved_together_are_restored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention asks for query, key and value, three views of one storage: one dequantization."""
    calls = []

    def counted(*arguments: object, **options: object) -> Tensor:
        calls.append(arguments)
        return dequantize(*arguments, **options)

    monkeypatch.setattr(forms, "dequantize", counted)
    torch.manual_seed(0)
    x = torch.randn(2, 16, 3, 4, 32, requires_grad=True)
    with store_for(nn.Linear(1, 1)):
        query, key, value = (x * 1.0).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value)
    y.sum().backward()
    # One for the three inputs, one for the output.
    assert len(calls) == 2


def test_more_bits_replace_fewer_where_a_later_use_needs_them() -> None:
    """A tensor kept at 4 bits for a product is kept at 8 for the nonlinear function after it."""
    torch.manual_seed(0)
    h = torch.randn(512, requires_grad=True) + 0
    store = store_for(nn.Linear(1, 1))
    with store:
        y = torch.mul(h, torch.randn(512, requires_grad=True)).sum()
        assert stored_bytes(store) == 2 * (256 + 2 * 4)
        z = F.gelu(h).sum()
    assert stored_bytes(store) == 256 + 512 + 2 * 2 * 4
    (y + z).backward()


def test_exact_replaces_codes_and_signs() -> None:
    """What one use needs exact is kept once, for all."""
    torch.manual_seed(0)
    x = torch.randn(512, requires_grad=True)
    store = store_for(nn.Linear(1, 1))
    with store:
        h = torch.relu(x)
        y = F.gelu(h).sum() + torch.tanh(h).sum()
        # Signs, codes of h and codes of the tanh.
        assert stored_bytes(store) == 128 + 2 * (512 + 8)
        z = torch.exp2(h).sum() + torch.atan(h).sum()
    assert stored_bytes(store) == 512 + 8
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
        store._tracker._running = ("linear", (x,), {})
        packed = store._pack(x)
    y = _unpack(packed)
    assert (y.shape, y.stride(), y.dtype, y.device) == (x.shape, x.stride(), x.dtype, x.device)
    span = float(x.float().max() - x.float().min())
    # Scale rounded outward to bf16 (8 significant bits, at most two units), codes off by at most
    # one; zero point outward by one bf16 unit; the result rounded to its dtype.
    unit = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    largest = float(x.float().abs().max())
    step = (span + largest * 2**-7) / (2**bits - 1) * (1 + 2**-6) + 1e-30
    assert float((y.float() - x.float()).abs().max()) <= step + unit * (largest + step)


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


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_non_finite_group_is_stored_exact(value: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 40, requires_grad=True)
    x = torch.randn(40, 40)
    x[5, 7], x[39, 39] = value, value
    flat = x.flatten()
    with store_for(nn.Linear(1, 1)):
        y = torch.mul(x, weight)
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    exact = torch.zeros(1600, dtype=torch.bool)
    exact[0:256] = exact[1536:1600] = True
    torch.testing.assert_close(
        gradient.flatten()[exact], flat[exact], rtol=0, atol=0, equal_nan=True
    )
    assert bool(torch.isfinite(gradient.flatten()[~exact]).all())
    assert not torch.equal(gradient.flatten()[~exact], flat[~exact])


@pytest.mark.parametrize(
    "kind",
    [
        "complex",
        "sparse",
        "integer",
        "parameter subclass",
        "small",
        "expanded from little",
        "expanded from a part",
    ],
)
def test_what_is_not_compressed_passes_exactly(kind: str) -> None:
    model = nn.Linear(1, 1)
    store = store_for(model)
    tensor = {
        "complex": lambda: torch.randn(32, 32, dtype=torch.complex64),
        "sparse": lambda: torch.eye(32).to_sparse(),
        "integer": lambda: torch.arange(1024),
        "parameter subclass": lambda: nn.Parameter(torch.randn(32, 32)),
        "small": lambda: torch.randn(10),
        "expanded from little": lambda: torch.randn(1, 10).expand(100, 10),
        "expanded from a part": lambda: torch.randn(2, 300)[:1].detach().expand(8, 300),
    }[kind]()
    with store:
        store._tracker._running = ("linear", (tensor,), {})
        packed = store._pack(tensor)
    restored = _unpack(packed)
    assert store.compressed_tensors() == []
    assert restored.data_ptr() == tensor.data_ptr() if kind != "sparse" else restored.is_sparse


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_pass_exactly() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 32)
    x = torch.nested.nested_tensor([torch.randn(20, 32), torch.randn(30, 32)])
    store = store_for(layer)
    with store:
        y = layer(x)
    assert store.compressed_tensors() == []
    torch.nested.to_padded_tensor(y, 0.0).sum().backward()
    expected = torch.cat(x.unbind()).sum(0).expand(32, 32)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_inside_vmap_views_and_codes_are_right() -> None:
    """A batched tensor has no storage; what autograd saves beneath it has."""
    torch.manual_seed(0)
    weight = torch.randn(32, 16, requires_grad=True)
    x = torch.randn(32, 32)
    store = store_for(nn.Linear(1, 1))
    with store:
        y = torch.vmap(lambda row: row @ weight)(x)
    assert store.compressed_tensors() != []
    y.sum().backward()
    step = float(x.max() - x.min()) / 15 * (1 + 2**-6)
    assert float((weight.grad - x.sum(0)[:, None]).abs().max()) <= 32 * step
