"""What CUDA's operators allocate beside their results: rules, each with its source.

Workspaces of cuBLAS stay allocated, one for each thread that multiplies matrices (the caller's and
autograd's). Everything else is given back when the operator returns. What cuDNN takes for a
convolution is its own decision, so it is an interval: from nothing to what can be said at most.
Where torch.backends.cudnn.benchmark is set the decision is for speed, and more is known.

Not here: the partial sums of layer_norm's backward, which are 4 MiB each at most
(layer_norm_kernel.cu), and the tables of offsets and the sort's own memory in embedding's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpmem_profiling.cuda_semantics import Architecture
from dpmem_profiling.tracker import Scratch

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

    architecture             compute capability, as (8, 6); None for a GPU that has none
    cublas_workspace_bytes   of one handle, as gpus.cublas_workspace_bytes gives it
    """

    def __init__(self, architecture: Architecture | None, cublas_workspace_bytes: int) -> None:
        self._architecture = architecture
        self._cublas_workspace_bytes = cublas_workspace_bytes
        self._threads: set[bool] = set()
        self._tried: set[Any] = set()

    def __call__(self, func: Any, args: Any, result: Any) -> Iterator[Scratch]:
        """The allocations of one operator."""
        if func in _MATRIX_PRODUCTS:
            yield from self._cublas()
        elif rule := _PASSING.get(func):
            for size_bytes in rule(args):
                yield Scratch(size_bytes, "passes")
        elif func is _aten.convolution.default:
            yield from self._cudnn(
                args[0], args[1], _Settings(*args[3:9]), _convolution(args, result)
            )
        elif func is _aten.convolution_backward.default:
            runs = _convolution_backward(args, result)
            yield from self._cudnn(args[1], args[2], _Settings(*args[4:10]), runs)

    def _cublas(self) -> Iterator[Scratch]:
        """aten/src/ATen/cuda/CublasHandlePool.cpp: one workspace for each thread's handle."""
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward not in self._threads:
            self._threads.add(in_backward)
            yield Scratch(self._cublas_workspace_bytes, "stays")

    def _cudnn(
        self, x: Tensor, weight: Tensor, settings: _Settings, runs: Iterable[_Run]
    ) -> Iterator[Scratch]:
        """What cuDNN may take, and what it takes where torch.backends.cudnn.benchmark is set.

        Then it tries its kernels for each convolution that it has not met, in memory that the
        allocator's cache is emptied of, and keeps to the fastest (Conv_v8.cpp, run_single_conv,
        get_plans_from_find). On tensor cores that is one which reads channels_last copies. What it
        makes it may write as it is to be: profiles show sm80_xmma_fprop_implicit_gemm_tf32f32_…
        _nhwckrsc_nchw.
        """
        runs = () if _is_depthwise(x, settings) else tuple(runs)
        most_bytes = (_copies(*run.reads, run.makes) for run in runs)
        yield Scratch(max(most_bytes, default=0), "is possible")
        if not torch.backends.cudnn.benchmark:
            return
        copies = self._has_tensor_cores(x.dtype) and not _is_matrix_product(weight, settings)
        for run in runs:
            size_bytes = _copies(*run.reads) if copies else 0
            key = (run.name, x.dtype, x.shape, x.stride(), weight.shape, str(settings))
            yield Scratch(size_bytes, "follows" if key in self._tried else "is tried")
            self._tried.add(key)

    def _has_tensor_cores(self, dtype: torch.dtype) -> bool:
        """Half precision from Volta on, bfloat16 and float32 as TF32 from Ampere on."""
        if self._architecture is None or dtype == torch.float64:
            return False
        if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
            return False
        return self._architecture >= ((7, 0) if dtype == torch.float16 else (8, 0))


def _flash_attention_backward(args: Any) -> Iterator[int]:
    """flash_attn/flash_api.cpp, mha_bwd: the gradient of queries is summed in float32, beside a
    number for each row, over tokens and widths that kernels take whole; grouped keys and values
    have gradients for every head first."""
    query, key = args[1], args[2]
    batch_size, heads, n_queries, width = query.shape
    rows = batch_size * heads * _multiple(n_queries, 128)
    yield rows * 4
    yield rows * (_multiple(width, 32) if width <= 192 else 256) * 4
    if key.shape[1] != heads:
        expanded = batch_size * key.shape[2] * heads * width * query.element_size()
        yield from (expanded, expanded)


