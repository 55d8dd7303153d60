"""The cases of split_master and join_master."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpmem_kernels.master import join_ref, split_ref
from dpmem_kernels.master_triton import BLOCK, join_kernel, split_kernel
from verify.cases import KernelCase, Source, Work, require
from verify.launch import CompiledKernel, Moved, placed, poisoned
from verify.ptx import Counts

_LARGE = 1 << 17


@dataclass(frozen=True, kw_only=True)
class _MasterCase(KernelCase):
    """`wide`: the source starts at a 16-byte boundary."""

    index: str = "i32"
    wide: bool = True
    block: int = BLOCK

    @property
    def variant(self) -> str:
        return " ".join(["i64"] * (self.index == "i64") + ["unaligned"] * (not self.wide))

    @property
    def bar(self) -> str | None:
        return self.kernel if self.wide else None

    def work(self) -> Work:
        width = 128 if self.wide else None
        return Work(self.block, self.block * 4, self.block * 4, 8, width, width)

    @property
    def masters(self) -> list[Tensor]:
        """Every kind of float: all upper halves, each with the lower halves that round apart."""
        top = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
        low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
        every = (top + low).to(torch.int32).view(-1).view(torch.float32)
        return [every[: 2 * self.block - 1], every, every[-(self.block + 77) :], every[:1]]


@dataclass(frozen=True, kw_only=True)
class SplitCase(_MasterCase):
    @property
    def kernel(self) -> str:
        return "split_master"

    def source(self) -> Source:
        return Source(
            function=split_kernel,
            signature={"master_ptr": "*i32", "weight_ptr": "*i16", "remainder_ptr": "*i16"}
            | {"n": self.index},
            constexprs={"BLOCK": self.block},
            aligned=("master_ptr",) * self.wide + ("weight_ptr", "remainder_ptr"),
        )

    def launch(
        self, kernel: CompiledKernel, master: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Counts]:
        """dpmem_kernels.split_master, of a flat tensor."""
        weight = poisoned(master.numel(), torch.bfloat16)
        remainder = poisoned(master.numel(), torch.int16)
        counts = kernel.launch(
            -(-master.numel() // self.block), master, weight, remainder, master.numel(),
            memory=placed(master, 0 if self.wide else 4),
        )  # fmt: skip
        return (weight, remainder), counts

    def check(self, kernel: CompiledKernel) -> None:
        for master in self.masters:
            got, _ = self.launch(kernel, master)
            for half, want in zip(got, split_ref(master), strict=True):
                same = torch.equal(half.view(torch.int16), want.view(torch.int16))
                require(same, f"{self.name}: {half.dtype} of {master.numel()} elements")

    def moved(self, kernel: CompiledKernel) -> Moved:
        return Moved(_LARGE, self.launch(kernel, torch.linspace(-3, 3, _LARGE))[1])


@dataclass(frozen=True, kw_only=True)
class JoinCase(_MasterCase):
    @property
    def kernel(self) -> str:
        return "join_master"

    def source(self) -> Source:
        return Source(
            function=join_kernel,
            signature={"weight_ptr": "*i16", "remainder_ptr": "*i16", "master_ptr": "*i32"}
            | {"n": self.index},
            constexprs={"BLOCK": self.block},
            aligned=("weight_ptr",) * self.wide + ("remainder_ptr", "master_ptr"),
        )

    def launch(
        self, kernel: CompiledKernel, weight: Tensor, remainder: Tensor
    ) -> tuple[Tensor, Counts]:
        """dpmem_kernels.join_master, of flat halves."""
        master = poisoned(weight.numel(), torch.float32)
        counts = kernel.launch(
            -(-weight.numel() // self.block), weight, remainder, master, weight.numel(),
            memory=placed(weight, 0 if self.wide else 2),
        )  # fmt: skip
        return master, counts

    def check(self, kernel: CompiledKernel) -> None:
        for master in self.masters:
            halves = split_ref(master)
            got, _ = self.launch(kernel, *halves)
            same = torch.equal(got.view(torch.int32), join_ref(*halves).view(torch.int32))
            require(same, f"{self.name}: {master.numel()} elements")

    def moved(self, kernel: CompiledKernel) -> Moved:
        halves = split_ref(torch.linspace(-3, 3, _LARGE))
        return Moved(_LARGE, self.launch(kernel, *halves)[1])


def master_cases() -> list[KernelCase]:
    return [
        Case(index=index, wide=wide)
        for Case in (SplitCase, JoinCase)
        for index, wide in (("i32", True), ("i64", True), ("i32", False))
    ]
