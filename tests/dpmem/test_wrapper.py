"""`wrap` and DataParallel in one process: the loop does not change, the numbers are torch's."""

import copy
import gc
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dpmem
from dpmem.text_gpt import ByteGPT, GPTSize, next_byte_loss


def gpt() -> ByteGPT:
    torch.manual_seed(0)
    return ByteGPT(GPTSize(layers=2, width=64, heads=2, context=32))


def windows(step: int = 0) -> Tensor:
    return torch.randint(0, 256, (4, 33), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_clipped_training_matches_torch(optimizer_class: type, max_norm: float) -> None:
    model = gpt()
    plain = copy.deepcopy(model)
    options = {"foreach": True, "lr": 1e-3}
    ours, optimizer = dpmem.wrap(
        model, optimizer_class(model.parameters(), **options), max_grad_norm=max_norm
    )
    theirs = optimizer_class(plain.parameters(), **options)
    for step in range(3):
        # From the same state: AdamW makes a step of the sign of what rounding leaves of a gradient
        # that is 0, such as that of the keys' bias.
        plain.load_state_dict(model.state_dict())
        theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        next_byte_loss(ours, windows(step)).backward()
        next_byte_loss(plain, windows(step)).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        optimizer.step()
        theirs.step()
        # Sums of 120 k squares in fp32, in different orders.
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=32 * 2**-24)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=64 * 2**-24, atol=0)
        optimizer.zero_grad()
        theirs.zero_grad()


def test_gradients_below_the_norm_are_untouched() -> None:
    model = gpt()
    plain = copy.deepcopy(model)
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.0), max_grad_norm=1e9
    )
    next_byte_loss(ours, windows()).backward()
    next_byte_loss(plain, windows()).backward()
    optimizer.step()
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )


def test_expanded_gradients_are_clipped_too() -> None:
    """A gradient set by hand, with overlapping memory, must not be skipped or scaled twice."""
    model = nn.Linear(3, 4)
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.0), max_grad_norm=1.0
    )
    model.weight.grad = torch.tensor(2.0).expand(4, 3)
    model.bias.grad = torch.zeros(8)[::2]
    optimizer.step()
    assert float(ours.grad_norm) == pytest.approx(48**0.5, rel=1e-6)
    assert torch.allclose(model.weight.grad, torch.full((4, 3), 2 / 48**0.5))


def test_channels_last_gradients_are_clipped() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=0.1
    )
    x = torch.randn(2, 3, 8, 8)
    ours(x).sum().backward()
    plain(x).sum().backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    optimizer.step()
    assert torch.allclose(model.weight.grad, plain.weight.grad, rtol=1e-5)


def test_a_closures_gradients_are_clipped() -> None:
    model = gpt()
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.0), max_grad_norm=0.05
    )

    def closure() -> Tensor:
        loss = next_byte_loss(ours, windows())
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure=closure)) > 0
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.05, rel=1e-4)
    assert float(ours.grad_norm) > 0.05


def test_lbfgs_with_clipping_is_refused() -> None:
    model = gpt()
    with pytest.raises(ValueError, match="must evaluate once a step; received LBFGS"):
        dpmem.wrap(model, torch.optim.LBFGS(model.parameters()), max_grad_norm=1.0)


def test_sparse_gradients_are_clipped() -> None:
    """One index three times: its gradient is the sum, and that is what the norm is of."""
    torch.manual_seed(0)
    norms, gradients = [], []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Embedding(10, 4, sparse=sparse)
        ours, optimizer = dpmem.wrap(
            model, torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=1.0
        )
        ours(torch.tensor([1, 2, 1, 1])).square().sum().backward()
        optimizer.step()
        norms.append(float(ours.grad_norm))
        gradients.append(model.weight.grad.to_dense())
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] > 1
    assert torch.allclose(*gradients, rtol=1e-6)


def test_bf16_returns_fp32_and_computes_in_bf16() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.linear(x)
            return {"y": y, "inner_dtype": y.dtype, "indices": torch.arange(3)}

    ours, _ = dpmem.wrap(Model(), precision="bf16")
    outputs = ours(torch.randn(2, 8))
    assert outputs["inner_dtype"] is torch.bfloat16
    assert outputs["y"].dtype is torch.float32
    assert outputs["indices"].dtype is torch.int64
    outputs["y"].sum().backward()
    assert ours.module.linear.weight.grad.dtype is torch.float32


def test_compressed_training_learns() -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ours, optimizer = dpmem.wrap(model, optimizer, activations="4bit", max_grad_norm=1.0)
    losses = []
    for _ in range(12):
        loss = next_byte_loss(ours, windows())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_no_compression_without_gradients() -> None:
    ours, _ = dpmem.wrap(gpt(), activations="4bit")
    with torch.no_grad():
        next_byte_loss(ours, windows())
    assert ours.owned_tensors() == {"bucket": [], "compressed": []}


