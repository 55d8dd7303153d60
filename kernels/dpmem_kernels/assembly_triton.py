"""What Triton has no operation for: single machine instructions of NVIDIA's, each with a twin.

A helper whose last argument is ASM chooses between NVIDIA's assembly and plain Triton that gives
the same bits; the interpreter and AMD take the latter. What is here without ASM is assembly alone,
and its caller has the twin. ASM is assembly_of: 0 for none, else the sm_80 or sm_100 from which on
the instructions exist.

Source   PTX ISA: prmt, cvt, max, min, rcp, add and fma .f32x2
"""

# Arguments of Triton kernels have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

import functools

import torch
import triton
import triton.language as tl

from .backend import INTERPRETING


@functools.cache
def assembly_of(device: torch.device) -> int:
    """What `device` can execute of it: 100 for NVIDIA's from sm_100 on, 80 from sm_80, else 0."""
    if INTERPRETING or torch.version.hip is not None:
        return 0
    major, _ = torch.cuda.get_device_capability(device)
    return 100 if major >= 10 else 80 if major >= 8 else 0


@triton.jit
def instruction(INSTRUCTION: tl.constexpr, a, b):
    """One machine instruction on two 32-bit words."""
    return tl.inline_asm_elementwise(
        INSTRUCTION, "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def as_float32(x, ASM: tl.constexpr):
    """fp32, bf16 or fp16 as float32, exactly.

    Assembly takes neighbours out of the 32-bit word that they were loaded in. Without, a bf16 in an
    upper half costs two instructions; and where a value is rounded, written and read again, the
    compiler rounds every element apart instead of two at a time.
    """
    if ASM and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    elif ASM and x.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.f32.f16 $0, low;
            cvt.f32.f16 $1, high;
            }""",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(tl.float32)


@triton.jit
def rounded_pair(a, b, Element: tl.constexpr, ASM: tl.constexpr):
    """Two float32 rounded to nearest even as bf16 or fp16, in one word, a in its lower half."""
    if ASM:
        # cvt takes floats; their bits ride in the instruction's 32-bit words.
        a = a.to(tl.uint32, bitcast=True)
        b = b.to(tl.uint32, bitcast=True)
        if Element == tl.bfloat16:
            return instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", a, b)
        else:
            return instruction("cvt.rn.f16x2.f32 $0, $2, $1;", a, b)
    else:
        low = a.to(Element).to(tl.uint16, bitcast=True).to(tl.uint32)
        return low | (b.to(Element).to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def fma_of_difference(a, b, c, x, u, v, ASM: tl.constexpr):
    """((a - c) x + u, (b - c) x + v) in float32, each product and sum rounded once together.

    From sm_100 on two float32 in neighbouring registers are one operand.
    """
    if ASM >= 100:
        return tl.inline_asm_elementwise(
            """{
            .reg .b64 p, q, r;
            mov.b64 p, {$2, $3};
            mov.b64 q, {$4, $4};
            add.rn.f32x2 p, p, q;
            mov.b64 q, {$5, $5};
            mov.b64 r, {$6, $7};
            fma.rn.f32x2 p, p, q, r;
            mov.b64 {$0, $1}, p;
            }""",
            "=r,=r,r,r,r,r,r,r",
            [a, b, -c, x, u, v],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.fma(a - c, x, u), tl.fma(b - c, x, v)


@triton.jit
def upper_halves(a, b, ASM: tl.constexpr):
    """The upper halves of two words in one, that of a in its lower half."""
    if ASM:
        return instruction("prmt.b32 $0, $1, $2, 0x7632;", a, b)
    else:
        return (a >> 16) | (b & 0xFFFF0000)


@triton.jit
def middle_bytes(a, b, ASM: tl.constexpr):
    """Bits 15 to 22 of two words, of a in byte 0, of b in byte 2; the other bytes are undefined.

    Bit 31 of a is 0.
    """
    if ASM:
        return instruction("prmt.b32 $0, $1, $2, 0x6521;", a, b) >> 7
    else:
        return (a >> 15) | ((b << 1) & 0xFFFF0000)


@triton.jit
def interleave_bytes(a, b, ASM: tl.constexpr):
    """Bytes 0 of the halves of a and b: (a low, b low, a high, b high)."""
    if ASM:
        return instruction("prmt.b32 $0, $1, $2, 0x6240;", a, b)
    else:
        return (a & 0x00FF00FF) | ((b << 8) & 0xFF00FF00)


@triton.jit
def reciprocal(s, ASM: tl.constexpr):
    """1 / s, correctly rounded. One Newton step is enough for the 8-bit significand of a bf16
    scale: it was checked for all 128 of them and starts up to 3 units off."""
    if ASM:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [s], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.fma(y, tl.fma(-s, y, 1.0), y)
    else:
        return tl.div_rn(1.0, s)


@triton.jit
def max_nan_bf16x2(a, b):
    return instruction("max.NaN.bf16x2 $0, $1, $2;", a, b)


@triton.jit
def min_nan_bf16x2(a, b):
    return instruction("min.NaN.bf16x2 $0, $1, $2;", a, b)


@triton.jit
def max_nan_f16x2(a, b):
    return instruction("max.NaN.f16x2 $0, $1, $2;", a, b)


@triton.jit
def min_nan_f16x2(a, b):
    return instruction("min.NaN.f16x2 $0, $1, $2;", a, b)
