"""Philox-4x32-10 inside Triton kernels; philox.py has its definition."""

# Arguments of Triton kernels have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .philox import MULTIPLIER_A, MULTIPLIER_B, ROUNDS, WEYL_0, WEYL_1

_ROUNDS = tl.constexpr(ROUNDS)
_MULTIPLIER_A = tl.constexpr(MULTIPLIER_A)
_MULTIPLIER_B = tl.constexpr(MULTIPLIER_B)
_WEYL_0 = tl.constexpr(WEYL_0)
_WEYL_1 = tl.constexpr(WEYL_1)


@triton.jit
def multiply_wide(a, M: tl.constexpr, ASM: tl.constexpr):
    """Both halves, (low, high), of a times M: one instruction, for which assembly spares the
    compiler's moves of a 64-bit number's halves."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 t; mul.wide.u32 t, $2, $3; mov.b64 {$0, $1}, t; }",
            "=r,=r,r,r",
            [a, tl.full(a.shape, M, tl.uint32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        product = a.to(tl.uint64) * M
        return product.to(tl.uint32), (product >> 32).to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, ASM: tl.constexpr):
    """Four words for each counter: c0..c3 uint32 tiles of one shape, k0 and k1 uint32."""
    for _ in tl.static_range(_ROUNDS):
        low_a, high_a = multiply_wide(c0, _MULTIPLIER_A, ASM)
        low_b, high_b = multiply_wide(c2, _MULTIPLIER_B, ASM)
        c0 = high_b ^ c1 ^ k0
        c2 = high_a ^ c3 ^ k1
        c1 = low_b
        c3 = low_a
        k0 = k0 + _WEYL_0
        k1 = k1 + _WEYL_1
    return c0, c1, c2, c3
