"""Compile the CPU loops that training takes into numba's cache: `python -m dpmem_kernels.warm`.

Set-up runs this, so that nobody's first training step waits for a compiler. It compiles what the
data-parallel engine and the activation store call for fp32 and bf16 models: check, norm and scale
of gradients, packing into fp32 and bf16 buckets, 8- and 4-bit quantization, masks; each of them for
a single thread and for several. Everything else (fp16, 2 bits, fp8, accumulation, unpacking,
indices, bf16 master weights) compiles on its first use, a second or a few for each, and is cached
from then on. Without numba there is nothing to do.

numba recompiles a function when its own file changes, but not when a file that it imports does:
after an edit to numba_intrinsics.py, numba_lanes.py or philox.py delete __pycache__ and warm it
again.
"""

import torch

from .backend import HAS_NUMBA
from .bucket import PackPlan, bucket_pack
from .grad_scale import grad_scale_, grad_stats
from .mask import pack_mask, pack_positive, unpack_mask
from .quantize import Noise, dequantize, quantize

# More than one unit of parallel work of every loop, which otherwise takes its single thread.
_NUMEL = 1 << 18
# Of gradients and the buckets they go to.
_PACKED = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
)


def warm() -> None:
    """Run the ops named above once in each variant, on small tensors."""
    if not HAS_NUMBA:
        return
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            _run()
    finally:
        torch.set_num_threads(before)


def _run() -> None:
    noise = Noise(seed=0, stream=0, step=0, rank=0)
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.ones(_NUMEL, dtype=dtype)
        for bits in (8, 4):
            stored = quantize(values, bits, noise=noise)
            dequantize(stored, values.numel(), dtype, bits)
        pack_positive(values)
        grad_stats([values])
        grad_scale_([values], torch.full((), 2.0))
    for source, destination in _PACKED:
        plan = PackPlan([_NUMEL], [source], [0], torch.device("cpu"))
        bucket = torch.zeros(_NUMEL, dtype=destination)
        bucket_pack(plan, [torch.ones(_NUMEL, dtype=source)], bucket, scale=0.5)
    unpack_mask(pack_mask(torch.ones(_NUMEL, dtype=torch.bool)), _NUMEL)


if __name__ == "__main__":
    warm()
