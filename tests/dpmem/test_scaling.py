"""Loss scaling inside the wrapper, with torch.amp.GradScaler as the oracle."""

import copy
import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpmem

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "adamw foreach": (torch.optim.AdamW, {"lr": 1e-2, "foreach": True}),
    "sgd loop": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "foreach": False}),
    "sgd fused": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "fused": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
}
OVERFLOW = 1e6  # beyond fp16's largest number, 65504


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 8))


def batch(step: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(step))


def scaled_backward(model: nn.Module, x: Tensor, scale: float = 2.0**16) -> list[Tensor]:
    """What a person with a scale of his own gets: parameters' gradients, the scale divided out."""
    with torch.autocast("cpu", torch.float16):
        outputs = model(x)
    (outputs.float().square().mean() * scale).backward()
    return [p.grad / scale for p in model.parameters()]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_matches_grad_scaler(kind: str, max_norm: float | None) -> None:
    """Five steps, the third with infinite gradients: scale, skips, norm and parameters."""
    model = network()
    plain = copy.deepcopy(model)
    make, options = OPTIMIZERS[kind]
    ours, optimizer = dpmem.wrap(
        model, make(model.parameters(), **options), precision="fp16", max_grad_norm=max_norm
    )
    theirs, scaler = make(plain.parameters(), **options), torch.amp.GradScaler("cpu")
    for step in range(5):
        x = batch(step) * (OVERFLOW if step == 2 else 1.0)
        ours(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            outputs = plain(x)
        scaler.scale(outputs.float().square().mean()).backward()
        scaler.unscale_(theirs)
        norm = nn.utils.clip_grad_norm_(plain.parameters(), max_norm or float("inf"))
        scaler.step(theirs)
        scaler.update()
        theirs.zero_grad()
        assert float(ours.scaler.scale) == scaler.get_scale()
        assert ours.scaler.skipped_steps == (1 if step >= 2 else 0)
        if step != 2:
            # Sums of 1.7 k squares in different orders.
            assert float(ours.grad_norm) == pytest.approx(float(norm), rel=16 * 2**-24)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            if max_norm is None:
                # By powers of two: nothing is rounded.
                assert torch.equal(a, b)
            else:
                # A coefficient some roundings apart; four steps of at most 1e-2 an element.
                assert torch.allclose(a, b, rtol=0, atol=5 * 1e-2 * 64 * 2**-24)


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_skipped_step_changes_nothing(kind: str, warm: int) -> None:
    model = network()
    make, options = OPTIMIZERS[kind]
    ours, optimizer = dpmem.wrap(model, make(model.parameters(), **options), precision="fp16")
    for step in range(warm):
        ours(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy((list(model.parameters()), optimizer.state_dict()))
    ours(batch(9) * OVERFLOW).square().mean().backward()
    optimizer.step()
    parameters, state = before
    assert same(list(model.parameters()), parameters)
    received = optimizer.state_dict()["state"]
    assert received.keys() == state["state"].keys()
    for index, values in state["state"].items():
        assert all(torch.equal(received[index][name], v) for name, v in values.items())
    assert ours.scaler.skipped_steps == 1
    assert all(p.grad is not None for p in model.parameters())


def test_a_loss_and_the_logits_it_comes_from_are_scaled_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.net(x).float()
            return {"loss": logits.square().mean(), "logits": logits}

    model = Both()
    plain = copy.deepcopy(model)
    ours, _ = dpmem.wrap(model, precision="fp16")
    outputs = ours(batch(0))
    (outputs["loss"] + outputs["logits"].mean()).backward()
    ours.unscale_()
    with torch.autocast("cpu", torch.float16):
        expected = plain(batch(0))
    (2.0**16 * (expected["loss"] + expected["logits"].mean())).backward()
    assert same(gradients(model), [p.grad / 2**16 for p in plain.parameters()])


def test_outputs_edited_in_place_are_scaled() -> None:
    model = network()
    ours, _ = dpmem.wrap(model, precision="fp16")
    outputs = ours(batch(0))
    outputs.mul_(2.0)
    outputs[0].zero_()
    (outputs / 64).sum().backward()
    ours.unscale_()
    plain = network()
    with torch.autocast("cpu", torch.float16):
        expected = plain(batch(0)).float()
    (2.0**11 * expected[1:].sum()).backward()
    assert same(gradients(model), [p.grad / 2**16 for p in plain.parameters()])


def test_wrapped_models_follow_each_other() -> None:
    """Each with its scale; what comes back to the first one's input carries none."""
    first, second = nn.Linear(16, 16), network()
    plain = copy.deepcopy(nn.Sequential(first, second))
    a, _ = dpmem.wrap(first, precision="fp16")
    b, _ = dpmem.wrap(second, precision="fp16")
    b.scaler.load_state_dict({"scale": 64.0, "growth_tracker": 0, "skipped_steps": 0})
    x = batch(0).requires_grad_()
    b(a(x)).square().mean().backward()
    a.unscale_()
    b.unscale_()
    y = batch(0).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        hidden = plain[0](y).float()
        outputs = plain[1](hidden).float()
    outputs.square().mean().backward()
    # fp16 without a scale loses some; a wrong scale would be off by a factor of 2 at least.
    assert torch.allclose(x.grad, y.grad, rtol=0, atol=float(y.grad.abs().max()) * 2**-8)
    for ours, theirs in zip(
        (*first.parameters(), *second.parameters()), plain.parameters(), strict=True
    ):
        assert torch.allclose(
            ours.grad, theirs.grad, rtol=0, atol=float(theirs.grad.abs().max()) * 2**-8
        )


def test_an_input_used_elsewhere_keeps_the_gradients_from_there() -> None:
    ours, _ = dpmem.wrap(network(), precision="fp16")
    x = batch(0).requires_grad_()
    (ours(x).square().mean() + 3.0 * x.sum()).backward()
    alone = batch(0).requires_grad_()
    ours.module.zero_grad()
    ours(alone).square().mean().backward()
    assert torch.allclose(x.grad, alone.grad + 3.0, rtol=2**-20, atol=0.0)


def test_a_gradient_made_infinite_after_unscaling_skips_the_step_and_halves_the_scale() -> None:
    model = network()
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=1.0), precision="fp16"
    )
    before = [p.detach().clone() for p in model.parameters()]
    ours(batch(0)).square().mean().backward()
    ours.unscale_()
    model[0].weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert same(list(model.parameters()), before)
    assert ours.scaler.skipped_steps == 1
    assert float(ours.scaler.scale) == 2.0**15


