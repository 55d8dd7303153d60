"""Compile the CPU loops into numba's cache: `python -m dpmem_kernels.warm`.

Set-up runs this, so that nobody's first training step waits for a compiler. Both variants of every
loop are compiled, the one for a single thread and the one for several. Without numba there is
nothing to do.
"""

import torch

from .backend import HAS_NUMBA
from .bucket import bucket_pack, bucket_unpack
from .grad_scale import grad_scale_, grad_stats, grad_unscale_
from .mask import pack_mask, unpack_mask
from .quantize import Noise, dequantize, quantize


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
                values = torch.ones(1000, dtype=dtype)
                for bits in (8, 4, 2):
                    stored = quantize(values, bits, noise=noise)
                    dequantize(stored, values.numel(), dtype, bits)
                grad_stats([values])
                grad_unscale_([values], torch.ones(()))
                grad_scale_([values], torch.full((), 2.0))
                bucket = torch.empty_like(values)
                bucket_pack([values], bucket, [0], scale=0.5)
                bucket_unpack(bucket, [values], [0])
            unpack_mask(pack_mask(torch.ones(1000, dtype=torch.bool)), 1000)
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    warm()
