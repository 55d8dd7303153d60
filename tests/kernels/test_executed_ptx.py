"""What Triton compiles for NVIDIA GPUs, executed on the CPU, does what the references say.

Integers and elements are compared bit for bit, a NaN with any NaN. Nothing here runs on a GPU.
"""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpmem_kernels.bucket import bucket_pack, bucket_unpack
from dpmem_kernels.grad_scale import grad_scale_, grad_stats, grad_unscale_
from dpmem_kernels.mask import BLOCK_BOOLS
from dpmem_kernels.mask import pack_mask as pack_mask_op
from dpmem_kernels.mask import unpack_mask as unpack_mask_op
from dpmem_kernels.quantize import Noise, Quantized
from dpmem_kernels.quantize import dequantize as dequantize_op
from dpmem_kernels.quantize import quantize as quantize_op
from dpmem_kernels.tensor_table import CHUNK, Walk
from verify.execute import (
    CompiledKernel,
    Variant,
    Walked,
    add_partials,
    bits_of,
    compile_kernels,
    dequantize,
    pack_mask,
    quantize,
    unpack_mask,
    walk,
)
from verify.ptx import GlobalMemory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOISE = Noise(seed=0x9234567812345678, stream=3, step=0xF0000001, rank=1)
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
SECTOR_BYTES = 32
DEVICE = torch.device("cpu")

# Every dtype and every bit width once, every group size, both ways of passing n.
FEW_FORMATS = (
    ("fp32", Variant("quantize_fp32_8bit", group_size=256), Variant("dequantize_fp32_8bit")),
    (
        "bf16",
        Variant("quantize_bf16_4bit"),
        Variant("dequantize_bf16_4bit", index="i32"),
    ),
    (
        "fp16",
        Variant("quantize_fp16_2bit", group_size=128, index="i32"),
        Variant("dequantize_fp16_2bit", group_size=128),
    ),
)
NARROW = Variant("quantize_bf16_4bit", wide=False)
EVERY_FORMAT = tuple(
    (
        dtype,
        Variant(f"quantize_{dtype}_{bits}bit", group_size, wide, index),
        Variant(f"dequantize_{dtype}_{bits}bit", group_size, index=index),
    )
    for dtype in DTYPES
    for bits, group_size, wide, index in (
        (8, 64, True, "i64"),
        (8, 256, False, "i32"),
        (4, 64, True, "i64"),
        (4, 128, False, "i32"),
        (2, 64, True, "i64"),
        (2, 256, True, "i32"),
    )
)
MASKS = tuple(
    Variant(name, wide=wide, index=index)
    for name in ("pack_mask", "unpack_mask")
    for wide, index in ((True, "i32"), (False, "i64"))
)
FEW_WALKS = ("grad_stats", "grad_unscale", "grad_scale", "pack_fp16", "unpack_bf16")
EVERY_WALK = (
    "grad_stats",
    "grad_unscale",
    "grad_scale",
    *(f"{way}_{dtype}" for way in ("pack", "unpack") for dtype in DTYPES),
)
FEW = tuple(
    dict.fromkeys(
        (
            *(variant for _, *both in FEW_FORMATS for variant in both),
            NARROW,
            *MASKS,
            *(Variant(name) for name in (*FEW_WALKS, "sum")),
        )
    )
)
EVERY = tuple(
    dict.fromkeys(
        (
            *(variant for _, *both in EVERY_FORMAT for variant in both),
            *MASKS,
            *(Variant(name) for name in (*EVERY_WALK, "sum")),
        )
    )
)

Kernels = dict[Variant, CompiledKernel]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return compile_kernels("sm_90", FEW)


@pytest.fixture(scope="module", params=TARGETS)
def every_kernel(request: pytest.FixtureRequest) -> Kernels:
    return compile_kernels(request.param, EVERY)


