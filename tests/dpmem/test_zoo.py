"""hf:, torchvision: and timm: TARGETs: what they build, and what they refuse."""

import importlib
import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dpmem import Job
from dpmem.targets import TargetError, load_job
from dpmem.zoo.options import OPTIMIZERS, Options, importing
from dpmem.zoo.presets import PRESETS

ROOT = Path(__file__).parents[2]
TINY_GPT2 = "hf:gpt2?n_layer=1&n_embd=32&n_head=2&vocab_size=50&n_positions=16"


def train(job: Job, n: int = 2) -> float:
    """One step of `job`; the loss before it."""
    torch.manual_seed(0)
    model = job.model().train()
    assert job.optimizer is not None
    assert job.loss is not None
    optimizer = job.optimizer(model.parameters())
    loss = job.loss(model, job.batch(n))
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    "target",
    [
        TINY_GPT2,
        "hf:llama?num_hidden_layers=1&hidden_size=32&num_attention_heads=2"
        "&num_key_value_heads=1&intermediate_size=32&vocab_size=50&seq=9",
        "hf:bert?num_hidden_layers=1&hidden_size=32&num_attention_heads=2"
        "&intermediate_size=32&vocab_size=50&seq=9",
        "hf:roberta?num_hidden_layers=1&hidden_size=32&num_attention_heads=2"
        "&intermediate_size=32&vocab_size=50&max_position_embeddings=12",
        "hf:t5-small?num_layers=1&d_model=32&d_ff=32&num_heads=2&d_kv=16&vocab_size=50&seq=9",
        "hf:vit?num_hidden_layers=1&hidden_size=32&num_attention_heads=2"
        "&intermediate_size=32&image=32&num_labels=50",
        "torchvision:mobilenet_v3_small?image=64&num_classes=50",
        "timm:test_vit?num_classes=50",
        "timm:test_vit?image=64&num_classes=50",
        "timm:test_resnet?image=32&num_classes=50",
    ],
)
def test_every_family_trains(target: str) -> None:
    job = load_job(target)
    assert job.name == target
    # An untrained model guesses: the loss is about that of equal odds.
    assert train(job) == pytest.approx(math.log(50), rel=0.35)


@pytest.mark.usefixtures("libraries")
def test_a_batch_has_the_size_asked_for() -> None:
    tokens = load_job(f"{TINY_GPT2}&seq=7").batch(3)
    assert tokens["input_ids"].shape == (3, 7)
    assert torch.equal(tokens["input_ids"], tokens["labels"])
    assert load_job(TINY_GPT2).batch(1)["input_ids"].shape == (1, 16)
    images, labels = load_job("torchvision:resnet18?image=40&num_classes=4").batch(5)
    assert images.shape == (5, 3, 40, 40)
    assert labels.shape == (5,)
    assert labels.max() < 4
    assert load_job("timm:test_vit").batch(1)[0].shape == (1, 3, 160, 160)
    with torch.device("meta"):
        model: Any = load_job("torchvision:vit_b_32?image=64").model()
    assert model.image_size == 64
    assert load_job("torchvision:inception_v3").batch(1)[0].shape == (1, 3, 299, 299)


@pytest.mark.usefixtures("libraries")
def test_models_do_not_share_a_configuration() -> None:
    job = load_job(TINY_GPT2)
    first, second = job.model(), job.model()
    assert first.config is not second.config


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    job = load_job(f"{TINY_GPT2}&optimizer={name}&lr=0.25")
    assert job.optimizer is not None
    optimizer = job.optimizer(torch.nn.Linear(2, 2).parameters())
    assert type(optimizer).__name__.lower() == name
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.usefixtures("libraries")
def test_attention_is_chosen() -> None:
    for attention in ("eager", "sdpa"):
        config: Any = load_job(f"{TINY_GPT2}&attn={attention}").model().config
        assert config._attn_implementation == attention


def _saved_bytes(job: Job) -> dict[torch.dtype, int]:
    """Bytes that the forward pass saves for backward, by type."""
    sizes: dict[torch.dtype, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return tensor

    model = job.model().train()
    assert job.loss is not None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        job.loss(model, job.batch(8))
    return sizes


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    "target", [TINY_GPT2.replace("n_layer=1", "n_layer=4"), "timm:test_vit?image=160"]
)
def test_precision_and_checkpointing_reach_the_step(target: str) -> None:
    plain = _saved_bytes(load_job(target))
    assert torch.bfloat16 not in plain
    assert _saved_bytes(load_job(f"{target}&precision=bf16"))[torch.bfloat16] > 0
    checkpointed = _saved_bytes(load_job(f"{target}&checkpointing=true"))
    assert sum(checkpointed.values()) < 0.5 * sum(plain.values())


