"""What a saved tensor is: the table of functions, for reading and for extending.

A saved tensor's role follows from the torch function that saves it, by the name torch dispatches
it under. Stochastic rounding leaves a gradient unbiased only where the saved tensor enters it
linearly: inputs of matrix products, convolutions, normalisations (their statistics kept exact) and
elementwise products. Inputs of nonlinear functions are kept at 8 bits, where the bias measured
stays at the noise floor. A function that is not in the table keeps what it saves exact: division,
roots, exp, log-softmax and their kind amplify errors, and what is unknown is not guessed at.

To add a function, give its name a role in `ROLES`, or a rule (tensor, call) -> Use where it saves
tensors of several kinds.

Two limits. A normalisation's gradient holds the product of its normalised input with itself, summed
over the width, which rounding noise biases by a share that falls with the width: see
`NARROWEST_NORM`. And a tensor that enters one path of the graph twice (`h = x * w; y = h * x`)
meets its own noise there: it is stored once, and the product's mean is off by the noise's variance.

Source: the linear-use condition is ActNN's and GACT's (arXiv 2104.14129, 2206.11357). What each
function saves: torch's tools/autograd/derivatives.yaml.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpmem.activations.calls import FunctionCall

Role = Literal[
    "linear_input",  # enters gradients linearly
    "nonlinear_input",  # enters through a smooth, tame derivative
    "sign",  # backward asks only where it is positive
    "mask",  # two values, 0 and one other
    "pool_index",  # where in its window a maximum was: see `forms.pool_offsets`
    "shape",  # backward asks only for its sizes and strides
    "statistics",  # mean, deviation, log-sum-exp, log-softmax: exact
    "other",  # unknown or sensitive: exact
    "model",  # a parameter, a buffer, or made from these alone: exact
    "small",  # fewer values than the policy looks at: exact
    "foreign",  # a subclass, nested, sparse, conjugated: passed through
]


class Use(NamedTuple):
    """The role of a saved tensor, the fewest bits that its use bears, and why."""

    role: Role
    reason: str
    least_bits: int = 2


Rule = Callable[[Tensor, FunctionCall], Use]

LINEAR = Use("linear_input", "enters the gradient linearly")
NONLINEAR = Use("nonlinear_input", "enters the gradient through a smooth function", least_bits=8)
SIGN = Use("sign", "backward asks only where it is positive")
SHAPE = Use("shape", "backward asks only for its shape")
STATISTICS = Use("statistics", "small and sensitive")
UNKNOWN = Use("other", "no role known for this function")
MODEL = Use("model", "a parameter or buffer, or made from these alone")
SMALL = Use("small", "smaller than minimum_numel")
FOREIGN = Use("foreign", "no plain dense tensor")

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


def _norm(width_of: Callable[[Tensor, FunctionCall], int]) -> Rule:
    def rule(tensor: Tensor, call: FunctionCall) -> Use:
        """The input, told from the statistics by its shape."""
        x = call.argument(0, "input")
        if not isinstance(x, Tensor) or tensor.shape != x.shape:
            return STATISTICS
        width = width_of(x, call)
        least_bits = min(bits for bits, narrowest in NARROWEST_NORM.items() if width >= narrowest)
        if least_bits == 2:
            return LINEAR
        return Use("linear_input", f"input of a norm over only {width} values", least_bits)

    return rule


def _attention(tensor: Tensor, call: FunctionCall) -> Use:
    """Query, key, value, output, mask, statistics; on the CPU's unfused way also the softmax.

    Fused kernels recompute the softmax from query and key, which makes these nonlinear; the output
    enters linearly. The unfused way saves the operands of two products, three-dimensional, and the
    softmax's result between them.
    """
    if not tensor.requires_grad:
        dropout = call.argument(4, "dropout_p", 0.0)
        query, key = call.argument(0, "query"), call.argument(1, "key")
        weights = query.shape[-2], key.shape[-2]
        operands = query, key, call.argument(2, "value")
        # The CPU has no fused kernel with dropout, and its unfused way saves no attention mask.
        # Frozen operands it saves, and their softmax: these may have the mask's shape.
        frozen = not all(operand.requires_grad for operand in operands)
        on_cpu = tensor.device.type == "cpu"
        if dropout > 0 and on_cpu and not frozen and tensor.shape[-2:] == weights:
            return Use("mask", "the mask of the attention's dropout")
        return Use("statistics", "a mask that may hold -inf, or a log-sum-exp")
    mask = call.argument(3, "attn_mask")
    if mask is not None and any(origin is mask for origin in call.origins(tensor)):
        return Use("other", "a learned mask, which may hold -inf")
    name = "" if tensor.grad_fn is None else tensor.grad_fn.name()
    if "Softmax" in name:
        return NONLINEAR
    if name.startswith("ScaledDotProduct") or tensor.dim() == 3:
        return LINEAR
    return NONLINEAR


def _multi_head_attention(tensor: Tensor, call: FunctionCall) -> Use:
    """A composite of products and attention: without knowing which, all that is differentiable."""
    mask = call.argument(16, "attn_mask")
    if not tensor.requires_grad or (mask is not None and mask.requires_grad):
        return Use("other", "may be a mask that holds -inf, or a log-sum-exp")
    return NONLINEAR


def _dropout(tensor: Tensor, call: FunctionCall) -> Use:
    # The mask, as the CPU makes it: 0 and 1 / (1 - p) in the input's dtype.
    x = call.argument(0, "input")
    if not tensor.requires_grad and tensor.shape == x.shape and tensor.dtype == x.dtype:
        return Use("mask", "the mask of a dropout")
    return UNKNOWN


def _product(tensor: Tensor, call: FunctionCall) -> Use:
    # A square, as `_power` has it: in `x * x * x` its noise would meet that of the last factor.
    return NONLINEAR if call.argument(0, "input") is call.argument(1, "other") else LINEAR


def _power(tensor: Tensor, call: FunctionCall) -> Use:
    exponent = call.argument(1, "exponent")
    if isinstance(exponent, bool) or not isinstance(exponent, int | float):
        return UNKNOWN
    # A square's derivative is linear, a cube's three times a square, whose mean at 8 bits is off by
    # the noise's variance, 8e-5 of the values' own. Squares too stay at 8: norms written by hand
    # multiply a tensor with a statistic of its square.
    return NONLINEAR if exponent in (2, 3) else Use("other", "a power that amplifies errors")


def _pool(tensor: Tensor, call: FunctionCall) -> Use:
    if tensor.dtype == torch.int64:
        return Use("pool_index", "where in its window each maximum was")
    return SHAPE


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


class PoolGeometry(NamedTuple):
    """A two-dimensional pooling's window, (rows, columns) each."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    width: int
    """Columns of the pooled plane."""

    @classmethod
    def of(cls, call: FunctionCall) -> "PoolGeometry":
        """That of a max_pool2d."""
        kernel = call.argument(1, "kernel_size")
        stride = call.argument(2, "stride")
        return cls(
            _pair(kernel),
            _pair(stride if stride not in (None, [], ()) else kernel),
            _pair(call.argument(3, "padding", 0)),
            _pair(call.argument(4, "dilation", 1)),
            call.argument(0, "input").shape[-1],
        )


