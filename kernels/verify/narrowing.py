"""The cases of narrow and widen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpmem_kernels.narrow import narrow_ref, widen_ref
from dpmem_kernels.narrow_triton import BLOCK, narrow_kernel, widen_kernel
from verify.cases import KernelCase, Source, Work, require
from verify.launch import CompiledKernel, Moved, placed, poisoned
from verify.ptx import Counts

_INDEX_DTYPES = {"int64": torch.int64, "int32": torch.int32}
_CODE_DTYPES = {"uint8": torch.uint8, "int16": torch.int16}
_LARGE = 1 << 17
_LOW = -100


@dataclass(frozen=True, kw_only=True)
class _NarrowingCase(KernelCase):
    """`index_dtype` on one side, `code_dtype` on the other; `wide`: the source is aligned."""

    index_dtype: str = "int64"
    code_dtype: str = "uint8"
    index: str = "i32"
    wide: bool = True
    block: int = BLOCK

    @property
    def variant(self) -> str:
        parts = [self.index_dtype, self.code_dtype]
        parts += ["i64"] * (self.index == "i64") + ["unaligned"] * (not self.wide)
        return " ".join(parts)

    @property
    def bar(self) -> str | None:
        return self.kernel if self.wide else None

    @property
    def index_bytes(self) -> int:
        return _INDEX_DTYPES[self.index_dtype].itemsize

    @property
    def code_bytes(self) -> int:
        return _CODE_DTYPES[self.code_dtype].itemsize

    @property
    def span(self) -> int:
        """How many values the range has: all that the codes can tell apart, but one."""
        return (1 << 8 * self.code_bytes) - 1

    def indices(self, numel: int) -> Tensor:
        generator = torch.Generator().manual_seed(numel)
        x = torch.randint(_LOW, _LOW + self.span, (numel,), generator=generator)
        x[0], x[-1] = _LOW + self.span - 1, _LOW
        return x.to(_INDEX_DTYPES[self.index_dtype])

    @property
    def sizes(self) -> tuple[int, ...]:
        """One element less than whole programs, a ragged end, and one element."""
        return 2 * self.block - 1, self.block + 77, 1


@dataclass(frozen=True, kw_only=True)
class NarrowCase(_NarrowingCase):
    @property
    def kernel(self) -> str:
        return "narrow"

    def source(self) -> Source:
        pointers = {
            "index_ptr": "*i64" if self.index_dtype == "int64" else "*i32",
            "codes_ptr": "*u8" if self.code_dtype == "uint8" else "*i16",
            "outside_ptr": "*i32",
        }
        return Source(
            function=narrow_kernel,
            signature=pointers | {"n": self.index, "low": "i32", "span": "i32"},
            constexprs={"BLOCK": self.block},
            aligned=("index_ptr",) * self.wide + ("codes_ptr", "outside_ptr"),
        )

    def work(self) -> Work:
        width = 128 if self.wide else None
        read, written = self.block * self.index_bytes, self.block * self.code_bytes
        floor = self.index_bytes + self.code_bytes
        return Work(self.block, read, written, floor, width, width)

    def launch(self, kernel: CompiledKernel, index: Tensor) -> tuple[Tensor, bool, Counts]:
        """dpmem_kernels.narrow of values from _LOW on: the codes, and whether all were in range."""
        codes = poisoned(index.numel(), _CODE_DTYPES[self.code_dtype])
        outside = torch.zeros(1, dtype=torch.int32)
        counts = kernel.launch(
            -(-index.numel() // self.block), index, codes, outside, index.numel(), _LOW, self.span,
            memory=placed(index, 0 if self.wide else self.index_bytes),
        )  # fmt: skip
        return codes, outside.item() == 0, counts

    def check(self, kernel: CompiledKernel) -> None:
        for numel in self.sizes:
            index = self.indices(numel)
            want, _ = narrow_ref(index, _LOW, _LOW + self.span)
            got, inside, _ = self.launch(kernel, index)
            require(inside, f"{self.name}: {numel} elements in range are called outside")
            require(torch.equal(got, want.view(got.dtype)), f"{self.name}: codes of {numel}")
            for place, value in ((0, _LOW - 1), (-1, _LOW + self.span), (numel // 2, 2**31 - 1)):
                wrong = index.clone()
                wrong[place] = value
                _, inside, _ = self.launch(kernel, wrong)
                require(not inside, f"{self.name}: {value} among {numel} elements goes unseen")

    def moved(self, kernel: CompiledKernel) -> Moved:
        return Moved(_LARGE, self.launch(kernel, self.indices(_LARGE))[2])


@dataclass(frozen=True, kw_only=True)
class WidenCase(_NarrowingCase):
    @property
    def kernel(self) -> str:
        return "widen"

    def source(self) -> Source:
        pointers = {
            "codes_ptr": "*u8" if self.code_dtype == "uint8" else "*i16",
            "index_ptr": "*i64" if self.index_dtype == "int64" else "*i32",
        }
        return Source(
            function=widen_kernel,
            signature=pointers | {"n": self.index, "low": "i32"},
            constexprs={"BLOCK": self.block},
            aligned=("codes_ptr",) * self.wide + ("index_ptr",),
        )

    def work(self) -> Work:
        width = 128 if self.wide else None
        read, written = self.block * self.code_bytes, self.block * self.index_bytes
        floor = self.index_bytes + self.code_bytes
        return Work(self.block, read, written, floor, width, width)

    def launch(self, kernel: CompiledKernel, codes: Tensor) -> tuple[Tensor, Counts]:
        """dpmem_kernels.widen."""
        index = poisoned(codes.numel(), _INDEX_DTYPES[self.index_dtype])
        counts = kernel.launch(
            -(-codes.numel() // self.block), codes, index, codes.numel(), _LOW,
            memory=placed(codes, 0 if self.wide else self.code_bytes),
        )  # fmt: skip
        return index, counts

    def check(self, kernel: CompiledKernel) -> None:
        for numel in self.sizes:
            codes, _ = narrow_ref(self.indices(numel), _LOW, _LOW + self.span)
            got, _ = self.launch(kernel, codes)
            want = widen_ref(codes, _LOW, _INDEX_DTYPES[self.index_dtype])
            require(torch.equal(got, want), f"{self.name}: indices of {numel} elements")

    def moved(self, kernel: CompiledKernel) -> Moved:
        codes, _ = narrow_ref(self.indices(_LARGE), _LOW, _LOW + self.span)
        return Moved(_LARGE, self.launch(kernel, codes)[1])


def narrowing_cases() -> list[KernelCase]:
    cases: list[KernelCase] = []
    for Case in (NarrowCase, WidenCase):
        cases += [
            Case(index_dtype=index, code_dtype=code)
            for index in ("int64", "int32")
            for code in ("uint8", "int16")
        ]
        cases += [Case(index="i64"), Case(wide=False)]
    return cases
