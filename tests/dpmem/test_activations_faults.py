"""What went wrong once: programs, failures and shapes that compression must survive."""

import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import dpmem
from dpmem.activations import ActivationStore, Policy
from dpmem.activations.refusals import compiled_code

LOSSLESS = Policy(linear_bits=None, nonlinear_bits=None, minimum_numel=256)
NO_MODEL = nn.Linear(1, 1)


def random_program(seed: int, a: Tensor, b: Tensor) -> Tensor:
    """Arithmetic and smooth functions of a few live tensors; others die, and lend addresses."""
    rng = random.Random(seed)
    live = [a, b]
    for _ in range(rng.randint(6, 20)):
        kind, x, y = rng.randrange(6), rng.choice(live), rng.choice(live)
        if kind == 0:
            result = 0.5 * (x + y)
        elif kind == 1:
            result = F.gelu(x + y)
        elif kind == 2:
            result = (x + y) / 2
        elif kind == 3:
            result = torch.tanh(x - y * 0.3)
        elif kind == 4:
            result = F.gelu(x.t()) * y.t().contiguous()
        else:
            result = x * 0.7 + y
        live.append(result)
        if len(live) > 4:
            live.pop(rng.randrange(len(live)))
    return sum(live).square().mean()


def test_arithmetic_on_what_died_is_not_taken_for_another_tensors() -> None:
    """Kept by address alone, the source of a sum was whatever tensor came to lie there later."""
    for seed in range(150):
        torch.manual_seed(seed)
        a, b = (torch.randn(32, 32, requires_grad=True) for _ in range(2))
        exact = torch.autograd.grad(random_program(seed, a, b), (a, b), allow_unused=True)
        with dpmem.compress(NO_MODEL, LOSSLESS):
            loss = random_program(seed, a, b)
        found = torch.autograd.grad(loss, (a, b), allow_unused=True)
        for mine, want in zip(found, exact, strict=True):
            assert (mine is None and want is None) or torch.equal(mine, want), seed


