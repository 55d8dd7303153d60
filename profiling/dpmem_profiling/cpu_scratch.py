"""What operators on a CPU allocate beside their results: copies in other layouts.

Of convolutions in float32, on x86: oneDNN computes on maps and weights whose channels lie in
blocks, as many as a vector register holds, and gives everything back when the operator returns.
Which of its kernels runs, and what buffers of its own that takes, is its decision
(torch.backends.mkldnn.verbose tells): grouped convolutions, and matrix products in place of
convolutions, are not followed further than this.

Sources: aten/src/ATen/native/mkldnn/Conv.cpp, its note on memory formats and the order of what it
does; use_mkldnn and determine_backend_memory_format in aten/src/ATen/native/Convolution.cpp;
aten/src/ATen/native/cpu/MaxPoolKernel.cpp; oneDNN's guide, on memory format propagation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from dpmem_profiling.tracker import Scratch

_aten = torch.ops.aten
_CONTIGUOUS = torch.contiguous_format
_VECTORS = {"AVX2": 8, "AVX512": 16}


def cpu_scratch(func: Any, args: Any, result: Any) -> Iterator[Scratch]:
    """The allocations of one operator on this machine's CPU."""
    block = _VECTORS.get(torch.backends.cpu.get_cpu_capability())
    if block is None or func not in _RULES or not torch.backends.mkldnn.enabled:
        return
    size_bytes = _RULES[func](args, result, block)
    if size_bytes:
        yield Scratch(size_bytes, "passes")


def _convolution(args: Any, result: Tensor, block: int) -> int:
    x, weight, _, stride, _, dilation, _, _, groups = args[:9]
    layout = _layout(x, weight)
    copied_bytes = _copies(layout, x, weight)
    if not _is_onednns(x, weight, stride, dilation, groups):
        return copied_bytes
    weight_bytes = _weight(weight, groups, block, layout)
    if layout is not _CONTIGUOUS:
        return copied_bytes + weight_bytes
    return copied_bytes + max(_map(x, groups, block) + weight_bytes, _map(result, groups, block))


def _convolution_backward(args: Any, result: Any, block: int) -> int:
    grad_out, x, weight = args[:3]
    stride, _, dilation, _, _, groups = args[4:10]
    layout = _layout(x, weight)
    copied_bytes = _copies(layout, grad_out, x, weight)
    if not _is_onednns(x, weight, stride, dilation, groups):
        return copied_bytes
    grad_x, grad_weight, _ = result
    weight_bytes = _weight(weight, groups, block, layout)
    sizes = [0]
    if grad_weight is not None:
        # From its blocks into rows, and in channels_last from rows into that.
        rows_bytes = 0 if layout is _CONTIGUOUS else _bytes(grad_weight)
        sizes.append(weight_bytes + rows_bytes)
    if layout is _CONTIGUOUS:
        if grad_weight is not None:
            padding_bytes = weight_bytes - _bytes(grad_weight)
            sizes.append(_map(grad_out, groups, block) + _map(x, groups, block) + padding_bytes)
        elif grad_x is not None:
            sizes.append(_map(grad_out, groups, block) + weight_bytes)
            sizes.append(_map(grad_x, groups, block))
    return copied_bytes + max(sizes)


def _max_pool_backward(args: Any, result: Tensor, block: int) -> int:
    grad_out, indices = args[0], args[-1]
    return _copies(_layout(grad_out), grad_out, indices, result)


def _is_onednns(x: Tensor, weight: Tensor, stride: Any, dilation: Any, groups: int) -> bool:
    if x.dtype != torch.float32:
        return False
    kernel = weight.shape[2:]
    is_matrix_product = set(kernel) == set(stride) == set(dilation) == {1}
    if is_matrix_product and x.shape[0] < 16 and torch.get_num_threads() == 1:
        return False
    is_wide = len(kernel) > 1 and min(kernel[-2:]) > 3
    return groups > 1 or is_wide or x.shape[0] > 1 or x.numel() > 20480


def _layout(*operands: Tensor) -> torch.memory_format:
    """That of all operands of an operator: any that is in channels_last decides."""
    formats = map(suggest_memory_format, operands)
    return next((one for one in formats if one is not _CONTIGUOUS), _CONTIGUOUS)


def _copies(layout: torch.memory_format, *operands: Tensor) -> int:
    """Bytes of those that are laid out otherwise."""
    return sum(_bytes(one) for one in operands if not one.is_contiguous(memory_format=layout))


def _map(maps: Tensor, groups: int, block: int) -> int:
    """A copy whose channels are whole blocks; of one channel or three, as of an image, none."""
    channels = maps.shape[1]
    if groups > 1:
        return _bytes(maps)
    return 0 if channels in (1, 3) else _bytes(maps) // channels * _multiple(channels, block)


def _weight(weight: Tensor, groups: int, block: int, layout: torch.memory_format) -> int:
    """A copy whose channels are whole blocks, both ways.

    Where each group has one channel it is as it is; except, with 16 in a block and in
    channels_last, that backward takes a whole block for each group: 256 values, 255 of them empty.
    """
    ins, outs = weight.shape[1], weight.shape[0] // groups
    if groups > 1 and ins == outs == 1:
        is_padded = block == 16 and layout is not _CONTIGUOUS
        blocks = block * block if is_padded else 1
    elif groups == 1 and ins in (1, 3):
        blocks = ins * _multiple(outs, block)
    else:
        blocks = _multiple(ins, block) * _multiple(outs, block)
    return groups * blocks * math.prod(weight.shape[2:]) * weight.element_size()


def _multiple(size: int, block: int) -> int:
    """Whole blocks; up to 8 channels take one of 8."""
    of = min(block, 8) if size <= 8 else block
    return -(-size // of) * of


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_RULES = {
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
}
