"""What is known to go wrong with saved-tensor hooks and compressed activations, each a test."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dpmem
from dpmem.activations import ActivationStore, Policy
from dpmem.activations.forms import Exact
from dpmem.activations.slots import Slot, View

EIGHT = Policy(linear_bits=8, minimum_numel=256)
FOUR = Policy(linear_bits=4, minimum_numel=256)
LOSSLESS = Policy(linear_bits=None, nonlinear_bits=None, minimum_numel=256)
NOTHING = nn.Linear(1, 1)


def store_for(policy: Policy = EIGHT, model: nn.Module = NOTHING) -> ActivationStore:
    return ActivationStore(model, policy, seed=1)


def held_bytes(store: ActivationStore) -> int:
    return sum(t.untyped_storage().nbytes() for t in store.compressed_tensors())


def close(restored: Tensor, exact: Tensor, share: float = 0.02) -> bool:
    return float((restored - exact).norm()) <= share * float(exact.norm())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_01_a_transposed_weight_is_no_activation() -> None:
    model = nn.Linear(32, 32)
    x = torch.randn(8, 32, requires_grad=True)
    store = store_for(model=model)
    with store:
        torch.mm(x[:4], model.weight.t())
    assert held_bytes(store) == 0


def test_02_autocasts_copies_of_weights_are_no_activations() -> None:
    model = nn.Linear(32, 32)
    store = store_for(model=model)
    with store, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 32))
    assert held_bytes(store) == 0


def test_03_an_output_saved_twice_is_kept_once() -> None:
    x = torch.randn(32, 32, requires_grad=True)
    weight = torch.randn(32, 32, requires_grad=True)
    store = store_for()
    with store:
        y = torch.tanh(x) @ weight
    # One of the tanh, one of the weight, which is nobody's parameter.
    assert held_bytes(store) == 2 * (1024 + 4 * 4)
    y.sum().backward()


def test_04_attentions_output_and_the_projections_input_are_one() -> None:
    x = torch.randn(2, 16, 3, 4, 8, requires_grad=True)
    weight = nn.Linear(32, 32)
    store = store_for(model=weight)
    with store:
        query, key, value = (x * 1.0).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        y = weight(mixed.transpose(1, 2).reshape(2, 16, 32))
    assert held_bytes(store) == 3 * 1024 + 1024 + 4 * 16
    y.sum().backward()


def test_05_query_key_and_value_are_offsets_of_one_buffer() -> None:
    x = torch.randn(2, 16, 96, requires_grad=True)
    results = []
    for policy in (None, LOSSLESS, EIGHT):
        store = store_for(policy or EIGHT)
        query, key, value = (
            part.view(2, 16, 4, 8).transpose(1, 2) for part in (x * 1.0).split(32, -1)
        )
        if policy is None:
            y = F.scaled_dot_product_attention(query, key, value)
        else:
            with store:
                y = F.scaled_dot_product_attention(query, key, value)
        results.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(results[0], results[1])
    assert close(results[2], results[0])


def test_06_an_address_used_again_is_another_tensor() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    inputs = [torch.full((64, 64), float(i + 1)) for i in range(20)]
    outputs = []
    with store_for():
        for x in inputs:
            passing = x.clone()
            outputs.append(torch.mul(weight, passing))
            del passing
    for x, y in zip(inputs, outputs, strict=True):
        (gradient,) = torch.autograd.grad(y.sum(), weight)
        assert close(gradient, x)


def test_07_a_transpose_is_not_its_storage() -> None:
    x = torch.randn(32, 32)
    first, second = torch.randn(2, 32, 32, requires_grad=True).unbind(0)
    with store_for():
        y = (first * x).sum() + (second * x.t()).sum()
    one, two = torch.autograd.grad(y, (first, second))
    assert torch.equal(two, one.t())
    assert close(one, x)


def test_08_a_view_may_be_the_last_holder() -> None:
    weight = torch.randn(16, 32, requires_grad=True)
    base = torch.randn(4, 16, 32)
    exact = base[2].clone()
    with store_for():
        y = torch.mul(weight, base[2])
        del base
    gc.collect()
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert close(gradient, exact)


def test_09_unpack_runs_again_under_retain_graph() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with store_for(FOUR):
        y = F.gelu(x * 1.5).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, x)[0])


def test_10_unpack_comes_in_any_order() -> None:
    weights = torch.randn(3, 32, 32, requires_grad=True).unbind(0)
    inputs = [torch.randn(32, 32) for _ in range(3)]
    with store_for():
        outputs = [torch.mul(w, x) for w, x in zip(weights, inputs, strict=True)]
    for i in (1, 2, 0):
        (gradient,) = torch.autograd.grad(outputs[i].sum(), weights[i])
        assert close(gradient, inputs[i])


def test_11_in_place_after_compressing_is_right() -> None:
    weight = torch.randn(32, 32, requires_grad=True)
    x = torch.randn(32, 32)
    before = x.clone()
    with store_for():
        y = torch.mul(weight, x)
        x.zero_()
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert close(gradient, before)


@pytest.mark.parametrize("numel", [100, 1000])
def test_12_in_place_on_what_passed_through_raises(numel: int) -> None:
    x = torch.randn(numel, requires_grad=True)
    with store_for():
        y = torch.exp(x)
        y.mul_(2)
    with pytest.raises(RuntimeError, match="must not change before it is used"):
        y.sum().backward()


def test_13_nothing_keeps_its_own_graph_alive() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    store = store_for()
    gc.collect()
    gc.disable()
    try:
        with store:
            y = torch.exp(F.gelu(torch.tanh(x)))
        watched = torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage())
        del y
        assert watched.expired()
        assert held_bytes(store) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_14_dtype_and_strides_come_back(dtype: torch.dtype) -> None:
    x = torch.randn(4, 8, 6, 6).to(dtype).to(memory_format=torch.channels_last)
    found: list[tuple[Any, ...]] = []
    store = store_for()

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return w * 1

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (saved,) = ctx.saved_tensors
            found.append((saved.dtype, saved.shape, saved.stride()))
            return g

    weight = torch.ones(1, requires_grad=True)
    with store:
        y = Product.apply(weight)
        z = torch.mul(torch.ones(x.shape, dtype=dtype, requires_grad=True), x)
    y.backward()
    assert found == [(x.dtype, x.shape, x.stride())]
    assert z.grad_fn._saved_other.stride() == x.stride()
    assert z.grad_fn._saved_other.dtype == dtype


def test_15_only_the_innermost_hooks_run() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with (
        pytest.raises(RuntimeError, match="must be the outermost"),
        torch.autograd.graph.save_on_cpu(),
        store_for(),
    ):
        pass
    store = store_for()
    # Inside the model others may nest: what they save is theirs.
    with store, torch.autograd.graph.save_on_cpu():
        y = F.gelu(x)
    assert held_bytes(store) == 0
    y.sum().backward()


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x * 1.0, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_16_a_checkpoints_boundary_is_exact(reentrant: bool) -> None:
    model = Checkpointed(reentrant)
    x = torch.randn(32, 32, requires_grad=True)
    expected = torch.autograd.grad(model.body(x).square().sum(), list(model.parameters()))
    store = store_for(model=model)
    with store:
        y = model(x)
    assert held_bytes(store) == 0
    y.square().sum().backward()
    for parameter, exact in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, exact)


def test_17_inside_a_checkpoint_is_refused() -> None:
    def run(x: Tensor) -> Tensor:
        with store_for():
            return F.gelu(x)

    with pytest.raises(RuntimeError, match="put the checkpoint inside the compressed model"):
        checkpoint(run, torch.randn(32, 32, requires_grad=True), use_reentrant=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("how", ["module", "function", "wrapped"])
def test_18_compiled_code_is_refused(how: str) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU())
    x = torch.randn(64, 32)
    run: Callable[[Tensor], Tensor]
    if how == "wrapped":
        run = torch.compile(dpmem.wrap(model, activations=EIGHT)[0], backend="aot_eager")
        with pytest.raises(NotImplementedError, match=r"torch\.compile"):
            run(x)
        return
    run = torch.compile(
        model if how == "module" else lambda x: model(x).tanh(), backend="aot_eager"
    )
    with pytest.raises(NotImplementedError, match=r"torch\.compile"), store_for(model=model):
        run(x)
    # Uncompiled, the same store serves, and compiled code runs again outside.
    with store_for(model=model):
        model(x).sum().backward()
    run(x).sum().backward()


def test_19_a_relu_passes_gradients_where_it_did() -> None:
    """Through its output at 2 bits, a third of the active ones would be lost."""
    x = torch.randn(64, 64, requires_grad=True)
    model = nn.Linear(64, 64)
    with store_for(Policy(linear_bits=2, minimum_numel=256), model):
        y = model(torch.relu(x))
    (gradient,) = torch.autograd.grad(y, x, torch.randn(64, 64))
    assert torch.equal(gradient != 0, x > 0)


def test_20_small_tensors_are_exact() -> None:
    weight = torch.randn(255, requires_grad=True)
    x = torch.randn(255)
    with store_for(Policy(linear_bits=2, minimum_numel=256)):
        y = weight * x
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], x)


def test_21_a_dropped_prefetch_leaves_the_rest_in_order() -> None:
    xs = [torch.randn(32, 32, requires_grad=True) for _ in range(4)]
    policy = Policy(None, None, minimum_numel=256, offload=True)
    with store_for(policy):
        ys = [torch.exp(x) for x in xs]
    expected = [y.detach().clone() for y in ys]
    torch.autograd.grad(ys[3].sum(), xs[3])
    # Its copy was begun; it is never used.
    del ys[2]
    for i in (1, 0):
        (gradient,) = torch.autograd.grad(ys[i].sum(), xs[i])
        assert torch.equal(gradient, expected[i])


def test_22_what_a_function_hides_on_its_context_is_untouched() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.x = x.detach()
            return x.square()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * ctx.x * g

    x = torch.randn(64, 64, requires_grad=True)
    store = store_for()
    with store:
        y = Hidden.apply(x)
    assert held_bytes(store) == 0
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * x)


def test_23_dropout_masks_do_not_move() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 32), nn.Dropout(0.5))
    x = torch.randn(16, 32)
    outputs = []
    for policy in (None, FOUR):
        torch.manual_seed(7)
        if policy is None:
            y = model(x)
        else:
            with store_for(policy, model):
                y = model(x)
        y.sum().backward()
        outputs += [y.detach(), torch.rand(3)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_24_the_mean_of_what_is_restored_is_what_was_saved() -> None:
    """Metadata rounded to bfloat16 after quantizing would leave the mean off by 1e-2 of a step."""
    x = torch.randn(64, 64)
    weight = torch.ones(64, 64, requires_grad=True)
    store, total, draws = store_for(FOUR), torch.zeros(64, 64, dtype=torch.float64), 400
    for _ in range(draws):
        with store:
            y = weight * x
        total += torch.autograd.grad(y.sum(), weight)[0]
    step = float(x.max() - x.min()) / 15 * (1 + 2**-6)
    # A value's error has a standard deviation of half a step at most.
    bound = 6 * step / 2 / draws**0.5
    assert float((total / draws - x).abs().max()) < bound
    # Over all values: 64 times closer.
    assert abs(float((total / draws - x).mean())) < bound / 64


def test_25_the_same_noise_for_the_same_key_alone() -> None:
    x = torch.randn(64, 64)
    weight = torch.ones(64, 64, requires_grad=True)

    def restored(seed: int, rank: int) -> Iterator[Tensor]:
        store = ActivationStore(NOTHING, FOUR, seed=seed, rank=lambda: rank)
        while True:
            with store:
                y = weight * x
            yield torch.autograd.grad(y.sum(), weight)[0]

    draws = {key: restored(*key) for key in [(1, 0), (1, 1), (2, 0)]}
    first = {key: next(draw) for key, draw in draws.items()}
    assert torch.equal(first[1, 0], next(restored(1, 0)))
    others = [next(draws[1, 0]), first[1, 1], first[2, 0]]
    assert not any(torch.equal(first[1, 0], other) for other in others)


def test_views_and_slots_hold_no_exact_activation_under_codes() -> None:
    """What is compressed is not also kept as it was."""
    x = torch.randn(64, 64, requires_grad=True)
    store = store_for(FOUR)
    store.log = log = []
    with store:
        F.gelu(x * 1.0)
    sources = [one.packed.source for one in log if isinstance(one.packed, View)]
    assert sources
    assert not any(isinstance(s, Slot) and isinstance(s.values, Exact) for s in sources)
