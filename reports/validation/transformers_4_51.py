"""How transformers 4.51.3 trained a language model, where later versions take other memory.

The measured rows ran with it; it does not run under fake tensors, so its ways are told to the
version at hand. What differs, and lasts until the backward pass or the next step:

- Scaled-dot-product attention was given contiguous copies of query, key and value, and as many key
  and value heads as query heads (integrations/sdpa_attention.py); OPT's own no copies
  (models/opt/modeling_opt.py). Its mask was one additive tensor, not a boolean one that every layer
  converts.
- The first tokens' keys and values went into the cache as they were (cache_utils.py,
  DynamicCache.update; GPT-2's tuple likewise). Version 5 copies them.
- Every layer of GPT-2 had a triangle of all positions as a buffer (models/gpt2/modeling_gpt2.py).
- Gemma 2 trained without a cache, and with scaled-dot-product attention, which ignored its
  softcapping (models/gemma2/modeling_gemma2.py).

Source: https://github.com/huggingface/transformers/tree/v4.51.3/src/transformers
"""

from functools import partial
from typing import Any

import torch
import torchvision_operators  # noqa: F401 - transformers imports torchvision
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

# Names of attention implementations. Without "sdpa": version 5 refuses Gemma 2 any name with it.
OF_COPIES = "attention_of_contiguous_copies"
OF_VIEWS = "attention_of_views"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    copies: bool,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of query [batch, heads, tokens, size] and key, value [batch, groups, tokens, size].

    Returns [batch, tokens, heads, size], and None for the weights that it never makes.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    if copies:
        query, key, value = (states.contiguous() for states in (query, key, value))
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=attention_mask is None,
        scale=scaling,
    )
    return attended.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make OF_COPIES and OF_VIEWS attention implementations of transformers."""
    for name, copies in ((OF_COPIES, True), (OF_VIEWS, False)):
        AttentionInterface.register(name, partial(attention, copies=copies))
        AttentionMaskInterface.register(name, _additive_mask)


def _additive_mask(*args: Any, **settings: Any) -> Tensor | None:
    """0 where a token is attended to, else the lowest float32; None where only order decides."""
    attended: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **settings)
    if attended is None:
        return None
    mask = torch.zeros_like(attended, dtype=torch.float32)
    return mask.masked_fill_(~attended, torch.finfo(torch.float32).min)


class _AsGiven(DynamicLayer):
    """Keys and values of one layer, kept without a copy: for a cache that is filled once."""

    is_initialized: bool

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        assert not self.is_initialized, "a training step fills a new cache, once"
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


def new_cache(config: Any) -> Any:
    """What a training step passes as past_key_values; None for a model that trains without."""
    if config.model_type == "gemma2":
        return None
    if config.is_encoder_decoder:
        return EncoderDecoderCache(*(Cache(layer_class_to_replicate=_AsGiven) for _ in range(2)))
    return Cache(layer_class_to_replicate=_AsGiven)


def add_buffers(model: Any, config: Any) -> None:
    """Give GPT-2's layers the triangles that they had."""
    if config.model_type == "gpt2":
        positions = config.n_positions
        for layer in model.transformer.h:
            triangle = torch.ones(1, 1, positions, positions, dtype=torch.bool).tril()
            layer.attn.register_buffer("bias", triangle, persistent=False)


def adafactor(parameters: Any) -> torch.optim.Optimizer:
    """Adafactor as the measured rows ran it: transformers' own, with a fixed step."""
    return transformers.Adafactor(parameters, lr=1e-3, relative_step=False)
