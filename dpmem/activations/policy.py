"""What a saved tensor is, and so how it may be stored.

The role follows from the function that saves the tensor, by the name torch dispatches it under.
Stochastic rounding leaves a gradient unbiased only where the saved tensor enters it linearly:
inputs of matrix products, convolutions, normalisations (their statistics kept exact) and
elementwise products. Inputs of nonlinear functions are kept at 8 bits, where the bias measured
stays at the noise floor. A function that is not in the table keeps what it saves exact: division,
powers, exp, log-softmax and their kind amplify errors, and what is unknown is not guessed at.

Source: the linear-use condition is ActNN's and GACT's (arXiv 2104.14129, 2206.11357).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Role = Literal["linear_input", "nonlinear_input", "attention", "sign", "exact"]

ROLE_OF_FUNCTION: dict[str, Role] = {
    # Products of two tensors: each operand enters the other's gradient linearly.
    "linear": "linear_input",
    "matmul": "linear_input",
    "__matmul__": "linear_input",
    "__rmatmul__": "linear_input",
    "mm": "linear_input",
    "bmm": "linear_input",
    "addmm": "linear_input",
    "baddbmm": "linear_input",
    "einsum": "linear_input",
    "mul": "linear_input",
    "__mul__": "linear_input",
    "__rmul__": "linear_input",
    "conv1d": "linear_input",
    "conv2d": "linear_input",
    "conv3d": "linear_input",
    "conv_transpose1d": "linear_input",
    "conv_transpose2d": "linear_input",
    "conv_transpose3d": "linear_input",
    "layer_norm": "linear_input",
    "rms_norm": "linear_input",
    "group_norm": "linear_input",
    "batch_norm": "linear_input",
    "gelu": "nonlinear_input",
    "silu": "nonlinear_input",
    "tanh": "nonlinear_input",
    "sigmoid": "nonlinear_input",
    "softmax": "nonlinear_input",
    "scaled_dot_product_attention": "attention",
    # Backward asks only where the output is positive.
    "relu": "sign",
    "relu_": "sign",
}

# These save their input and small statistics of it; the statistics are kept exact, and the input
# is told from them by its shape.
_SAVES_STATISTICS = {"layer_norm", "rms_norm", "group_norm", "batch_norm"}
# Query, key, value and output are [batch, heads, length, width]; the log-sum-exp beside them is
# [batch, heads, length] and stays exact.
_ATTENTION_DIMENSIONS = 4


@dataclass(frozen=True)
class Policy:
    """How activations are stored.

    linear_bits      8, 4 or 2 for tensors used linearly in backward; None: exact
    nonlinear_bits   8, 4 or 2 for inputs of nonlinear functions and attention; None: exact
    minimum_numel    smaller tensors are left alone: statistics and other small, sensitive things
    group_size       64, 128 or 256 values share one scale and zero point

    In every policy boolean masks become bits, ReLU keeps a bit per value, and one storage is kept
    once however often it is saved.
    """

    linear_bits: int | None = 4
    nonlinear_bits: int | None = 8
    minimum_numel: int = 16_384
    group_size: int = 128

    def __post_init__(self) -> None:
        for option in ("linear_bits", "nonlinear_bits"):
            if getattr(self, option) not in (None, 8, 4, 2):
                raise ValueError(
                    f"{option} must be 8, 4, 2 or None (exact); received {getattr(self, option)!r}"
                )
        if self.group_size not in (64, 128, 256):
            raise ValueError(f"group_size must be 64, 128 or 256; received {self.group_size!r}")
        if not isinstance(self.minimum_numel, int) or self.minimum_numel < 0:
            raise ValueError(
                f"minimum_numel must be an integer of at least 0; received {self.minimum_numel!r}"
            )

    def role(self, tensor: Tensor, function: str | None, first_argument: object) -> Role:
        """The role of `tensor`, saved while `function(first_argument, …)` runs."""
        role = ROLE_OF_FUNCTION.get(function, "exact") if function is not None else "exact"
        if role == "attention":
            # A mask of 0 and -inf is saved too, and needs no gradient.
            differentiable = tensor.requires_grad and tensor.dim() == _ATTENTION_DIMENSIONS
            return "nonlinear_input" if differentiable else "exact"
        if function in _SAVES_STATISTICS and not (
            isinstance(first_argument, Tensor) and tensor.shape == first_argument.shape
        ):
            return "exact"
        return role

    def bits(self, role: Role) -> int | None:
        """Bits a value of `role` is stored in; None: exact."""
        if role == "linear_input":
            return self.linear_bits
        if role == "nonlinear_input":
            return self.nonlinear_bits
        return None


PRESETS = {
    "lossless": Policy(linear_bits=None, nonlinear_bits=None),
    "8bit": Policy(linear_bits=8),
    "4bit": Policy(linear_bits=4),
    "2bit": Policy(linear_bits=2),
}

COMPRESSIBLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