def _same(a: Tensor, b: Tensor) -> bool:
    """The same bits, and NaN (any) in the same places."""
    number = ~a.isnan()
    return (
        a.dtype == b.dtype
        and torch.equal(number, ~b.isnan())
        and bool((bits_of(a) == bits_of(b))[number.numpy()].all())
    )


def _values(numel: int, dtype: torch.dtype) -> Tensor:
    """Six decades, then groups of every kind that the format treats apart."""
    x = torch.randn(numel) * torch.logspace(-3, 3, numel)
    for first, value in ((70, "nan"), (300, "inf"), (600, "-inf")):
        x[first : first + 1] = float(value)
    x[1024:1280] = 0
    x[1280:1536] = 1.5
    x[1536:1792] *= 1e30
    x[1792:2048] *= 1e-38 if dtype != torch.float16 else 1e-7
    x[2048:2304:2] = -0.0
    return x.to(dtype)


def _check_quantize(kernel: CompiledKernel, x: Tensor, misalignment_bytes: int = 0) -> Quantized:
    assert kernel.bits is not None
    assert kernel.group_size is not None
    want = quantize_op(
        x, kernel.bits, noise=NOISE, group_size=kernel.group_size, backend="reference"
    )
    got, _ = quantize(kernel, x, NOISE.words, misalignment_bytes=misalignment_bytes)
    assert torch.equal(got.meta, want.meta)
    assert torch.equal(got.codes, want.codes)
    return want


def _check_format(kernels: Kernels, dtype: torch.dtype, to: Variant, back: Variant) -> None:
    encode, decode = kernels[to], kernels[back]
    assert encode.group_size is not None
    for numel in (2 * encode.elements_per_program, encode.elements_per_program + 1234, 1):
        x = _values(numel, dtype)
        _check_quantize(encode, x, 0 if to.wide else x.itemsize)
        assert decode.bits is not None
        assert decode.group_size is not None
        codes = quantize_op(
            x, decode.bits, noise=NOISE, group_size=decode.group_size, backend="reference"
        )
        got, _ = dequantize(decode, codes, numel, dtype)
        want = dequantize_op(
            codes,
            numel,
            dtype,
            decode.bits,
            group_size=decode.group_size,
            backend="reference",
        )
        assert _same(got, want)


@pytest.mark.parametrize(("dtype", "to", "back"), FEW_FORMATS)
def test_quantize(kernels: Kernels, dtype: str, to: Variant, back: Variant) -> None:
    _check_format(kernels, DTYPES[dtype], to, back)


@pytest.mark.parametrize("misalignment_bytes", [2, 14])
def test_quantize_at_any_address(kernels: Kernels, misalignment_bytes: int) -> None:
    for numel in (2 * 4096, 5001):
        _check_quantize(kernels[NARROW], _values(numel, torch.bfloat16), misalignment_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "to", "back"), EVERY_FORMAT)
def test_every_quantize(every_kernel: Kernels, dtype: str, to: Variant, back: Variant) -> None:
    _check_format(every_kernel, DTYPES[dtype], to, back)


def _check_masks(kernels: Kernels) -> None:
    for variant in MASKS:
        kernel, misalignment_bytes = kernels[variant], 0 if variant.wide else 1
        block = kernel.elements_per_program
        for numel in (2 * block, block + 1234, BLOCK_BOOLS - 1, 1):
            mask = torch.rand(numel) < 0.3
            bits = pack_mask_op(mask, backend="reference")
            if variant.case == "pack_mask":
                got, _ = pack_mask(kernel, mask, misalignment_bytes=misalignment_bytes)
                assert torch.equal(got, bits)
            else:
                got, _ = unpack_mask(kernel, bits, numel, misalignment_bytes=misalignment_bytes)
                assert torch.equal(got, mask.view(torch.uint8))
                assert torch.equal(unpack_mask_op(bits, numel, backend="reference"), mask)


def test_masks(kernels: Kernels) -> None:
    _check_masks(kernels)


@pytest.mark.slow
def test_masks_everywhere(every_kernel: Kernels) -> None:
    _check_masks(every_kernel)