@pytest.mark.parametrize("width", [64, 32])
def test_frozen_keys_are_no_dropout_masks(width: int) -> None:
    """On the CPU a frozen key has the mask's shape where the sequence is as long as a head."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 64, width, requires_grad=True)
    key, value = torch.randn(2, 4, 64, width), torch.randn(2, 4, 64, width)

    def gradient(*, compressed: bool) -> Tensor:
        torch.manual_seed(1)
        if compressed:
            with dpmem.compress(NO_MODEL, LOSSLESS):
                y = F.scaled_dot_product_attention(query, key, value, dropout_p=0.1)
        else:
            y = F.scaled_dot_product_attention(query, key, value, dropout_p=0.1)
        return torch.autograd.grad(y.square().sum(), query)[0]

    assert torch.equal(gradient(compressed=True), gradient(compressed=False))


class Fragile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        if self.fails:
            raise ValueError("bad batch")
        return y


def test_a_forward_that_raised_leaves_a_budget_as_it_was() -> None:
    torch.manual_seed(0)
    model, x = Fragile(), torch.randn(128, 64)
    store = ActivationStore(model, Policy.parse("256KiB"), seed=1)
    for fails in (False, True, True, False, False):
        model.fails = fails
        try:
            with store:
                loss = model(x).square().mean()
        except ValueError:
            assert fails
        else:
            loss.backward()
        assert store.log == []
        assert store.compressed_tensors() == []


def test_ranks_that_disagree_leave_the_compiler_alone() -> None:
    def agree(told: Tensor) -> Tensor:
        return told + 1 if told.numel() == 2 else told

    model, x = Fragile(), torch.randn(128, 64)
    store = ActivationStore(model, Policy.parse("1MiB"), seed=1, agree=agree)
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
    with store:
        loss = model(x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="ranks must save as many tensors"), store:
        model(x)
    compiled(x)


def test_a_forward_refused_for_compiled_code_leaves_nothing_to_the_next() -> None:
    """What it saved was planned with, and kept until the next forward ended."""
    model, x = Fragile(), torch.randn(128, 64)
    store = ActivationStore(model, Policy.parse("1MiB"), seed=1)
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
    with pytest.raises(NotImplementedError, match="run uncompiled"), store:
        compiled(model(x))
    assert store.log == []


def test_a_loop_inside_one_context_keeps_nothing() -> None:
    torch.manual_seed(0)
    model = Fragile()
    store = ActivationStore(model, Policy(minimum_numel=256), seed=1)
    with store:
        for _ in range(3):
            model(torch.randn(128, 64)).square().mean().backward()
            assert store.compressed_tensors() == []


def test_a_forward_of_larger_tensors_than_planned_is_said() -> None:
    """Two inputs, of which one grows: what the other was given is gone already."""
    torch.manual_seed(0)
    first, second = Fragile(), Fragile()
    model = nn.ModuleList([first, second])
    store = ActivationStore(
        model, Policy(linear_bits=2, minimum_numel=256, budget_bytes=260_000), seed=1
    )

    def step(rows: int) -> None:
        with store:
            loss = first(torch.randn(128, 64)).square().mean()
            loss = loss + second(torch.randn(rows, 64)).square().mean()
        loss.backward()

    step(32)
    step(32)
    with pytest.warns(UserWarning, match="saved larger tensors than the one before"):
        step(256)
    step(256)


@pytest.mark.parametrize(
    "power",
    [
        lambda x: torch.pow(2.0, x),
        lambda x: torch.pow(x.exp(), x),
        lambda x: torch.div(3.0 * x, x.exp()),
    ],
)
def test_powers_and_quotients_of_tensors_are_no_arithmetic_on_one(
    power: Callable[[Tensor], Tensor],
) -> None:
    """The exponent was asked whether it is 2, which a tensor cannot say."""
    x = torch.randn(32, 32, requires_grad=True)
    with dpmem.compress(NO_MODEL, LOSSLESS):
        y = power(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, torch.autograd.grad(power(x).sum(), x)[0])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_arithmetic_on_sparse_rows_passes() -> None:
    """They have no strides that could be asked for."""
    torch.manual_seed(0)
    rows = (torch.rand(64, 64) < 0.1).float().to_sparse_csr()
    x = torch.randn(64, 32, requires_grad=True)
    with dpmem.compress(NO_MODEL, LOSSLESS):
        y = (rows * 0.5) @ x
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, torch.autograd.grad(((rows * 0.5) @ x).sum(), x)[0])


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_module_is_made_inside() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(8))
    store = ActivationStore(model, Policy(minimum_numel=256), seed=1)
    with store:
        y = model(torch.randn(64, 32))
    assert store.compressed_tensors() != []
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def known(store: ActivationStore) -> int:
    tracker = store._tracker
    return sum(map(len, (store._slots, tracker._keys, tracker._derived, tracker._computed)))


def train(model: nn.Module, inputs: list[Tensor]) -> None:
    for x in inputs:
        model(2 * x).sum().backward()


def evaluate(model: nn.Module, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        for x in inputs:
            model(2 * x)


def train_on_batches_that_live(model: nn.Module, inputs: list[Tensor]) -> None:
    for x in inputs:
        model(x).sum().backward()


@pytest.mark.parametrize("loop", [train, evaluate, train_on_batches_that_live])
def test_what_is_known_of_storages_does_not_grow_while_a_context_is_open(
    monkeypatch: pytest.MonkeyPatch, loop: Callable[[nn.Module, list[Tensor]], None]
) -> None:
    """Weights computed in each forward, forwards that save nothing, slots of batches that live."""
    monkeypatch.setattr("dpmem.activations.store.FIRST_PRUNING", 16)
    monkeypatch.setattr("dpmem.activations.tracker.FIRST_PRUNING", 16)
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(32, 32)), nn.GELU(), nn.Linear(32, 8))
    store = ActivationStore(model, LOSSLESS, seed=1)
    with store:
        loop(model, [torch.randn(32, 32) for _ in range(120)])
        assert known(store) < 100


def test_forgetting_what_is_gone_leaves_gradients_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dpmem.activations.store.FIRST_PRUNING", 1)
    monkeypatch.setattr("dpmem.activations.tracker.FIRST_PRUNING", 1)
    for seed in range(60):
        torch.manual_seed(seed)
        a, b = (torch.randn(32, 32, requires_grad=True) for _ in range(2))
        exact = torch.autograd.grad(random_program(seed, a, b), (a, b), allow_unused=True)
        with dpmem.compress(NO_MODEL, LOSSLESS):
            found = [
                torch.autograd.grad(random_program(seed, a, b), (a, b), allow_unused=True)
                for _ in range(2)
            ]
        for mine, want in zip(found[0] + found[1], exact + exact, strict=True):
            assert (mine is None and want is None) or torch.equal(mine, want), seed


def test_a_context_that_refused_to_begin_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counted a forward, and its reader watched forwards that nobody read."""
    store = ActivationStore(Fragile(), Policy.parse("1MiB"), seed=1)

    def refuse() -> None:
        raise NotImplementedError("compiled")

    with monkeypatch.context() as patch:
        patch.setattr(compiled_code, "refuse", refuse)
        with pytest.raises(NotImplementedError, match="compiled"):
            store.__enter__()
    assert store.reader is None
    assert store._tracker.watch is None
    assert next(store._forwards) == 1
    with store:
        assert store._tracker.watch is not None


