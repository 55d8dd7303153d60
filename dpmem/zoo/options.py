"""What follows the question mark: each key is read once, and none is ignored."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import torch
from torch import nn
from torch.optim import Optimizer

from dpmem.config import Precision

T = TypeVar("T")

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adafactor": torch.optim.Adafactor,
}
_PRECISIONS: dict[str, Precision] = {"fp32": "fp32", "bf16": "bf16"}
_BOOLEANS = {"true": True, "false": False}


class Options:
    """The key=value pairs of a query such as "seq=128&lr=1e-4".

    Raises ValueError for text of another form and for a key that comes twice.
    """

    def __init__(self, query: str) -> None:
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        except ValueError as error:
            raise ValueError(
                f"options must be key=value, joined by &; received {query!r}"
            ) from error
        self._left = dict(pairs)
        self._known: list[str] = []
        if len(self._left) < len(pairs):
            raise ValueError(f"a key must come once; received {query!r}")

    def take(self, key: str, read: Callable[[str, str], T], default: T) -> T:
        """The value of `key` as `read(key, text)` understands it, or `default` without one."""
        self._known.append(key)
        return read(key, self._left.pop(key)) if key in self._left else default

    def take_rest(self) -> dict[str, str]:
        """All pairs that nobody has taken."""
        rest, self._left = self._left, {}
        return rest

    def unknown(self, key: str, also_known: Iterable[str] = ()) -> ValueError:
        """The error about `key`, listing every key that was asked for, and `also_known`."""
        known = ", ".join([*self._known, *also_known])
        return ValueError(f"unknown option {key!r}; known are {known}")

    def finish(self) -> None:
        """Raises ValueError where a pair is left that nobody has taken."""
        for key in self._left:
            raise self.unknown(key)


def count(key: str, text: str) -> int:
    """A whole number from 1."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise ValueError(f"{key} must be a whole number from 1; received {text!r}")
    return int(text)


def boolean(key: str, text: str) -> bool:
    """true or false."""
    return one_of(_BOOLEANS)(key, text)


def one_of(choices: dict[str, T]) -> Callable[[str, str], T]:
    """A reader of the names in `choices`."""

    def read(key: str, text: str) -> T:
        if text not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}; received {text!r}")
        return choices[text]

    return read


def take_precision(options: Options) -> Precision:
    """`precision`: fp32 (the default), or bf16 for autocast around the forward pass."""
    return options.take("precision", one_of(_PRECISIONS), "fp32")


def take_optimizer(options: Options) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """`optimizer` and `lr`: one of torch.optim's (AdamW by default) with its other defaults."""
    optimizer = options.take("optimizer", one_of(OPTIMIZERS), OPTIMIZERS["adamw"])
    return partial(optimizer, lr=options.take("lr", _rate, 1e-3))


def _rate(key: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate < float("inf"):
        raise ValueError(f"{key} must be a number from 0; received {text!r}")
    return rate


@contextmanager
def importing(library: str) -> Iterator[Any]:
    """Import `library`, and tell a person what to install where it, or what it needs, is missing.

    Libraries import their parts on first use, so what runs inside may still find one missing.

    Raises ValueError where `library` is not installed, or not for this torch.
    """
    try:
        yield importlib.import_module(library)
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == library:
            raise ValueError(f"{library} is not installed: pip install {library}") from error
        # transformers and timm import torchvision, and put errors of their own around its.
        causes: list[BaseException | None] = [error]
        while causes[-1] is not None:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        if any("operator torchvision::" in str(cause) for cause in causes):
            raise ValueError(
                f"the installed torchvision was built for another torch than {torch.__version__}: "
                "install the one that matches, from the same index as torch: pip install "
                "--force-reinstall --no-deps torchvision, with torch's --index-url"
            ) from error
        raise
