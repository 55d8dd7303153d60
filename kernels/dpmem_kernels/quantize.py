"""Group-wise 8/4/2-bit compression of activations with unbiased (stochastic) rounding.

Math     for each group of G consecutive elements, L = 2^bits - 1
             zero  = min(x), rounded down to bfloat16
             scale = (max(x) - zero) / L, rounded up to bfloat16, at least 2^-100
             code  = floor((x - zero) / scale + u),  u = noise / 2^16 (2^15 for 8 bits) in [0, 1)
             x'    = code * scale + zero, in one fused multiply-add, rounded to the output's dtype
         The metadata is rounded outward *before* it is used, which keeps E[x'] = x and leaves
         every code within [0, L] with no clamp.
Shapes   x [n] fp32|bf16|fp16 -> codes [groups * G * bits / 8] uint8, meta [groups] int32, with
         groups = ceil(n / G); the last group is filled up by repeating the last element
Traffic  quantize reads n * itemsize and writes n * bits / 8 + groups * 4 bytes; dequantize the
         reverse. Both touch every byte once.
Error    |x' - x| <= (1 + 2^-15) * scale and |E[x'] - x| <= 2^-14 * scale, before the rounding to
         the output's dtype. x' may pass max(x) by 2^-6 * (max(x) - zero): a value next to the
         dtype's largest can come back as inf. A constant bf16 group comes back exactly.
         A group with a NaN or an infinity, or one whose zero or scale no bf16 below 2^126 can
         hold, has meta 0x7fc07fc0, codes 0, and comes back as NaN throughout.
Source   ActNN (Chen et al., ICML 2021) for the group-wise scheme; Philox (philox.py) for noise

Format, for G = 4 * W * 2 elements as four quarters of W words of two neighbours:
    element k * G/4 + 2j + h      is quarter k, word j, half h
    its noise                     is half h of word k of the Philox block with counter
                                  (group * W + j, stream, step, rank) and key seed;
                                  for 8 bits the low (h = 0) or high (h = 1) 15 bits of that half
    its code, 4 bits              is bits 16h + 4k .. of little-endian 32-bit word j of the group
              2 bits              is bits 8h + 2k .. of 16-bit word j
              8 bits              is byte 2h + k % 2 of 32-bit word W * (k // 2) + j
    meta                          is the scale's bf16 pattern * 2^16 + the zero's

Example  x = 0, 1, .., 63 with G = 64 and 4 bits: zero = 0, scale = 63/15 = 4.2 rounded up to
         4.21875, meta = 0x40870000. Element 10 is 2.370 steps up: code 3 with probability 0.370,
         else 2, and comes back as 12.65625 or 8.4375, on average 10.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import Backend, resolve_backend
from .philox import philox_ref

BITS = (8, 4, 2)
GROUP_SIZES = (64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_NUMEL = 2**35  # one 32-bit counter for every eight elements

NAN_META = 0x7FC07FC0
SMALLEST_SCALE = 0x0D800000  # 2^-100, so that 1 / scale is finite
SCALE_LIMIT = 0x7E800000  # 2^126, so that 1 / scale is not a denormal
# Added to a float's bits before the low half is dropped: one bf16 step up, and 7 units so that the
# roundings of (max - zero) / L and of 1 / scale never lift the largest element past L.
ROUND_UP = 0x10007


@dataclass(frozen=True)
class Noise:
    """Which random numbers to round with: the same four values give the same codes.

    `seed` has 64 bits, `stream` (which tensor), `step` and `rank` have 32 each. Tensors that must
    round independently of each other differ in at least one of them.
    Raises ValueError for a value outside its range.
    """

    seed: int
    stream: int
    step: int
    rank: int

    def __post_init__(self) -> None:
        # One is made for every tensor: all at once what is true of all.
        if 0 <= self.seed < 1 << 64 and 0 <= (self.stream | self.step | self.rank) < 1 << 32:
            return
        for name, bits in (("seed", 64), ("stream", 32), ("step", 32), ("rank", 32)):
            value = getattr(self, name)
            if not 0 <= value < 1 << bits:
                raise ValueError(
                    f"Noise.{name} must be in [0, 2^{bits}); received {value}; "
                    f"reduce it modulo 2^{bits}"
                )

    @property
    def words(self) -> tuple[int, int, int, int, int]:
        """Key (low, high), stream, step, rank: five 32-bit words."""
        return self.seed & 0xFFFFFFFF, self.seed >> 32, self.stream, self.step, self.rank


class Quantized(NamedTuple):
    """What `quantize` leaves of a tensor; the module's docstring states the layout."""

    codes: Tensor
    """uint8 [groups * group_size * bits / 8]"""
    meta: Tensor
    """int32 [groups]: bf16 scale in the high half, bf16 zero point in the low half"""