def test_gradient_penalties_are_right() -> None:
    """autograd.grad(create_graph=True) on an input, then backward through it and the output."""

    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.net(x)

    def penalized(model: Any) -> Tensor:
        x = batch(0).requires_grad_()
        outputs = model(x)
        (slope,) = torch.autograd.grad(outputs.square().sum(), x, create_graph=True)
        return outputs.mean() + slope.square().sum()

    torch.manual_seed(0)
    model = Smooth()
    plain = copy.deepcopy(model)
    ours, _ = dpmem.wrap(model, precision="fp16")
    loss, expected = penalized(ours), penalized(plain)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    ours.unscale_()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7 * float(b.grad.abs().max()))


def test_losses_beside_the_outputs_go_through_scale() -> None:
    model = network()
    plain = copy.deepcopy(model)
    ours, _ = dpmem.wrap(model, precision="fp16")
    penalty = ours.scale(model[0].weight.square().sum())
    assert torch.equal(penalty, plain[0].weight.square().sum())
    (ours(batch(0)).square().mean() + penalty).backward()
    ours.unscale_()
    with torch.autocast("cpu", torch.float16):
        outputs = plain(batch(0)).float()
    ((outputs.square().mean() + plain[0].weight.square().sum()) * 2.0**16).backward()
    assert same(gradients(model), [p.grad / 2**16 for p in plain.parameters()])


def test_outputs_that_nobody_sees_are_refused() -> None:
    @dataclass
    class Hidden:
        inner: dict[str, list[Tensor]]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Hidden:
            return Hidden({"list": [self.linear(x)]})

    ours, _ = dpmem.wrap(Model(), precision="fp16")
    with pytest.raises(TypeError, match="received tensors inside Hidden; return tuples"):
        ours(batch(0))
    with torch.no_grad():
        ours(batch(0))


def test_unscaled_gradients_can_be_read_edited_and_added_to() -> None:
    model = network()
    expected = scaled_backward(network(), batch(0))
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=1.0), precision="fp16"
    )
    ours(batch(0)).square().mean().backward()
    ours.unscale_()
    ours.unscale_()
    assert same(gradients(model), expected)
    norm = torch.stack([g.norm() for g in expected]).norm()
    assert float(ours.grad_norm) == pytest.approx(float(norm), rel=16 * 2**-24)
    ours(batch(0)).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert same(gradients(model), [2 * g for g in expected])
    assert same(
        list(model.parameters()), [p - 2 * g for p, g in zip(before, expected, strict=True)]
    )
    # Two unscalings, one step: one count towards growth each.
    assert ours.scaler.state_dict()["growth_tracker"] == 2


@pytest.mark.parametrize("zeroed", [False, True])
def test_gradients_kept_over_a_step_are_added_to(zeroed: bool) -> None:
    model = network()
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.0), precision="fp16"
    )
    expected = scaled_backward(network(), batch(0))
    for _ in range(2):
        if zeroed:
            optimizer.zero_grad(set_to_none=False)
        ours(batch(0)).square().mean().backward()
        optimizer.step()
    assert same(gradients(model), expected if zeroed else [2 * g for g in expected])


