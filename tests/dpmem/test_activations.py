"""The activation store over a model: gradients, noise, other hooks."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dpmem
from dpmem.activations import ActivationStore, Policy
from dpmem.text_gpt import ByteGPT, GPTSize, next_byte_loss

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
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(256, 64),
        nn.GELU(),
        nn.Linear(64, 8),
    )
    x = torch.randn(32, 64)

    def run() -> Tensor:
        torch.manual_seed(1)
        return model(x).square().sum()

    run().backward()
    expected = gradients(model)
    store = store_for(model, LOSSLESS)
    with store:
        loss = run()
    # The ReLU's output and the dropout's mask as bits: 32 * 256 of each, and the mask's value.
    assert stored_bytes(store) == 2 * 32 * 256 // 8 + 4
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


def test_a_context_made_anew_at_every_step_does_not_repeat_its_noise() -> None:
    model, windows = gpt()
    runs = []
    for _ in range(2):
        with dpmem.compress(model, FOUR_BITS):
            loss = next_byte_loss(model, windows)
        loss.backward()
        runs.append(gradients(model))
    assert any(not torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("made_before_the_group", [False, True])
def test_ranks_that_compress_draw_noise_of_their_own(
    monkeypatch: pytest.MonkeyPatch, made_before_the_group: bool
) -> None:
    """As under DistributedDataParallel, whose ranks all make the same context."""
    runs = []
    for rank in range(2):
        model, windows = gpt()
        with monkeypatch.context() as patch:
            context = dpmem.compress(model, FOUR_BITS) if made_before_the_group else None
            patch.setattr("torch.distributed.is_initialized", lambda: True)
            patch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
            with context or dpmem.compress(model, FOUR_BITS):
                loss = next_byte_loss(model, windows)
            loss.backward()
        runs.append(gradients(model))
    assert any(not torch.equal(a, b) for a, b in zip(*runs, strict=True))
