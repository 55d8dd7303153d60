"""Clipping and unscaling that torch's fused optimizers do in the pass of their update."""

import copy
import functools
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpmem
from dpmem.restore import undisturbed

FUSED: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adam amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2}),
    "sgd momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
}
MAX_NORM = 1.0
# What each step's inputs are multiplied by: gradients beyond MAX_NORM, and within.
SIZES = (100.0, 0.01, 100.0, 100.0, 0.01)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(step)).to(dtype)


def fused(name: str, model: nn.Module) -> torch.optim.Optimizer:
    make, options = FUSED[name]
    optimizer: torch.optim.Optimizer = make(model.parameters(), fused=True, **options)
    return optimizer


def start_at_scale_8(ours: dpmem.DataParallel) -> None:
    """Where nothing overflows that need not."""
    if ours.scaler is not None:
        ours.scaler.load_state_dict({"scale": 8.0, "growth_tracker": 0, "skipped_steps": 0})


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
def test_clipped_training_matches_clip_grad_norm(name: str, dtype: torch.dtype) -> None:
    model = network(dtype)
    plain = copy.deepcopy(model)
    ours, optimizer = dpmem.wrap(model, fused(name, model), max_grad_norm=MAX_NORM)
    theirs = fused(name, plain)
    for step, size in enumerate(SIZES):
        # From the same state, so that one step's roundings are all there is between them.
        plain.load_state_dict(model.state_dict())
        theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for wrapped in (ours, plain):
            (wrapped(batch(step, dtype)).float().square().sum() * size).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM)
        assert (float(norm) > MAX_NORM) == (size == 100.0)
        theirs.step()
        optimizer.step()
        gradients = [flat(p.grad for p in m.parameters()) for m in (model, plain)]
        parameters = [flat(m.parameters()) for m in (model, plain)]
        if size == 100.0:
            # A coefficient, a division and the gradient each round once or twice.
            unit = torch.finfo(dtype).eps
            for ours_flat, theirs_flat in (gradients, parameters):
                assert torch.allclose(ours_flat, theirs_flat, rtol=4 * unit, atol=1e-2 * 4 * unit)
        else:
            assert torch.equal(*gradients)
            assert torch.equal(*parameters)
        optimizer.zero_grad()
        theirs.zero_grad()
    for state in optimizer.state.values():
        if "step" in state:
            assert float(state["step"]) == len(SIZES)


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_hooks_schedulers_and_closures_see_one_step(size: float) -> None:
    model = network()
    optimizer = fused("adamw", model)
    seen: list[tuple[str, float]] = []

    def saw(when: str) -> Any:
        return lambda *_: seen.append((when, float(model[0].weight.detach().sum())))

    optimizer.register_step_pre_hook(saw("before"))
    optimizer.register_step_post_hook(saw("after"))
    ours, optimizer = dpmem.wrap(model, optimizer, max_grad_norm=MAX_NORM)
    optimizer.register_step_pre_hook(saw("before"))
    optimizer.register_step_post_hook(saw("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ours(batch(0)).square().sum() * size
        loss.backward()
        return loss

    for _ in range(2):
        before = float(model[0].weight.detach().sum())
        assert optimizer.step(closure).item() > 0
        after = float(model[0].weight.detach().sum())
        assert before != after
        assert seen == [("before", before)] * 2 + [("after", after)] * 2
        seen.clear()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 1e-2 / 4


@pytest.mark.parametrize("keeps_name", [False, True])
@pytest.mark.parametrize("size", [0.01, 100.0])
def test_a_class_whose_step_was_replaced(
    size: float, keeps_name: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As profilers do, with functools.wraps or without."""
    model = network()
    ours, optimizer = dpmem.wrap(model, fused("sgd momentum", model), max_grad_norm=MAX_NORM)
    hooked, seen = torch.optim.SGD.step, []
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hooked(self, *args, **kwargs)

    def train() -> Tensor:
        (ours(batch(0)).square().sum() * size).backward()
        optimizer.step()
        optimizer.zero_grad()
        return flat(model.parameters())

    train()
    saved = [copy.deepcopy(part.state_dict()) for part in (model, optimizer)]
    expected = train()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    monkeypatch.setattr(
        torch.optim.SGD, "step", functools.wraps(hooked)(timed) if keeps_name else timed
    )
    assert torch.allclose(train(), expected, rtol=1e-6, atol=1e-8)
    assert seen == ["after"] * 3


def test_an_update_that_raises_ends_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second update of one step: it may be tried again, and others may step."""
    model = network()
    ours, optimizer = dpmem.wrap(model, fused("adamw", model), max_grad_norm=MAX_NORM)
    module = importlib.import_module("torch.optim.adam")  # torch.optim hides it
    update, calls = module._fused_adam, 0

    def fails_second(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("no memory")
        update(*args, **kwargs)

    for step in range(2):
        (ours(batch(step)).square().sum() * 100.0).backward()
        if step == 1:
            monkeypatch.setattr(module, "_fused_adam", fails_second)
            with pytest.raises(RuntimeError, match="no memory"):
                optimizer.step()
            assert not ours._step.is_stepping
            assert not hasattr(optimizer, "found_inf")
        optimizer.step()
        assert float(flat(p.grad for p in model.parameters()).norm()) == pytest.approx(MAX_NORM)
        optimizer.zero_grad()
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_a_momentum_of_none_is_none() -> None:
    """Of a checkpoint from before the first step: torch's SGD takes it as one to come."""
    model = network()
    ours, optimizer = dpmem.wrap(model, fused("sgd momentum", model), precision="fp16")
    start_at_scale_8(ours)
    state = optimizer.state_dict()
    state["state"] = {number: {"momentum_buffer": None} for number in range(4)}
    optimizer.load_state_dict(state)
    (ours(batch(0)).square().sum() * 1e6).backward()
    optimizer.step()
    assert ours.scaler.skipped_steps == 1
    assert all(state["momentum_buffer"] is None for state in optimizer.state.values())


def test_a_subclass_steps_once() -> None:
    class Counting(torch.optim.AdamW):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    model = network()
    ours, optimizer = dpmem.wrap(
        model, Counting(model.parameters(), fused=True), max_grad_norm=MAX_NORM
    )
    for step in range(3):
        (ours(batch(step)).square().sum() * 100.0).backward()
        optimizer.step()
        norm = flat(p.grad for p in model.parameters()).norm()
        assert float(norm) == pytest.approx(MAX_NORM, rel=1e-4)
        optimizer.zero_grad()
    assert optimizer.steps == 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_fused_that_a_loaded_state_took_back(precision: Any) -> None:
    """A checkpoint of a run without fused: its steps take no flag."""
    model = network()
    plain = torch.optim.AdamW(model.parameters(), foreach=True)
    model(batch(0)).sum().backward()
    plain.step()
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ours, optimizer = dpmem.wrap(model, optimizer, precision=precision, max_grad_norm=MAX_NORM)
    start_at_scale_8(ours)
    optimizer.load_state_dict(plain.state_dict())
    for step in range(2):
        before = flat(model.parameters())
        (ours(batch(step)).square().sum() * 100.0).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(before, flat(model.parameters()))


def test_a_group_whose_first_step_is_skipped_gets_no_state() -> None:
    """torch's fused SGD leaves the momentum of a skipped first step uninitialised."""
    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor, which: int) -> Tensor:
            return self.layers[which](x)

    groups = [{"params": layer.parameters()} for layer in model]
    ours, optimizer = dpmem.wrap(
        Part(), torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=True), precision="fp16"
    )
    start_at_scale_8(ours)
    for which, size in ((0, 1.0), (1, 1e6)):
        ours(batch(0) * size, which).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ours.scaler.skipped_steps == 1
    assert not any(optimizer.state.get(p) for p in model[1].parameters())


def test_gradients_that_the_optimizer_does_not_hold_stay_as_they_are() -> None:
    """Those that parameters had when they were frozen: no update divides them."""
    model = network()
    ours, whole = dpmem.wrap(model, fused("adamw", model), precision="fp16")
    start_at_scale_8(ours)
    ours(batch(0)).square().sum().backward()
    whole.step()
    model[0].requires_grad_(False)
    kept = model[0].weight.grad.clone()
    rest = torch.optim.AdamW(model[2].parameters(), fused=True)
    for step in range(1, 4):
        rest.zero_grad()
        ours(batch(step)).square().sum().backward()
        rest.step()
        assert torch.equal(model[0].weight.grad, kept)


@pytest.mark.parametrize("again", ["the same", "added to", "zeroed", "none"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_raised_may_be_tried_again(precision: Any, again: str) -> None:
    """Whatever happened to its gradients since, it is the step that had not been tried before."""
    model = network()
    ours, optimizer = dpmem.wrap(
        model, fused("sgd", model), max_grad_norm=MAX_NORM, precision=precision
    )
    start_at_scale_8(ours)

    def backward(step: int) -> None:
        (ours(batch(step)).square().sum() * 10.0).backward()

    for step in range(2):
        backward(step)
        optimizer.step()
        optimizer.zero_grad()
    saved = [copy.deepcopy(part.state_dict()) for part in (model, optimizer)]
    scale = None if ours.scaler is None else ours.scaler.state_dict()

    def fail(*_: object) -> None:
        raise RuntimeError("a user's hook")

    def train(*, raises: bool) -> tuple[Tensor, Tensor]:
        """One step on from the same state."""
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        if scale is not None:
            ours.scaler.load_state_dict(scale)
        backward(2)
        if raises:
            handle = optimizer.register_step_pre_hook(fail)
            with pytest.raises(RuntimeError, match="a user's hook"):
                optimizer.step()
            handle.remove()
        if again in ("zeroed", "none"):
            optimizer.zero_grad(set_to_none=again == "none")
        if again != "the same":
            backward(3)
        optimizer.step()
        assert not hasattr(optimizer, "found_inf")
        result = flat(model.parameters()), ours.grad_norm
        optimizer.zero_grad()
        return result

    for expected, found in zip(train(raises=False), train(raises=True), strict=True):
        assert torch.equal(expected, found)
    if ours.scaler is not None:
        assert ours.scaler.state_dict()["growth_tracker"] == scale["growth_tracker"] + 1


def test_another_optimizer_after_a_step_that_raised_unscales(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradients were to be divided by the update, which did not happen."""
    model = network()
    ours, optimizer = dpmem.wrap(model, fused("adam amsgrad", model), precision="fp16")
    for step in range(2):
        start_at_scale_8(ours)
        optimizer.zero_grad()
        ours(batch(step)).sum().backward()
        if step == 0:
            optimizer.step()
    scaled = flat(p.grad for p in model.parameters())

    def no_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(importlib.import_module("torch.optim.adam"), "adam", no_memory)
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    before = flat(model.parameters())
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.allclose(before - flat(model.parameters()), scaled / 8, atol=1e-6)


def test_a_step_that_raised_where_all_is_put_back() -> None:
    model = network()
    ours, optimizer = dpmem.wrap(model, fused("adamw", model), max_grad_norm=MAX_NORM)

    def train() -> None:
        ours(batch(0)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def fail(*_: object) -> None:
        raise RuntimeError("a user's hook")

    def fail_to_train() -> None:
        with undisturbed([ours, optimizer]):
            optimizer.register_step_pre_hook(fail)
            train()

    train()
    with pytest.raises(RuntimeError, match="a user's hook"):
        fail_to_train()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(ours(batch(0)).square().sum()).backward()
    with pytest.raises(ValueError, match=r"received a step by torch\.amp\.GradScaler"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    train()


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_scaler_of_the_users_own(is_fused: bool, unscales: bool) -> None:
    """GradScaler unscales before a step, unless the optimizer is fused: then it is refused."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), fused=is_fused)
    ours, optimizer = dpmem.wrap(model, optimizer, max_grad_norm=1e9)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(ours(batch(0)).square().sum()).backward()
    expected = flat(p.grad for p in model.parameters()).norm() / 8
    if unscales:
        scaler.unscale_(optimizer)
    if is_fused:
        with pytest.raises(ValueError, match=r"received a step by torch\.amp\.GradScaler"):
            scaler.step(optimizer)
        optimizer.zero_grad()
        ours(batch(0)).square().sum().backward()
        optimizer.step()
        assert float(ours.grad_norm) == pytest.approx(float(expected), rel=1e-5)
    else:
        scaler.step(optimizer)
        assert float(ours.grad_norm) == pytest.approx(float(expected), rel=1e-6)
