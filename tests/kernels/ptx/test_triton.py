"""What Triton compiles for four architectures, executed and compared with NumPy."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from verify.ptx import MemoryFault, parse, run

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton compiles the kernels"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = Path(__file__).with_name("triton_kernels.py")
    result = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(params=["80", "90", "100", "120"])
def launch(request, compiled):
    """launch(kernel, blocks, *arguments) -> Counts, on one architecture."""

    def launch(name, blocks, *arguments):
        kernel = compiled[name][request.param]
        return run(parse(kernel["ptx"]), (blocks,), arguments, shared_bytes=kernel["shared"])

    return launch


def test_masked_add(launch):
    n = 5000
    x, y = np.random.default_rng(0).standard_normal((2, n), dtype=np.float32)
    x[:4] = [np.inf, -np.inf, 1e-45, -0.0]
    y[:4] = [1, 2, 1e-45, -0.0]
    out = np.zeros(n, np.float32)
    counts = launch("masked_add", 5, x, y, out, n)
    np.testing.assert_array_equal(out.view(np.uint32), (x + y).view(np.uint32))
    assert counts.loaded_bytes == 8 * n
    assert counts.stored_bytes == 4 * n


def test_a_wrong_size_is_found(launch):
    """The kernel is told of one element more than the arrays have."""
    x, y, out = np.zeros((3, 1000), np.float32)
    memory_owned = [np.array(a) for a in (x, y, out)]
    with pytest.raises(MemoryFault, match="masked_add_param_0"):
        launch("masked_add", 1, *memory_owned, 1001)


@pytest.mark.parametrize("n_columns", [1, 1000, 1024, 3333])
def test_row_sum(launch, n_columns):
    """Integers small enough for any order of additions to be exact."""
    x = np.random.default_rng(1).integers(-99, 100, (7, n_columns)).astype(np.float32)
    out = np.zeros(7, np.float32)
    counts = launch("row_sum", 7, x, out, n_columns)
    np.testing.assert_array_equal(out, x.sum(axis=1))
    assert counts.loaded_bytes == x.nbytes


def philox(counter, seed):
    """Philox4x32-10, first word, counter in the lowest of four (Salmon et al., 2011)."""
    c = [counter.astype(np.uint64), *np.zeros((3, counter.size), np.uint64)]
    low, keys = np.uint64(0xFFFFFFFF), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        k0, k1 = map(np.uint64, keys)
        c = [b >> np.uint64(32) ^ c[1] ^ k0, b & low, a >> np.uint64(32) ^ c[3] ^ k1, a & low]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0].astype(np.uint32)


def test_philox(launch):
    n, seed = 1500, 20260101
    out = np.zeros(n, np.uint32)
    launch("philox_words", 3, out, n, seed)
    np.testing.assert_array_equal(out, philox(np.arange(n), seed))


def test_cast_to_bf16(launch):
    bits = np.random.default_rng(2).integers(0, 2**32, 4097, np.uint64).astype(np.uint32)
    x, out = bits.view(np.float32), np.zeros(4097, np.uint16)
    counts = launch("cast_bf16", 5, x, out, x.size)
    want = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    finite = ~np.isnan(x)
    np.testing.assert_array_equal(out[finite], want[finite])
    assert (out[~finite] & 0x7FFF > 0x7F80).all()
    assert counts.stored_bytes == 2 * x.size


def test_pack_int4(launch):
    n = 3000
    x = np.random.default_rng(3).uniform(-12, 12, n).astype(np.float32)
    out = np.zeros(n // 2, np.uint8)
    launch("pack_int4", 3, x, out, n)
    codes = np.clip(np.floor(x), -8, 7).astype(np.int8).view(np.uint8) & 15
    np.testing.assert_array_equal(out, codes[::2] | codes[1::2] << 4)


def test_transpose_through_shared_memory(launch):
    x = np.random.default_rng(4).standard_normal((64, 64)).astype(np.float16)
    out = np.zeros_like(x)
    counts = launch("transpose", 1, x, out)
    np.testing.assert_array_equal(out, x.T)
    assert counts.loaded_bytes == counts.stored_bytes == x.nbytes


def test_histogram(launch):
    x = np.random.default_rng(5).integers(0, 10, 1000).astype(np.int32)
    found = np.zeros(10, np.int32)
    counts = launch("histogram", 4, x, found, x.size)
    np.testing.assert_array_equal(found, np.bincount(x, minlength=10))
    assert counts.atomics == {4: 1000}


# Assembly and its twin in plain Triton do the same: dpmem_kernels.assembly_triton.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
each_form = pytest.mark.parametrize("form", ["assembly", "plain"])
each_dtype = pytest.mark.parametrize("name", DTYPES)


@each_form
@each_dtype
def test_every_16_bit_number_as_float32(launch, name, form):
    x = torch.arange(1 << 16).to(torch.uint16).view(torch.int16)
    out = np.zeros(1 << 16, np.float32)
    launch(f"{name} as float32 {form}", 64, x.numpy(), out)
    want = x.view(DTYPES[name]).float()
    assert torch.equal(torch.from_numpy(out).isnan(), want.isnan())
    np.testing.assert_array_equal(out[~want.isnan()], want[~want.isnan()])


@each_form
@each_dtype
def test_pairs_are_rounded_to_nearest_even(launch, name, form):
    """Any bits; each 16-bit number, half a step above it, where ties go to even, and a bit off."""
    near = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16) + np.uint32([0, 0x7FFF, 0x8000])
    half = torch.arange(1 << 16).to(torch.uint16).view(torch.float16).float().view(torch.int32)
    near_half = half.numpy().view(np.uint32)[:, None] + np.uint32([0xFFF, 0x1000, 0x1001])
    random = np.random.default_rng(6).integers(0, 2**32, 1 << 17, np.uint64).astype(np.uint32)
    bits = np.concatenate([near.ravel(), near_half.ravel(), random])
    x = torch.from_numpy(bits.view(np.float32))
    out = torch.zeros(x.numel() // 2, dtype=torch.int32)
    launch(f"pairs of {name} {form}", out.numel() // 1024, x.numpy(), out.numpy())
    found, want = out.view(DTYPES[name]), x.to(DTYPES[name])
    assert torch.equal(found.isnan(), want.isnan())
    finite = ~want.isnan()
    assert torch.equal(found.view(torch.int16)[finite], want.view(torch.int16)[finite])


@each_form
def test_bytes_are_permuted(launch, form):
    pairs = np.random.default_rng(7).integers(0, 2**32, (2048, 2), np.uint64).astype(np.uint32)
    upper, interleaved = np.zeros((2, 2048), np.uint32)
    launch(f"bytes {form}", 2, pairs.ravel(), upper, interleaved)
    halves, octets = pairs.view(np.uint16), pairs.view(np.uint8)
    np.testing.assert_array_equal(upper.view(np.uint16).reshape(-1, 2), halves[:, [1, 3]])
    want = octets[:, [0, 4, 2, 6]]
    np.testing.assert_array_equal(interleaved.view(np.uint8).reshape(-1, 4), want)