def test_a_budget_that_refuses_leaves_the_compiler_alone() -> None:
    def disagree(told: Tensor) -> Tensor:
        return told + 1 if told.numel() == 2 else told

    model = Fragile()
    store = ActivationStore(model, Policy.parse("1MiB"), seed=1, agree=disagree)
    with store:
        loss = model(torch.randn(128, 64)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="ranks must save as many tensors"):
        store.__enter__()
    assert compiled_code._inside == 0


def test_a_forward_without_a_reader_is_not_watched() -> None:
    store = ActivationStore(Fragile(), LOSSLESS, seed=1)
    store._tracker.watch = lambda call, result: None
    with store:
        assert store._tracker.watch is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "how", ["scripted", "traced", "frozen", "a trained part", "a thread a device"]
)
def test_models_whose_functions_cannot_be_seen_are_refused(how: str) -> None:
    """Everything stayed exact, and nobody was told."""
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU())
    if how == "frozen":
        model.requires_grad_(False)
    if how == "traced":
        hidden = torch.jit.trace(model, torch.randn(2, 32))
    elif how == "a thread a device":
        hidden = nn.DataParallel(model)
        hidden.device_ids = [0, 1]
    else:
        hidden = torch.jit.script(model)
    if how == "a trained part":
        hidden = nn.Sequential(nn.Linear(32, 32), hidden)
    with pytest.raises(NotImplementedError, match=r"a process a device|scripted or traced"):
        dpmem.compress(hidden, "4bit")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:UserWarning")
def test_a_frozen_part_that_cannot_be_seen_lets_the_rest_be_compressed() -> None:
    """What it saves stays exact; the whole model was an error for it."""
    torch.manual_seed(0)
    frozen = torch.jit.trace(nn.Linear(32, 32).requires_grad_(False), torch.randn(2, 32))
    model = nn.Sequential(frozen, nn.Linear(32, 32), nn.GELU())
    store = ActivationStore(model, Policy(minimum_numel=256), seed=1)
    with store:
        y = model(torch.randn(64, 32))
    assert store.compressed_tensors() != []
    y.sum().backward()


def test_two_models_in_nested_contexts_are_told_what_to_do() -> None:
    with (
        dpmem.compress(Fragile(), "4bit"),
        pytest.raises(RuntimeError, match=r"nn\.ModuleList"),
        dpmem.compress(Fragile(), "4bit"),
    ):
        pass


def test_contexts_of_two_threads_leave_the_compiler_as_it_was() -> None:
    """The second to enter took the first's refusal of compiled code for what had been before."""
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with ActivationStore(Fragile(), LOSSLESS, seed=1):
            first_in.set()
            second_in.wait()
        first_out.set()

    def second() -> None:
        first_in.wait()
        with ActivationStore(Fragile(), LOSSLESS, seed=1):
            second_in.set()
            first_out.wait()

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compiled(torch.randn(3))