def _efficient_attention_backward(args: Any) -> Iterator[int]:
    """attention_backward.cu: delta, (grad_out * out).sum(-1) in float32, and in float32 its product
    before.

    In half precision the kernel computes delta, and sums the gradient of queries in float32
    (mem_eff_attention/kernel_backward.h, workspace_elements_gq): in blocks of 64, as most are.
    """
    grad_out, query = args[0], args[1]
    batch_size, heads, n_queries, width = query.shape
    if grad_out.dtype == torch.float32:
        yield grad_out.numel() * 4
    yield batch_size * heads * n_queries * 4
    if grad_out.dtype != torch.float32:
        yield batch_size * heads * _multiple(n_queries, 64) * _multiple(width, 64) * 4


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _softmax_backward(args: Any) -> Iterator[int]:
    """SoftMax.cu, softmax_backward_cuda_out: the gradient times the result."""
    yield _bytes_of(args[0])


def _safe_softmax(args: Any) -> Iterator[int]:
    """transformers/attention.cpp: an ordinary softmax, and whether each element is -inf. From both
    it makes the result, where rows that are wholly so are zero."""
    yield _bytes_of(args[0])
    yield args[0].numel()


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _embedding_backward(args: Any) -> Iterator[int]:
    """Embedding.cu and EmbeddingBackwardKernel.cu: indices sorted, where they came from, and
    partial sums, one for each index that occurs and one for every 10 indices.

    Each index is taken to occur once. Up to 3072 indices need none of this; it is counted for them
    too, so that all batches allocate alike.
    """
    grad_out, indices, num_weights, _, _ = args
    sorted_bytes = indices.numel() * indices.element_size()
    yield sorted_bytes
    yield sorted_bytes
    rows = indices.numel() // 10 + min(indices.numel(), num_weights)
    yield rows * grad_out.shape[-1] * 4


class _Run(NamedTuple):
    """One of cuDNN's operations: it reads two tensors and makes a third."""

    name: str
    reads: tuple[Tensor, Tensor]
    makes: Tensor


def _convolution(args: Any, result: Any) -> Iterator[_Run]:
    yield _Run("forward", (args[0], args[1]), result)


def _convolution_backward(args: Any, result: Any) -> Iterator[_Run]:
    grad_out, x, weight = args[:3]
    grad_x, grad_weight, _ = result
    if grad_x is not None:
        yield _Run("input", (grad_out, weight), grad_x)
    if grad_weight is not None:
        yield _Run("weight", (grad_out, x), grad_weight)


class _Settings(NamedTuple):
    """A convolution's, as both operators have them in a row."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def _is_depthwise(x: Tensor, settings: _Settings) -> bool:
    """Those run on a kernel of PyTorch (Convolution.cpp, use_cudnn_depthwise)."""
    return not settings.transposed and settings.groups == x.shape[1] > 1


def _is_matrix_product(weight: Tensor, settings: _Settings) -> bool:
    """One of 1x1 is a product of matrices, channels by pixels, that need no other layout."""
    kernel = weight.shape[2:]
    return all(size == 1 for size in (*kernel, *settings.stride)) and not any(settings.padding)


def _copies(*operands: Tensor) -> int:
    """What a cuDNN kernel for tensor cores takes where its operands are not channels_last: copies
    that are (NVIDIA's guide to convolutional layers, on tensor layouts).

    Winograd and FFT may take more, where there is more: Conv_v8.cpp, try_plans, goes on to the next
    kernel when the allocator refuses a workspace.
    """
    return sum(
        _bytes_of(operand) for operand in operands if operand.shape[1] > 1 and operand.stride(1) > 1
    )


_PASSING = {
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_attention_backward,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten._safe_softmax.default: _safe_softmax,
    _aten.embedding_dense_backward.default: _embedding_backward,
}
