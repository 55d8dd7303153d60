"""dpmem: a memory toolkit for PyTorch data-parallel training.

`wrap` a model, `find_batch_size` of a `Job`, `report` where its bytes go.
"""

from dpmem.activations.audit import Audit, audit
from dpmem.activations.policy import Policy
from dpmem.comm_hooks import GradBucket, comm_hook
from dpmem.config import WrapConfig
from dpmem.data_parallel import DataParallel
from dpmem.executable_batch_size import find_executable_batch_size
from dpmem.finder import find_batch_size
from dpmem.forecast import estimate
from dpmem.jobs import report
from dpmem.scaling import LossScaler
from dpmem.wrapper import compress, wrap
from dpmem_profiling import BatchSizeResult, Estimate, Job, MemoryRecord, Probe, StepContext

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "BatchSizeResult",
    "DataParallel",
    "Estimate",
    "GradBucket",
    "Job",
    "LossScaler",
    "MemoryRecord",
    "Policy",
    "Probe",
    "StepContext",
    "WrapConfig",
    "audit",
    "comm_hook",
    "compress",
    "estimate",
    "find_batch_size",
    "find_executable_batch_size",
    "report",
    "wrap",
]
