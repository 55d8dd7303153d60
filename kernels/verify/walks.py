"""The cases of the gradient ops, which are all one walk over a list of tensors, and of its sum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpmem_kernels.bucket import PackPlan, bucket_pack, bucket_unpack
from dpmem_kernels.grad_scale import grad_scale_, grad_stats, grad_unscale_
from dpmem_kernels.tensor_table import CHUNK, chunk_table
from dpmem_kernels.tensor_table_triton import NUM_WARPS, TL_DTYPES, sum_kernel, walk_kernel
from verify.cases import DTYPES, KernelCase, Source, Work, require
from verify.launch import CompiledKernel, Moved, bits_of, poisoned, same_bits
from verify.ptx import Counts, GlobalMemory

Op = Literal["grad_stats", "grad_unscale", "grad_scale", "pack", "accumulate", "unpack"]
_CPU = torch.device("cpu")
_SUM_BLOCK = 1024
# Of every chunk, beside its elements: a row of the table, two addresses, and the scale if on the
# device.
_TABLE_BYTES, _ADDRESS_BYTES, _SCALAR_BYTES = 32, 8, 4


class Walked(NamedTuple):
    """What a walk leaves besides the tensors: fp32 [chunks] if summed, fp32 [], the traffic."""

    partials: Tensor | None
    found_inf: Tensor
    counts: Counts


@dataclass(frozen=True, kw_only=True)
class WalkCase(KernelCase):
    """One op, of tensors of `tensors`' size next to a bucket of dtype `bucket`.

    A compiled walk has a path for each dtype, chosen per tensor: cases that differ in `tensors`
    alone are one kernel, and `tensors` says whose hot path is looked at. bf16 and fp16 move the
    same bytes; the dearer of the two is what counts. `scaled` False: without a scale.
    """

    op: Op
    tensors: Literal["fp32", "16bit"]
    bucket: str | None = None
    scaled: bool = True
    num_warps: int = NUM_WARPS

    @property
    def kernel(self) -> str:
        ops = {"pack": "bucket_pack", "accumulate": "bucket_pack", "unpack": "bucket_unpack"}
        return ops.get(self.op, self.op)

    @property
    def variant(self) -> str:
        twin = " portable" * self.portable
        if self.bucket is None:
            return self.tensors + twin
        pair = (self.tensors, self.bucket)
        source, destination = reversed(pair) if self.op == "unpack" else pair
        extra = " accumulate" * (self.op == "accumulate") + " unscaled" * (not self.scaled)
        return f"{source} to {destination}{extra}{twin}"

    @property
    def bar(self) -> str | None:
        return None if self.portable else "gradient"

    @property
    def stores(self) -> bool:
        return self.op != "grad_stats"

    @property
    def sums(self) -> bool:
        return self.op in ("grad_stats", "grad_unscale", "unpack")

    @property
    def device_scale(self) -> bool:
        return self.scaled and self.op in ("grad_unscale", "grad_scale", "unpack")

    def source(self) -> Source:
        bucket = None if self.bucket is None else TL_DTYPES[DTYPES[self.bucket]]
        signature = {"table_ptr": "*i64", "addresses_ptr": "*i64"}
        constexprs: dict[str, Any] = {
            "SOURCE": bucket if self.op == "unpack" else None,
            "DESTINATION": bucket if self.op in ("pack", "accumulate") else None,
            "STORE": self.stores,
            "LOAD_SCALE": self.device_scale,
            "SKIP_IF_ONE": self.op == "grad_scale",
            "ACCUMULATE": self.op == "accumulate",
            "SUMS": self.sums,
            "ASM": self.assembly,
            "BLOCK": CHUNK,
        }
        if self.stores and self.scaled:
            signature["scale"] = "*fp32" if self.device_scale else "fp32"
        else:
            constexprs["scale"] = None
        signature["found_inf_ptr"] = "*fp32"
        if self.sums:
            signature["partials_ptr"] = "*fp32"
        else:
            constexprs["partials_ptr"] = None
        return Source(
            function=walk_kernel,
            signature=signature,
            constexprs=constexprs,
            aligned=("table_ptr", "addresses_ptr") + ("partials_ptr",) * self.sums,
            enable_fp_fusion=True,
        )

    def work(self) -> Work:
        own = 4 if self.tensors == "fp32" else 2
        bucket = own if self.bucket is None else DTYPES[self.bucket].itemsize
        read, written = (bucket, own) if self.op == "unpack" else (own, bucket)
        if self.op == "accumulate":
            read += bucket
        if not self.stores:
            written = 0
        tables = _TABLE_BYTES + _ADDRESS_BYTES * (1 + self.stores)
        tables += _SCALAR_BYTES * (self.device_scale + self.sums)
        return Work(
            elements=CHUNK,
            read_bytes=CHUNK * read,
            written_bytes=CHUNK * written or None,
            floor_bytes_per_element=read + written + tables / CHUNK,
        )

    def walk(
        self,
        kernel: CompiledKernel,
        tensors: Sequence[Tensor],
        bucket: Tensor | None,
        offsets: Sequence[int],
        scale: float,
        shift: int = 0,
    ) -> Walked:
        """Execute the op's launch, in place; every tensor starts `shift` elements past a boundary.

        `offsets` are the tensors' places in the bucket, in elements.
        """
        memory = GlobalMemory()
        addresses = [
            memory.map(f"tensor {i}", bits_of(t), misalignment_bytes=shift * t.itemsize)
            for i, t in enumerate(tensors)
        ]
        places = addresses
        if bucket is not None:
            start = memory.map("bucket", bits_of(bucket))
            places = [start + offset * bucket.itemsize for offset in offsets]
        sources, destinations = (places, addresses) if self.op == "unpack" else (addresses, places)
        words = torch.tensor([sources, destinations], dtype=torch.int64).T.contiguous()
        numels, dtypes = [t.numel() for t in tensors], [t.dtype for t in tensors]
        chunks = chunk_table(numels, dtypes, _CPU)
        partials = poisoned(len(chunks), torch.float32) if self.sums else None
        found_inf = torch.zeros(1)
        factor: tuple[Tensor | float, ...] = ()
        if self.stores and self.scaled:
            factor = (torch.tensor([scale]),) if self.device_scale else (scale,)
        sums = () if partials is None else (partials,)
        counts = kernel.launch(
            len(chunks), chunks, words.view(-1), *factor, found_inf, *sums, memory=memory
        )
        return Walked(partials, found_inf[0], counts)

    def check(self, kernel: CompiledKernel) -> None:
        for poison, shift in ((None, 0), ("nan", 1), ("-inf", 0), ("inf", 4)):
            self._check(kernel, poison, shift)

    def _check(self, kernel: CompiledKernel, poison: str | None, shift: int) -> None:
        tensors, scale = _gradients(poison), 0.3
        # `shift` elements past a boundary: 1 makes every access single.
        offsets, end = [], shift
        for tensor in tensors:
            offsets.append(end)
            end += -(-tensor.numel() // 64) * 64
        bucket = None
        if self.bucket is not None:
            bucket = torch.linspace(-2, 2, end).to(DTYPES[self.bucket])
        if bucket is not None and self.op == "unpack":
            for tensor, offset in zip(tensors, offsets, strict=True):
                bucket[offset : offset + tensor.numel()] = tensor
        want = [tensor.clone() for tensor in tensors]
        want_bucket = None if bucket is None else bucket.clone()
        want_found = self._reference(want, want_bucket, offsets, scale)

        got = self.walk(kernel, tensors, bucket, offsets, scale, shift)

        where = f"{self.name}: with {poison}, {shift} elements off"
        require(all(map(same_bits, tensors, want)), f"{where}: tensors")
        if bucket is not None and want_bucket is not None:
            require(same_bits(bucket, want_bucket), f"{where}: bucket")
        require(torch.equal(got.found_inf, want_found), f"{where}: found_inf")
        require(want_found.item() == (poison is not None), f"{where}: the reference's found_inf")
        if got.partials is not None:
            require(_sums_agree(got.partials, want), f"{where}: sums of squares")

    def _reference(
        self, tensors: list[Tensor], bucket: Tensor | None, offsets: Sequence[int], scale: float
    ) -> Tensor:
        """Run the op on its reference backend, in place; returns found_inf."""
        factor = torch.tensor([scale])
        if bucket is not None:
            numels, dtypes = [t.numel() for t in tensors], [t.dtype for t in tensors]
            plan = PackPlan(numels, dtypes, offsets, _CPU)
            if self.op == "unpack":
                times = factor if self.scaled else None
                return bucket_unpack(
                    plan, bucket, tensors, scale=times, backend="reference"
                ).found_inf
            accumulate = self.op == "accumulate"
            return bucket_pack(
                plan, tensors, bucket, scale=scale, accumulate=accumulate, backend="reference"
            )
        if self.op == "grad_scale":
            grad_scale_(tensors, factor, backend="reference")
        elif self.op == "grad_unscale":
            return grad_unscale_(tensors, factor, backend="reference").found_inf
        return grad_stats(tensors, backend="reference").found_inf

    def moved(self, kernel: CompiledKernel) -> Moved:
        dtype = torch.float32 if self.tensors == "fp32" else torch.bfloat16
        x = torch.linspace(-3, 3, 32 * CHUNK).to(dtype)
        bucket = None if self.bucket is None else torch.zeros(x.numel(), dtype=DTYPES[self.bucket])
        return Moved(x.numel(), self.walk(kernel, [x], bucket, [0], 0.5).counts)


def _gradients(poison: str | None) -> list[Tensor]:
    """Whole and ragged chunks of each dtype, denormals, and one value that is not finite."""
    sizes = (CHUNK, CHUNK + 904, 1, 2 * CHUNK + 8, 16, 3)
    dtypes = list(DTYPES.values()) * 2
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(n, generator=generator).to(dtype)
        for n, dtype in zip(sizes, dtypes, strict=True)
    ]
    tensors[0][:64] = torch.linspace(-1e-38, 1e-38, 64)
    tensors[1][:64] = torch.linspace(-1e-38, 1e-38, 64)
    tensors[4][:8] = -0.0
    if poison is not None:
        tensors[3][2 * CHUNK + 1] = float(poison)
    return tensors


def _sums_agree(got: Tensor, written: Sequence[Tensor]) -> bool:
    """Whether `got` [chunks] are the sums of the squares of what was written, within rounding.

    A partial is a sum, in some order, of at most CHUNK rounded squares. With u = 2^-24, each square
    is off by u (or 2^-150 below 2^-126) and passes through at most CHUNK - 1 additions of
    non-negative numbers, each off by u: together (1 + u)^CHUNK - 1, below (CHUNK + 2) u. The
    float64 sum is off by CHUNK 2^-53, which the second of the two u covers.
    """
    chunks = [chunk for tensor in written for chunk in tensor.split(CHUNK)]
    want = torch.stack([chunk.double().square().sum() for chunk in chunks])
    bound = want * (CHUNK + 2) * 2**-24 + CHUNK * 2**-150
    finite = want <= torch.finfo(torch.float32).max
    close = (got.double() - want).abs() <= bound
    return torch.equal(got.isfinite(), finite) and bool(close[finite].all())


@dataclass(frozen=True, kw_only=True)
class SumCase(KernelCase):
    """The second launch of a walk that sums: one program adds the chunks' sums."""

    @property
    def kernel(self) -> str:
        return "sum"

    @property
    def variant(self) -> str:
        return ""

    @property
    def bar(self) -> None:
        return None

    def source(self) -> Source:
        return Source(
            function=sum_kernel,
            signature={"partials_ptr": "*fp32", "n": "i32", "sum_ptr": "*fp32"},
            constexprs={"BLOCK": _SUM_BLOCK},
            aligned=("partials_ptr", "sum_ptr"),
        )

    def work(self) -> None:
        return None

    def launch(self, kernel: CompiledKernel, partials: Tensor) -> Tensor:
        """fp32 []: the sum of fp32 [n]."""
        total = poisoned(1, torch.float32)
        kernel.launch(1, partials, partials.numel(), total)
        return total[0]

    def check(self, kernel: CompiledKernel) -> None:
        """It adds in float64 and rounds once; two float64 orders may round apart."""
        generator = torch.Generator().manual_seed(0)
        for numel in (1, _SUM_BLOCK, 3 * _SUM_BLOCK + 7):
            partials = torch.rand(numel, generator=generator) * torch.logspace(-30, 30, numel)
            exact = partials.double().sum()
            error = (self.launch(kernel, partials).double() - exact).abs()
            require(bool(error <= exact * (2**-24 + numel * 2**-52)), f"{self.name}: of {numel}")
            partials[-1] = float("nan")
            require(
                bool(self.launch(kernel, partials).isnan()), f"{self.name}: of {numel} with NaN"
            )

    def moved(self, kernel: CompiledKernel) -> None:
        return None


