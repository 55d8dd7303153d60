"""What the NVIDIA driver knows about each GPU's memory. The only importer of `pynvml`.

NVML sees the whole device: every process, the CUDA contexts, what never passes through torch.
Nothing here creates a CUDA context.

Source: NVML API reference, nvmlDeviceGetMemoryInfo_v2 (version 1 counts the driver's reserved
memory as used).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class NvmlUnavailable(RuntimeError):  # noqa: N818 - the public name
    """NVML cannot be asked: no library, no driver, or an error from it."""


@dataclass(frozen=True)
class DeviceMemory:
    """One GPU. `reserved_bytes` is the driver's own share, None where NVML cannot tell it apart
    (it is then part of `used_bytes`)."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    reserved_bytes: int | None


@dataclass(frozen=True)
class ProcessMemory:
    """One process that uses a GPU; `used_bytes` is None where the driver does not say (WSL,
    containers)."""

    pid: int
    used_bytes: int | None


def device_memory() -> tuple[DeviceMemory, ...]:
    """All GPUs of the machine, in NVML's (PCI bus) order.

    Raises NvmlUnavailable where the library or the driver is missing or reports an error.
    """
    with _session() as pynvml:
        return tuple(_device_memory(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))


def visible_devices() -> tuple[DeviceMemory, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES lets this process use, in its order; all where unset.

    Entries may be indices or (abbreviated) UUIDs. As in CUDA, the first entry that names no GPU
    ends the list. Raises NvmlUnavailable as `device_memory` does.
    """
    devices = device_memory()
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return devices
    visible: list[DeviceMemory] = []
    for entry in (part.strip() for part in setting.split(",")):
        named = [
            device
            for device in devices
            if entry and (str(device.index) == entry or device.uuid.startswith(entry))
        ]
        if len(named) != 1:
            break
        visible.append(named[0])
    return tuple(visible)


def processes(index: int) -> tuple[ProcessMemory, ...]:
    """The processes that compute on GPU number `index`.

    Raises NvmlUnavailable as `device_memory` does, also for an index that does not exist.
    """
    with _session() as pynvml:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        return tuple(
            ProcessMemory(pid=process.pid, used_bytes=process.usedGpuMemory)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        )


def _device_memory(pynvml: Any, index: int) -> DeviceMemory:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        reserved_bytes = info.reserved
    except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLLibraryMismatchError):
        # Drivers before 510 have version 1 alone.
        info = pynvml.nvmlDeviceGetMemoryInfo(handle)
        reserved_bytes = None
    return DeviceMemory(
        index=index,
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=info.total,
        used_bytes=info.used,
        free_bytes=info.free,
        reserved_bytes=reserved_bytes,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


@contextmanager
def _session() -> Iterator[Any]:
    """NVML, initialised inside the block; its errors become NvmlUnavailable."""
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise NvmlUnavailable(
            "reading GPU memory needs the Python package nvidia-ml-py; importing pynvml failed. "
            "Install nvidia-ml-py."
        ) from error
    try:
        pynvml.nvmlInit()
        try:
            yield pynvml
        finally:
            pynvml.nvmlShutdown()
    except (
        pynvml.NVMLError_LibraryNotFound,
        pynvml.NVMLError_DriverNotLoaded,
    ) as error:
        raise NvmlUnavailable(
            f"reading GPU memory needs the NVIDIA driver; loading libnvidia-ml.so.1 failed "
            f"({error}). Install the driver, or run where there is one."
        ) from error
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as error:
        raise NvmlUnavailable(
            f"NVML must answer a question about GPU memory; it reported: {error}. "
            "`nvidia-smi` shows whether the driver is well."
        ) from error
