"""Dense tensors as flat ones, in memory order.

A gradient is packed by walking its memory, not its indices: a channels_last convolution weight
needs no copy. Gradient, parameter and bucket slot must then agree on the strides, and the
parameter's are the ones that hold.
"""

import torch
from torch import Tensor


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the parts of a complex number are; of a real one, itself."""
    return dtype.to_real() if dtype.is_complex else dtype


def real_numel(tensor: Tensor) -> int:
    """Real numbers in `tensor`."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Strides for a gradient of `parameter`: its own where it is dense, else contiguous ones."""
    expected = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return torch.empty(parameter.shape, device="meta").stride()
        expected *= size
    return parameter.stride()


def flatten_dense(gradient: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`gradient` as a 1-D tensor in the memory order of `strides`: a view where it has them."""
    have = gradient.stride()
    matches = have == strides or all(
        own == want
        for own, want, size in zip(have, strides, gradient.shape, strict=True)
        if size > 1
    )
    if not matches and gradient.numel() > 0:
        gradient = torch.empty_strided(
            gradient.shape, strides, dtype=gradient.dtype, device=gradient.device
        ).copy_(gradient)
    # Most parameters are vectors, and flat already.
    return gradient if have == (1,) else gradient.as_strided((gradient.numel(),), (1,))


def dense_gradient(parameter: Tensor) -> Tensor:
    """`parameter.grad`, or a view of it without the graph that backward(create_graph=True) left.

    Raises TypeError where it is sparse.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise TypeError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} must be dense, since "
            f"it is no weight of an nn.Embedding with sparse=True; received {gradient.layout}; "
            "use such an embedding, or make the gradient dense"
        )
    return gradient.detach() if gradient.requires_grad else gradient


def writable_gradient(parameter: Tensor) -> Tensor:
    """`parameter.grad` as a 1-D view, so that writing to it writes to the gradient.

    A gradient whose memory has holes or overlaps (only a user can have put it there) is replaced
    by a contiguous copy first. Of a sparse one it is the values, each index's added up.
    """
    if parameter.grad is not None and parameter.grad.is_sparse:
        parameter.grad = parameter.grad.detach().coalesce()
        return parameter.grad._values().view(-1)
    gradient = dense_gradient(parameter)
    strides = dense_strides(gradient)
    if strides != gradient.stride():
        gradient = gradient.contiguous()
        parameter.grad = gradient
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
        strides = dense_strides(gradient)
    return flatten_dense(gradient, strides)
