"""The measured training runs, rebuilt as Jobs.

`rows()` are the runs whose whole-GPU peak was measured, and those that ran out of memory; `job`
makes the training step that such a run took, `STEPS` times. `timm_rows()` and `timm_job` are
exploratory, as nobody stated their recipe. README.md holds the facts of the runs and their sources.
"""

import csv
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
import transformers_4_51
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torchvision_operators import torchvision

from dpmem.targets import load_job
from dpmem.zoo.presets import PRESETS
from dpmem_profiling import Job, StepContext
from dpmem_profiling.job import ZeroGrad

HERE = Path(__file__).parent
STEPS = 4
LEARNING_RATE = 1e-3
IMAGE_SIZE = 86
# CIFAR-10's, whatever the model's number of classes.
LABELS = 10
# Texts were cut here, and padded to the longest of their batch.
TOKENS = 128
IGNORED_LABEL = -100
# The figures in the `zero_grad_position` column.
ZERO_GRAD_POSITIONS: Mapping[str, ZeroGrad] = {"0": "start", "1": "before_backward", "2": "end"}

Kind = Literal["cnn", "transformer"]


@dataclass(frozen=True)
class Row:
    """One run on a real GPU.

    measured_bytes      the whole GPU's peak over its start; None where it ran out of memory
    gpu_total_bytes     the card's memory, for runs that ran out of it
    recorded_zero_grad  the mode that was written down, which may not be the one that ran
    xmem_bytes, dnnmem_bytes   what the two peers predicted
    """

    kind: Kind
    model: str
    optimizer: str
    batch_size: int
    gpu: str
    measured_bytes: int | None
    gpu_total_bytes: int | None
    recorded_zero_grad: ZeroGrad | None
    xmem_bytes: int | None
    dnnmem_bytes: int | None
    source_path: str


@dataclass(frozen=True)
class TimmRow:
    """What one of timm's models took of an A100 40 GB, the context included."""

    model: str
    batch_size: int
    whole_gpu_bytes: int


def rows() -> list[Row]:
    """The 56 measured runs, then the 5 that ran out of memory."""
    return [
        Row(
            kind=_kind(line["kind"]),
            model=line["model"],
            optimizer=line["optimizer"],
            batch_size=int(line["batch"]),
            gpu=line["gpu"],
            measured_bytes=_integer(line.get("measured_bytes")),
            gpu_total_bytes=_integer(line.get("gpu_total_bytes")),
            recorded_zero_grad=ZERO_GRAD_POSITIONS.get(line.get("zero_grad_position", "")),
            xmem_bytes=_integer(line.get("xmem_bytes")),
            dnnmem_bytes=_integer(line.get("dnnmem_bytes")),
            source_path=line["source_path"],
        )
        for name in ("measured_peaks.csv", "out_of_memory.csv")
        for line in _lines(name)
    ]


def timm_rows() -> list[TimmRow]:
    """The 1,219 exploratory runs, in the order of their models and batch sizes."""
    return [
        TimmRow(line["timm_model"], int(line["batch"]), int(line["whole_gpu_mib"]) << 20)
        for line in _lines("timm_a100_whole_gpu_mib.csv")
    ]


def job(row: Row, *, zero_grad: ZeroGrad = "start") -> Job:
    """The training step of `row`; its batch size is `row.batch_size`.

    zero_grad  where in the step gradients are dropped. Most runs did not write it down; their loop
               dropped them at the "start" unless told otherwise.
    """
    assert zero_grad in get_args(ZeroGrad)
    build = _classifier_job if row.kind == "cnn" else _language_job
    return build(row, zero_grad)


def timm_job(model: str) -> Job:
    """The assumed step of a timm row: what timm's train.py does by default.

    Nobody stated the recipe of these runs.
    """
    return replace(load_job(f"timm:{model}"), optimizer=_timm_sgd)


def _timm_sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """timm/optim/optim_factory.py with train.py's defaults: vectors do not decay.

    The momentum moves slopes, although it has the size of the weights: it lies among what samples
    need, in blocks that they would fit again.
    """
    vectors: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters:
        (vectors if parameter.ndim <= 1 else others).append(parameter)
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": others, "weight_decay": 2e-5}]
    return torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=0.9, nesterov=True)


# The models that the source names, which are more than the rows have: torchvision's builders, and
# the number of classes where it was not 1,000. MobeNetV3 (sic) and MnasNet were made from their
# classes, with the settings of these builders.
_CLASSIFIERS: Mapping[str, tuple[str, int]] = {
    "ConvNeXtBase": ("convnext_base", 1000),
    "ConvNeXtTiny": ("convnext_tiny", 1000),
    "MnasNet": ("mnasnet1_0", 10),
    "MobeNetV3Large": ("mobilenet_v3_large", 10),
    "MobeNetV3Small": ("mobilenet_v3_small", 10),
    "MobileNetV2": ("mobilenet_v2", 1000),
    "RegNetX32GF": ("regnet_x_32gf", 1000),
    "RegNetX400MF": ("regnet_x_400mf", 1000),
    "RegNetY32GF": ("regnet_y_32gf", 1000),
    "RegNetY400MF": ("regnet_y_400mf", 1000),
    "ResNet50": ("resnet50", 1000),
    "ResNet101": ("resnet101", 1000),
    "ResNet152": ("resnet152", 1000),
    "VGG11": ("vgg11", 1000),
    "VGG16": ("vgg16", 1000),
    "VGG19": ("vgg19", 1000),
}


@dataclass(frozen=True)
class _Language:
    """A preset of dpmem's, and the attention that transformers 4.51.3 chose for it."""

    preset: str
    attention: str = transformers_4_51.OF_COPIES


