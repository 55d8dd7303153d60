"""`dpmem doctor`: what is here, what works, what is missing."""

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from dpmem.targets import describe
from dpmem.terminal import bytes_or_unknown
from dpmem.top import number
from dpmem_kernels import Noise, dequantize, quantize
from dpmem_kernels.backend import HAS_NUMBA, HAS_TRITON, resolve_backend
from dpmem_profiling import nvml

Verdict = Literal["ok", "absent", "broken"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. "absent" takes a feature away, "broken" is a fault to mend."""

    what: str
    verdict: Verdict
    detail: str


def examine() -> tuple[Finding, ...]:
    """Look at everything dpmem stands on."""
    checks: tuple[Callable[[], Finding], ...] = (
        _python,
        _torch,
        _triton,
        _numba,
        _cuda,
        _nvml,
        _kernels,
    )
    return tuple(check() for check in checks)


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} on {platform.platform()}")


def _torch() -> Finding:
    return Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _triton() -> Finding:
    if not HAS_TRITON:
        return Finding("triton", "absent", "GPU tensors use the plain-torch reference")
    return Finding("triton", "ok", importlib.metadata.version("triton"))


def _numba() -> Finding:
    if not HAS_NUMBA:
        return Finding("numba", "absent", "CPU tensors use the plain-torch reference, slowly")
    return Finding("numba", "ok", importlib.metadata.version("numba"))


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch sees no GPU" if built else "this torch build has no GPU support"
        return Finding("GPU", "absent", f"{why}; everything runs on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("GPU", "ok", ", ".join(names))


def _nvml() -> Finding:
    try:
        devices = nvml.device_memory()
    except nvml.NvmlUnavailable as error:
        return Finding("NVML", "absent", str(error))
    try:
        visible = {device.uuid for device in nvml.visible_devices()}
    except ValueError as error:
        return Finding("NVML", "broken", str(error))
    return Finding("NVML", "ok", "; ".join(_device_words(d, d.uuid in visible) for d in devices))


def _device_words(device: nvml.DeviceMemory, visible: bool) -> str:
    used = f"{bytes_or_unknown(device.used_bytes)} of {bytes_or_unknown(device.total_bytes)} used"
    hidden = "" if visible else ", not visible to CUDA here"
    note = "" if device.note is None else f" ({device.note})"
    return f"{number(device)} {device.name}: {used}{hidden}{note}"


def _kernels() -> Finding:
    """Quantize and restore on each device, and compare with the reference bit for bit."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", 0))
    results = []
    verdict: Verdict = "ok"
    for device in devices:
        try:
            agrees = _agrees_with_reference(device)
            result = (
                f"{resolve_backend(device)} {'agrees with' if agrees else 'DIFFERS from'} reference"
            )
        except (RuntimeError, OSError, ImportError) as error:
            # What compilers and drivers raise, such as Triton without a C compiler.
            agrees, result = False, describe(error)
        verdict = verdict if agrees else "broken"
        results.append(f"{device}: {result}")
    return Finding("kernels", verdict, "; ".join(results))


def _agrees_with_reference(device: torch.device) -> bool:
    noise = Noise(seed=1, stream=2, step=3, rank=4)
    values = torch.linspace(-1, 1, 1000, device=device)
    stored = quantize(values, 4, noise=noise)
    expected = quantize(values, 4, noise=noise, backend="reference")
    restored = dequantize(stored, values.numel(), values.dtype, 4)
    same = all(torch.equal(a, b) for a, b in zip(stored, expected, strict=True))
    return same and bool(torch.isfinite(restored).all())
