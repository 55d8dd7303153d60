"""What a saved tensor is, and so how it may be stored.

The role follows from the function that saves the tensor, by the name torch dispatches it under.
Stochastic rounding leaves a gradient unbiased only where the saved tensor enters it linearly:
inputs of matrix products, convolutions, normalisations (their statistics kept exact) and
elementwise products. Inputs of nonlinear functions are kept at 8 bits, where the bias measured
stays at the noise floor. A function that is not in the table keeps what it saves exact: division,
powers, exp, log-softmax and their kind amplify errors, and what is unknown is not guessed at.

Two limits of this. A normalisation's gradient holds the product of its normalised input with
itself, summed over the width, which rounding noise biases by a share that falls with the width: see
`NARROWEST_NORM`. And a tensor that enters one path of the graph twice (`h = x * w; y = h * x`)
meets its own noise there: it is stored once, and the product's mean is off by the noise's variance.

Source: the linear-use condition is ActNN's and GACT's (arXiv 2104.14129, 2206.11357).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
_NORMS = {"layer_norm", "rms_norm", "group_norm", "batch_norm"}
# Query, key, value and output are [batch, heads, length, width]; the log-sum-exp beside them is
# [batch, heads, length] and stays exact.
_ATTENTION_DIMENSIONS = 4

NARROWEST_NORM = {8: 1, 4: 32, 2: 512}
"""Values normalised together, at least, for a norm's input to be stored at these many bits.

A norm's input gradient is r (g - mean(g) - h mean(g h)) with h the normalised input, so noise of
variance v in h shifts its mean by -r g v / width. v is about 0.02 at 4 bits and 0.5 at 2 bits for
normally distributed values in groups of 128. Measured on layer_norm of N(0, 1), 2^16 values, 60
draws: the gradient's mean falls short by (percent, with its standard error)

    width      8             16             32              64              256
    8 bits     0.003 ± 0.001 0.0007 ± .0003 0.0002 ± .0002  0.0000 ± .0001  0.0000 ± .0001
    4 bits     0.70 ± 0.01   0.191 ± 0.005  0.072 ± 0.003   0.032 ± 0.002   0.007 ± 0.001
    2 bits     17.4 ± 0.1    4.84 ± 0.03    1.92 ± 0.02     0.85 ± 0.01     0.194 ± 0.005

(group_norm the same, rms_norm no more.) The widths are the powers of two from which it stays below
2^-9 = 0.195 %, what rounding the gradient to bfloat16 may change, in groups of 256 too (0.084 % at
4 bits and 32, 0.116 % at 2 bits and 512). A mean of a thousand times the spread doubles the bias:
the zero point, in bfloat16, then lies further below the values.
"""


class FunctionCall(NamedTuple):
    """The torch function that runs, and on what."""

    name: str | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def argument(self, position: int, name: str) -> Any:
        """The argument at `position`, or passed as `name`; None where neither was given."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors among the arguments, and in lists and tuples among them."""
        return tensors_in(*self.args, *self.kwargs.values())

    def origins(self, tensor: Tensor) -> list[Tensor]:
        """The arguments from which alone `tensor`, saved during this call, can have been made.

        One, where it shares an argument's storage or its graph leads to an argument by steps on one
        tensor (casts as autocast inserts, transposes, copies of expanded views). A tensor with
        neither, such as the low-precision copy of a frozen weight, was made from arguments that
        need no gradient: these. Empty where several differentiable arguments went into it.
        """
        arguments = list(self.tensors())
        storage = storage_key(tensor)
        for argument in arguments:
            if storage is not None and storage_key(argument) == storage:
                return [argument]
        node = tensor.grad_fn
        if node is None:
            return [argument for argument in arguments if not argument.requires_grad]
        while node is not None:
            for argument in arguments:
                if argument.grad_fn is node or getattr(node, "variable", None) is argument:
                    return [argument]
            following = node.next_functions
            node = following[0][0] if len(following) == 1 else None
        return []


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """The tensors among `values`, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(*value)


def storage_key(tensor: Tensor) -> int | None:
    """Identifies the tensor's storage while that lives; None: it has none (sparse, vmap)."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return None


@dataclass(frozen=True)
class Policy:
    """How activations are stored.

    linear_bits      8, 4 or 2 for tensors used linearly in backward; None: exact
    nonlinear_bits   8, 4 or 2 for inputs of nonlinear functions, narrow norms (`NARROWEST_NORM`)
                     and attention; None: exact
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

    def role(self, tensor: Tensor, call: FunctionCall | None) -> Role:
        """The role of `tensor`, saved while `call` runs; None: no function of torch's runs."""
        role = ROLE_OF_FUNCTION.get(call.name or "", "exact") if call is not None else "exact"
        if call is None or role == "exact":
            return "exact"
        if role == "attention":
            return self._role_in_attention(tensor, call)
        if call.name in _NORMS:
            return self._role_in_norm(tensor, call)
        return role

    def _role_in_attention(self, tensor: Tensor, call: FunctionCall) -> Role:
        """Exact for the mask, learned or not: it may hold -inf, and for the log-sum-exp."""
        if not tensor.requires_grad or tensor.dim() != _ATTENTION_DIMENSIONS:
            return "exact"
        mask = call.argument(3, "attn_mask")
        if any(origin is mask for origin in call.origins(tensor)):
            return "exact"
        return "nonlinear_input"

    def _role_in_norm(self, tensor: Tensor, call: FunctionCall) -> Role:
        """Linear for the input of a norm that is wide enough, nonlinear where it is narrower."""
        x = call.argument(0, "input")
        if not isinstance(x, Tensor) or tensor.shape != x.shape:
            return "exact"
        if call.name == "batch_norm":
            width = x.numel() // x.shape[1]
        elif call.name == "group_norm":
            width = x.numel() // (x.shape[0] * call.argument(1, "num_groups"))
        else:
            width = math.prod(call.argument(1, "normalized_shape"))
        if self.linear_bits is not None and width < NARROWEST_NORM[self.linear_bits]:
            return "nonlinear_input"
        return "linear_input"

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