def walk_cases(*, assembly: int) -> list[KernelCase]:
    """What GPUs with that assembly launch.

    If there is any, also portable twins of the ops that read 16-bit elements twice.
    """
    sizes: tuple[Literal["fp32", "16bit"], ...] = ("fp32", "16bit")
    ops: tuple[Op, ...] = ("grad_stats", "grad_unscale", "grad_scale")
    bucket_ops: tuple[Op, ...] = ("pack", "accumulate", "unpack")
    walks = [WalkCase(op=op, tensors=size, assembly=assembly) for op in ops for size in sizes]
    walks += [
        WalkCase(op=op, tensors=size, bucket=bucket, assembly=assembly)
        for op in bucket_ops
        for bucket in DTYPES
        for size in sizes
    ]
    walks += [
        WalkCase(op="unpack", tensors=size, bucket="bf16", scaled=False, assembly=assembly)
        for size in sizes
    ]
    if not assembly:
        return [*walks, SumCase()]
    twins = [
        WalkCase(op="grad_unscale", tensors="16bit", assembly=0),
        WalkCase(op="accumulate", tensors="16bit", bucket="bf16", assembly=0),
        WalkCase(op="unpack", tensors="16bit", bucket="fp16", assembly=0),
    ]
    return [*walks, *twins, SumCase()]
