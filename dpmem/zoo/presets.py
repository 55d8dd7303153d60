"""Published models as configuration values for transformers, without their weights.

Only what differs from the defaults of transformers' configuration class stands here, as the
config.json of the named repository on the Hugging Face hub has it. `parameters` is the published
model's count, tied weights once, with the head that dpmem trains it with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A configuration: transformers' model type, values that are not its defaults, their source."""

    model_type: str
    source: str
    parameters: int
    values: Mapping[str, Any] = field(default_factory=dict)


def _gpt2(source: str, parameters: int, n_embd: int, n_layer: int, n_head: int) -> Preset:
    values = {"n_embd": n_embd, "n_layer": n_layer, "n_head": n_head}
    return Preset("gpt2", source, parameters, values)


def _opt(source: str, parameters: int, hidden: int, layers: int, heads: int, **more: Any) -> Preset:
    values = {
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return Preset("opt", source, parameters, values | more)


_LARGE_ENCODER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}

PRESETS: Mapping[str, Preset] = {
    "distilgpt2": _gpt2("distilbert/distilgpt2", 81_912_576, 768, 6, 12),
    "gpt2": _gpt2("openai-community/gpt2", 124_439_808, 768, 12, 12),
    "gpt2-medium": _gpt2("openai-community/gpt2-medium", 354_823_168, 1024, 24, 16),
    "gpt2-large": _gpt2("openai-community/gpt2-large", 774_030_080, 1280, 36, 20),
    "gpt2-xl": _gpt2("openai-community/gpt2-xl", 1_557_611_200, 1600, 48, 25),
    # Dropout 0: its training used none (arXiv 2304.03208), and its config.json says so.
    "cerebras-gpt-111m": Preset(
        "gpt2",
        "cerebras/Cerebras-GPT-111M",
        111_050_496,
        {
            "n_layer": 10,
            "n_positions": 2048,
            "n_inner": 3072,
            "activation_function": "gelu",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    ),
    "gpt-neo-125m": Preset(
        "gpt_neo",
        "EleutherAI/gpt-neo-125m",
        125_198_592,
        {
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "attention_types": [[["global", "local"], 6]],
            "attention_dropout": 0.0,
            "embed_dropout": 0.0,
            "resid_dropout": 0.0,
        },
    ),
    "pythia-1b": Preset(
        "gpt_neox",
        "EleutherAI/pythia-1b",
        1_011_781_632,
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 8,
        },
    ),
    "opt-125m": _opt("facebook/opt-125m", 125_239_296, 768, 12, 12),
    "opt-350m": _opt(
        "facebook/opt-350m",
        331_196_416,
        1024,
        24,
        16,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    ),
    "opt-1.3b": _opt("facebook/opt-1.3b", 1_315_758_080, 2048, 24, 32),
    "llama-7b": Preset("llama", "huggyllama/llama-7b", 6_738_415_616),
    "llama-3.2-3b": Preset(
        "llama",
        "meta-llama/Llama-3.2-3B-Instruct",
        3_212_749_824,
        {
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
    "qwen3-0.6b": Preset(
        "qwen3",
        "Qwen/Qwen3-0.6B",
        596_049_920,
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-4b": Preset(
        "qwen3",
        "Qwen/Qwen3-4B",
        4_022_468_096,
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek-r1-distill-qwen-1.5b": Preset(
        "qwen2",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        1_777_088_000,
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
        },
    ),
    "gemma-2-2b": Preset("gemma2", "google/gemma-2-2b-it", 2_614_341_888),
    "t5-small": Preset("t5", "google-t5/t5-small", 60_506_624),
    "t5-base": Preset(
        "t5",
        "google-t5/t5-base",
        222_903_552,
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    ),
    "bert-base": Preset("bert", "google-bert/bert-base-uncased", 109_514_298),
    "bert-large": Preset("bert", "google-bert/bert-large-uncased", 335_174_458, _LARGE_ENCODER),
    "roberta-base": Preset(
        "roberta",
        "FacebookAI/roberta-base",
        124_697_433,
        {
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
        },
    ),
    "vit-base": Preset("vit", "google/vit-base-patch16-224", 86_567_656, {"num_labels": 1000}),
    "vit-large": Preset(
        "vit", "google/vit-large-patch16-224", 304_326_632, _LARGE_ENCODER | {"num_labels": 1000}
    ),
}
