"""What the NVIDIA driver knows about each GPU's memory. The only importer of `pynvml`.

NVML sees the whole device: every process, the CUDA contexts, what never passes through torch.
Nothing here creates a CUDA context.

Source: NVML API reference, nvmlDeviceGetMemoryInfo_v2 (version 1 counts the driver's reserved
memory as used) and the notes on MIG there; NVIDIA MIG user guide, "CUDA device enumeration".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any, NamedTuple

UNIFIED = (
    "this GPU shares the host's memory (unified memory), which NVML does not count; what the host "
    "has free is what is left"
)
MIG_PARENT = "in MIG mode only an administrator is shown the whole GPU; its instances are listed"

_DRIVER = "Install the NVIDIA driver, or run where there is one; a container needs --gpus all."
_SMI = "`nvidia-smi` shows whether the driver is well."
# What to do about each of NVML's answers; about the others, _SMI.
_FIXES = {
    "NVML_ERROR_LIBRARY_NOT_FOUND": _DRIVER,
    "NVML_ERROR_DRIVER_NOT_LOADED": "Load it with `sudo modprobe nvidia`, or reboot.",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": (
        "The driver was updated while the old one runs: reboot. In a container, restart it."
    ),
    "NVML_ERROR_FUNCTION_NOT_FOUND": "The driver is too old for this question: update it.",
    "NVML_ERROR_ARGUMENT_VERSION_MISMATCH": "The driver is too old for this question: update it.",
    "NVML_ERROR_NO_PERMISSION": (
        "This user may not ask: run as administrator, or be given access to /dev/nvidia*."
    ),
    "NVML_ERROR_OPERATING_SYSTEM": "The operating system blocks access to /dev/nvidia*.",
    "NVML_ERROR_GPU_IS_LOST": (
        "The GPU fell off the bus: `dmesg | grep Xid` says why; a power cycle brings it back."
    ),
    "NVML_ERROR_RESET_REQUIRED": "Reset it with `sudo nvidia-smi --gpu-reset`, or reboot.",
    "NVML_ERROR_GPU_NOT_FOUND": "There is no GPU, or its power cable or slot is at fault.",
    "NVML_ERROR_IRQ_ISSUE": "The GPU's interrupt does not arrive: check the firmware's settings.",
    "NVML_ERROR_INSUFFICIENT_POWER": "Connect the GPU's external power.",
    "NVML_ERROR_TIMEOUT": "The GPU is busy or hangs: try again, then reset it.",
    "NVML_ERROR_IN_USE": "Another program holds the GPU: try again.",
    "NVML_ERROR_NOT_SUPPORTED": "This GPU does not answer this question.",
}

_PROC = Path("/proc")
# The inode of the first PID namespace. Source: Linux, include/linux/proc_ns.h, PROC_PID_INIT_INO.
_HOST_PID_NAMESPACE = "pid:[4026531836]"


class NvmlUnavailable(RuntimeError):  # noqa: N818 - the public name
    """NVML cannot be asked: no library, no driver, or an error from it."""


@dataclass(frozen=True)
class DeviceMemory:
    """One GPU, or one MIG instance of one.

    index           of the GPU, in NVML's (PCI bus) order
    mig_index       which of the GPU's MIG instances; None for a whole GPU
    uuid            "GPU-…" or "MIG-…"
    total_bytes     with used_bytes and free_bytes None where NVML does not count; `note` says why
    reserved_bytes  the driver's own share; None where NVML cannot tell it apart (it is then part of
                    used_bytes)
    """

    index: int
    mig_index: int | None
    uuid: str
    name: str
    total_bytes: int | None
    used_bytes: int | None
    free_bytes: int | None
    reserved_bytes: int | None
    note: str | None = None


@dataclass(frozen=True)
class ProcessMemory:
    """One process that computes on a GPU.

    pid         as the driver says it: of the host, which means nothing inside a container
    name        what the kernel calls the process; None where this process cannot tell, as in a
                container
    used_bytes  None where the driver does not say (WSL, Windows)
    """

    pid: int
    name: str | None
    used_bytes: int | None


class Sample(NamedTuple):
    """The GPU's used bytes at `time_s`, on the clock of `time.perf_counter`."""

    time_s: float
    used_bytes: int


