"""Group-wise compression of activations to 8-bit floats, rounded to nearest.

Math     for each group of G consecutive elements
             scale = 2^k, the smallest power of two with max(|x|) / scale <= the format's largest
                     number (448 for e4m3, 57344 for e5m2), k >= -126
             code  = x / scale, rounded to nearest even in the format
             x'    = code * scale, rounded to the output's dtype
         A power of two makes both products exact, so that the one error is the format's rounding;
         a tighter scale would gain a floating format nothing. Nothing ever saturates.
Shapes   x [any, n elements] fp32|bf16|fp16 -> codes [same] float8_e4m3fn|float8_e5m2, scales
         [ceil(n / G)] float8_e8m0fnu, which holds powers of two (the byte is k + 127)
Traffic  n * (itemsize + 1) bytes and one per group, each way
Error    |x' - x| <= 2^-4 |x| for e4m3 (2^-3 for e5m2) or 2^-10 scale (2^-17) if that is more,
         before the rounding to the output's dtype. A number within 1/16 (1/8) of the dtype's
         largest can come back as inf. A group with a NaN or an infinity has the scale NaN and codes
         0 and comes back as NaN throughout.
Source   OCP Microscaling Formats (MX) v1.0 for E8M0 scales, though MX lets the largest saturate;
         OCP 8-bit Floating Point Specification (OFP8) for e4m3 and e5m2

Rounding to nearest is biased: this is for tensors whose use tolerates an error of fixed direction,
that hold values many binades apart within a group, or that have to be equal on every run. Unbiased
8-bit compression is quantize(bits=8), with a tenth of the mean squared error on normal data.
The conversions are arithmetic on the floats' bits, because conversion instructions are neither
everywhere (none before NVIDIA's compute capability 8.9, another e4m3 on gfx942) nor alike in what
they do on overflow: so the bytes are the same on every backend and every GPU.

Example  x = (1000, 3.3, -0.002, ..) to e4m3, max(|x|) = 1000: 1000/2 = 500 > 448, so scale = 4 and
         codes 250, 0.825, -0.0005 round to 256, 0.8125, 0: back come 1024, 3.25, -0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import Backend, resolve_backend
from .quantize import DTYPES, GROUP_SIZES, is_plain

INFINITY_BITS = 0x7F800000
# Carries into the exponent where a significand passes 1.75, that of both formats' largest number.
PAST_LARGEST = 0x1FFFFF
NAN_SCALE = 255


class Fp8Format(NamedTuple):
    """A format's layout; `top` is the exponent of its largest number, which is 1.75 * 2^top."""

    mantissa_bits: int
    bias: int
    top: int


FORMATS = {
    torch.float8_e4m3fn: Fp8Format(mantissa_bits=3, bias=7, top=8),
    torch.float8_e5m2: Fp8Format(mantissa_bits=2, bias=15, top=15),
}


class QuantizedFp8(NamedTuple):
    """What `quantize_fp8` leaves of a tensor."""

    codes: Tensor
    """float8_e4m3fn or float8_e5m2, the tensor's shape"""
    scales: Tensor
    """float8_e8m0fnu [groups]"""


def _groups(x: Tensor, group_size: int) -> Tensor:
    """x flat, filled up with zeros, in float32 [groups, group_size]."""
    flat = x.detach().reshape(-1).float()
    return torch.cat((flat, flat.new_zeros(-flat.numel() % group_size))).view(-1, group_size)


def quantize_fp8_ref(x: Tensor, dtype: torch.dtype, group_size: int) -> tuple[Tensor, Tensor]:
    """The specification of `quantize_fp8`, in bytes, for x with at least one element."""
    values = _groups(x, group_size)
    largest = (values.view(torch.int32) & 0x7FFFFFFF).amax(1).clamp(max=INFINITY_BITS)
    finite = largest < INFINITY_BITS
    exponent = (((largest + PAST_LARGEST) >> 23) - FORMATS[dtype].top).clamp(min=1)
    inverse = ((254 - exponent) << 23).view(torch.float32)
    codes = (values * inverse[:, None]).to(dtype).view(torch.uint8)
    codes = torch.where(finite[:, None], codes, 0).view(-1)[: x.numel()].clone()
    return codes.view(x.shape), torch.where(finite, exponent, NAN_SCALE).to(torch.uint8)


def dequantize_fp8_ref(
    codes: Tensor, scales: Tensor, code_dtype: torch.dtype, dtype: torch.dtype, group_size: int
) -> Tensor:
    """The specification of `dequantize_fp8`, from bytes, for one element or more."""
    scale = scales.view(torch.float8_e8m0fnu).float()
    restored = _groups(codes.view(code_dtype), group_size) * scale[:, None]
    return restored.view(-1)[: codes.numel()].view(codes.shape).to(dtype)


