"""fp8 compression on GPUs: the Triton kernels for the format in fp8.py."""

# Arguments of Triton kernels have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import INFINITY_BITS, NAN_SCALE, PAST_LARGEST, Fp8Format

_INFINITY_BITS = tl.constexpr(INFINITY_BITS)
_PAST_LARGEST = tl.constexpr(PAST_LARGEST)
_NAN_SCALE = tl.constexpr(NAN_SCALE)

# Elements in a program: a 128-bit access of codes a thread with 4 warps.
BLOCK = 2048


@triton.jit
def _encode(y, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """float32, at most the format's largest in magnitude -> code, in a uint32.

    Adding 2^(E + 23 - MANTISSA) to |y| in [2^E, 2^(E + 1)) rounds it to a multiple of
    2^(E - MANTISSA), to nearest even, and leaves the multiple in the sum's low bits. Below the
    smallest normal number E is that number's, which is what makes the format's denormals.
    """
    bits = y.to(tl.uint32, bitcast=True)
    exponent = tl.maximum(bits & 0x7F800000, (128 - BIAS) << 23)
    magic = exponent + ((23 - MANTISSA) << 23)
    total = tl.abs(y) + magic.to(tl.float32, bitcast=True)
    multiple = total.to(tl.uint32, bitcast=True) - magic
    code = multiple + (exponent >> (23 - MANTISSA)) - ((128 - BIAS) << MANTISSA)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def _decode(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """A finite code in a uint32 -> its value in float32."""
    magnitude = code & 0x7F
    bits = (magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23)
    value = bits.to(tl.float32, bitcast=True)
    # A denormal was read as if it had a leading one.
    SMALLEST: tl.constexpr = 2.0 ** (1 - BIAS)
    value = tl.where(magnitude < (1 << MANTISSA), 2.0 * value - SMALLEST, value)
    return (value.to(tl.uint32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _encode_groups(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr):
    """x [ROWS, G] -> codes and the scales' bytes [ROWS, 1], in uint8."""
    values = x.to(tl.float32)
    magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.minimum(tl.max(magnitude, 1, keep_dims=True), _INFINITY_BITS)
    exponent = tl.maximum(((largest + _PAST_LARGEST) >> 23) - TOP, 1)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    finite = largest < _INFINITY_BITS
    codes = tl.where(finite, _encode(values * inverse, MANTISSA, BIAS), 0)
    return codes.to(tl.uint8), tl.where(finite, exponent, _NAN_SCALE).to(tl.uint8)


@triton.jit(do_not_specialize=["n"])
def quantize_fp8_kernel(
    x_ptr, codes_ptr, scales_ptr, n,
    G: tl.constexpr, ROWS: tl.constexpr,
    MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """ROWS groups a program."""
    g0 = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    element = row * G + tl.arange(0, G)[None, :]
    x_ptr += g0 * G
    codes_ptr += g0 * G
    scales_ptr += g0
    if (g0 + ROWS) * G <= n:
        codes, scales = _encode_groups(tl.load(x_ptr + element), MANTISSA, BIAS, TOP)
        tl.store(codes_ptr + element, codes)
        tl.store(scales_ptr + row, scales)
    else:
        left = (n - g0 * G).to(tl.int32)
        x = tl.load(x_ptr + element, mask=element < left, other=0.0)
        codes, scales = _encode_groups(x, MANTISSA, BIAS, TOP)
        tl.store(codes_ptr + element, codes, mask=element < left)
        tl.store(scales_ptr + row, scales, mask=row * G < left)


@triton.jit
def _scale(byte):
    """The power of two that a scale's byte, never 0, stands for; NaN for 255."""
    bits = tl.where(byte == _NAN_SCALE, 0x7FC00000, byte.to(tl.uint32) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n"])
def dequantize_fp8_kernel(
    codes_ptr, scales_ptr, out_ptr, n,
    G: tl.constexpr, ROWS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """ROWS groups a program."""
    g0 = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    element = row * G + tl.arange(0, G)[None, :]
    codes_ptr += g0 * G
    scales_ptr += g0
    out_ptr += g0 * G
    if (g0 + ROWS) * G <= n:
        scale = _scale(tl.load(scales_ptr + row))
        value = _decode(tl.load(codes_ptr + element).to(tl.uint32), MANTISSA, BIAS)
        tl.store(out_ptr + element, (value * scale).to(out_ptr.dtype.element_ty))
    else:
        left = (n - g0 * G).to(tl.int32)
        scale = _scale(tl.load(scales_ptr + row, mask=row * G < left, other=1))
        code = tl.load(codes_ptr + element, mask=element < left, other=0).to(tl.uint32)
        value = _decode(code, MANTISSA, BIAS)
        tl.store(
            out_ptr + element, (value * scale).to(out_ptr.dtype.element_ty), mask=element < left
        )


def launch_quantize_fp8(
    x: Tensor, codes: Tensor, scales: Tensor, layout: Fp8Format, group_size: int,
    block: int = BLOCK,
) -> None:  # fmt: skip
    """Fill `codes` and `scales` from x, one element or more; `block` elements a program."""
    rows = block // group_size
    with torch.cuda.device_of(x):
        quantize_fp8_kernel[(triton.cdiv(scales.numel(), rows),)](
            x,
            codes,
            scales,
            x.numel(),
            G=group_size,
            ROWS=rows,
            MANTISSA=layout.mantissa_bits,
            BIAS=layout.bias,
            TOP=layout.top,
            num_warps=4,
            enable_fp_fusion=False,
        )


def launch_dequantize_fp8(
    codes: Tensor, scales: Tensor, out: Tensor, layout: Fp8Format, group_size: int,
    block: int = BLOCK,
) -> None:  # fmt: skip
    """Fill `out`, which has an element or more; `block` elements a program."""
    rows = block // group_size
    with torch.cuda.device_of(out):
        dequantize_fp8_kernel[(triton.cdiv(scales.numel(), rows),)](
            codes,
            scales,
            out,
            out.numel(),
            G=group_size,
            ROWS=rows,
            MANTISSA=layout.mantissa_bits,
            BIAS=layout.bias,
            num_warps=4,
            enable_fp_fusion=False,
        )
