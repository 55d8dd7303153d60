"""Activations in host memory: the same gradients, bounded copies, streams in the right order."""

import pytest
import torch
from torch import Tensor

import dpmem
from dpmem.activations import ActivationStore, Policy
from dpmem.activations.offload import HostMemory, OnHost
from dpmem.text_gpt import ByteGPT, GPTSize, next_byte_loss


def gpt() -> tuple[ByteGPT, Tensor]:
    torch.manual_seed(0)
    model = ByteGPT(GPTSize(layers=2, width=64, heads=2, context=32))
    return model, torch.randint(0, 256, (4, 33))


def train(policy: Policy | None) -> list[Tensor]:
    model, windows = gpt()
    if policy is None:
        loss = next_byte_loss(model, windows)
    else:
        with ActivationStore(model, policy, seed=1):
            loss = next_byte_loss(model, windows)
    loss.backward()
    return [p.grad for p in model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bits", [None, 8, 4, 2])
def test_offload_leaves_gradients_as_they_are(bits: int | None) -> None:
    nonlinear = None if bits is None else 8
    options = {"linear_bits": bits, "nonlinear_bits": nonlinear, "minimum_numel": 256}
    stays, leaves = train(Policy(**options)), train(Policy(**options, offload=True))
    assert same(stays, leaves)
    assert (bits is None) == same(leaves, train(None))


def test_all_activations_leave() -> None:
    """Nothing of an activation's size stays behind by reference."""
    model, windows = gpt()
    store = ActivationStore(model, Policy(None, None, minimum_numel=256, offload=True), seed=1)
    kept: list[object] = []
    with store:
        loss = next_byte_loss(model, windows)
        kept += [form.kept for form in store._alive]
    assert kept
    assert all(isinstance(held, OnHost) for held in kept)
    # The logits' log-softmax, the largest exact one, is among them.
    assert max(t.numel() for t in store.compressed_tensors()) == 4 * 32 * 256
    loss.backward()


def test_an_offloaded_tensor_may_change_in_place() -> None:
    x = torch.randn(400, requires_grad=True)
    model = torch.nn.Linear(1, 1)
    with ActivationStore(model, Policy(None, None, minimum_numel=1, offload=True), seed=1):
        y = torch.exp(x)
        expected = y.detach().clone()
        y.add_(1)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, expected)


def test_presets_offload() -> None:
    model, windows = gpt()
    for preset in ("offload", "4bit+offload"):
        wrapped, _ = dpmem.wrap(model, activations=preset)
        next_byte_loss(wrapped, windows).backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_prefetch_is_bounded_and_ahead() -> None:
    memory = HostMemory(in_flight_bytes=1000)
    waiting = [memory((torch.full((100,), float(i)),)) for i in range(10)]
    for i in reversed(range(10)):
        (tensor,) = waiting[i].fetch()
        assert torch.equal(tensor, torch.full((100,), float(i)))
        flying = [w.arriving_bytes() for w in waiting]
        assert sum(flying) == 400 * min(2, i)
        assert all(size > 0 for size in flying[max(0, i - 2) : i])
    # Again, as under retain_graph.
    assert waiting[3].fetch()[0][0] == 3


def test_what_nobody_waits_for_is_forgotten() -> None:
    memory = HostMemory()
    first = [memory((torch.zeros(10),)) for _ in range(3)]
    del first[1]
    memory.begin_forward()
    second = memory((torch.zeros(10),))
    assert [w.place for w in (*first, second)] == [0, 1, 2]


class Stream:
    """Stands for a device's stream: writes down what is asked of it."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_stream(self, other: object) -> None:
        self.log.append("copies wait for compute")

    def record_event(self) -> "Event":
        self.log.append("event")
        return Event(self.log)

    def __enter__(self) -> None:
        self.log.append("copy")

    def __exit__(self, *_: object) -> None:
        pass


class Event:
    def __init__(self, log: list[str]) -> None:
        self.log, self.reached = log, False

    def query(self) -> bool:
        return self.reached

    def wait(self, stream: object) -> None:
        self.log.append("compute waits for a copy")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device with a stream for copies, played by the CPU."""
    log: list[str] = []
    stream = Stream(log)
    monkeypatch.setattr(HostMemory, "_stream", lambda self, device: stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: log.append("held"))
    real = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda t, device, pin_memory=False: real(t, device=device)
    )
    return log


def test_events_order_the_streams(log: list[str]) -> None:
    memory = HostMemory(in_flight_bytes=500)
    out = ["copies wait for compute", "copy", "event"]
    first = memory((torch.ones(100),))
    assert log == out
    assert len(memory._leaving) == 1
    log.clear()
    # With the second, 800 bytes are leaving: compute waits for the first copy, which is let go.
    second = memory((torch.full((100,), 2.0),))
    assert log == [*out, "compute waits for a copy"]
    assert [left.tensors[0][0] for left in memory._leaving] == [2.0]
    # A copy that is done is let go unasked.
    memory._leaving[0].done.reached = True
    log.clear()
    memory.end_forward()
    assert not memory._leaving
    log.clear()
    (tensor,) = second.fetch()
    # Used only after its event; the first is on its way then.
    arriving = ["copies wait for compute", "copy", "held", "event"]
    assert log == [*arriving, "compute waits for a copy", *arriving]
    assert torch.equal(tensor, torch.full((100,), 2.0))
    log.clear()
    assert first.fetch()[0][0] == 1
    assert log == ["compute waits for a copy"]