def _gradients(poison: str | None) -> list[Tensor]:
    """Whole and ragged chunks of each dtype, denormals, and one value that is not finite."""
    sizes = (CHUNK, CHUNK + 904, 1, 2 * CHUNK + 8, 16, 3)
    dtypes = list(DTYPES.values()) * 2
    tensors = [torch.randn(n).to(dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
    tensors[0][:64] = torch.linspace(-1e-38, 1e-38, 64)
    tensors[1][:64] = torch.linspace(-1e-38, 1e-38, 64)
    tensors[4][:8] = -0.0
    if poison is not None:
        tensors[3][2 * CHUNK + 1] = float(poison)
    return tensors


def _name_parts(name: str) -> tuple[str, torch.dtype | None]:
    way, _, dtype = name.partition("_")
    return way, DTYPES.get(dtype)


def _walk(
    kernel: CompiledKernel,
    name: str,
    tensors: list[Tensor],
    bucket: Tensor | None,
    offsets: list[int],
    scale: Tensor,
    misalignment_bytes: int,
) -> Walked:
    """Execute the walk that the op `name` launches."""
    memory = GlobalMemory()
    addresses = [
        memory.map(
            f"tensor {i}", bits_of(tensor), misalignment_bytes=misalignment_bytes * tensor.itemsize
        )
        for i, tensor in enumerate(tensors)
    ]
    places = addresses
    if bucket is not None:
        start = memory.map("bucket", bits_of(bucket))
        places = [start + offset * bucket.itemsize for offset in offsets]
    way, _ = _name_parts(name)
    return walk(
        kernel,
        Walk(
            device=DEVICE,
            numels=tuple(tensor.numel() for tensor in tensors),
            dtypes=tuple(tensor.dtype for tensor in tensors),
            sources=places if way == "unpack" else addresses,
            destinations=None if name == "grad_stats" else places if way == "pack" else addresses,
            scale=None if name == "grad_stats" else scale.item() if way == "pack" else scale,
        ),
        memory,
    )


def _reference(
    name: str, tensors: list[Tensor], bucket: Tensor | None, offsets: list[int], scale: Tensor
) -> Tensor:
    """Run the op on its reference backend, in place; returns found_inf."""
    way, _ = _name_parts(name)
    if way == "pack":
        assert bucket is not None
        return bucket_pack(tensors, bucket, offsets, scale=scale.item(), backend="reference")
    if way == "unpack":
        assert bucket is not None
        return bucket_unpack(bucket, tensors, offsets, scale=scale, backend="reference").found_inf
    if name == "grad_scale":
        grad_scale_(tensors, scale, backend="reference")
    elif name == "grad_unscale":
        return grad_unscale_(tensors, scale, backend="reference").found_inf
    return grad_stats(tensors, backend="reference").found_inf


def _chunk_sums(written: list[Tensor]) -> Tensor:
    """Of the squares in each chunk, in float64; a square of fp32 and a sum of 4096 fit."""
    return torch.stack(
        [chunk.double().square().sum() for tensor in written for chunk in tensor.split(CHUNK)]
    )


def _check_sums(got: Tensor, want: Tensor) -> None:
    """A partial is a sum, in some order, of at most CHUNK rounded squares.

    With u = 2^-24, each square is off by u (or 2^-150 below 2^-126) and passes through at most
    CHUNK - 1 additions of non-negative numbers, each off by u: together (1 + u)^CHUNK - 1, below
    (CHUNK + 2) u. The float64 sum is off by CHUNK 2^-53, which the second of the two u covers.
    """
    limit = torch.finfo(torch.float32).max
    bound = want * (CHUNK + 2) * 2**-24 + CHUNK * 2**-150
    assert torch.equal(got.isfinite(), want <= limit)
    finite = got.isfinite()
    assert bool(((got.double() - want).abs() <= bound)[finite].all())


def _check_walk(
    kernels: Kernels, name: str, poison: str | None, shift: int, scale_value: float = 0.3
) -> None:
    tensors, scale = _gradients(poison), torch.tensor([scale_value])
    way, bucket_dtype = _name_parts(name)
    # `shift` elements past a boundary: 1 makes every access single.
    offsets, end = [], shift
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.numel() // 64) * 64
    bucket = None if bucket_dtype is None else torch.full((end,), 7.0, dtype=bucket_dtype)
    if way == "unpack":
        assert bucket is not None
        for tensor, offset in zip(tensors, offsets, strict=True):
            bucket[offset : offset + tensor.numel()] = tensor
    want = [tensor.clone() for tensor in tensors]
    want_bucket = None if bucket is None else bucket.clone()
    want_found = _reference(name, want, want_bucket, offsets, scale)

    got = _walk(kernels[Variant(name)], name, tensors, bucket, offsets, scale, shift)

    assert all(_same(a, b) for a, b in zip(tensors, want, strict=True))
    if bucket is not None:
        assert want_bucket is not None
        assert _same(bucket, want_bucket)
    assert torch.equal(got.found_inf, want_found)
    assert want_found.item() == (poison in ("nan", "inf", "-inf"))
    written = want
    if way == "pack":
        assert want_bucket is not None
        written = [want_bucket[o : o + t.numel()] for o, t in zip(offsets, want, strict=True)]
    sums = _chunk_sums(written)
    _check_sums(got.partials, sums)
    # The second launch adds in float64 and rounds once; two float64 orders may round apart.
    total = add_partials(kernels[Variant("sum")], got.partials)
    exact = got.partials.double().sum()
    if exact.isfinite():
        assert abs(total.double() - exact) <= exact * (2**-24 + len(sums) * 2**-52)
    else:
        assert not total.isfinite()


@pytest.mark.parametrize("name", FEW_WALKS)
def test_walk(kernels: Kernels, name: str) -> None:
    _check_walk(kernels, name, None, 0)
    _check_walk(kernels, name, "nan", 1)
    _check_walk(kernels, name, "-inf", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_WALK)
def test_every_walk(every_kernel: Kernels, name: str) -> None:
    for poison in (None, "nan", "inf", "-inf"):
        for shift in (0, 1, 4):
            _check_walk(every_kernel, name, poison, shift)


def test_finite_values_whose_squares_overflow(kernels: Kernels) -> None:
    tensors = [torch.full((100,), 3e30), torch.ones(100)]
    got = _walk(kernels[Variant("grad_stats")], "grad_stats", tensors, None, [], torch.ones(1), 0)
    assert got.found_inf == 0
    assert got.partials.tolist() == [float("inf"), 100.0]


def test_scaling_by_one_stores_nothing(kernels: Kernels) -> None:
    tensors = _gradients("nan")
    before = [bits_of(tensor).copy() for tensor in tensors]
    got = _walk(kernels[Variant("grad_scale")], "grad_scale", tensors, None, [], torch.ones(1), 0)
    assert got.counts.stored_bytes == 0
    assert all((bits_of(t) == b).all() for t, b in zip(tensors, before, strict=True))


def test_a_large_value_does_not_fit_an_fp16_bucket(kernels: Kernels) -> None:
    tensors, bucket = [torch.tensor([1.0, 65519.0]), torch.tensor([65520.0])], torch.zeros(3).half()
    kernel, one = kernels[Variant("pack_fp16")], torch.ones(1)
    got = _walk(kernel, "pack_fp16", tensors[:1], bucket, [0], one, 0)
    assert got.found_inf == 0
    got = _walk(kernel, "pack_fp16", tensors, bucket, [0, 2], one, 0)
    assert got.found_inf == 1
    assert bucket.tolist() == [1.0, 65504.0, float("inf")]


@pytest.mark.parametrize(
    ("variant", "pattern", "constant"),
    [
        # Philox's first multiplier, the metadata's rounding, the reciprocal's Newton step
        (NARROW, r"-766435501\b", "-766435499"),
        (NARROW, r"\b65543\b", "131079"),
        (NARROW, r"\b0f3F800000\b", "0f3F810000"),
    ],
)
def test_a_wrong_constant_is_seen(
    kernels: Kernels, variant: Variant, pattern: str, constant: str
) -> None:
    kernel = kernels[variant]
    x = _values(5001, torch.bfloat16)
    text, replaced = re.subn(pattern, constant, kernel.ptx)
    assert replaced
    with pytest.raises(AssertionError):
        _check_quantize(replace(kernel, ptx=text), x)


def _is_about(sectors: int, floor_bytes: int) -> bool:
    return floor_bytes <= SECTOR_BYTES * sectors <= 1.01 * floor_bytes


# Lanes hold 32 consecutive bytes of fp32 and read them in two accesses, each of which touches every
# sector: the first-level cache is asked twice, memory once. Counts knows no cache.
def _read_passes(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.float32 else 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", DTYPES)
def test_quantize_moves_the_declared_bytes(every_kernel: Kernels, name: str, bits: int) -> None:
    encode = every_kernel[Variant(f"quantize_{name}_{bits}bit", group_size=64)]
    decode = every_kernel[Variant(f"dequantize_{name}_{bits}bit", group_size=64)]
    x = torch.randn(1 << 17).to(DTYPES[name])
    data, codes, meta = x.nbytes, x.numel() * bits // 8, x.numel() // 64 * 4
    quantized, counts = quantize(encode, x, NOISE.words)
    assert _is_about(counts.loaded_sectors, data * _read_passes(x.dtype))
    assert _is_about(counts.stored_sectors, codes + meta)
    _, counts = dequantize(decode, quantized, x.numel(), x.dtype)
    # Threads that share a group read its metadata again, from the cache.
    repeats, rest = divmod(SECTOR_BYTES * counts.loaded_sectors - codes, meta)
    assert rest == 0
    assert 1 <= repeats <= 4
    assert _is_about(counts.stored_sectors, data)


@pytest.mark.slow
def test_masks_move_the_declared_bytes(every_kernel: Kernels) -> None:
    mask = torch.rand(1 << 18) < 0.3
    bits, counts = pack_mask(every_kernel[Variant("pack_mask", index="i32")], mask)
    assert _is_about(counts.loaded_sectors, mask.nbytes)
    assert _is_about(counts.stored_sectors, bits.nbytes)
    _, counts = unpack_mask(every_kernel[Variant("unpack_mask", index="i32")], bits, mask.numel())
    assert _is_about(counts.loaded_sectors, bits.nbytes)
    assert _is_about(counts.stored_sectors, mask.nbytes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
@pytest.mark.parametrize("name", EVERY_WALK)
def test_walks_move_the_declared_bytes(
    every_kernel: Kernels, name: str, dtype: torch.dtype
) -> None:
    x, chunks = torch.randn(32 * CHUNK).to(dtype), 32
    way, bucket_dtype = _name_parts(name)
    bucket = None if bucket_dtype is None else torch.zeros(x.numel(), dtype=bucket_dtype)
    read = x if bucket is None or way == "pack" else bucket
    written = x if bucket is None or way == "unpack" else bucket
    kernel = every_kernel[Variant(name)]
    counts = _walk(kernel, name, [x], bucket, [0], torch.tensor([0.5]), 0).counts
    # Apart from the tensors: each of four warps reads the chunk's row (four words), the addresses
    # and the scale, a sector each and all but the first from the cache; one thread writes a sum.
    words = 4 + (1 if name == "grad_stats" else 2 if way == "pack" else 3)
    loaded = counts.loaded_sectors - chunks * 4 * words
    assert _is_about(loaded, read.nbytes * _read_passes(read.dtype))
    stored = counts.stored_sectors - chunks
    assert _is_about(stored, written.nbytes) if name != "grad_stats" else stored == 0
