"""How many elements sparse tensors have, which operators on fake ones forget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_SUMS = {_aten.add.Tensor, _aten.sub.Tensor}
# What has no elements, whatever it is made like.
_EMPTY = {
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_zeros.default,
    _aten.zeros_like.default,
}
# What has those of an argument's elements that are asked for.
_CHOICES = {_aten.index_select.default}


class SparseElements:
    """Gives the results of operators the elements that real ones have.

    By those of the sparse arguments of the same dimensions, each of which is taken to stay:
    coalescing merges none. What cannot be given is in `notes`.
    """

    def __init__(self) -> None:
        self._unknown: set[str] = set()

    def with_elements(
        self, func: Any, args: Any, kwargs: Mapping[str, Any], result: Tensor
    ) -> Tensor:
        """`result`, a fake sparse tensor, with its elements."""
        sparse = [
            leaf
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.layout is torch.sparse_coo
        ]
        if func._schema.is_mutable:
            # A sum in place has more elements than before, and a fake tensor cannot grow.
            if sum(leaf._nnz() > 0 for leaf in sparse) > 1:
                self._unknown.add(str(func.overloadpacket))
            return result
        if result._nnz() or func in _EMPTY:
            return result
        if func is _aten._embedding_bag_backward.default:
            return _embedding_bag_backward(*args)
        kept = sparse if func in _SUMS else sparse and [max(sparse, key=Tensor._nnz)]
        n = sum(leaf._nnz() for leaf in kept)
        if func in _CHOICES or not n or any(_dims(leaf) != _dims(result) for leaf in kept):
            self._unknown.add(str(func.overloadpacket))
            return result
        return torch.sparse_coo_tensor(
            torch.cat([leaf._indices() for leaf in kept], dim=1),
            result._values().new_empty(n, *result._values().shape[1:]),
            result.shape,
            is_coalesced=func is _aten._coalesce.default or all(map(Tensor.is_coalesced, kept)),
            check_invariants=False,
        )

    def notes(self) -> tuple[str, ...]:
        """What a reader of the trace must know."""
        if not self._unknown:
            return ()
        return (
            "unknown: how many elements the sparse results of "
            f"{', '.join(sorted(self._unknown))} have; the figures have fewer.",
        )


def _dims(tensor: Tensor) -> tuple[torch.Size, int]:
    return tensor.shape, tensor.sparse_dim()


def _embedding_bag_backward(grad: Tensor, indices: Tensor, *more: Any) -> Tensor:
    """EmbeddingBag.cpp, _embedding_bag_sparse_backward: a row for each index."""
    num_weights, width = more[4], grad.shape[1]
    return torch.sparse_coo_tensor(
        indices.reshape(1, -1),
        grad.new_empty(indices.numel(), width),
        (num_weights, width),
        check_invariants=False,
    )