@pytest.mark.usefixtures("libraries")
def test_settings_have_the_types_of_the_configuration() -> None:
    job = load_job(
        f"{TINY_GPT2}&resid_pdrop=0.25&use_cache=false&activation_function=relu&n_inner=24"
    )
    config: Any = job.model().config
    assert config.resid_pdrop == 0.25
    assert config.use_cache is False
    assert config.activation_function == "relu"
    assert config.n_inner == 24


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("hf:", "a name must follow the colon"),
        ("hf:gpt3", "unknown model 'gpt3'; presets are distilgpt2, gpt2, .*CONFIG_MAPPING"),
        ("hf:whisper", "whisper is neither a language model nor a classifier of images"),
        ("hf:gpt2?layers=3", "unknown option 'layers'; known are optimizer, lr, precision, attn, "
         "checkpointing, seq, .*n_layer"),
        ("hf:vit?seq=3", "unknown option 'seq'; known are .*image"),
        ("hf:gpt2?image=3", "unknown option 'image'"),
        ("hf:gpt2?model_type=bert", "unknown option 'model_type'"),
        ("hf:gpt2?n_layer=two", "n_layer must be of type int; received 'two'"),
        ("hf:gpt2?use_cache=no", "use_cache must be one of true, false; received 'no'"),
        ("hf:gpt2?resid_pdrop=", "resid_pdrop must be of type float; received ''"),
        ("hf:gpt-neo-125m?attention_types=3", "attention_types is a list, which an option cannot"),
        ("hf:gpt2?seq=0", "seq must be a whole number from 1; received '0'"),
        ("hf:gpt2?seq=1025", "seq must be at most the model's 1024 positions; received 1025"),
        ("hf:roberta-base?seq=513", "seq must be at most the model's 512 positions"),
        ("hf:gpt2?seq", "options must be key=value, joined by &; received 'seq'"),
        ("hf:gpt2?seq=1&seq=1", "a key must come once"),
        ("hf:gpt2?lr=-1", "lr must be a number from 0; received '-1'"),
        ("hf:gpt2?lr=nan", "lr must be a number from 0; received 'nan'"),
        ("hf:gpt2?optimizer=lion", "optimizer must be one of sgd, adam, .*; received 'lion'"),
        ("hf:gpt2?precision=fp16", "precision must be one of fp32, bf16; received 'fp16'"),
        ("hf:gpt2?attn=flash", "attn must be one of eager, sdpa; received 'flash'"),
        ("hf:gpt-neo-125m?num_layers=3", "its library raised .*attention_types"),
        ("torchvision:resnet5", "torchvision has no classifier 'resnet5'"),
        ("torchvision:fcn_resnet50", "torchvision has no classifier 'fcn_resnet50'"),
        ("torchvision:resnet18?attn=sdpa", "unknown option 'attn'; known are optimizer, lr, "
         "precision, image, num_classes"),
        ("timm:resnet5", "timm has no model 'resnet5'"),
        ("timm:resnet18?seq=3", "unknown option 'seq'; known are .*checkpointing"),
    ],
)  # fmt: skip
def test_errors_say_what_is_known(target: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load_job(target)


def test_options_are_read_once() -> None:
    options = Options("a=1&b=2")
    assert options.take("a", lambda key, text: int(text), 0) == 1
    assert options.take("c", lambda key, text: int(text), 7) == 7
    with pytest.raises(ValueError, match="unknown option 'b'; known are a, c"):
        options.finish()
    assert options.take_rest() == {"b": "2"}
    options.finish()


@pytest.mark.parametrize(
    ("target", "library"),
    [("hf:gpt2", "transformers"), ("torchvision:resnet18", "torchvision"), ("timm:vgg11", "timm")],
)
def test_a_missing_library_is_named(
    target: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., ModuleType] = importlib.import_module

    def missing(name: str, package: str | None = None) -> ModuleType:
        if name == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(TargetError, match=f"{library} is not installed: pip install {library}$"):
        load_job(target)


def test_a_torchvision_of_another_torch_is_explained() -> None:
    missing = RuntimeError("operator torchvision::nms does not exist")
    match = r"built for another torch .* from the same index as torch"
    with pytest.raises(ValueError, match=match), importing("json"):
        raise missing
    # transformers puts an error of its own around it.
    with pytest.raises(ValueError, match="built for another torch"), importing("json"):
        raise ModuleNotFoundError("Could not import module 'LlamaConfig'") from missing
    with pytest.raises(RuntimeError, match="something else"), importing("json"):
        raise RuntimeError("something else")


def test_importing_dpmem_imports_none_of_the_libraries() -> None:
    code = (
        "import sys, dpmem.targets;"
        "print([name for name in ('transformers', 'timm', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def _parameters(name: str) -> int:
    """Parameters of a preset's model, built without memory."""
    with torch.device("meta"):
        model = load_job(f"hf:{name}").model()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_size(name: str) -> None:
    presets: Mapping[str, Any] = PRESETS
    assert _parameters(name) == presets[name].parameters
