"""How much the rounding of each saved tensor would disturb the gradients, read in one backward.

Every tensor gets one number C: rounded to b bits, it adds C / (2^b - 1)^2 to the sum of the
variances of all weight gradients. Nothing runs twice for it. In the forward that is read, hooks are
set on the graph nodes that saved tensors; in its backward a hook sees the node's incoming gradient
g just before the node asks for what it saved, x.

Rounding a value at random in steps of s = range / (2^b - 1) has a variance of s^2 f (1 - f), on
average s^2 / 6, so v = range^2 / 6 for each group stands for the values' variance below.

    y = x W            dW = x^T g,  C = sum_n |g_n|^2 sum_j v_nj
    a convolution      the same with |g|^2 summed over the windows that a value is in
    norm, x * w        the weight's gradient sums g h:  C = sum g^2 v r^2, r = 1 / std or 1
    anything else      only gradients of activations are disturbed: C = E sum v / sum x^2, with E
                       the sum over the products and convolutions that backward still reaches of
                       sum_n |g_n|^2 |x_n|^2, what noise of relative variance 1 would leave in
                       their weights' gradients, were all directions alike

The first three are exact but for the average over f. The last is an estimate; so is the share of a
norm's noise that goes on to its input's gradient, 2 / width of its relative variance.

Source: the variance of stochastic rounding and the greedy use of it are ActNN's (arXiv 2104.14129).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import grad as convolution_gradients

from dpmem.activations.calls import FunctionCall, tensors_in

# A function that autograd records as more nodes than this is no single operation.
_MOST_NODES = 16
_NORMS = ("NativeLayerNorm", "NativeBatchNorm", "NativeGroupNorm")
_INPUT_GRADIENT = {
    3: convolution_gradients.conv1d_input,
    4: convolution_gradients.conv2d_input,
    5: convolution_gradients.conv3d_input,
}


class Reading(NamedTuple):
    """What one use of the storage number `number` told: scalars, on the device."""

    number: int
    direct: Tensor
    """Variance of a weight's gradient, in units of 1 / (2^b - 1)^2."""
    relative: Tensor
    """Variance of the activations' gradients relative to their squares, in the same units."""
    energy: Tensor
    """What noise of relative variance 1 from further on leaves in this weight's gradient."""


class GradientReader:
    """Reads one backward. `readings` are in its order."""

    def __init__(self, group_size: int) -> None:
        self.readings: list[Reading] = []
        self._group_size = group_size
        self._node: Any = None
        self._gradient: Tensor | None = None

    def arm(self, call: FunctionCall, result: Any) -> None:
        """Watch the graph nodes that `call` made."""
        outside = {tensor.grad_fn for tensor in call.tensors()}
        waiting = [tensor.grad_fn for tensor in tensors_in(result)]
        seen: set[Any] = set()
        while waiting and len(seen) < _MOST_NODES:
            node = waiting.pop()
            if node is None or node in seen or node in outside or hasattr(node, "variable"):
                continue
            seen.add(node)
            node.register_prehook(self._note)
            waiting += [following for following, _ in node.next_functions]

    def _note(self, gradients: tuple[Tensor, ...]) -> None:
        # The node itself is asked for, not bound: a hook that held its node would never be freed.
        self._node = torch._C._current_autograd_node()
        self._gradient = gradients[0]

    def read(self, number: int, x: Tensor, whole: Tensor) -> None:
        """`x`, a view of the storage `whole`, is asked for by the node that now runs."""
        node, gradient = torch._C._current_autograd_node(), self._gradient
        if node is None or node is not self._node or gradient is None:
            return
        with torch.no_grad():
            form = x.shape, x.stride(), int(x.storage_offset())
            variance = _unit_variance(whole, self._group_size).as_strided(*form)
            self.readings.append(Reading(number, *_reading(node, x.float(), gradient, variance)))


def _reading(node: Any, x: Tensor, gradient: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
    name, g = node.name(), gradient.float()
    nothing = torch.zeros((), device=x.device)
    relative = variance.sum() / x.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    if name.startswith(("Addmm", "MmBackward")) and x.dim() == 2:
        if x.shape[0] == g.shape[0]:
            power = g.square().sum(1, keepdim=True)
        else:
            power = g.square().sum(0)
        return (power * variance).sum(), nothing, (power * x.square()).sum()
    if name.startswith("Convolution") and not node._saved_transposed and x.dim() == g.dim():
        power = _window_power(node, x, g)
        return (power * variance).sum(), nothing, (power * x.square()).sum()
    if name.startswith(_NORMS) and x.shape == g.shape:
        dims = _normalised_dims(name, x)
        inverse = 1 / x.var(dims, correction=0, keepdim=True).clamp(min=1e-12)
        normalised = variance * inverse
        width = x.numel() / inverse.numel()
        return (g.square() * normalised).sum(), 2 * normalised.mean() / width, nothing
    if name.startswith("MulBackward") and _has_a_weight(node) and x.shape == g.shape:
        return (g.square() * variance).sum(), nothing, nothing
    return nothing, relative, nothing


def _window_power(node: Any, x: Tensor, g: Tensor) -> Tensor:
    """For each value of x: the sum of g^2 over all products that it takes part in."""
    weight, groups = node._saved_weight.shape, node._saved_groups
    power = g.square().unflatten(1, (groups, -1)).sum(2)
    ones = torch.ones(groups, 1, *weight[2:], device=x.device)
    spread = _INPUT_GRADIENT[x.dim()](
        (x.shape[0], groups, *x.shape[2:]),
        ones,
        power,
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        groups,
    )
    return spread.repeat_interleave(x.shape[1] // groups, 1)


def _normalised_dims(name: str, x: Tensor) -> tuple[int, ...]:
    if name.startswith("NativeLayerNorm"):
        return (-1,)
    if name.startswith("NativeGroupNorm"):
        return tuple(range(1, x.dim()))
    return (0, *range(2, x.dim()))


def _has_a_weight(node: Any) -> bool:
    return any(hasattr(following, "variable") for following, _ in node.next_functions)


def _unit_variance(whole: Tensor, group_size: int) -> Tensor:
    """For each value of the storage: its group's range, squared, by 6."""
    flat = whole.as_strided((whole.untyped_storage().nbytes() // whole.dtype.itemsize,), (1,), 0)
    values = flat.float()
    groups = -(-values.numel() // group_size)
    values = torch.cat((values, values[-1:].expand(groups * group_size - values.numel())))
    values = values.view(groups, group_size)
    span = values.amax(1, keepdim=True) - values.amin(1, keepdim=True)
    return (span.square() / 6).repeat_interleave(group_size, 1).view(-1)


def sensitivities(readings: list[Reading], count: int) -> list[float]:
    """C of each of `count` storages. Waits for the device once.

    A storage that no gradient passed has 0, and so have all where tensors are fake and hold no
    values, as in a forecast.
    """
    result = [0.0] * count
    if not readings or isinstance(readings[0].direct, FakeTensor):
        return result
    table = torch.stack([torch.stack(reading[1:]) for reading in readings]).tolist()
    # Of the weights that backward still reaches: those of the readings after each.
    reached = 0.0
    for reading, (direct, relative, energy) in zip(
        reversed(readings), reversed(table), strict=True
    ):
        result[reading.number] += direct + relative * reached
        reached += energy
    return result
