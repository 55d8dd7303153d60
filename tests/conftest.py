"""For all tests: Triton's interpreter runs kernels, and is chosen before dpmem is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
