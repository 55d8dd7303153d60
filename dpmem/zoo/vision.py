"""`torchvision:` and `timm:` classifiers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dpmem.config import Precision
from dpmem.precision import autocast
from dpmem.zoo.options import (
    Options,
    boolean,
    count,
    importing,
    take_optimizer,
    take_precision,
)
from dpmem_profiling import Job

# What every classifier of torchvision was trained on; Inception v3 needs larger images.
IMAGE_SIZE = 224
_IMAGE_SIZES = {"inception_v3": 299}
CLASSES = 1000


def load_torchvision(name: str, options: Options, target: str) -> Job:
    """The Job of a torchvision classifier, by the name its builder has."""
    with importing("torchvision") as torchvision:
        models = torchvision.models
    if name not in models.list_models(module=models):
        raise ValueError(
            f"torchvision has no classifier {name!r}: torchvision.models.list_models() lists them"
        )
    optimizer, precision = take_optimizer(options), take_precision(options)
    image = options.take("image", count, _IMAGE_SIZES.get(name, IMAGE_SIZE))
    classes = options.take("num_classes", count, CLASSES)
    options.finish()
    arguments: dict[str, Any] = {"weights": None, "num_classes": classes}
    if name.startswith("vit_"):
        # Its position embeddings have the image's size.
        arguments["image_size"] = image
    if name in ("googlenet", "inception_v3"):
        # Said because they warn that the default will change.
        arguments["init_weights"] = True
    return Job(
        model=lambda: models.get_model(name, **arguments),
        batch=image_batch(3, image, classes),
        loss=classification_loss(precision),
        optimizer=optimizer,
        name=target,
    )


def load_timm(name: str, options: Options, target: str) -> Job:
    """The Job of a timm model, at its own image size unless told otherwise."""
    with importing("timm") as timm:
        if not timm.is_model(name):
            raise ValueError(f"timm has no model {name!r}: timm.list_models() lists them")
        config = timm.get_pretrained_cfg(name)
    channels, default_image, _ = config.input_size
    optimizer, precision = take_optimizer(options), take_precision(options)
    image = options.take("image", count, default_image)
    classes = options.take("num_classes", count, config.num_classes or CLASSES)
    checkpointing = options.take("checkpointing", boolean, False)
    options.finish()
    arguments: dict[str, Any] = {"pretrained": False, "num_classes": classes}
    if image != default_image and config.fixed_input_size:
        arguments["img_size"] = image

    def build() -> nn.Module:
        model = timm.create_model(name, **arguments)
        if checkpointing:
            model.set_grad_checkpointing(True)
        assert isinstance(model, nn.Module)
        return model

    return Job(
        model=build,
        batch=image_batch(channels, image, classes),
        loss=classification_loss(precision),
        optimizer=optimizer,
        name=target,
    )


def image_batch(channels: int, image: int, classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """(n) -> images [n, channels, image, image] float32 and labels [n] int64, always the same."""

    def batch(n: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return (
            torch.randn(n, channels, image, image, generator=generator),
            torch.randint(classes, (n,), generator=generator),
        )

    return batch


def classification_loss(precision: Precision) -> Callable[[nn.Module, Any], Tensor]:
    """Cross entropy of the logits, and of auxiliary heads' (GoogLeNet, Inception) with weight 1."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        with autocast(precision, images.device):
            outputs = model(images)
            heads = (
                [outputs] if isinstance(outputs, Tensor) else [*filter(torch.is_tensor, outputs)]
            )
            losses = [cross_entropy(head, labels) for head in heads]
            return sum(losses[1:], start=losses[0])

    return loss