@contextmanager
def session() -> Iterator[Any]:
    """`pynvml`, initialised inside the block; its errors become NvmlUnavailable.

    Every function here opens its own. One around several makes theirs cheap: without persistence
    mode the first initialisation takes about a second.
    """
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
    except pynvml.NVMLError as error:
        raise _unavailable(pynvml, error) from error


def device_memory() -> tuple[DeviceMemory, ...]:
    """All GPUs of the machine in NVML's order, each followed by its MIG instances.

    Raises NvmlUnavailable where the library or the driver is missing or reports an error.
    """
    with session() as pynvml:
        return tuple(_read(pynvml, found) for found in _all_found(pynvml))


def visible_devices() -> tuple[DeviceMemory, ...]:
    """What CUDA lets this process use, in CUDA's order, by CUDA_VISIBLE_DEVICES; all where unset.

    Entries are indices of GPUs or UUIDs, of GPUs or MIG instances, whole or abbreviated. As in
    CUDA, the first entry that names nothing ends the list, a GPU in MIG mode stands for its first
    instance, and a process that sees an instance sees that one alone.

    Raises NvmlUnavailable as `device_memory` does, and ValueError for an index of different GPUs
    without CUDA_DEVICE_ORDER=PCI_BUS_ID: CUDA then counts the fastest first, and NVML cannot tell.
    """
    devices = device_memory()
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        chosen = [device for device in devices if device.mig_index is None]
    else:
        chosen = list(_named(setting, devices))
    first_instances = {
        device.index: device for device in reversed(devices) if device.mig_index is not None
    }
    usable = [
        first_instances.get(device.index, device) if device.mig_index is None else device
        for device in chosen
    ]
    instances = [device for device in usable if device.mig_index is not None]
    return tuple(instances[:1] or usable)


def processes(uuid: str) -> tuple[ProcessMemory, ...] | None:
    """The processes that compute on the GPU or MIG instance `uuid`; None where NVML lists none.

    It lists none for a GPU in MIG mode to other than administrators, and none under WSL.

    Raises ValueError for a UUID that no device has, and NvmlUnavailable as `device_memory` does.
    """
    with session() as pynvml:
        handle = _find(pynvml, uuid).handle
        try:
            try:
                running = pynvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
            except pynvml.NVMLError_FunctionNotFound:
                # Drivers before 510.
                running = pynvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
            return None
        return tuple(
            ProcessMemory(process.pid, _process_name(process.pid), process.usedGpuMemory)
            for process in running
        )


class Sampler:
    """Reads a GPU's used bytes every `every_s` seconds, in a thread, from `with` to its end.

    uuid     of a GPU or MIG instance, also without its "GPU-" or "MIG-", as torch writes it
    every_s  seconds between two readings; what is shorter than that may be missed

    There is a reading at the start and one at the end. `samples` holds them all, `peak_bytes` the
    highest. An error after the first reading ends the sampling and is raised by `peak_bytes`.

    Entering raises NvmlUnavailable as `device_memory` does, also for a GPU whose memory NVML does
    not count, and ValueError for a UUID that no device has.
    """

    def __init__(self, uuid: str, every_s: float = 0.005) -> None:
        if every_s <= 0:
            raise ValueError(f"every_s must be more than 0 seconds; got {every_s}")
        self.uuid = uuid
        self.every_s = every_s
        self.samples: list[Sample] = []
        self._error: NvmlUnavailable | None = None
        self._stop = Event()

    @property
    def peak_bytes(self) -> int:
        """The most bytes in use at any reading. Raises NvmlUnavailable where one failed."""
        if self._error is not None:
            raise self._error
        return max(sample.used_bytes for sample in self.samples)

    def __enter__(self) -> Sampler:
        with ExitStack() as undo:
            self._pynvml = undo.enter_context(session())
            found = _find(self._pynvml, self.uuid)
            first = _read(self._pynvml, found)
            if first.used_bytes is None:
                raise NvmlUnavailable(f"memory in use is not known: {first.note}")
            self.samples.append(Sample(perf_counter(), first.used_bytes))
            self._handle = found.handle
            self._thread = Thread(target=self._run, name="nvml-sampler", daemon=True)
            self._thread.start()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is None:
            self._take()
        self._undo.close()

    def _run(self) -> None:
        while self._error is None and not self._stop.wait(self.every_s):
            self._take()

    def _take(self) -> None:
        try:
            used_bytes = _memory(self._pynvml, self._handle)[1]
        except self._pynvml.NVMLError as error:
            self._error = _unavailable(self._pynvml, error)
        else:
            self.samples.append(Sample(perf_counter(), used_bytes))


