"""The torch function that runs, and what its arguments tell about a tensor saved meanwhile."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch._C import _storage_address  # type: ignore[attr-defined]


class FunctionCall(NamedTuple):
    """The torch function that runs, and on what."""

    name: str | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position`, or passed as `name`; `default` where neither was given."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

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
            if argument is tensor or (storage is not None and storage_key(argument) == storage):
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
        return _storage_address(tensor)
    except NotImplementedError:
        return None
