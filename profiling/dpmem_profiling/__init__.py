"""Where the bytes of a training step go: measure it, search the batch that fits, report it."""

from dpmem_profiling.allocator import CachingAllocator, OutOfDeviceMemory
from dpmem_profiling.allocator_settings import AllocatorSettings
from dpmem_profiling.batch_size import search
from dpmem_profiling.estimate import Estimate, Forecast
from dpmem_profiling.job import InvalidJob, Job, StepContext, build, make_batch, run_step
from dpmem_profiling.meter import measure
from dpmem_profiling.nvml import NvmlUnavailable, device_memory
from dpmem_profiling.record import CATEGORIES, BatchSizeResult, Category, MemoryRecord, Probe
from dpmem_profiling.replay import DeviceReplay, ReplayRun, replay_snapshot
from dpmem_profiling.report import ReportFiles, terminal_table, write_report
from dpmem_profiling.snapshot import read_snapshot
from dpmem_profiling.trace import Untraceable
from dpmem_profiling.tracker import MemoryLimitExceeded
from dpmem_profiling.units import format_bytes

__all__ = [
    "CATEGORIES",
    "AllocatorSettings",
    "BatchSizeResult",
    "CachingAllocator",
    "Category",
    "DeviceReplay",
    "Estimate",
    "Forecast",
    "InvalidJob",
    "Job",
    "MemoryLimitExceeded",
    "MemoryRecord",
    "NvmlUnavailable",
    "OutOfDeviceMemory",
    "Probe",
    "ReplayRun",
    "ReportFiles",
    "StepContext",
    "Untraceable",
    "build",
    "device_memory",
    "format_bytes",
    "make_batch",
    "measure",
    "read_snapshot",
    "replay_snapshot",
    "run_step",
    "search",
    "terminal_table",
    "write_report",
]
