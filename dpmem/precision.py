"""The precision of forward: autocast, and outputs in fp32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dpmem.config import Precision

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The context forward runs in."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def upcast_outputs(outputs: Any) -> Any:
    """`outputs` with bf16 tensors as fp32, so that losses are computed in full precision.

    Sees what torch's pytree sees: tuples, lists, dicts, named tuples and registered classes such
    as transformers' ModelOutput. Other containers pass through unchanged.
    """

    def upcast(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor

    return tree_map_only(Tensor, upcast, outputs)
