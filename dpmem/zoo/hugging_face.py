"""`hf:` models of transformers, from configurations alone."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpmem.config import Precision
from dpmem.precision import autocast
from dpmem.zoo.options import (
    Options,
    boolean,
    count,
    importing,
    one_of,
    take_optimizer,
    take_precision,
)
from dpmem.zoo.presets import PRESETS, Preset
from dpmem.zoo.vision import IMAGE_SIZE, image_batch
from dpmem_profiling import Job

# Tokens of a text, where the model can take as many.
SEQUENCE_LENGTH = 512
_ATTENTION: dict[str, str | None] = {"eager": "eager", "sdpa": "sdpa"}
# What names the configuration's class, and what the loss needs.
_NOT_SETTABLE = {"model_type", "architectures", "transformers_version", "return_dict"}
# Whose positions begin after the padding token's.
_OFFSET_POSITIONS = {
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
}
# Encoder-decoders are trained with the first, others with the first that they have of the rest.
_HEADS = (
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
)


def load(name: str, options: Options, target: str) -> Job:
    """The Job of a preset, or of one of transformers' model types with its default configuration.

    A language model learns its own input, a classifier of images random labels. Texts have `seq`
    tokens and no padding.
    """
    with importing("transformers") as transformers:
        preset = PRESETS.get(name) or _model_type(name, transformers.CONFIG_MAPPING)
        config_class = transformers.CONFIG_MAPPING[preset.model_type]
        present = config_class(**preset.values)
        head, class_name = _head(present, transformers.models.auto.modeling_auto)
        auto_model = getattr(transformers, head)
        # Imported now, where what it needs and lacks is told.
        getattr(transformers, class_name)
    of_images = head == "AutoModelForImageClassification"
    optimizer, precision = take_optimizer(options), take_precision(options)
    attention = options.take("attn", one_of(_ATTENTION), None)
    checkpointing = options.take("checkpointing", boolean, False)
    size = options.take("image" if of_images else "seq", count, None)
    settings = dict(preset.values) | _settings(options, present)
    if of_images and size is not None and hasattr(present, "image_size"):
        settings["image_size"] = size
    config = config_class(**settings)

    def build() -> nn.Module:
        more = {} if attention is None else {"attn_implementation": attention}
        # Models keep their configuration, and write to it.
        model = auto_model.from_config(config_class(**settings), **more)
        if checkpointing:
            # transformers 5 renames it, and warns of the old name.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        assert isinstance(model, nn.Module)
        return model

    return Job(
        model=build,
        batch=_images(config, size) if of_images else _texts(config, size),
        loss=model_loss(precision),
        optimizer=optimizer,
        name=target,
    )


def model_loss(precision: Precision) -> Callable[[nn.Module, Any], Tensor]:
    """The loss that the model computes itself."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with autocast(precision, batch["labels"].device):
            own: Tensor = model(**batch).loss
            return own

    return loss


def _model_type(name: str, config_mapping: Mapping[str, Any]) -> Preset:
    if name not in config_mapping:
        raise ValueError(
            f"unknown model {name!r}; presets are {', '.join(PRESETS)}; every model type of "
            "transformers (transformers.CONFIG_MAPPING) works too, such as mistral"
        )
    return Preset(name, f"transformers' {name}", 0)


def _head(config: Any, modeling_auto: Any) -> tuple[str, str]:
    """The name of the class that makes the model trainable, and of the model's class with it."""
    # The decoder alone of a model of speech or images is a language model too.
    heads = _HEADS[:1] if config.is_encoder_decoder else _HEADS[1:]
    for mapping, auto_model in heads:
        names = getattr(modeling_auto, mapping).get(config.model_type)
        if names is not None:
            return auto_model, names if isinstance(names, str) else names[0]
    raise ValueError(
        f"{config.model_type} is neither a language model nor a classifier of images; "
        "return a dpmem.Job with its inputs from a function: file.py:function"
    )


def _settings(options: Options, config: Any) -> dict[str, Any]:
    """What is left of `options` as settings of `config`, with the types that it has."""
    names = {"num_labels", *config.attribute_map, *config.to_dict()} - _NOT_SETTABLE
    known = {name for name in names if not name.startswith("_")}
    settings = {}
    for key, text in options.take_rest().items():
        if key not in known:
            raise options.unknown(key, sorted(known))
        settings[key] = _as(key, text, getattr(config, key))
    return settings


def _as(key: str, text: str, present: object) -> object:
    """`text` with the type of `present`; where that is None, the simplest type it can be."""
    if isinstance(present, bool):
        return boolean(key, text)
    if isinstance(present, str):
        return text
    if present is not None and not isinstance(present, int | float):
        raise ValueError(
            f"{key} is a {type(present).__name__}, which an option cannot set; "
            "return a dpmem.Job from a function: file.py:function"
        )
    kinds = (int, float, str) if present is None else (type(present),)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    raise ValueError(f"{key} must be of type {kinds[0].__name__}; received {text!r}")


def _texts(config: Any, length: int | None) -> Callable[[int], dict[str, Tensor]]:
    longest = _positions(config)
    length = length or min(SEQUENCE_LENGTH, longest or SEQUENCE_LENGTH)
    if longest is not None and length > longest:
        raise ValueError(f"seq must be at most the model's {longest} positions; received {length}")
    vocabulary, of_pairs = config.get_text_config().vocab_size, config.is_encoder_decoder

    def batch(n: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocabulary, (n, length), generator=generator)
        inputs = {"input_ids": tokens, "labels": tokens.clone()}
        # Not every configuration says what a decoder's first token is, so its input is given.
        return inputs | {"decoder_input_ids": tokens.roll(1, dims=1)} if of_pairs else inputs

    return batch


def _positions(config: Any) -> int | None:
    """How many positions the model has embeddings of; None where it computes them."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None or hasattr(config, "rope_parameters") or hasattr(config, "rope_theta"):
        return None
    if config.model_type in _OFFSET_POSITIONS:
        return positions - config.pad_token_id - 1
    return positions


def _images(config: Any, size: int | None) -> Callable[[int], dict[str, Tensor]]:
    # Networks of convolutions alone take any size, and do not say one.
    image = getattr(config, "image_size", IMAGE_SIZE) if size is None else size
    batch_of = image_batch(getattr(config, "num_channels", 3), image, config.num_labels)

    def batch(n: int) -> dict[str, Tensor]:
        images, labels = batch_of(n)
        return {"pixel_values": images, "labels": labels}

    return batch
