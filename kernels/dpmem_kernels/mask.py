"""Masks, eight to a byte: of bools, and of where a ReLU lets the gradient through.

Math     bit i of a block of 1024 is bit i // 128 of the block's byte i % 128, so that packing
         is shifts of whole words and no bit ever moves between lanes
             pack_mask      bit = mask
             pack_positive  bit = not (x <= 0): set for x > 0 and for NaN, whatever its sign, which
                            is where torch's ReLU passes the gradient on
Shapes   mask [any] bool or x [any] fp32|bf16|fp16, n elements -> bits [ceil(n / 1024) * 128] uint8,
         the bits past n zero; unpack_mask -> bool [n]
Traffic  the element's size + 0.125 bytes an element; back 1.125
Error    none: lossless

Example  n = 130, True at 0, 1 and 129: byte 0 is 0b01, byte 1 is 0b11, the other 126 are zero.
         Of x = (2.0, -0.0, NaN, -inf) the first byte is 1, the second 0, the third 1, the fourth 0.
"""

import torch
from torch import Tensor

from .backend import Backend, resolve_backend
from .quantize import DTYPES, is_plain

BLOCK_BOOLS = 1024
BLOCK_BYTES = BLOCK_BOOLS // 8


def pack_mask_ref(mask: Tensor) -> Tensor:
    """The specification of `pack_mask`."""
    flat = mask.reshape(-1).to(torch.uint8)
    blocks = -(-flat.numel() // BLOCK_BOOLS)
    full = torch.cat((flat, flat.new_zeros(blocks * BLOCK_BOOLS - flat.numel())))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    weighted = full.view(blocks, 8, BLOCK_BYTES) * powers[:, None]
    return weighted.sum(1, dtype=torch.uint8).view(-1)


def pack_positive_ref(x: Tensor) -> Tensor:
    """The specification of `pack_positive`."""
    return pack_mask_ref(~(x <= 0))


def unpack_mask_ref(bits: Tensor, numel: int) -> Tensor:
    """The specification of `unpack_mask`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    full = (bits.view(-1, 1, BLOCK_BYTES) >> shifts[:, None]) & 1
    return full.reshape(-1)[:numel].to(torch.bool)


def _packed_bytes(numel: int) -> int:
    return (numel + BLOCK_BOOLS - 1) // BLOCK_BOOLS * BLOCK_BYTES


def _empty_bits(x: Tensor) -> Tensor:
    return x.new_empty(_packed_bytes(x.numel()), dtype=torch.uint8)


def _pack_mask(mask: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return pack_mask_ref(mask)
    bits = _empty_bits(mask)
    if backend == "cpu" and mask.numel():
        from .mask_cpu import pack_mask_loop

        pack_mask_loop(mask, bits)
    elif mask.numel():
        from .mask_triton import launch_pack_mask

        launch_pack_mask(mask, bits)
    return bits


@torch.library.custom_op("dpmem::pack_mask", _pack_mask, mutates_args=()).register_fake
def _(mask: Tensor, backend: str) -> Tensor:
    return _empty_bits(mask)


def _pack_positive(x: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return pack_positive_ref(x)
    bits = _empty_bits(x)
    if backend == "cpu" and x.numel():
        from .mask_cpu import pack_positive_loop

        pack_positive_loop(x, bits)
    elif x.numel():
        from .mask_triton import launch_pack_positive

        launch_pack_positive(x, bits)
    return bits


@torch.library.custom_op("dpmem::pack_positive", _pack_positive, mutates_args=()).register_fake
def _(x: Tensor, backend: str) -> Tensor:
    return _empty_bits(x)


def _unpack_mask(bits: Tensor, numel: int, backend: str) -> Tensor:
    if backend == "reference":
        return unpack_mask_ref(bits, numel)
    mask = bits.new_empty(numel, dtype=torch.bool)
    if backend == "cpu" and numel:
        from .mask_cpu import unpack_mask_loop

        unpack_mask_loop(bits, mask)
    elif numel:
        from .mask_triton import launch_unpack_mask

        launch_unpack_mask(bits, mask)
    return mask


@torch.library.custom_op("dpmem::unpack_mask", _unpack_mask, mutates_args=()).register_fake
def _(bits: Tensor, numel: int, backend: str) -> Tensor:
    return bits.new_empty(numel, dtype=torch.bool)


def _check_contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous; received strides {x.stride()} for shape "
            f"{tuple(x.shape)}; permute it into memory order first, or pass {name}.contiguous()"
        )


def pack_mask(mask: Tensor, *, backend: Backend | None = None) -> Tensor:
    """A contiguous bool tensor of any shape -> uint8 [ceil(n / 1024) * 128], one bit an element.

    Raises TypeError for another dtype, ValueError for a mask that is not contiguous or a backend
    that cannot serve its device, and what else `resolve_backend` raises.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; received {mask.dtype}; compare it to something first")
    _check_contiguous("mask", mask)
    chosen = resolve_backend(mask.device, backend)
    return _pack_mask(mask, chosen) if is_plain(mask) else torch.ops.dpmem.pack_mask(mask, chosen)


def pack_positive(x: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Where a ReLU with input or output x passes gradients on: what `pack_mask` makes of that.

    x is fp32, bf16 or fp16, contiguous, of any shape; a NaN counts as positive, as torch's ReLU has
    it. Raises as `pack_mask` does.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16; received {x.dtype}")
    _check_contiguous("x", x)
    chosen = resolve_backend(x.device, backend)
    return _pack_positive(x, chosen) if is_plain(x) else torch.ops.dpmem.pack_positive(x, chosen)


def unpack_mask(bits: Tensor, numel: int, *, backend: Backend | None = None) -> Tensor:
    """The mask of `numel` elements that `pack_mask` or `pack_positive` packed, as bool [numel].

    Raises ValueError where `bits` is not what it returns for that many, and as `pack_mask` does.
    """
    expected = _packed_bytes(numel)
    if bits.dtype != torch.uint8 or bits.shape != (expected,) or not bits.is_contiguous():
        raise ValueError(
            f"{numel} bools are packed in {expected} contiguous uint8; received {bits.dtype} "
            f"{tuple(bits.shape)}; pass the numel of the mask that was packed"
        )
    chosen = resolve_backend(bits.device, backend)
    if is_plain(bits):
        return _unpack_mask(bits, numel, chosen)
    return torch.ops.dpmem.unpack_mask(bits, numel, chosen)