@pytest.mark.parametrize("parts", [1, 2])
def test_optimizers_that_wrap_was_not_given(parts: int) -> None:
    """One, or two that share the model: each steps with the same unscaled gradients, or skips."""
    model = network()
    ours, _ = dpmem.wrap(model, precision="fp16")
    held = list(model.parameters())
    groups = [held] if parts == 1 else [held[:2], held[2:]]
    optimizers = [torch.optim.SGD(group, lr=1.0) for group in groups]
    expected = scaled_backward(network(), batch(0))
    for x, skipped in ((batch(0), 0), (batch(0) * OVERFLOW, 1)):
        before = [p.detach().clone() for p in held]
        ours(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert ours.scaler.skipped_steps == skipped
        assert float(ours.scaler.scale) == 2.0**16 / 2**skipped
        moved = [torch.zeros_like(p) for p in held] if skipped else expected
        assert same(held, [p - g for p, g in zip(before, moved, strict=True)])
    del ours
    gc.collect()


def test_a_closure_is_evaluated_once() -> None:
    model = network()
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=1.0), precision="fp16"
    )
    expected = scaled_backward(network(), batch(0))
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ours(batch(0)).square().mean()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) > 0
    assert same(list(model.parameters()), [p - g for p, g in zip(before, expected, strict=True)])


def test_lbfgs_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="received LBFGS"):
        dpmem.wrap(model, torch.optim.LBFGS(model.parameters()), precision="fp16")


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match=r"'0\.weight' is torch.float16; convert"):
        dpmem.wrap(network().half(), precision="fp16")


def test_schedulers_do_not_complain() -> None:
    model = network()
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=1.0), precision="fp16"
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    ours(batch(0) * OVERFLOW).square().mean().backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_state_is_saved_restored_and_copied() -> None:
    model = network()
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.1), precision="fp16"
    )
    for x in (batch(0) * OVERFLOW, batch(1), batch(2)):
        ours(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = ours.scaler.state_dict()
    assert state == {"scale": 2.0**15, "growth_tracker": 2, "skipped_steps": 1}
    assert list(ours.state_dict()) == list(model.state_dict())
    assert copy.deepcopy(ours).scaler.state_dict() == state
    other, _ = dpmem.wrap(network(), precision="fp16")
    other.scaler.load_state_dict(state)
    assert other.scaler.state_dict() == state


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"scale": float("nan")}, "scale must be a finite float above 0; received nan"),
        ({"scale": float("inf")}, "received inf"),
        ({"scale": 0.0}, "received 0.0"),
        ({"scale": "65536"}, "received '65536'"),
        ({"growth_tracker": -1}, r"growth_tracker must be an integer in \[0, 2000\)"),
        ({"growth_tracker": 2000}, "received 2000"),
        ({"skipped_steps": 0.5}, "skipped_steps must be an integer of at least 0"),
        ({"more": 1}, "must hold scale, growth_tracker and skipped_steps"),
    ],
)
def test_damaged_states_are_refused(damage: dict[str, Any], message: str) -> None:
    ours, _ = dpmem.wrap(network(), precision="fp16")
    before = ours.scaler.state_dict()
    with pytest.raises(ValueError, match=message):
        ours.scaler.load_state_dict(before | damage)
    assert ours.scaler.state_dict() == before


def test_the_scale_grows_as_grad_scalers_does() -> None:
    ours, _ = dpmem.wrap(network(), precision="fp16")
    ours.scaler.load_state_dict({"scale": 8.0, "growth_tracker": 1999, "skipped_steps": 0})
    ours.scaler.update(torch.tensor(0.0))
    assert ours.scaler.state_dict() == {"scale": 16.0, "growth_tracker": 0, "skipped_steps": 0}


def test_without_fp16_there_is_no_scale() -> None:
    ours, _ = dpmem.wrap(network(), precision="bf16")
    loss = ours(batch(0)).sum()
    assert ours.scaler is None
    assert ours.scale(loss) is loss
    ours.unscale_()


def test_a_forecast_takes_its_steps() -> None:
    """Tensors without data cannot say that they are finite; the optimizer's state must count."""
    job = dpmem.Job(
        model=network,
        batch=lambda n: torch.randn(n, 16),
        loss=lambda model, x: model(x).square().mean(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, foreach=True),
        wrap=lambda model, optimizer: dpmem.wrap(model, optimizer, precision="fp16"),
    )
    estimate = dpmem.estimate(job, batch_size=4, gpu="h100-80gb")
    parameter_bytes = sum(p.numel() * p.element_size() for p in network().parameters())
    assert estimate.breakdown["optimizer_state"] >= 2 * parameter_bytes