@dataclass(frozen=True)
class _Found:
    handle: Any
    index: int
    mig_index: int | None
    uuid: str
    in_mig_mode: bool


def _all_found(pynvml: Any) -> Iterator[_Found]:
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        in_mig_mode = _in_mig_mode(pynvml, handle)
        yield _Found(handle, index, None, pynvml.nvmlDeviceGetUUID(handle), in_mig_mode)
        slots = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if in_mig_mode else 0
        for slot in range(slots):
            try:
                instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot)
            except pynvml.NVMLError_NotFound:
                continue
            yield _Found(instance, index, slot, pynvml.nvmlDeviceGetUUID(instance), False)


def _in_mig_mode(pynvml: Any, handle: Any) -> bool:
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return False
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def _find(pynvml: Any, uuid: str) -> _Found:
    found = list(_all_found(pynvml))
    for device in found:
        if uuid in (device.uuid, device.uuid.partition("-")[2]):
            return device
    known = ", ".join(device.uuid for device in found) or "none"
    raise ValueError(f"uuid must be one of this machine's, {known}; received {uuid!r}")


def _read(pynvml: Any, found: _Found) -> DeviceMemory:
    sizes: tuple[int | None, int | None, int | None, int | None] = (None, None, None, None)
    note = None
    try:
        sizes = _memory(pynvml, found.handle)
    except pynvml.NVMLError_NotSupported:
        note = UNIFIED
    except pynvml.NVMLError_NoPermission:
        if not found.in_mig_mode:
            raise
        note = MIG_PARENT
    if sizes[0] == 0:
        sizes, note = (None, None, None, None), UNIFIED
    return DeviceMemory(
        index=found.index,
        mig_index=found.mig_index,
        uuid=found.uuid,
        name=pynvml.nvmlDeviceGetName(found.handle),
        total_bytes=sizes[0],
        used_bytes=sizes[1],
        free_bytes=sizes[2],
        reserved_bytes=sizes[3],
        note=note,
    )


def _memory(pynvml: Any, handle: Any) -> tuple[int, int, int, int | None]:
    """Total, used, free and, where NVML tells it apart, reserved bytes."""
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except (pynvml.NVMLError_FunctionNotFound, pynvml.NVMLError_ArgumentVersionMismatch):
        # Drivers before 510 have version 1 alone.
        info = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return info.total, info.used, info.free, None
    return info.total, info.used, info.free, info.reserved


def _named(setting: str, devices: tuple[DeviceMemory, ...]) -> Iterator[DeviceMemory]:
    gpus = [device for device in devices if device.mig_index is None]
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdecimal():
            named = [gpu for gpu in gpus if gpu.index == int(entry)]
            one_model = len({gpu.name for gpu in gpus}) == 1
            if named and not one_model and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
                raise ValueError(
                    "among different GPUs an index must follow a stated order; received "
                    f"CUDA_VISIBLE_DEVICES={setting} without CUDA_DEVICE_ORDER; set "
                    "CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the GPU by its UUID"
                )
        else:
            named = [device for device in devices if entry and device.uuid.startswith(entry)]
        if len(named) != 1:
            return
        yield named[0]


def _process_name(pid: int) -> str | None:
    """The name of the host's process `pid`; in a container that number is somebody else's."""
    try:
        if os.readlink(_PROC / "self/ns/pid") != _HOST_PID_NAMESPACE:
            return None
        return (_PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return None


def _unavailable(pynvml: Any, error: Any) -> NvmlUnavailable:
    fixes = {getattr(pynvml, name): fix for name, fix in _FIXES.items()}
    fix = fixes.get(error.value, _SMI)
    words = " ".join(str(error).split()).rstrip(".")
    reason = f"NVML, the driver's library, reported {words!r} (code {error.value})"
    if isinstance(error, pynvml.NVMLError_LibraryNotFound):
        reason = "the NVIDIA driver is missing: libnvidia-ml.so.1 cannot be loaded"
    return NvmlUnavailable(f"GPU memory cannot be read: {reason}. {fix}")
