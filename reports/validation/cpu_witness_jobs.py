"""The jobs of cpu_witness.py: small transformers and networks of convolutions, for a CPU."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torchvision_operators import torchvision

from dpmem.targets import load_job
from dpmem.text_gpt import ByteGPT, GPTSize, next_byte_loss
from dpmem_profiling import Job

CLASSES = 10
Kind = Literal["transformer", "convolutions"]


class DoubleConvolution(nn.Sequential):
    """Two convolutions, each normalised: [batch, into, height, width] -> [batch, out, ...]."""

    def __init__(self, into: int, out: int) -> None:
        layers: list[nn.Module] = []
        for channels in (into, out):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    """Down twice, up twice, with skips: [batch, 3, side, side] -> [batch, CLASSES, side, side]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [DoubleConvolution(3, width), DoubleConvolution(width, 2 * width)]
        )
        self.bottom = DoubleConvolution(2 * width, 4 * width)
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(2 * out, out, 2, stride=2) for out in (2 * width, width)
        )
        self.up = nn.ModuleList(DoubleConvolution(2 * out, out) for out in (2 * width, width))
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of every pixel."""
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for grow, up in zip(self.grow, self.up, strict=True):
            x = up(torch.cat([skips.pop(), grow(x)], 1))
        scores: Tensor = self.head(x)
        return scores


def vgg() -> nn.Module:
    """VGG's plan with a quarter of its channels, for 32x32 images."""
    layers: list[nn.Module] = []
    channels = 3
    for out, count in ((16, 2), (32, 2), (64, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(inplace=True)]
            channels = out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 256), nn.ReLU(),
                         nn.Dropout(), nn.Linear(256, CLASSES))  # fmt: skip


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """torch's, with its defaults."""
    return torch.optim.AdamW(parameters, lr=1e-3)


def images(side: int, n: int) -> tuple[Tensor, Tensor]:
    """`n` random images and labels."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, 3, side, side, generator=generator),
        torch.randint(CLASSES, (n,), generator=generator),
    )


def masks(side: int, n: int) -> tuple[Tensor, Tensor]:
    """`n` random images and a label for every pixel."""
    pixels, _ = images(side, n)
    return pixels, pixels.argmax(1)


def bytes_of_text(length: int, n: int) -> Tensor:
    """`n` random texts."""
    return torch.randint(256, (n, length), generator=torch.Generator().manual_seed(0))


def classified(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The cross entropy of the classes."""
    inputs, labels = batch
    return cross_entropy(model(inputs), labels)


def convolutions(name: str, model: Callable[[], nn.Module], side: int, batch: Any = images) -> Job:
    """A job of images `side` pixels wide."""
    return Job(model, partial(batch, side), classified, optimizer=adamw, name=name)


def classifier(name: str, side: int) -> Job:
    """One of torchvision's."""
    model = partial(torchvision.models.get_model, name, weights=None, num_classes=CLASSES)
    return convolutions(name, model, side)


def text_gpt() -> Job:
    """The model that `dpmem demo` trains, smaller."""
    size = GPTSize(layers=3, width=128, heads=4, context=64)
    return Job(
        partial(ByteGPT, size),
        partial(bytes_of_text, size.context + 1),
        next_byte_loss,
        optimizer=adamw,
        name="byte GPT",
    )


def known(name: str, target: str) -> Job:
    """A known model by its TARGET."""
    return replace(load_job(target), name=name)


def channels_last(job: Job) -> Job:
    """The job of a network of convolutions in that layout."""

    def model() -> nn.Module:
        return job.model().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def batch(n: int) -> tuple[Tensor, Tensor]:
        pixels, labels = job.batch(n)
        return pixels.contiguous(memory_format=torch.channels_last), labels

    return replace(job, model=model, batch=batch, name=f"{job.name}, channels_last")


class LowRank(nn.Module):
    """A frozen layer and a trained product of two narrow matrices beside it (LoRA)."""

    def __init__(self, layer: nn.Module, into: int, out: int, rank: int = 8) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(into, rank) / into**0.5)
        self.up = nn.Parameter(torch.zeros(rank, out))

    def forward(self, x: Tensor) -> Tensor:
        """[..., into] -> [..., out]."""
        result: Tensor = self.layer(x) + x @ self.down @ self.up
        return result


def low_rank(job: Job, width: int) -> Job:
    """GPT-2 with its weights frozen, and adapters beside the projections of queries to values."""

    def model() -> nn.Module:
        gpt = job.model().requires_grad_(False)
        for block in gpt.transformer.h:  # type: ignore[union-attr]
            block.attn.c_attn = LowRank(block.attn.c_attn, width, 3 * width)
        return gpt

    return replace(job, model=model)


_NARROW = "hidden_size=128&num_attention_heads=4&num_hidden_layers=3&intermediate_size=512"
_TEXT = "vocab_size=1024&seq=64"
_GPT_2 = f"hf:gpt2?n_embd=128&n_head=4&n_layer=3&{_TEXT}"
# The kind, the batch size and what makes the job.
JOBS: tuple[tuple[Kind, int, Callable[[], Job]], ...] = (
    ("transformer", 8, partial(known, "GPT-2", _GPT_2)),
    ("transformer", 8, partial(known, "GPT-2, checkpoints", f"{_GPT_2}&checkpointing=true")),
    ("transformer", 8, lambda: low_rank(known("GPT-2, LoRA", _GPT_2), 128)),
    ("transformer", 8, partial(known, "BERT", f"hf:bert?{_NARROW}&{_TEXT}")),
    ("transformer", 8, partial(known, "ViT", f"hf:vit?{_NARROW}&image=64&patch_size=8")),
    ("transformer", 8, text_gpt),
    (
        "transformer",
        8,
        partial(known, "Llama", f"hf:llama?{_NARROW}&num_key_value_heads=2&{_TEXT}"),
    ),
    (
        "transformer",
        8,
        partial(
            known,
            "T5",
            "hf:t5?d_model=128&d_kv=32&num_heads=4&d_ff=512&num_layers=2&num_decoder_layers=2"
            f"&{_TEXT}",
        ),
    ),
    ("convolutions", 8, partial(classifier, "resnet18", 64)),
    ("convolutions", 8, partial(convolutions, "U-Net", UNet, 64, masks)),
    ("convolutions", 32, partial(convolutions, "VGG", vgg, 32)),
    ("convolutions", 8, partial(classifier, "mobilenet_v2", 64)),
)
