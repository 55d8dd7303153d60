"""The cases of quantize_fp8 and dequantize_fp8."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpmem_kernels.fp8 import FORMATS, dequantize_fp8_ref, quantize_fp8_ref
from dpmem_kernels.fp8_triton import BLOCK, dequantize_fp8_kernel, quantize_fp8_kernel
from verify.activations import awkward_activations
from verify.cases import DTYPES, KernelCase, Source, Work, require
from verify.launch import CompiledKernel, Moved, placed, poisoned, same_bits
from verify.ptx import Counts

_CODE_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_LARGE = 1 << 17


@dataclass(frozen=True, kw_only=True)
class _Fp8Case(KernelCase):
    """`wide`: the source starts at a 16-byte boundary."""

    dtype: str
    code: str
    group_size: int = 128
    index: str = "i32"
    wide: bool = True
    block: int = BLOCK

    @property
    def variant(self) -> str:
        parts = [self.dtype, self.code, f"G{self.group_size}"]
        parts += ["i64"] * (self.index == "i64") + ["unaligned"] * (not self.wide)
        return " ".join(parts)

    @property
    def bar(self) -> str | None:
        return self.kernel if self.wide else None

    @property
    def code_dtype(self) -> torch.dtype:
        return _CODE_DTYPES[self.code]

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def floor_bytes_per_element(self) -> float:
        return self.element_bytes + 1 + 1 / self.group_size

    def constexprs(self) -> dict[str, int]:
        layout = FORMATS[self.code_dtype]
        return {
            "G": self.group_size,
            "ROWS": self.block // self.group_size,
            "MANTISSA": layout.mantissa_bits,
            "BIAS": layout.bias,
        }


@dataclass(frozen=True, kw_only=True)
class QuantizeFp8Case(_Fp8Case):
    @property
    def kernel(self) -> str:
        return "quantize_fp8"

    def source(self) -> Source:
        return Source(
            function=quantize_fp8_kernel,
            signature={"x_ptr": f"*{self.dtype}", "codes_ptr": "*u8", "scales_ptr": "*u8"}
            | {"n": self.index},
            constexprs=self.constexprs() | {"TOP": FORMATS[self.code_dtype].top},
            aligned=("x_ptr",) * self.wide + ("codes_ptr", "scales_ptr"),
        )

    def work(self) -> Work:
        return Work(
            elements=self.block,
            read_bytes=self.block * self.element_bytes,
            written_bytes=self.block,
            floor_bytes_per_element=self.floor_bytes_per_element,
            load_bits=128 if self.wide else None,
            # A lane's 16 bytes of elements are 4 or 8 codes.
            store_bits=128 // self.element_bytes if self.wide else None,
        )

    def launch(self, kernel: CompiledKernel, x: Tensor) -> tuple[tuple[Tensor, Tensor], Counts]:
        """dpmem_kernels.quantize_fp8 of a flat x, in bytes."""
        groups = -(-x.numel() // self.group_size)
        out = poisoned(x.numel(), torch.uint8), poisoned(groups, torch.uint8)
        programs = -(-groups // (self.block // self.group_size))
        memory = placed(x, 0 if self.wide else x.itemsize)
        return out, kernel.launch(programs, x, *out, x.numel(), memory=memory)

    def check(self, kernel: CompiledKernel) -> None:
        for x in awkward_activations(self.block, DTYPES[self.dtype]):
            want = quantize_fp8_ref(x, self.code_dtype, self.group_size)
            got, _ = self.launch(kernel, x)
            require(torch.equal(got[1], want[1]), f"{self.name}: scales of {x.numel()} elements")
            require(torch.equal(got[0], want[0]), f"{self.name}: codes of {x.numel()} elements")

    def moved(self, kernel: CompiledKernel) -> Moved:
        x = torch.linspace(-3, 3, _LARGE).to(DTYPES[self.dtype])
        return Moved(_LARGE, self.launch(kernel, x)[1])


@dataclass(frozen=True, kw_only=True)
class DequantizeFp8Case(_Fp8Case):
    @property
    def kernel(self) -> str:
        return "dequantize_fp8"

    def source(self) -> Source:
        return Source(
            function=dequantize_fp8_kernel,
            signature={"codes_ptr": "*u8", "scales_ptr": "*u8", "out_ptr": f"*{self.dtype}"}
            | {"n": self.index},
            constexprs=self.constexprs(),
            aligned=("codes_ptr",) * self.wide + ("scales_ptr", "out_ptr"),
        )

    def work(self) -> Work:
        return Work(
            elements=self.block,
            read_bytes=self.block,
            written_bytes=self.block * self.element_bytes,
            floor_bytes_per_element=self.floor_bytes_per_element,
            # The codes of the elements that fill a wide store do not fill a wide load.
            load_bits=128 // self.element_bytes if self.wide else None,
            store_bits=128 if self.wide else None,
        )

    def launch(
        self, kernel: CompiledKernel, codes: Tensor, scales: Tensor
    ) -> tuple[Tensor, Counts]:
        """dpmem_kernels.dequantize_fp8 of flat bytes."""
        out = poisoned(codes.numel(), DTYPES[self.dtype])
        programs = -(-codes.numel() // self.block)
        memory = placed(codes, int(not self.wide))
        return out, kernel.launch(programs, codes, scales, out, codes.numel(), memory=memory)

    def check(self, kernel: CompiledKernel) -> None:
        dtype = DTYPES[self.dtype]
        for x in awkward_activations(self.block, dtype):
            halves = quantize_fp8_ref(x, self.code_dtype, self.group_size)
            want = dequantize_fp8_ref(*halves, self.code_dtype, dtype, self.group_size)
            got, _ = self.launch(kernel, *halves)
            require(same_bits(got, want), f"{self.name}: values of {x.numel()} elements")

    def moved(self, kernel: CompiledKernel) -> Moved:
        x = torch.linspace(-3, 3, _LARGE)
        halves = quantize_fp8_ref(x, self.code_dtype, self.group_size)
        return Moved(_LARGE, self.launch(kernel, *halves)[1])


def fp8_cases() -> list[KernelCase]:
    cases: list[KernelCase] = []
    for Case in (QuantizeFp8Case, DequantizeFp8Case):
        cases += [Case(dtype=dtype, code="e4m3") for dtype in DTYPES]
        cases.append(Case(dtype="bf16", code="e5m2"))
        cases.append(Case(dtype="bf16", code="e4m3", group_size=64))
        cases.append(Case(dtype="bf16", code="e4m3", index="i64"))
        cases.append(Case(dtype="bf16", code="e4m3", wide=False))
    return cases
