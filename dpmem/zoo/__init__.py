"""`hf:`, `torchvision:` and `timm:` TARGETs: known models with random weights, as Jobs.

    hf:gpt2-xl?seq=1024&precision=bf16&checkpointing=true
    torchvision:resnet50?optimizer=sgd&image=224
    timm:vit_base_patch16_224?num_classes=10

Nothing is downloaded: a model is its configuration. The libraries are imported on use.
"""

from collections.abc import Callable, Mapping

from dpmem.zoo import hugging_face, vision
from dpmem.zoo.options import Options
from dpmem_profiling import Job

FAMILIES: Mapping[str, Callable[[str, Options, str], Job]] = {
    "hf": hugging_face.load,
    "torchvision": vision.load_torchvision,
    "timm": vision.load_timm,
}


def has(target: str) -> bool:
    """Does `target` begin with a family's name and a colon?"""
    family, colon, _ = target.partition(":")
    return bool(colon) and family in FAMILIES


def load(target: str) -> Job:
    """The Job of "family:name" or "family:name?key=value&key=value".

    Keys of all families: optimizer, lr, precision. Of texts: seq, attn, checkpointing. Of images:
    image, and num_classes, or for hf: attn and checkpointing. timm: checkpointing. hf: passes other
    keys to the configuration.

    Raises ValueError for an unknown model, key or value, and where the library is missing or does
    not match torch.
    """
    family, _, rest = target.partition(":")
    name, _, query = rest.partition("?")
    if not name:
        raise ValueError(f"a name must follow the colon, as in {family}:NAME?key=value")
    return FAMILIES[family](name, Options(query), target)
