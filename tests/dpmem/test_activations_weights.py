"""What is the model's stays exact, so that the gradient of an input meets no rounding noise."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import dpmem
from dpmem.activations import ActivationStore, Policy

FOUR_BITS = Policy(linear_bits=4, nonlinear_bits=8, minimum_numel=256)
WIDTH = 32


class Int8Linear(nn.Module):
    """A weight kept as integers and a scale, as quantized fine-tuning has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-128, 128, (WIDTH, WIDTH), dtype=torch.int8))
        self.scale = nn.Parameter(torch.rand(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.codes.float() * self.scale).to(x.dtype))


class Uses(nn.Module):
    """One weight, and the ways there are to multiply with it."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight)


def spectral() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "x @ w.T": lambda: Uses(lambda x, w: x @ w.T),
    "matmul": lambda: Uses(torch.matmul),
    "matmul from the left": lambda: Uses(lambda x, w: torch.matmul(w, x.mT)),
    "mm": lambda: Uses(lambda x, w: torch.mm(x.flatten(0, 1), w)),
    "addmm": lambda: Uses(lambda x, w: torch.addmm(w[0], x.flatten(0, 1), w)),
    "bmm of an expanded weight": lambda: Uses(lambda x, w: torch.bmm(x, w.expand(4, -1, -1))),
    "heads": lambda: Uses(lambda x, w: x.unsqueeze(1) @ w.view(2, WIDTH, WIDTH // 2)),
    "einsum": lambda: Uses(lambda x, w: torch.einsum("btc,dc->btd", x, w)),
    "einsum over heads": lambda: Uses(
        lambda x, w: torch.einsum("btc,hcd->bhtd", x, w.view(2, WIDTH, WIDTH // 2))
    ),
    "elementwise": lambda: Uses(lambda x, w: x.mul(w[:8])),
    "conv": lambda: Uses(lambda x, w: F.conv1d(x.mT, w.unsqueeze(-1))),
    "transposed conv": lambda: Uses(lambda x, w: F.conv_transpose1d(x.mT, w.unsqueeze(-1))),
    "channels-last conv": lambda: Uses(
        lambda x, w: F.conv2d(
            x.mT.unsqueeze(-1).contiguous(memory_format=torch.channels_last), w[..., None, None]
        )
    ),
    "cast by hand": lambda: Uses(lambda x, w: F.linear(x.bfloat16(), w.bfloat16())),
    "scaled": lambda: Uses(lambda x, w: F.linear(x, w * w.new_ones(()).mul(0.5) + w)),
    "cast under no_grad": lambda: Uses(lambda x, w: F.linear(x, without_gradient(w))),
    "concatenated": lambda: Uses(lambda x, w: F.linear(x, torch.cat([w, w[:3]]))),
    "tied": lambda: Uses(lambda x, w: F.linear(x + F.embedding(torch.arange(8) % WIDTH, w), w)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral norm": spectral,
    "int8": Int8Linear,
}


def without_gradient(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return weight.double().float()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16, no cache"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_weights_stay_exact(name: str, trained: bool, precision: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().requires_grad_(trained)
    x = torch.randn(4, 8, WIDTH, requires_grad=True)

    def run() -> Tensor:
        autocast = torch.autocast(
            "cpu", torch.bfloat16, enabled=precision != "fp32", cache_enabled="no" not in precision
        )
        with autocast:
            # Twice, so that the second use meets what autocast kept of the first.
            h = x * 1.0
            return model(h).float().square().sum() + model(h).float().sum()

    (exact,) = torch.autograd.grad(run(), x)
    store = ActivationStore(model, FOUR_BITS, seed=1)
    with store:
        loss = run()
    # A trained weight's gradient needs the activation, which is compressed.
    needs_activation = trained and name != "cast under no_grad"
    assert store.compressed_tensors() != [] or not needs_activation
    (restored,) = torch.autograd.grad(loss, x)
    assert torch.equal(restored, exact)


def test_gradients_through_a_frozen_layer_under_bf16() -> None:
    """Fine-tuning: the first layer's gradient reaches it through a frozen one."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    layers[1].requires_grad_(False)
    x = torch.randn(4, 8)
    found = []
    for activations in (None, FOUR_BITS):
        layers.zero_grad()
        model = dpmem.wrap(layers, precision="bf16", activations=activations)[0]
        model(x).square().sum().backward()
        # The input has 32 values, too few to be compressed: only weights could add noise.
        found.append(layers[0].weight.grad.clone())
    assert torch.equal(found[0], found[1])


def test_in_place_changes_make_a_copy_of_a_weight_an_activation() -> None:
    """A buffer of the weight's shape that activations are written into is no weight."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH)
    x = torch.randn(WIDTH, WIDTH)
    store = ActivationStore(layer, FOUR_BITS, seed=1)
    with store:
        h = torch.empty_like(layer.weight.detach())
        h.copy_(x)
        y = layer(h)
    assert store.compressed_tensors() != []
    y.sum().backward()


def test_the_first_layers_input_is_compressed_under_bf16() -> None:
    """Data needs no gradient, nor does its low-precision copy: it is still no weight."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH)
    store = ActivationStore(layer, FOUR_BITS, seed=1)
    with store, torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(WIDTH, WIDTH))
    assert store.compressed_tensors() != []
    y.float().sum().backward()


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
    store = ActivationStore(model, FOUR_BITS, seed=1)
    with store:
        loss = run(model)
    assert store.compressed_tensors() == []
    loss.backward()
    assert torch.equal(x.grad, expected)


def test_autocast_weight_copies_are_never_compressed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    x = torch.randn(2, 64)
    store = ActivationStore(model, FOUR_BITS, seed=1)
    with store, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).sum()
    assert store.compressed_tensors() == []
    loss.backward()
