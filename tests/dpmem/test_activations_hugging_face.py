"""Compression of models that others wrote: transformers', from configurations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpmem
from dpmem.activations import Policy

pytestmark = pytest.mark.usefixtures("libraries")

Build = Callable[[], tuple[nn.Module, Tensor]]

LEAST_NUMEL = 512
TOKENS = torch.randint(0, 90, (4, 32), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def gpt2() -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=90, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config), TOKENS


def bert() -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=90,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    return BertForMaskedLM(config), TOKENS


def vit() -> tuple[nn.Module, Tensor]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=4,
        hidden_dropout_prob=0.1,
    )
    return ViTForImageClassification(config), IMAGES


def resnet() -> tuple[nn.Module, Tensor]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], num_labels=5)
    return ResNetForImageClassification(config), IMAGES


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).logits.float().square().mean()


def gradients(model: nn.Module, batch: Tensor, context: Any) -> Tensor:
    """Those of one step, flat; dropout's masks are the same in all."""
    torch.manual_seed(1)
    with context:
        value = loss(model, batch)
    value.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


MODELS = pytest.mark.parametrize("build", [gpt2, bert, vit, resnet])


@MODELS
def test_lossless_gradients_are_bit_identical(build: Build) -> None:
    torch.manual_seed(0)
    model, batch = build()
    exact = gradients(model, batch, torch.enable_grad())
    lossless = Policy(linear_bits=None, nonlinear_bits=None, minimum_numel=LEAST_NUMEL)
    assert torch.equal(gradients(model, batch, dpmem.compress(model, lossless)), exact)


@MODELS
def test_four_bits_are_noise_and_no_bias(build: Build) -> None:
    """The mean gradient of n draws is off by 1/sqrt(n) of what one is, and not by a bias.

    A bias b beside noise of deviation s leaves sqrt(b^2 + s^2 / 16) of sixteen draws: more than
    0.35 of sqrt(b^2 + s^2) from b = 0.26 s on.
    """
    torch.manual_seed(0)
    model, batch = build()
    policy = Policy(linear_bits=4, minimum_numel=LEAST_NUMEL)
    exact = gradients(model, batch, torch.enable_grad())
    compressed = dpmem.compress(model, policy)
    errors = [gradients(model, batch, compressed) - exact for _ in range(16)]
    one = torch.stack([error.norm() for error in errors]).mean()
    assert 0 < float(one) < 0.25 * float(exact.norm())
    assert float(torch.stack(errors).mean(0).norm() / one) < 0.35


@MODELS
def test_the_audit_explains_each_tensor(build: Build) -> None:
    torch.manual_seed(0)
    model, batch = build()
    policy = Policy(linear_bits=4, minimum_numel=LEAST_NUMEL)
    audit = dpmem.audit(model, batch, policy, loss=loss)
    assert audit.bytes_before >= 5 * audit.bytes_after
    assert {row.decision for row in audit.rows if row.role == "model"} == {"exact"}
    # What no role is known for stays exact, and is little.
    unknown = sum(row.bytes_before for row in audit.rows if row.role == "other")
    assert unknown <= 0.1 * audit.bytes_before