_LANGUAGE_MODELS: Mapping[str, _Language] = {
    "EleutherAI/gpt-neo-125M": _Language("gpt-neo-125m", "eager"),
    "EleutherAI/pythia-1b": _Language("pythia-1b"),
    "Qwen/Qwen3-0.6B": _Language("qwen3-0.6b"),
    "Qwen/Qwen3-4B": _Language("qwen3-4b"),
    "T5-small": _Language("t5-small", "eager"),
    "t5-base": _Language("t5-base", "eager"),
    "cerebras/Cerebras-GPT-111M": _Language("cerebras-gpt-111m"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _Language("deepseek-r1-distill-qwen-1.5b"),
    "distilbert/distilgpt2": _Language("distilgpt2"),
    "facebook/opt-125m": _Language("opt-125m", transformers_4_51.OF_VIEWS),
    "facebook/opt-350m": _Language("opt-350m", transformers_4_51.OF_VIEWS),
    "google/gemma-2-2b-it": _Language("gemma-2-2b"),
    "meta-llama/Llama-3.2-3B-Instruct": _Language("llama-3.2-3b"),
    "openai-community/gpt2": _Language("gpt2"),
}


class _Locals:
    """The local variables of a training loop: each lives until its name is bound again."""

    outputs: Any
    loss: Tensor
    maxima: Any


def _classifier_job(row: Row, zero_grad: ZeroGrad) -> Job:
    builder, classes = _CLASSIFIERS[row.model]

    def batch(n: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        return images, torch.randint(LABELS, (n,), generator=generator)

    def forward(names: _Locals, context: StepContext) -> None:
        images, labels = context.batch
        names.outputs = context.model(images)
        names.loss = cross_entropy(names.outputs, labels)

    def after_step(names: _Locals) -> None:
        names.maxima = torch.max(names.outputs, 1)

    return Job(
        model=partial(torchvision.models.get_model, builder, weights=None, num_classes=classes),
        batch=batch,
        optimizer=_optimizer(row.optimizer),
        step=_step(zero_grad, forward, after_step),
        zero_grad=zero_grad,
        name=_name(row),
    )


def _language_job(row: Row, zero_grad: ZeroGrad) -> Job:
    language = _LANGUAGE_MODELS[row.model]
    preset = PRESETS[language.preset]
    transformers_4_51.register_attention()
    config_class = transformers.CONFIG_MAPPING[preset.model_type]
    config = config_class(**preset.values)
    auto_model = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    # What the configuration of T5 on the hub says, and version 5's class does not.
    start = {"decoder_start_token_id": 0} if config.is_encoder_decoder else {}

    def model() -> nn.Module:
        built: nn.Module = auto_model.from_config(
            config_class(**preset.values, **start), attn_implementation=language.attention
        )
        transformers_4_51.add_buffers(built, config)
        return built

    def forward(names: _Locals, context: StepContext) -> None:
        cache = transformers_4_51.new_cache(config)
        names.outputs = context.model(**context.batch, past_key_values=cache)

    def after_forward(names: _Locals) -> None:
        names.loss = names.outputs.loss

    return Job(
        model=model,
        batch=partial(_texts, config.vocab_size),
        optimizer=_optimizer(row.optimizer),
        step=_step(zero_grad, forward, after_forward=after_forward),
        zero_grad=zero_grad,
        name=_name(row),
    )


def _texts(vocabulary: int, n: int) -> dict[str, Tensor]:
    """`n` texts of TOKENS tokens, all but the first a token shorter and padded, as in any batch.

    One text alone has no padding and therefore no mask, which leaves attention another kernel.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (n, TOKENS), generator=generator)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if n > 1:
        mask = torch.ones_like(tokens)
        mask[1:, -1] = 0
        batch["labels"][1:, -1] = IGNORED_LABEL
        batch["attention_mask"] = mask
    return batch


def _optimizer(name: str) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    if name == "Adafactor":
        return transformers_4_51.adafactor
    return partial(getattr(torch.optim, name), lr=LEARNING_RATE)


def _step(
    zero_grad: ZeroGrad,
    forward: Callable[[_Locals, StepContext], None],
    after_step: Callable[[_Locals], None] = lambda names: None,
    after_forward: Callable[[_Locals], None] = lambda names: None,
) -> Callable[[StepContext], None]:
    """The runs' loop body. What it bound in the step before is alive until it is bound again."""
    bound: weakref.WeakKeyDictionary[nn.Module, _Locals] = weakref.WeakKeyDictionary()

    def drop_gradients(context: StepContext, position: ZeroGrad) -> None:
        if position == zero_grad:
            assert context.optimizer is not None
            with context.phase("zero_grad"):
                context.optimizer.zero_grad()

    def step(context: StepContext) -> None:
        names = bound.setdefault(context.model, _Locals())
        drop_gradients(context, "start")
        with context.phase("forward"):
            forward(names, context)
        drop_gradients(context, "before_backward")
        after_forward(names)
        with context.phase("backward"):
            names.loss.backward()
        assert context.optimizer is not None
        with context.phase("step"):
            context.optimizer.step()
            after_step(names)
        drop_gradients(context, "end")

    return step


def _name(row: Row) -> str:
    return f"{row.model} {row.optimizer} batch {row.batch_size}"


def _lines(name: str) -> list[dict[str, str]]:
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _integer(text: str | None) -> int | None:
    return int(text) if text else None


def _kind(text: str) -> Kind:
    assert text in ("cnn", "transformer")
    return "cnn" if text == "cnn" else "transformer"
