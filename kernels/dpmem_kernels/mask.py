"""Boolean masks, eight to a byte.

Math     bool i of a block of 1024 is bit i // 128 of the block's byte i % 128, so that packing
         is shifts of whole words and no bit ever moves between lanes
Shapes   mask [any] bool, n elements -> bits [ceil(n / 1024) * 128] uint8, the bits past n zero
Traffic  1.125 bytes an element each way
Error    none: lossless

Example  n = 130, True at 0, 1 and 129: byte 0 is 0b01, byte 1 is 0b11, the other 126 are zero.
"""

import torch
from torch import Tensor

from .backend import Backend, resolve_backend
from .quantize import is_plain

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


def unpack_mask_ref(bits: Tensor, numel: int) -> Tensor:
    """The specification of `unpack_mask`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    full = (bits.view(-1, 1, BLOCK_BYTES) >> shifts[:, None]) & 1
    return full.reshape(-1)[:numel].to(torch.bool)


def _packed_bytes(numel: int) -> int:
    return (numel + BLOCK_BOOLS - 1) // BLOCK_BOOLS * BLOCK_BYTES


def _pack_mask(mask: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return pack_mask_ref(mask)
    bits = mask.new_empty(_packed_bytes(mask.numel()), dtype=torch.uint8)
    if backend == "cpu" and mask.numel():
        from . import quantize_cpu

        quantize_cpu.pack_mask(mask, bits)
    elif mask.numel():
        from .mask_triton import launch_pack_mask

        launch_pack_mask(mask, bits)
    return bits


@torch.library.custom_op("dpmem::pack_mask", _pack_mask, mutates_args=()).register_fake
def _(mask: Tensor, backend: str) -> Tensor:
    return mask.new_empty(_packed_bytes(mask.numel()), dtype=torch.uint8)


def _unpack_mask(bits: Tensor, numel: int, backend: str) -> Tensor:
    if backend == "reference":
        return unpack_mask_ref(bits, numel)
    mask = bits.new_empty(numel, dtype=torch.bool)
    if backend == "cpu" and numel:
        from . import quantize_cpu

        quantize_cpu.unpack_mask(bits, mask)
    elif numel:
        from .mask_triton import launch_unpack_mask

        launch_unpack_mask(bits, mask)
    return mask


@torch.library.custom_op("dpmem::unpack_mask", _unpack_mask, mutates_args=()).register_fake
def _(bits: Tensor, numel: int, backend: str) -> Tensor:
    return bits.new_empty(numel, dtype=torch.bool)


def pack_mask(mask: Tensor, *, backend: Backend | None = None) -> Tensor:
    """A contiguous bool tensor of any shape -> uint8 [ceil(n / 1024) * 128], one bit an element.

    Raises TypeError for another dtype, ValueError for a mask that is not contiguous or a backend
    that cannot serve its device, and what else `resolve_backend` raises.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool; received {mask.dtype}; compare it to something first")
    if not mask.is_contiguous():
        raise ValueError(
            f"mask must be contiguous; received strides {mask.stride()} for shape "
            f"{tuple(mask.shape)}; permute it into memory order first, or pass mask.contiguous()"
        )
    chosen = resolve_backend(mask.device, backend)
    return _pack_mask(mask, chosen) if is_plain(mask) else torch.ops.dpmem.pack_mask(mask, chosen)


def unpack_mask(bits: Tensor, numel: int, *, backend: Backend | None = None) -> Tensor:
    """The `numel` elements that `pack_mask` was given, as bool [numel].

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
