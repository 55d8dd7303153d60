"""What CUDA's operators allocate beside their results: rules, each with its source.

Workspaces of cuBLAS stay allocated, one for each thread that multiplies matrices (the caller's and
autograd's). Everything else is given back when the operator returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_aten = torch.ops.aten
_MATRIX_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.addmv.default,
    _aten.mv.default,
    _aten.dot.default,
}


class CudaScratch:
    """The rules for one GPU; call it for every operator in order.

    cublas_workspace_bytes   of one handle, as gpus.cublas_workspace_bytes gives it
    """

    def __init__(self, cublas_workspace_bytes: int) -> None:
        self._cublas_workspace_bytes = cublas_workspace_bytes
        self._threads: set[bool] = set()

    def __call__(self, func: Any, args: Any, result: Any) -> Iterator[tuple[int, bool]]:
        """The allocations of one operator: bytes, and whether they stay."""
        if func in _MATRIX_PRODUCTS:
            yield from self._cublas()
        elif rule := _RULES.get(func):
            for size_bytes in rule(args, result):
                yield size_bytes, False

    def _cublas(self) -> Iterator[tuple[int, bool]]:
        """aten/src/ATen/cuda/CublasHandlePool.cpp: one workspace for each thread's handle."""
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward not in self._threads:
            self._threads.add(in_backward)
            yield self._cublas_workspace_bytes, True


def _efficient_attention_backward(args: Any, result: Any) -> Iterator[int]:
    """attention_backward.cu: delta, (grad_out * out).sum(-1), where its kernel does not."""
    grad_out = args[0]
    if grad_out.dtype == torch.float32:
        yield grad_out.numel() * 4
        yield grad_out.numel() // max(grad_out.shape[-1], 1) * 4


_RULES = {
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_attention_backward,
}
