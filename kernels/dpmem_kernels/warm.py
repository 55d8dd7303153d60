"""Compile the CPU loops into numba's cache: `python -m dpmem_kernels.warm`.

Set-up runs this, so that nobody's first training step waits for a compiler. Both variants of every
loop are compiled, the one for a single thread and the one for several. Without numba there is
nothing to do.

numba recompiles a function when its own file changes, but not when a file that it imports does:
after an edit to numba_intrinsics.py or philox.py delete __pycache__ and warm it again.
"""

import torch

from .backend import HAS_NUMBA
from .bucket import PackPlan, bucket_pack, bucket_unpack
from .fp8 import FORMATS, dequantize_fp8, quantize_fp8
from .grad_scale import grad_scale_, grad_stats, grad_unscale_
from .mask import pack_mask, pack_positive, unpack_mask
from .master import join_master, split_master
from .narrow import INDEX_DTYPES, narrow, widen
from .quantize import Noise, dequantize, quantize

# More than one unit of parallel work of every loop, which otherwise takes its single thread.
_NUMEL = 1 << 18


def warm() -> None:
    """Run every op once in every dtype, width and threading variant, on small tensors."""
    if not HAS_NUMBA:
        return
    before = torch.get_num_threads()
    noise = Noise(seed=0, stream=0, step=0, rank=0)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                values = torch.ones(_NUMEL, dtype=dtype)
                for bits in (8, 4, 2):
                    stored = quantize(values, bits, noise=noise)
                    dequantize(stored, values.numel(), dtype, bits)
                for code_dtype in FORMATS:
                    dequantize_fp8(quantize_fp8(values, code_dtype), dtype)
                pack_positive(values)
                grad_stats([values])
                grad_unscale_([values], torch.ones(()))
                grad_scale_([values], torch.full((), 2.0))
                plan = PackPlan([_NUMEL], [dtype], [0], values.device)
                for wire in (torch.float32, torch.bfloat16, torch.float16):
                    bucket = torch.zeros(_NUMEL, dtype=wire)
                    bucket_pack(plan, [values], bucket, scale=0.5)
                    bucket_unpack(plan, bucket, [values])
            join_master(*split_master(torch.ones(_NUMEL)))
            unpack_mask(pack_mask(torch.ones(_NUMEL, dtype=torch.bool)), _NUMEL)
            for dtype in INDEX_DTYPES:
                for high in (256, 65536):
                    widen(narrow(torch.zeros(_NUMEL, dtype=dtype), high), dtype)
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    warm()
