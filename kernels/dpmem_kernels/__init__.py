"""Kernels for gradients and activations: Triton on GPUs, numba on the CPU, plain torch anywhere.

Each op's file states its math, traffic and error. Importing this package needs torch alone; Triton
and numba are imported by the first call that runs on them.
"""

from .backend import Backend, resolve_backend
from .bucket import PackPlan, bucket_pack, bucket_unpack
from .fp8 import QuantizedFp8, dequantize_fp8, quantize_fp8
from .grad_scale import GradStats, grad_scale_, grad_stats, grad_unscale_
from .mask import pack_mask, pack_positive, unpack_mask
from .master import SplitMaster, join_master, split_master
from .narrow import narrow, widen
from .quantize import Noise, Quantized, dequantize, quantize

__all__ = [
    "Backend",
    "GradStats",
    "Noise",
    "PackPlan",
    "Quantized",
    "QuantizedFp8",
    "SplitMaster",
    "bucket_pack",
    "bucket_unpack",
    "dequantize",
    "dequantize_fp8",
    "grad_scale_",
    "grad_stats",
    "grad_unscale_",
    "join_master",
    "narrow",
    "pack_mask",
    "pack_positive",
    "quantize",
    "quantize_fp8",
    "resolve_backend",
    "split_master",
    "unpack_mask",
    "widen",
]
