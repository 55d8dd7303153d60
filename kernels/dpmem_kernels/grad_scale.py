"""Gradient scaling: multiply, measure and check a whole list of gradients in one pass.

Math     y[i] = round(float32(x[i]) * scale), to nearest even in x's dtype;
         sum_of_squares = sum of y[i]^2;  found_inf = 1 if some y[i] is inf or NaN, else 0
Shapes   tensors: any number of 1-D contiguous fp32|bf16|fp16 tensors, mixed, of any size;
         scale: one fp32 number on their device
Traffic  grad_stats reads itemsize * n bytes; grad_unscale_ and grad_scale_ read and write
         2 * itemsize * n; grad_scale_ by exactly 1 moves nothing. No host synchronization: only the
         first call for a list of sizes builds and uploads its chunk table.
Error    y is bit-exact on every backend (which NaN a NaN becomes is not specified).
         Sums add per chunk (tensor_table.py), then over chunks in float64, in an order that depends
         on the sizes and, on triton, on which tensors' addresses 16 divides (torch's own do). With
         CHUNK = 4096 elements and u = 2^-24, relative error
             triton              at most (CHUNK + 2) u, and CHUNK/64 + 12 u as the tile is laid
                                 out; squares below 2^-126 lose up to 2^-150 each
             cpu, reference      at most u + n 2^-53
         sum_of_squares is inf where the sum exceeds fp32; found_inf still tells whether an element
         did. Where found_inf is 1, sum_of_squares is inf or NaN.
Source   torch.amp.GradScaler.unscale_ and torch.nn.utils.clip_grad_norm_, in one read

Example  grad_unscale_([[6., 8.]], 0.5) leaves [3., 4.] and returns sum_of_squares 25, found_inf 0
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .backend import Backend, resolve_backend
from .tensor_table import (
    Walk,
    addresses_of,
    are_plain,
    check_scale,
    check_tensors,
    kept_chunk_table,
    stats_ref,
)


class GradStats(NamedTuple):
    """What a pass learned of the values it left behind: fp32 scalar tensors on their device."""

    sum_of_squares: Tensor
    """The squared 2-norm."""
    found_inf: Tensor
    """1.0 if a value is inf or NaN, else 0.0: what torch's fused optimizers take."""


def grad_stats(tensors: Sequence[Tensor], *, backend: Backend | None = None) -> GradStats:
    """Sum of squares and non-finite flag of all elements, in one read.

    Raises ValueError for an empty list, and TypeError or ValueError for tensors that are not 1-D
    contiguous fp32, bf16 or fp16 on one device.
    """
    if not tensors:
        raise ValueError("grad_stats needs at least one tensor to know its device; received none")
    device = tensors[0].device
    check_tensors(tensors, device)
    chosen = resolve_backend(device, backend)
    if are_plain(tensors):
        return GradStats(*_stats(tensors, chosen))
    return GradStats(*torch.ops.dpmem.grad_stats(list(tensors), chosen))


def grad_unscale_(
    tensors: Sequence[Tensor], inv_scale: Tensor, *, backend: Backend | None = None
) -> GradStats:
    """Multiply every element by `inv_scale` in place; the statistics are those of the results.

    Raises TypeError or ValueError as grad_stats does, and for an `inv_scale` that is not one fp32
    number on the tensors' device. An empty list is fine.
    """
    check_scale("inv_scale", inv_scale, inv_scale.device)
    check_tensors(tensors, inv_scale.device)
    chosen = resolve_backend(inv_scale.device, backend)
    if are_plain((inv_scale, *tensors)):
        torch.autograd.graph.increment_version(tensors)
        return GradStats(*_unscale(tensors, inv_scale, chosen))
    return GradStats(*torch.ops.dpmem.grad_unscale_(list(tensors), inv_scale, chosen))


def grad_scale_(
    tensors: Sequence[Tensor], scale: Tensor, *, backend: Backend | None = None
) -> None:
    """Multiply every element by `scale` in place; a scale of exactly 1 leaves every bit alone.

    Raises what grad_unscale_ raises.
    """
    check_scale("scale", scale, scale.device)
    check_tensors(tensors, scale.device)
    chosen = resolve_backend(scale.device, backend)
    if are_plain((scale, *tensors)):
        torch.autograd.graph.increment_version(tensors)
        _scale(tensors, scale, chosen)
    else:
        torch.ops.dpmem.grad_scale_(list(tensors), scale, chosen)


def _chunks(tensors: Sequence[Tensor], device: torch.device, backend: Backend) -> Tensor:
    return kept_chunk_table(
        tuple(tensor.numel() for tensor in tensors),
        tuple(tensor.dtype for tensor in tensors),
        device,
        backend,
    )


def _stats(tensors: Sequence[Tensor], backend: Backend) -> tuple[Tensor, Tensor]:
    device = tensors[0].device
    if backend == "reference":
        return stats_ref(tensors, device)
    return Walk(_chunks(tensors, device, backend), addresses_of(tensors)).run(backend)


def _unscale(
    tensors: Sequence[Tensor], inv_scale: Tensor, backend: Backend
) -> tuple[Tensor, Tensor]:
    device = inv_scale.device
    if backend == "reference":
        for tensor in tensors:
            tensor.copy_(tensor.float() * inv_scale.reshape(()))
        return stats_ref(tensors, device)
    addresses = addresses_of(tensors)
    walk = Walk(_chunks(tensors, device, backend), addresses, addresses, scale=inv_scale)
    return walk.run(backend)


def _scale(tensors: Sequence[Tensor], scale: Tensor, backend: Backend) -> None:
    if backend == "reference":
        for tensor in tensors:
            scaled = (tensor.float() * scale.reshape(())).to(tensor.dtype)
            tensor.copy_(torch.where(scale == 1, tensor, scaled))
        return
    addresses = addresses_of(tensors)
    walk = Walk(
        _chunks(tensors, scale.device, backend),
        addresses,
        addresses,
        scale=scale,
        sums=False,
        skip_if_one=True,
    )
    walk.run(backend)


@torch.library.custom_op("dpmem::grad_stats", mutates_args=())
def _grad_stats(tensors: Sequence[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    return _stats(tensors, cast(Backend, backend))


@torch.library.custom_op("dpmem::grad_unscale_", mutates_args=("tensors",))
def _grad_unscale_(
    tensors: Sequence[Tensor], inv_scale: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return _unscale(tensors, inv_scale, cast(Backend, backend))


@torch.library.custom_op("dpmem::grad_scale_", mutates_args=("tensors",))
def _grad_scale_(tensors: Sequence[Tensor], scale: Tensor, backend: str) -> None:
    _scale(tensors, scale, cast(Backend, backend))


@_grad_stats.register_fake
def _(tensors: Sequence[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    scalar = tensors[0].new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar)


@_grad_unscale_.register_fake
def _(tensors: Sequence[Tensor], inv_scale: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    scalar = inv_scale.new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar)


@_grad_scale_.register_fake
def _(tensors: Sequence[Tensor], scale: Tensor, backend: str) -> None:
    return None