# The operators work on bytes: torch's own tools have no arithmetic for its 8-bit floats.
def _allocate(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    groups = (x.numel() + group_size - 1) // group_size
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(groups, dtype=torch.uint8)


def _quantize_fp8(
    x: Tensor, dtype: torch.dtype, group_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "reference" and x.numel():
        return quantize_fp8_ref(x, dtype, group_size)
    codes, scales = _allocate(x, group_size)
    if backend == "cpu" and x.numel():
        from .fp8_cpu import quantize_loop

        quantize_loop(x, codes, scales, FORMATS[dtype], group_size)
    elif x.numel():
        from .fp8_triton import launch_quantize_fp8

        launch_quantize_fp8(x, codes, scales, FORMATS[dtype], group_size)
    return codes, scales


@torch.library.custom_op("dpmem::quantize_fp8", _quantize_fp8, mutates_args=()).register_fake
def _(x: Tensor, dtype: torch.dtype, group_size: int, backend: str) -> tuple[Tensor, Tensor]:
    return _allocate(x, group_size)


def _dequantize_fp8(
    codes: Tensor,
    scales: Tensor,
    code_dtype: torch.dtype,
    dtype: torch.dtype,
    group_size: int,
    backend: str,
) -> Tensor:
    if backend == "reference" and codes.numel():
        return dequantize_fp8_ref(codes, scales, code_dtype, dtype, group_size)
    out = codes.new_empty(codes.shape, dtype=dtype)
    if backend == "cpu" and codes.numel():
        from .fp8_cpu import dequantize_loop

        dequantize_loop(codes, scales, out, FORMATS[code_dtype], group_size)
    elif codes.numel():
        from .fp8_triton import launch_dequantize_fp8

        launch_dequantize_fp8(codes, scales, out, FORMATS[code_dtype], group_size)
    return out


@torch.library.custom_op("dpmem::dequantize_fp8", _dequantize_fp8, mutates_args=()).register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    code_dtype: torch.dtype,
    dtype: torch.dtype,
    group_size: int,
    backend: str,
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _check(dtype: torch.dtype, code_dtype: torch.dtype, group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}; received {group_size}")
    if dtype not in DTYPES:
        raise TypeError(f"the dtype must be float32, bfloat16 or float16; received {dtype}")
    if code_dtype not in FORMATS:
        raise TypeError(f"codes are float8_e4m3fn or float8_e5m2; received {code_dtype}")


def quantize_fp8(
    x: Tensor, dtype: torch.dtype, *, group_size: int = 128, backend: Backend | None = None
) -> QuantizedFp8:
    """Compress x to 8-bit floats of `dtype` (float8_e4m3fn or float8_e5m2), rounded to nearest.

    x is contiguous, of any shape (no elements included), fp32, bf16 or fp16, and is grouped in
    flat order; `group_size` is 64, 128 or 256. The module's docstring has the format, the error
    and an example. Raises ValueError for a layout, group size or backend out of range, TypeError
    for another dtype, and what `resolve_backend` raises.
    """
    _check(x.dtype, dtype, group_size)
    if not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous; received strides {x.stride()} for shape {tuple(x.shape)}; "
            "permute it into memory order first, or pass x.contiguous()"
        )
    chosen = resolve_backend(x.device, backend)
    operator = _quantize_fp8 if is_plain(x) else torch.ops.dpmem.quantize_fp8
    codes, scales = operator(x, dtype, group_size, chosen)
    return QuantizedFp8(codes.view(dtype), scales.view(torch.float8_e8m0fnu))


def dequantize_fp8(
    quantized: QuantizedFp8,
    dtype: torch.dtype,
    *,
    group_size: int = 128,
    backend: Backend | None = None,
) -> Tensor:
    """The tensor that `quantize_fp8` was given, in its shape and `dtype` (fp32, bf16 or fp16).

    Raises ValueError where `quantized` is not what `quantize_fp8` returns for this group size, or
    for a backend that cannot serve, and TypeError for another dtype.
    """
    codes, scales = quantized
    _check(dtype, codes.dtype, group_size)
    groups = (codes.numel() + group_size - 1) // group_size
    if (
        (scales.dtype, scales.shape) != (torch.float8_e8m0fnu, (groups,))
        or not codes.is_contiguous()
        or not scales.is_contiguous()
    ):
        raise ValueError(
            f"{codes.numel()} contiguous codes in groups of {group_size} have {groups} "
            f"float8_e8m0fnu scales; received {scales.dtype} {tuple(scales.shape)} and codes of "
            f"strides {codes.stride()}; pass what quantize_fp8 returned, and its group_size"
        )
    chosen = resolve_backend(codes.device, backend)
    operator = _dequantize_fp8 if is_plain(codes) else torch.ops.dpmem.dequantize_fp8
    code_bytes, scale_bytes = codes.view(torch.uint8), scales.view(torch.uint8)
    restored: Tensor = operator(code_bytes, scale_bytes, codes.dtype, dtype, group_size, chosen)
    return restored
