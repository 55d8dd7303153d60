"""Which implementation of an op runs: one decision, in one place.

`triton`     CUDA and ROCm tensors; CPU tensors too while Triton's interpreter is on
             (TRITON_INTERPRET=1 before this package is imported: that is how tests run kernels).
`cpu`        CPU tensors, loops compiled by numba.
`reference`  any device, plain torch: the specification of every op, and the only backend
             where neither Triton nor numba is installed.

Without a request the choice is triton for GPU tensors, cpu for CPU tensors, and reference where
that one's compiler is not installed at all. A requested backend runs or raises; it never becomes
another one.
"""

import importlib.util
import os
from typing import Literal, get_args

import torch

Backend = Literal["triton", "cpu", "reference"]

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_NUMBA = importlib.util.find_spec("numba") is not None
# Triton reads this when a kernel is decorated, so what counts is its value at import.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve_backend(device: torch.device, requested: Backend | None = None) -> Backend:
    """The backend for tensors on `device`.

    Raises ValueError where `requested` is no backend or cannot serve `device`, and RuntimeError
    where its compiler is not installed.
    """
    if requested is None:
        if device.type == "cuda":
            return "triton" if HAS_TRITON else "reference"
        if device.type == "cpu":
            return "cpu" if HAS_NUMBA else "reference"
        return "reference"
    if requested not in get_args(Backend):
        raise ValueError(
            f"backend must be one of {', '.join(get_args(Backend))}; received {requested!r}"
        )
    if requested == "triton":
        if not HAS_TRITON:
            raise RuntimeError(
                "backend='triton' needs the triton package, which is not installed here; "
                "install triton (Linux) or leave backend unset"
            )
        if device.type != "cuda" and not (device.type == "cpu" and INTERPRETING):
            raise ValueError(
                f"backend='triton' serves GPU tensors; received a tensor on {device}; "
                "move it to a GPU, or set TRITON_INTERPRET=1 before importing dpmem"
            )
    if requested == "cpu":
        if device.type != "cpu":
            raise ValueError(
                f"backend='cpu' serves CPU tensors; received a tensor on {device}; "
                "leave backend unset"
            )
        if not HAS_NUMBA:
            raise RuntimeError(
                "backend='cpu' needs the numba package, which is not installed here; "
                "install numba or use backend='reference'"
            )
    return requested
