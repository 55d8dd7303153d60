"""Kernels for gradients and activations: Triton on GPUs, numba on the CPU, plain torch anywhere.

Each op's file states its math, traffic and error. Importing this package needs torch alone; Triton
and numba are imported by the first call that runs on them.
"""

from .backend import Backend, resolve_backend
from .bucket import bucket_pack, bucket_unpack
from .grad_scale import GradStats, grad_scale_, grad_stats, grad_unscale_
from .mask import pack_mask, unpack_mask
from .quantize import Noise, Quantized, dequantize, quantize

__all__ = [
    "Backend",
    "GradStats",
    "Noise",
    "Quantized",
    "bucket_pack",
    "bucket_unpack",
    "dequantize",
    "grad_scale_",
    "grad_stats",
    "grad_unscale_",
    "pack_mask",
    "quantize",
    "resolve_backend",
    "unpack_mask",
]