def fma_ref(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z in float32 with one rounding; torch has no such operation.

    The product of two 24-bit significands is exact in float64 but the sum is not, and rounding
    twice could turn a near-tie into a tie. So the lost part is recovered (Knuth's TwoSum) and,
    where there is one, the float64 sum's last bit is made odd, which no float32 tie has.
    Source: Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008.
    """
    product, addend = x.double() * y.double(), z.double()
    total = product + addend
    added = total - product
    lost = (product - (total - added)) + (addend - added)
    to_odd = total.isfinite() & (lost != 0) & (total.view(torch.int64) & 1 == 0)
    outward = torch.where((lost > 0) == (total > 0), 1, -1)
    bits = total.view(torch.int64) + torch.where(to_odd, outward, 0)
    return bits.view(torch.float64).float()


def quantize_ref(x: Tensor, bits: int, group_size: int, noise: Sequence[int]) -> Quantized:
    """The specification of `quantize`, for x with at least one element."""
    levels, words = (1 << bits) - 1, group_size // 8
    flat = x.detach().reshape(-1).float()
    groups = -(-flat.numel() // group_size)
    fill = flat[-1:].expand(groups * group_size - flat.numel())
    values = torch.cat((flat, fill)).view(groups, group_size)

    low, high = values.amin(1), values.amax(1)
    low_bits = torch.where(low == 0, 0.0, low).view(torch.int32)  # -0 and +0 are one zero point
    zero_bits = (low_bits + ((low_bits >> 31) & 0xFFFF)) & -0x10000
    zero = zero_bits.view(torch.float32)
    raw_scale = (high - zero) * torch.tensor(1 / levels, dtype=torch.float32, device=x.device)
    # NaN and -0 come with either sign: without it every platform sees the same bits.
    raised = (raw_scale.view(torch.int32) & 0x7FFFFFFF).long() + ROUND_UP
    representable = raised < SCALE_LIMIT
    scale_bits = (raised & -0x10000).clamp(SMALLEST_SCALE, SCALE_LIMIT).int()
    inverse = 1 / scale_bits.view(torch.float32)

    counter = torch.arange(groups * words, device=x.device)
    key_low, key_high, stream, step, rank = noise
    blocks = philox_ref((counter, stream, step, rank), (key_low, key_high))
    random = torch.stack([block.view(groups, words) for block in blocks], 1)
    # The addend is the float 128 + u (256 + u for 8 bits), written as bits. The sum stays in that
    # binade, where the bits of a float are its value in fixed point: a shift is the floor.
    if bits == 8:
        base, shift, halves = 0x43800000, 15, (random & 0x7FFF, random >> 17)
    else:
        base, shift, halves = 0x43000000, 16, (random & 0xFFFF, random >> 16)
    addend = (torch.stack(halves, -1) + base).int().view(torch.float32)
    offset = (values - zero[:, None]).view(groups, 4, words, 2)
    rounded = fma_ref(offset, inverse.view(groups, 1, 1, 1), addend)
    codes = (rounded.view(torch.int32) >> shift) & levels

    codes = torch.where(representable.view(groups, 1, 1, 1), codes, 0)
    meta = torch.where(representable, scale_bits | ((zero_bits >> 16) & 0xFFFF), NAN_META)
    return Quantized(_pack_ref(codes.to(torch.uint8), bits), meta.int())


def dequantize_ref(
    codes: Tensor, meta: Tensor, numel: int, dtype: torch.dtype, bits: int, group_size: int
) -> Tensor:
    """The specification of `dequantize`."""
    groups = meta.numel()
    scale = (meta & -0x10000).view(torch.float32).view(groups, 1, 1, 1)
    zero = (meta << 16).view(torch.float32).view(groups, 1, 1, 1)
    unpacked = _unpack_ref(codes, bits, groups, group_size // 8)
    return fma_ref(unpacked.float(), scale, zero).view(-1)[:numel].to(dtype)


def _pack_ref(codes: Tensor, bits: int) -> Tensor:
    """Codes [group, quarter, word, half] -> the bytes of the format."""
    if bits == 8:
        packed = codes.unflatten(1, (2, 2)).permute(0, 1, 3, 4, 2)
    elif bits == 4:
        packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).permute(0, 2, 3, 1)
    else:
        packed = codes[:, 0] | (codes[:, 1] << 2) | (codes[:, 2] << 4) | (codes[:, 3] << 6)
    return packed.reshape(-1)


def _unpack_ref(codes: Tensor, bits: int, groups: int, words: int) -> Tensor:
    """The inverse of `_pack_ref`."""
    if bits == 8:
        return codes.view(groups, 2, words, 2, 2).permute(0, 1, 4, 2, 3).flatten(1, 2)
    if bits == 4:
        pairs = codes.view(groups, words, 2, 2).permute(0, 3, 1, 2)
        return torch.stack((pairs & 15, pairs >> 4), 2).flatten(1, 2)
    quads = codes.view(groups, 1, words, 2)
    return torch.cat([(quads >> shift) & 3 for shift in (0, 2, 4, 6)], 1)


def is_plain(x: Tensor) -> bool:
    """Whether nothing (compiler, fake tensor, subclass, dispatch mode) wants to see the operator.

    Then the function behind it is called directly. That pays: for 128 elements on the CPU quantize
    takes 23 us of a core and the way through the dispatcher and torch.library another 59.
    """
    return (
        not torch.compiler.is_compiling()
        and (type(x) is Tensor or type(x) is torch.nn.Parameter)
        # No public function tells. torch.utils._python_dispatch's flag is the process's: a thread
        # that leaves its mode clears it for one that is still inside. The stack is the thread's.
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _allocate(x: Tensor, bits: int, group_size: int) -> Quantized:
    groups = (x.numel() + group_size - 1) // group_size
    return Quantized(
        torch.empty(groups * (group_size * bits // 8), dtype=torch.uint8, device=x.device),
        torch.empty(groups, dtype=torch.int32, device=x.device),
    )


def _fill(
    x: Tensor, bits: int, group_size: int, noise: Sequence[int], backend: str
) -> tuple[Quantized, bool | None]:
    """What was made of x, and whether each group had a scale; None: only its metadata tells."""
    if backend == "reference" and x.numel():
        made = quantize_ref(x, bits, group_size, noise)
        return made, bool((made.meta != NAN_META).all()) if x.device.type == "cpu" else None
    out = _allocate(x, bits, group_size)
    if not x.numel():
        return out, True
    if backend == "cpu":
        return out, _cpu_loops().quantize(x, *out, bits, group_size, noise)
    from .quantize_triton import launch_quantize

    launch_quantize(x, out, bits, group_size, noise)
    return out, None


@functools.cache
def _cpu_loops() -> Any:
    """Found once: an import within a function, too, is looked up at every call."""
    from . import quantize_cpu

    return quantize_cpu


def _quantize(
    x: Tensor, bits: int, group_size: int, noise: Sequence[int], backend: str
) -> tuple[Tensor, Tensor]:
    return _fill(x, bits, group_size, noise, backend)[0]


@torch.library.custom_op("dpmem::quantize", _quantize, mutates_args=()).register_fake
def _(
    x: Tensor, bits: int, group_size: int, noise: Sequence[int], backend: str
) -> tuple[Tensor, Tensor]:
    return _allocate(x, bits, group_size)


def _dequantize(
    codes: Tensor,
    meta: Tensor,
    numel: int,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    backend: str,
) -> Tensor:
    if backend == "reference" and numel:
        return dequantize_ref(codes, meta, numel, dtype, bits, group_size)
    out = codes.new_empty(numel, dtype=dtype)
    if backend == "cpu" and numel:
        _cpu_loops().dequantize(codes, meta, out, bits, group_size)
    elif numel:
        from .quantize_triton import launch_dequantize

        launch_dequantize(Quantized(codes, meta), out, bits, group_size)
    return out


@torch.library.custom_op("dpmem::dequantize", _dequantize, mutates_args=()).register_fake
def _(
    codes: Tensor,
    meta: Tensor,
    numel: int,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    backend: str,
) -> Tensor:
    return codes.new_empty(numel, dtype=dtype)


def _check(bits: int, group_size: int, dtype: torch.dtype, numel: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}; received {bits}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}; received {group_size}")
    if dtype not in DTYPES:
        raise TypeError(
            f"the dtype must be float32, bfloat16 or float16; received {dtype}; "
            "keep other tensors as they are"
        )
    if numel > MAX_NUMEL:
        raise ValueError(
            f"a tensor has at most 2^35 elements, one 32-bit noise counter for every eight; "
            f"received {numel}; split it and give the parts different streams"
        )


def quantize(
    x: Tensor, bits: int, *, noise: Noise, group_size: int = 128, backend: Backend | None = None
) -> Quantized:
    """Compress x to `bits` per element plus 32 per group, with unbiased rounding.

    x is contiguous, of any shape (no elements included), fp32, bf16 or fp16 with at most 2^35
    elements, and is read flat. `bits` is 8, 4 or 2 and `group_size` 64, 128 or 256. Equal
    arguments give equal integers on every backend, so noise that should be independent has to
    differ in `noise`. The module's docstring has the format, the error and an example.

    Raises ValueError for a layout, size, bits, group size or backend out of range, TypeError for
    another dtype, and what `resolve_backend` raises.
    """
    return quantize_and_tell(x, bits, noise=noise, group_size=group_size, backend=backend)[0]


def quantize_and_tell(
    x: Tensor, bits: int, *, noise: Noise, group_size: int = 128, backend: Backend | None = None
) -> tuple[Quantized, bool | None]:
    """`quantize`, and whether each group had a scale, so that none comes back as NaN.

    None: only the metadata tells. The CPU's loop has seen it; to ask a GPU is to wait for it.
    """
    _check(bits, group_size, x.dtype, x.numel())
    if not x.is_contiguous():
        raise ValueError(
            f"x must be contiguous; received strides {x.stride()} for shape {tuple(x.shape)}; "
            "permute it into memory order first, or pass x.contiguous()"
        )
    chosen = resolve_backend(x.device, backend)
    if is_plain(x):
        return _fill(x, bits, group_size, noise.words, chosen)
    return Quantized(*torch.ops.dpmem.quantize(x, bits, group_size, noise.words, chosen)), None


def dequantize(
    quantized: Quantized,
    numel: int,
    dtype: torch.dtype,
    bits: int,
    *,
    group_size: int = 128,
    backend: Backend | None = None,
) -> Tensor:
    """The `numel` elements that `quantize` was given, flat [numel], in `dtype`.

    `bits` and `group_size` are those it was given, too; `dtype` may be another of fp32, bf16, fp16.
    Raises ValueError where `quantized` is not what such a call returns, or for a backend that
    cannot serve, and TypeError for another dtype.
    """
    _check(bits, group_size, dtype, numel)
    codes, meta = quantized
    groups = (numel + group_size - 1) // group_size
    code_bytes = groups * (group_size * bits // 8)
    if (
        (codes.dtype, meta.dtype) != (torch.uint8, torch.int32)
        or (codes.shape, meta.shape) != ((code_bytes,), (groups,))
        or not (codes.is_contiguous() and meta.is_contiguous())
    ):
        raise ValueError(
            f"{numel} elements of {bits} bits in groups of {group_size} are {code_bytes} "
            f"contiguous uint8 codes and {groups} int32 of metadata; received {codes.dtype} "
            f"{tuple(codes.shape)} and {meta.dtype} {tuple(meta.shape)}; pass the numel, bits and "
            "group_size that quantize was called with"
        )
    if codes.device != meta.device:
        raise ValueError(
            f"codes and metadata must be on one device; received {codes.device} and {meta.device}; "
            "move both"
        )
    chosen = resolve_backend(codes.device, backend)
    if is_plain(codes):
        return _dequantize(codes, meta, numel, dtype, bits, group_size, chosen)
    return torch.ops.dpmem.dequantize(codes, meta, numel, dtype, bits, group_size, chosen)