def test_state_dict_has_plain_keys_and_both_forms_load() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ours = dpmem.DataParallel(model)
    state = ours.state_dict()
    assert list(state) == list(model.state_dict())
    assert state._metadata == model.state_dict()._metadata
    prefixed = {f"module.{key}": value for key, value in model.state_dict().items()}
    for form in (state, prefixed):
        other = dpmem.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        other.load_state_dict(form)
        assert all(
            torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True)
        )
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    plain.load_state_dict(state)
    outer = nn.ModuleDict({"net": ours})
    assert list(outer.state_dict()) == [f"net.{key}" for key in model.state_dict()]
    nn.ModuleDict({"net": dpmem.DataParallel(plain)}).load_state_dict(outer.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_a_child_named_module_is_not_confused() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    class Both(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    for inner in (Inner(), Both()):
        expected = {key: value.clone() for key, value in inner.state_dict().items()}
        ours = dpmem.DataParallel(inner)
        assert list(ours.state_dict()) == list(expected)
        for form in (expected, {f"module.{key}": value for key, value in expected.items()}):
            for parameter in inner.parameters():
                parameter.data.zero_()
            ours.load_state_dict(form)
            assert all(torch.equal(inner.state_dict()[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_ids": [0]}, "must name the module's device cpu; received cuda:0"),
        ({"output_device": 1}, "received cuda:1"),
        ({"device_ids": ["cpu", "cpu"]}, "one process drives one device"),
    ],
)
def test_wrong_devices_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpmem.DataParallel(nn.Linear(2, 2), **options)


def test_several_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="must live on one device; received cpu, meta"):
        dpmem.DataParallel(model)


@pytest.mark.parametrize(
    "option",
    [
        {"dim": 1},
        {"mixed_precision": object()},
        {"delay_all_reduce_named_params": [("weight", None)]},
        {"param_to_hook_all_reduce": object()},
        {"skip_all_reduce_unused_params": True},
    ],
)
def test_ddp_arguments_are_honoured_or_refused(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be .*; received"):
        dpmem.DataParallel(nn.Linear(2, 2), **option)


def test_positional_arguments_are_ddps() -> None:
    """Those that this torch's has: later ones come later."""
    parameters = inspect.signature(dpmem.DataParallel.__init__).parameters.values()
    ours = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    theirs = list(inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters)
    assert theirs[: len(ours)] == ours[: len(theirs)]


def test_buffers_are_broadcast_by_the_newer_name_without_a_warning() -> None:
    for options, expected in (
        ({"broadcast_buffers": False}, False),
        ({"broadcast_buffers": False, "forward_sync_buffers": True}, True),
    ):
        with pytest.warns(FutureWarning, match="pass forward_sync_buffers instead"):
            wrapped = dpmem.DataParallel(nn.Linear(2, 2), **options)
        assert wrapped.forward_sync_buffers is expected
    assert dpmem.DataParallel(nn.Linear(2, 2)).forward_sync_buffers


def test_module_without_gradients_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must have a parameter that requires one"):
        dpmem.DataParallel(nn.ReLU())


def test_frozen_parameters_stay_out_of_the_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model[1].parameters(), lr=0.0), max_grad_norm=1.0
    )
    F.mse_loss(ours(torch.ones(2, 4)), torch.zeros(2, 4)).backward()
    expected = torch.stack([p.grad.norm() for p in model[1].parameters()]).norm()
    optimizer.step()
    assert float(ours.grad_norm) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"precision": "fp16"}])
def test_ignored_parameters_cannot_be_clipped_or_scaled(options: dict[str, object]) -> None:
    """Their gradients are each rank's own, and so would be the norm and the flag."""
    model = nn.Linear(2, 2)
    dpmem.DataParallel._set_params_and_buffers_to_ignore_for_model(model, ["bias"])
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="1 that are trained were to be ignored, such as 'bias'"):
        dpmem.wrap(model, optimizer, **options)
    model.bias.requires_grad_(False)
    dpmem.wrap(model, optimizer, **options)


def test_strangers_in_the_optimizer_are_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="1 belong to no part of the model"):
        dpmem.wrap(model, optimizer, max_grad_norm=1.0)


def test_an_optimizer_may_hold_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=1e-3
    )
    ours(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert float(model[1].weight.grad.norm()) < 1e-3


def test_parameters_that_cannot_be_clipped_are_refused_at_once() -> None:
    model = nn.Linear(2, 2).double()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match=r"parameter 'weight' is torch.float64"):
        dpmem.wrap(model, optimizer, max_grad_norm=1.0)
    assert not optimizer._optimizer_step_pre_hooks


def test_unfrozen_parameters_are_clipped_once_the_optimizer_has_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model[1].parameters(), lr=0.0), max_grad_norm=1.0
    )
    ours(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    model[0].requires_grad_(True)
    ours(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"2 are not in it, such as '0\.weight'; add_param_group"):
        optimizer.step()
    optimizer.add_param_group({"params": model[0].parameters()})
    expected = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    optimizer.step()
    assert float(ours.grad_norm) == pytest.approx(float(expected), rel=1e-6)


def test_an_optimizer_clips_for_one_wrapper() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first, optimizer = dpmem.wrap(model, optimizer, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="this one does so for another wrapped model"):
        dpmem.wrap(model, optimizer, max_grad_norm=2.0)
    del first
    gc.collect()
    with pytest.raises(RuntimeError, match="wrapped model, which is gone"):
        optimizer.step()
    second, optimizer = dpmem.wrap(model, optimizer, max_grad_norm=2.0)
    second(torch.full((1, 2), 100.0)).sum().backward()
    optimizer.step()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(norm) == pytest.approx(2.0, rel=1e-5)
    assert float(second.grad_norm) > 100


def test_a_part_of_the_model_cannot_be_clipped() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[0].parameters())
    with pytest.raises(ValueError, match=r"2 are not in it, such as '1\.weight'"):
        dpmem.wrap(model, optimizer, max_grad_norm=1.0)


def test_parameters_added_to_the_optimizer_later_are_not_stepped_unclipped() -> None:
    model = nn.Linear(2, 2)
    ours, optimizer = dpmem.wrap(
        model, torch.optim.SGD(model.parameters(), lr=1.0), max_grad_norm=1.0
    )
    stranger = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [stranger]})
    stranger.grad = torch.full((1,), 100.0)
    with pytest.raises(ValueError, match="1 belong to no part of the model"):
        optimizer.step()
    assert stranger.item() == 1.0
    assert ours.grad_norm is None