ROLES: dict[str, Use | Rule] = {
    # Products of two tensors: each operand enters the other's gradient linearly.
    "linear": LINEAR,
    "matmul": LINEAR,
    "__matmul__": LINEAR,
    "__rmatmul__": LINEAR,
    "mm": LINEAR,
    "bmm": LINEAR,
    "addmm": LINEAR,
    "baddbmm": LINEAR,
    "einsum": LINEAR,
    "mul": _product,
    "__mul__": _product,
    "__rmul__": _product,
    "conv1d": LINEAR,
    "conv2d": LINEAR,
    "conv3d": LINEAR,
    "conv_transpose1d": LINEAR,
    "conv_transpose2d": LINEAR,
    "conv_transpose3d": LINEAR,
    # Normalisations: the input, beside small statistics of it.
    "layer_norm": _norm(lambda x, call: math.prod(call.argument(1, "normalized_shape"))),
    "rms_norm": _norm(lambda x, call: math.prod(call.argument(1, "normalized_shape"))),
    "group_norm": _norm(lambda x, call: x.numel() // (x.shape[0] * call.argument(1, "num_groups"))),
    "batch_norm": _norm(lambda x, call: x.numel() // x.shape[1]),
    # Smooth functions of one tensor.
    "gelu": NONLINEAR,
    "silu": NONLINEAR,
    "tanh": NONLINEAR,
    "sigmoid": NONLINEAR,
    "softmax": NONLINEAR,
    "pow": _power,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    # Where the gradient passes.
    "relu": SIGN,
    "relu_": SIGN,
    "dropout": _dropout,
    # Pooling: values do not matter, places do.
    "max_pool2d": _pool,
    "max_pool2d_with_indices": _pool,
    "avg_pool1d": SHAPE,
    "avg_pool2d": SHAPE,
    "avg_pool3d": SHAPE,
    "adaptive_avg_pool1d": SHAPE,
    "adaptive_avg_pool2d": SHAPE,
    "adaptive_avg_pool3d": SHAPE,
    # Exact, by name: so that the table says why.
    "log_softmax": STATISTICS,
    "cross_entropy": STATISTICS,
    "logsumexp": STATISTICS,
}


def use_of(tensor: Tensor, call: FunctionCall | None) -> Use:
    """How backward will use `tensor`, saved while `call` runs; None: no torch function does."""
    if call is None:
        return UNKNOWN
    entry = ROLES.get(call.name or "", UNKNOWN)
    return entry if isinstance(entry, Use) else entry(tensor, call)
