"""An fp32 master weight in two 16-bit halves: the bf16 model weight and what it lacks.

Math     weight = x rounded to the nearest bf16, ties away from zero; remainder = the low 16 bits of
         x's pattern, as int16. With x, weight and remainder as integers,
         x = weight * 65536 + remainder: a bf16 pattern is the upper half of an fp32 pattern, and
         the remainder, from -32768 to 32767, says how far x lies from it.
Shapes   x [any] fp32 <-> weight [same] bf16, remainder [same] int16; all contiguous
Traffic  8 bytes per element each way. A model in bf16 with its remainders takes 4 bytes per
         parameter, fp32 masters beside a bf16 model 6.
Error    join(split(x)) is x, bit for bit, for each of the 2^32 patterns. The weight differs from
         x.bfloat16() in ties alone. (To even, two neighbours on either side would share one
         weight and one remainder: 65537 patterns round to each even bf16.)
Source   apex DistributedFusedAdam(store_param_remainders=True)

Weights a model should see at the edges: a finite x beyond the largest bf16 becomes inf, as rounding
has it. A NaN stays a NaN, its upper half unrounded, where the sum above would carry NVIDIA's NaN,
0x7FFFFFFF, into the sign and show -0. One place has to be found for the patterns that rounding up
to inf displaces: signaling NaNs from 0x7F808000 to 0x7F80FFFF, which no arithmetic returns, have
zero as their weight, and a negative remainder that zero never has otherwise; those up to 0x7F807FFF
have inf.

Example  x = 0.3 is 0x3E99999A: weight 0x3E9A (0.30078125), remainder 0x999A - 65536 = -26214
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import Backend, resolve_backend
from .quantize import is_plain


class SplitMaster(NamedTuple):
    """The two halves of an fp32 tensor."""

    weight: Tensor
    """bf16, of the tensor's shape"""
    remainder: Tensor
    """int16, of the tensor's shape"""


def split_master(master: Tensor, *, backend: Backend | None = None) -> SplitMaster:
    """The nearest bf16 weight, and the int16 remainder from which `join_master` restores `master`.

    Not differentiable. Raises TypeError unless `master` is fp32, ValueError unless it is contiguous
    or for a backend that cannot serve its device.
    """
    _check("master", master, torch.float32)
    chosen = resolve_backend(master.device, backend)
    if is_plain(master):
        return SplitMaster(*_split(master, chosen))
    return SplitMaster(*torch.ops.dpmem.split_master(master, chosen))


def join_master(weight: Tensor, remainder: Tensor, *, backend: Backend | None = None) -> Tensor:
    """The fp32 tensor that was split.

    Raises TypeError unless `weight` is bf16 and `remainder` int16, ValueError unless they are
    contiguous and of one shape on one device, or for a backend that cannot serve it.
    """
    _check("weight", weight, torch.bfloat16)
    _check("remainder", remainder, torch.int16)
    if weight.shape != remainder.shape or weight.device != remainder.device:
        raise ValueError(
            "weight and remainder must have one shape and device; received "
            f"{tuple(weight.shape)} on {weight.device} and {tuple(remainder.shape)} on "
            f"{remainder.device}; pass the two halves of one tensor"
        )
    chosen = resolve_backend(weight.device, backend)
    if is_plain(weight):
        return _join(weight, remainder, chosen)
    return torch.ops.dpmem.join_master(weight, remainder, chosen)


def split_ref(master: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `split_master`."""
    bits = master.view(torch.int32)
    top, low = (bits >> 16) & 0xFFFF, bits & 0xFFFF
    sign, magnitude = top & 0x8000, top & 0x7FFF
    away = low >= 0x8000
    rounded = torch.where(away, top + 1, top)
    at_inf = torch.where(away, sign, top)
    weight = torch.where(magnitude == 0x7F80, at_inf, torch.where(magnitude < 0x7F80, rounded, top))
    return weight.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_ref(weight: Tensor, remainder: Tensor) -> Tensor:
    """The specification of `join_master`."""
    top, low = weight.view(torch.int16).int() & 0xFFFF, remainder.int() & 0xFFFF
    magnitude = top & 0x7FFF
    away = low >= 0x8000
    unrounded = torch.where(away, top - 1, top)
    at_zero = torch.where(away, top | 0x7F80, top)
    top = torch.where(magnitude == 0, at_zero, torch.where(magnitude <= 0x7F80, unrounded, top))
    return ((top << 16) | low).view(torch.float32)


def _check(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}; received {tensor.dtype}; convert it first")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous; received strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; pass {name}.contiguous()"
        )


def _split(master: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    master = master.detach()
    if backend == "reference":
        return split_ref(master)
    weight = torch.empty_like(master, dtype=torch.bfloat16)
    remainder = torch.empty_like(master, dtype=torch.int16)
    if backend == "cpu":
        from .master_cpu import split
    else:
        from .master_triton import split
    split(master.view(-1), weight.view(-1), remainder.view(-1))
    return weight, remainder


def _join(weight: Tensor, remainder: Tensor, backend: str) -> Tensor:
    weight = weight.detach()
    if backend == "reference":
        return join_ref(weight, remainder)
    master = torch.empty_like(weight, dtype=torch.float32)
    if backend == "cpu":
        from .master_cpu import join
    else:
        from .master_triton import join
    join(weight.view(-1), remainder.view(-1), master.view(-1))
    return master


@torch.library.custom_op("dpmem::split_master", _split, mutates_args=()).register_fake
def _(master: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(master, dtype=torch.bfloat16),
        torch.empty_like(master, dtype=torch.int16),
    )


@torch.library.custom_op("dpmem::join_master", _join, mutates_args=()).register_fake
def _(weight: Tensor, remainder: Tensor, backend: str) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)
