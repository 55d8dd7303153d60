"""Quantize and dequantize beside a plain copy, and beside the same scheme in torch operations."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.rows import Row
from dpmem_kernels import Noise, Quantized, dequantize, pack_mask, quantize, unpack_mask

_ELEMENTS = 16 * 2**20
_GROUP = 128
_NOISE = Noise(seed=1, stream=2, step=3, rank=0)


def rows(device: torch.device) -> Iterator[Row]:
    """The activation ops' rows."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(_ELEMENTS, generator=generator, device=device)
    copied = torch.empty_like(x)
    for bits in (8, 4, 2):
        yield _quantize_row(x, copied, bits)
    yield _torch_row(x)
    for bits in (8, 4, 2):
        yield _dequantize_row(x, copied, bits)
    half = x.bfloat16()
    yield Row(
        name="quantize 4 bit from bfloat16",
        beside="quantize 4 bit from float32",
        ours=lambda: quantize(half, 4, noise=_NOISE),
        theirs=lambda: quantize(x, 4, noise=_NOISE),
        check=lambda: _check_quantized(half, 4),
        moved_bytes=_moved_bytes(2, 4),
        at_most=1.0,
    )
    if device.type == "cpu" and torch.get_num_threads() > 1:
        yield _threads_row(x, torch.get_num_threads())
    yield from _mask_rows(x > 0)


def _moved_bytes(item_bytes: int, bits: int) -> int:
    return _ELEMENTS * item_bytes + _ELEMENTS * bits // 8 + _ELEMENTS // _GROUP * 4


def _assert_same(ours: Quantized, theirs: Quantized) -> None:
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.meta, theirs.meta)


def _check_quantized(x: Tensor, bits: int) -> None:
    """Bit-equal to the reference on a part, and within one step of the scale everywhere."""
    part = x[: 2**14]
    ours = quantize(part, bits, noise=_NOISE)
    reference = quantize(part, bits, noise=_NOISE, backend="reference")
    _assert_same(ours, reference)
    back = dequantize(quantize(x, bits, noise=_NOISE), x.numel(), torch.float32, bits)
    groups = x.float().view(-1, _GROUP)
    # Outward rounding to bf16 widens a group's range by up to 2^-7 of its largest magnitude.
    spread = groups.amax(1) - groups.amin(1) + 2 * 2**-7 * groups.abs().amax(1)
    error = (back.view(-1, _GROUP) - groups).abs().amax(1)
    assert bool((error <= 1.02 * spread / (2**bits - 1)).all())


def _quantize_row(x: Tensor, copied: Tensor, bits: int) -> Row:
    return Row(
        name=f"quantize {bits} bit with noise from float32, 16 M",
        beside="copy_ into a warm buffer",
        ours=lambda: quantize(x, bits, noise=_NOISE),
        theirs=lambda: copied.copy_(x),
        check=lambda: _check_quantized(x, bits),
        moved_bytes=_moved_bytes(4, bits),
        at_most=3.5 if bits == 4 else None,
    )


def _dequantize_row(x: Tensor, copied: Tensor, bits: int) -> Row:
    quantized = quantize(x, bits, noise=_NOISE)

    def check() -> None:
        part = Quantized(
            quantized.codes[: 2**14 * bits // 8].clone(), quantized.meta[: 2**14 // _GROUP].clone()
        )
        reference = dequantize(part, 2**14, torch.float32, bits, backend="reference")
        ours = dequantize(quantized, _ELEMENTS, torch.float32, bits)
        assert torch.equal(ours[: 2**14], reference)

    return Row(
        name=f"dequantize {bits} bit to float32, 16 M",
        beside="copy_ into a warm buffer",
        ours=lambda: dequantize(quantized, _ELEMENTS, torch.float32, bits),
        theirs=lambda: copied.copy_(x),
        check=check,
        moved_bytes=_moved_bytes(4, bits),
        at_most=2.0 if bits == 4 else None,
    )


def _torch_row(x: Tensor) -> Row:
    def per_group() -> Tensor:
        """Per-group minimum and scale with stochastic rounding, as ActNN does, in torch ops."""
        groups = x.view(-1, _GROUP)
        low = groups.amin(1, keepdim=True)
        scale = 15 / (groups.amax(1, keepdim=True) - low)
        codes = ((groups - low) * scale + torch.rand_like(groups)).clamp_(0, 15).to(torch.uint8)
        return codes[:, ::2] | (codes[:, 1::2] << 4)

    return Row(
        name="quantize 4 bit with noise from float32, 16 M",
        beside="the same scheme in torch operations",
        ours=lambda: quantize(x, 4, noise=_NOISE),
        theirs=per_group,
        check=lambda: _check_quantized(x, 4),
        moved_bytes=_moved_bytes(4, 4),
    )


def _threads_row(x: Tensor, threads: int) -> Row:
    def with_threads(count: int) -> None:
        torch.set_num_threads(count)
        try:
            quantize(x, 4, noise=_NOISE)
        finally:
            torch.set_num_threads(threads)

    def check() -> None:
        torch.set_num_threads(1)
        one = quantize(x, 4, noise=_NOISE)
        torch.set_num_threads(threads)
        both = quantize(x, 4, noise=_NOISE)
        _assert_same(one, both)

    return Row(
        name=f"quantize 4 bit, {threads} threads",
        beside="quantize 4 bit, 1 thread",
        ours=lambda: with_threads(threads),
        theirs=lambda: with_threads(1),
        check=check,
        moved_bytes=_moved_bytes(4, 4),
        at_most=1 / 1.6,
    )


def _mask_rows(mask: Tensor) -> Iterator[Row]:
    copied = torch.empty_like(mask)
    packed = pack_mask(mask)

    def check() -> None:
        assert torch.equal(unpack_mask(packed, mask.numel()), mask)

    for name, ours in (
        ("pack a bool mask, 16 M", lambda: pack_mask(mask)),
        ("unpack a bool mask, 16 M", lambda: unpack_mask(packed, mask.numel())),
    ):
        yield Row(
            name=name,
            beside="copy_ into a warm buffer",
            ours=ours,
            theirs=lambda: copied.copy_(mask),
            check=check,
            moved_bytes=_ELEMENTS + _ELEMENTS // 8,
        )
