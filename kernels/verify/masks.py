"""The cases of pack_mask, pack_positive and unpack_mask."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpmem_kernels.mask import BLOCK_BOOLS, BLOCK_BYTES, pack_mask_ref, pack_positive_ref
from dpmem_kernels.mask_triton import (
    POSITIVE_ROWS,
    ROWS,
    pack_mask_kernel,
    pack_positive_kernel,
    unpack_mask_kernel,
)
from verify.cases import DTYPES, KernelCase, Source, Work, require
from verify.launch import CompiledKernel, Moved, placed, poisoned
from verify.ptx import Counts

_LARGE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class _MaskCase(KernelCase):
    """`wide`: the source starts at a 16-byte boundary. `rows`: blocks of 1024 in a program."""

    index: str = "i32"
    wide: bool = True
    rows: int = ROWS

    @property
    def variant(self) -> str:
        return " ".join(["i64"] * (self.index == "i64") + ["unaligned"] * (not self.wide))

    @property
    def bar(self) -> str | None:
        return "mask" if self.wide else None

    @property
    def elements(self) -> int:
        return self.rows * BLOCK_BOOLS


@dataclass(frozen=True, kw_only=True)
class PackMaskCase(_MaskCase):
    @property
    def kernel(self) -> str:
        return "pack_mask"

    def source(self) -> Source:
        return Source(
            function=pack_mask_kernel,
            signature={"mask_ptr": "*u8", "bits_ptr": "*u8", "n": self.index},
            constexprs={"ROWS": self.rows, "WIDE": self.wide},
            aligned=("mask_ptr",) * self.wide + ("bits_ptr",),
        )

    def work(self) -> Work:
        width = 128 if self.wide else None
        return Work(self.elements, self.elements, self.elements // 8, 1.125, width, width)

    def launch(
        self, kernel: CompiledKernel, mask: Tensor, misalignment_bytes: int
    ) -> tuple[Tensor, Counts]:
        """dpmem_kernels.pack_mask, of a flat mask that starts past a boundary."""
        bits = poisoned(-(-mask.numel() // BLOCK_BOOLS) * BLOCK_BYTES, torch.uint8)
        memory = placed(mask, misalignment_bytes)
        programs = -(-mask.numel() // self.elements)
        return bits, kernel.launch(programs, mask, bits, mask.numel(), memory=memory)

    def check(self, kernel: CompiledKernel) -> None:
        for mask in _masks(self.elements):
            got, _ = self.launch(kernel, mask, int(not self.wide))
            require(torch.equal(got, pack_mask_ref(mask)), f"{self.name}: {mask.numel()} bools")

    def moved(self, kernel: CompiledKernel) -> Moved:
        _, counts = self.launch(kernel, torch.ones(_LARGE, dtype=torch.bool), int(not self.wide))
        return Moved(_LARGE, counts)


@dataclass(frozen=True, kw_only=True)
class PackPositiveCase(_MaskCase):
    dtype: str
    rows: int = POSITIVE_ROWS

    @property
    def kernel(self) -> str:
        return "pack_positive"

    @property
    def variant(self) -> str:
        return f"{self.dtype} {super().variant}".strip()

    def source(self) -> Source:
        return Source(
            function=pack_positive_kernel,
            signature={"x_ptr": f"*{self.dtype}", "bits_ptr": "*u8", "n": self.index},
            constexprs={"ROWS": self.rows},
            aligned=("x_ptr",) * self.wide + ("bits_ptr",),
        )

    @property
    def bar(self) -> str | None:
        return "pack_positive" if self.wide else None

    def work(self) -> Work:
        size = DTYPES[self.dtype].itemsize
        return Work(
            elements=self.elements,
            read_bytes=self.elements * size,
            written_bytes=self.elements // 8,
            floor_bytes_per_element=size + 0.125,
            load_bits=128 if self.wide else None,
            # A sixteenth of the traffic or less, in half a wide store: a whole one takes registers
            # that fp32 has not.
            store_bits=64 if self.wide else None,
        )

    def launch(
        self, kernel: CompiledKernel, x: Tensor, misalignment_bytes: int
    ) -> tuple[Tensor, Counts]:
        """dpmem_kernels.pack_positive, of a flat x that starts past a boundary."""
        bits = poisoned(-(-x.numel() // BLOCK_BOOLS) * BLOCK_BYTES, torch.uint8)
        memory = placed(x, misalignment_bytes)
        programs = -(-x.numel() // self.elements)
        return bits, kernel.launch(programs, x, bits, x.numel(), memory=memory)

    def check(self, kernel: CompiledKernel) -> None:
        for mask in _masks(self.elements):
            x = torch.randn(mask.numel(), generator=torch.Generator().manual_seed(mask.numel()))
            special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45])
            x[:: x.numel() // 6 + 1] = special[: len(x[:: x.numel() // 6 + 1])]
            x = x.to(DTYPES[self.dtype])
            got, _ = self.launch(kernel, x, 0 if self.wide else x.itemsize)
            require(torch.equal(got, pack_positive_ref(x)), f"{self.name}: {x.numel()} elements")

    def moved(self, kernel: CompiledKernel) -> Moved:
        x = torch.ones(_LARGE, dtype=DTYPES[self.dtype])
        _, counts = self.launch(kernel, x, 0 if self.wide else x.itemsize)
        return Moved(_LARGE, counts)


@dataclass(frozen=True, kw_only=True)
class UnpackMaskCase(_MaskCase):
    @property
    def kernel(self) -> str:
        return "unpack_mask"

    def source(self) -> Source:
        return Source(
            function=unpack_mask_kernel,
            signature={"bits_ptr": "*u8", "mask_ptr": "*u8", "n": self.index},
            constexprs={"ROWS": self.rows, "WIDE": self.wide},
            aligned=("bits_ptr",) * self.wide + ("mask_ptr",),
        )

    def work(self) -> Work:
        width = 128 if self.wide else None
        return Work(self.elements, self.elements // 8, self.elements, 1.125, width, width)

    def launch(
        self, kernel: CompiledKernel, bits: Tensor, numel: int, misalignment_bytes: int
    ) -> tuple[Tensor, Counts]:
        """dpmem_kernels.unpack_mask, as the bytes of its bools: uint8 [numel]."""
        mask = poisoned(numel, torch.uint8)
        memory = placed(bits, misalignment_bytes)
        return mask, kernel.launch(-(-numel // self.elements), bits, mask, numel, memory=memory)

    def check(self, kernel: CompiledKernel) -> None:
        for mask in _masks(self.elements):
            bits = pack_mask_ref(mask)
            got, _ = self.launch(kernel, bits, mask.numel(), int(not self.wide))
            require(torch.equal(got, mask.view(torch.uint8)), f"{self.name}: {mask.numel()} bools")

    def moved(self, kernel: CompiledKernel) -> Moved:
        bits = torch.full((_LARGE // 8,), 0xFF, dtype=torch.uint8)
        _, counts = self.launch(kernel, bits, _LARGE, int(not self.wide))
        return Moved(_LARGE, counts)


def _masks(elements: int) -> list[Tensor]:
    """One less than whole programs, a ragged end, less than a block, and one element."""
    sizes = (2 * elements - 1, elements + 1234, BLOCK_BOOLS - 1, 1)
    return [torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.3 for n in sizes]


def mask_cases() -> list[KernelCase]:
    cases: list[KernelCase] = [
        Case(index=index, wide=wide)
        for Case in (PackMaskCase, UnpackMaskCase)
        for index, wide in (("i32", True), ("i64", True), ("i32", False))
    ]
    cases += [PackPositiveCase(dtype=dtype) for dtype in DTYPES]
    cases += [
        PackPositiveCase(dtype="bf16", index="i64"),
        PackPositiveCase(dtype="bf16", wide=False),
    ]
    return cases
