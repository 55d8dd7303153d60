"""Paired timings of dpmem_kernels beside what people use instead: `python -m bench`."""
