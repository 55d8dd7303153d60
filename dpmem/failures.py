"""How a step says that it failed."""

import re

import torch

from dpmem_profiling import MemoryLimitExceeded

# Where torch raises a plain RuntimeError for memory that ran out. Sources: c10/core/
# impl/alloc_cpu.cpp, cudaGetErrorString, aten/src/ATen/cuda/CUDABlas.cpp, cudnn's status names, and
# torch/csrc/Exceptions.h, which passes on what C++ itself says.
_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (not enough|can't allocate) memory"
    r"|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|\Astd::bad_alloc\Z"
)


class Failure(Exception):  # noqa: N818 - a mark on errors that say all there is to say
    """Not to be explained further."""


class StepFailed(Failure, RuntimeError):  # noqa: N818 - as above
    """A rank failed."""


class StepOutOfMemory(Failure, torch.OutOfMemoryError):
    """A rank ran out of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for every way in which a step says that memory ran out, and for nothing else."""
    if isinstance(error, MemoryLimitExceeded | torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
