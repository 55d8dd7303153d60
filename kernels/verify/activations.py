"""The cases of quantize and dequantize."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpmem_kernels.quantize import Noise, Quantized, dequantize_ref, quantize_ref
from dpmem_kernels.quantize_triton import BLOCK, dequantize_kernel, quantize_kernel
from verify.cases import DTYPES, KernelCase, Source, Work, require
from verify.launch import CompiledKernel, Moved, placed, poisoned, same_bits
from verify.ptx import Counts

# Words of the noise with their top bits set: Triton passes them as signed, the executor as bits.
NOISE = Noise(seed=0x9234567812345678, stream=3, step=0xF0000001, rank=1).words
_NOISE_NAMES = ("key_low", "key_high", "stream", "step", "rank")
_LARGE = 1 << 17


@dataclass(frozen=True, kw_only=True)
class _ActivationCase(KernelCase):
    dtype: str
    bits: int
    group_size: int = 128
    index: str = "i32"

    @property
    def variant(self) -> str:
        parts = [self.dtype, f"{self.bits}bit", f"G{self.group_size}"]
        parts += ["i64"] * (self.index == "i64") + ["portable"] * self.portable
        return " ".join(parts)

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def floor_bytes_per_element(self) -> float:
        return self.element_bytes + self.bits / 8 + 4 / self.group_size


@dataclass(frozen=True, kw_only=True)
class QuantizeCase(_ActivationCase):
    """`wide`: x starts at a 16-byte boundary. `block`: elements in a program."""

    wide: bool = True
    block: int = BLOCK

    @property
    def kernel(self) -> str:
        return "quantize"

    @property
    def variant(self) -> str:
        return super().variant + ("" if self.wide else " unaligned")

    @property
    def bar(self) -> str | None:
        if not self.wide:
            return None
        return "quantize portable" if self.portable else "quantize"

    def source(self) -> Source:
        return Source(
            function=quantize_kernel,
            signature={"x_ptr": f"*{self.dtype}", "codes_ptr": "*u8", "meta_ptr": "*i32"}
            | {"n": self.index}
            | dict.fromkeys(_NOISE_NAMES, "i32"),
            constexprs={
                "G": self.group_size,
                "BITS": self.bits,
                "ROWS": self.block // self.group_size,
                "WIDE": self.wide,
                "ASM": self.assembly,
            },
            aligned=("x_ptr",) * self.wide + ("codes_ptr", "meta_ptr"),
        )

    def work(self) -> Work:
        return Work(
            elements=self.block,
            read_bytes=self.block * self.element_bytes,
            written_bytes=self.block * self.bits // 8,
            floor_bytes_per_element=self.floor_bytes_per_element,
            load_bits=128 if self.wide else None,
            # 2-bit codes of the eight words that a lane reads at a time are 16 bits each.
            store_bits=(64 if self.bits == 2 else 128) if self.wide else None,
        )

    def launch(
        self, kernel: CompiledKernel, x: Tensor, misalignment_bytes: int = 0
    ) -> tuple[Quantized, Counts]:
        """dpmem_kernels.quantize, of a flat x that starts `misalignment_bytes` past a boundary."""
        groups = -(-x.numel() // self.group_size)
        out = Quantized(
            poisoned(groups * self.group_size * self.bits // 8, torch.uint8),
            poisoned(groups, torch.int32),
        )
        programs = -(-groups // (self.block // self.group_size))
        memory = placed(x, misalignment_bytes)
        return out, kernel.launch(programs, x, *out, x.numel(), *NOISE, memory=memory)

    def check(self, kernel: CompiledKernel) -> None:
        dtype = DTYPES[self.dtype]
        tensors = awkward_activations(self.block, dtype)
        if dtype == torch.float32:
            tensors.append(_scales_near_a_step(self.bits, self.group_size))
        for x in tensors:
            for misalignment_bytes in (0,) if self.wide else (x.itemsize, 16 - x.itemsize):
                want = quantize_ref(x, self.bits, self.group_size, NOISE)
                got, _ = self.launch(kernel, x, misalignment_bytes)
                where = f"of {x.numel()} elements, {misalignment_bytes} bytes off"
                require(torch.equal(got.meta, want.meta), f"{self.name}: metadata {where}")
                require(torch.equal(got.codes, want.codes), f"{self.name}: codes {where}")

    def moved(self, kernel: CompiledKernel) -> Moved:
        x = torch.linspace(-3, 3, _LARGE).to(DTYPES[self.dtype])
        _, counts = self.launch(kernel, x, 0 if self.wide else x.itemsize)
        return Moved(x.numel(), counts)


@dataclass(frozen=True, kw_only=True)
class DequantizeCase(_ActivationCase):
    """`block`: elements in a program, None as the launcher chooses."""

    block: int | None = None

    @property
    def kernel(self) -> str:
        return "dequantize"

    @property
    def elements(self) -> int:
        return self.block or BLOCK * 2 // self.element_bytes

    def source(self) -> Source:
        return Source(
            function=dequantize_kernel,
            signature={"codes_ptr": "*u8", "meta_ptr": "*i32", "out_ptr": f"*{self.dtype}"}
            | {"n": self.index},
            constexprs={
                "G": self.group_size,
                "BITS": self.bits,
                "ROWS": self.elements // self.group_size,
                "ASM": self.assembly,
            },
            aligned=("codes_ptr", "meta_ptr", "out_ptr"),
        )

    def work(self) -> Work:
        # The codes of the elements that fill a thread's wide store may not fill a wide load.
        words = 2 if self.element_bytes == 4 else 4
        return Work(
            elements=self.elements,
            read_bytes=self.elements * self.bits // 8,
            written_bytes=self.elements * self.element_bytes,
            floor_bytes_per_element=self.floor_bytes_per_element,
            load_bits=words * (16 if self.bits == 2 else 32),
        )

    def launch(
        self, kernel: CompiledKernel, quantized: Quantized, numel: int
    ) -> tuple[Tensor, Counts]:
        """dpmem_kernels.dequantize."""
        out = poisoned(numel, DTYPES[self.dtype])
        return out, kernel.launch(-(-numel // self.elements), *quantized, out, numel)

    def check(self, kernel: CompiledKernel) -> None:
        dtype = DTYPES[self.dtype]
        for x in awkward_activations(self.elements, dtype):
            codes = quantize_ref(x, self.bits, self.group_size, NOISE)
            want = dequantize_ref(*codes, x.numel(), dtype, self.bits, self.group_size)
            got, _ = self.launch(kernel, codes, x.numel())
            require(same_bits(got, want), f"{self.name}: values of {x.numel()} elements")

    def moved(self, kernel: CompiledKernel) -> Moved:
        x = torch.linspace(-3, 3, _LARGE)
        _, counts = self.launch(kernel, quantize_ref(x, self.bits, self.group_size, NOISE), _LARGE)
        return Moved(_LARGE, counts)


def awkward_activations(block: int, dtype: torch.dtype) -> list[Tensor]:
    """One element less than whole programs, a ragged end, one program, and one element.

    They hold six decades and every kind of group.
    """
    return [_values(numel, dtype) for numel in (2 * block - 1, block + 1234, block, 1)]


def _scales_near_a_step(bits: int, group_size: int) -> Tensor:
    """32 groups of two fp32 values each, whose scale is at most 7 units below a bf16 number.

    There the step up that keeps roundings from lifting the largest element past the last code makes
    the difference. One pair of numbers in 9000 is of the kind; of bf16 and fp16 hardly any is.
    """
    generator = torch.Generator().manual_seed(0)
    low, high = torch.rand(2, 1 << 20, generator=generator) + torch.tensor([[-2.0], [8.0]])
    low = low.bfloat16().float()
    scale = (high - low) * torch.tensor(1 / ((1 << bits) - 1), dtype=torch.float32)
    near = (scale.view(torch.int32) & 0xFFFF) >= 0x10000 - 7
    groups = torch.stack((low[near], high[near]), 1)[:32]
    return groups.repeat_interleave(group_size // 2, 1).view(-1)


def _values(numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator) * torch.logspace(-3, 3, numel)
    for first, value in ((70, "nan"), (300, "inf"), (600, "-inf")):
        x[first : first + 1] = float(value)
    x[1024:1280] = 0
    x[1280:1536] = 1.5
    x[1536:1792] *= 1e30
    x[1792:2048] *= 1e-38 if dtype != torch.float16 else 1e-7
    x[2048:2304:2] = -0.0
    return x.to(dtype)


def activation_cases(*, assembly: int) -> list[KernelCase]:
    """What GPUs with that assembly launch.

    Every dtype and width at the default group size and index; every other group size, the 64-bit
    index and unaligned sources once for every dtype of quantize, where the code differs most, and
    once for dequantize. If there is assembly, the portable twins too.
    """
    formats = [(dtype, bits) for dtype in DTYPES for bits in (8, 4, 2)]
    cases: list[KernelCase] = []
    for Case in (QuantizeCase, DequantizeCase):
        cases += [Case(dtype=d, bits=b, assembly=assembly) for d, b in formats]
    for dtype in DTYPES:
        for size in (64, 256):
            cases.append(QuantizeCase(dtype=dtype, bits=4, group_size=size, assembly=assembly))
        cases.append(QuantizeCase(dtype=dtype, bits=4, index="i64", assembly=assembly))
        cases.append(QuantizeCase(dtype=dtype, bits=4, wide=False, assembly=assembly))
    for size in (64, 256):
        cases.append(DequantizeCase(dtype="bf16", bits=4, group_size=size, assembly=assembly))
    cases.append(DequantizeCase(dtype="bf16", bits=4, index="i64", assembly=assembly))
    if assembly:
        cases += [QuantizeCase(dtype=d, bits=b, assembly=0) for d, b in formats]
        cases += [DequantizeCase(dtype=d, bits=4, assembly=0) for d in DTYPES]
    return cases
