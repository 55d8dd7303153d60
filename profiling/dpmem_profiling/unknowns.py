"""What a trace leaves out, as notes for its readers: said, and never counted as nothing."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any
from unittest import mock

from torch import nn
from torch.optim import LBFGS, Optimizer

from dpmem_profiling.tracker import StorageInfo
from dpmem_profiling.units import format_bytes


class CompiledRegions:
    """Inside the block what torch.compile would compile runs as it is written, and is noted.

    Modules, functions and methods alike: all enter by the same door. Where the stance is that
    nothing may be compiled, it fails, as it does on a device.
    """

    def __init__(self) -> None:
        self._met = False
        self._door: Any = None

    def __enter__(self) -> None:
        # Fake tensors import it anyway.
        eval_frame = import_module("torch._dynamo.eval_frame")
        by_stance = eval_frame._callback_from_stance

        def callback(compiler: Any) -> Any:
            if eval_frame._stance.stance == "fail_on_recompile":
                return by_stance(compiler)
            # torch's own ways around the compiler come by here too, without one.
            self._met |= callable(compiler)
            return None

        self._door = mock.patch.object(eval_frame, "_callback_from_stance", callback)
        self._door.__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        self._door.__exit__(*exc_info)

    def notes(self) -> tuple[str, ...]:
        """A note where torch.compile would fuse: what it saves and takes is not known here."""
        if not self._met:
            return ()
        return (
            "unknown: what torch.compile makes the step take. Compiled regions were traced as they "
            "are written.",
        )


def history_of_lbfgs(optimizer: Optimizer | None) -> tuple[str, ...]:
    """A note where the optimizer's state is as large as its way to the minimum is long.

    Source: torch/optim/lbfgs.py, old_dirs and old_stps.
    """
    if not isinstance(optimizer, LBFGS):
        return ()
    most_bytes = sum(
        2 * group["history_size"] * parameter.numel() * parameter.element_size()
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    return (
        "unknown: how much of its history LBFGS fills, which the figures leave out: "
        f"{format_bytes(most_bytes)} at most.",
    )


def recurrent(model: nn.Module) -> tuple[str, ...]:
    """A note where cuDNN would run a whole layer: its library decides what that takes.

    Source: aten/src/ATen/native/cudnn/RNN.cpp, which asks cuDNN for both sizes.
    """
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, nn.RNNBase)}
    if not kinds:
        return ()
    return (
        "unknown: workspace and reserve of cuDNN's RNN. The model has recurrent layers "
        f"({', '.join(sorted(kinds))}), and the figures leave these out.",
    )


def sharded(model: nn.Module) -> tuple[str, ...]:
    """A note where fully_shard gathers and reduces on streams of its own."""
    kinds = (kind for module in model.modules() for kind in type(module).__mro__)
    if not any(kind.__name__ == "FSDPModule" for kind in kinds):
        return ()
    return (
        "unknown: what the allocator reserves for fully_shard's own streams. The figures have all "
        "tensors on one stream.",
    )


_PREFER_CUDNN = {(9, 0), (10, 0), (10, 3)}
_FUSED = {
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
}
_HALF = {"bfloat16", "float16"}


def attention_of_cudnn(
    storages: Iterable[StorageInfo], architecture: tuple[int, int] | None
) -> tuple[str, ...]:
    """A note where torch prefers cuDNN's attention, whose workspace that library decides.

    Source: sdp_utils.cpp, check_prefer_cudnn_attention: on Hopper and B200, with a cuDNN after
    9.15. It saves what FlashAttention saves (derivatives.yaml).
    """
    if architecture not in _PREFER_CUDNN:
        return ()
    if not any(storage.op in _FUSED and storage.dtype in _HALF for storage in storages):
        return ()
    return (
        "unknown: what cuDNN's attention takes while it runs. torch prefers it on this GPU, where "
        "cuDNN is newer than 9.15; the figures have what PyTorch's own kernels take, which save "
        "the same for backward.",
    )
