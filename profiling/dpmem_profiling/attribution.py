"""Whose bytes are these? A category for every storage, decided after the step.

Whoever owns a storage is often known only later (a tensor turns out to be a gradient when backward
ends), so storages are claimed while the step runs and their category is looked up afterwards. The
timeline is then exact from its first event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dpmem_profiling.job import Built
from dpmem_profiling.record import CATEGORIES, Category
from dpmem_profiling.tracker import MemoryTracker

Owned = Callable[[nn.Module], Mapping[Category, Iterable[Tensor]]]

# Two claims on one storage: the smaller rank wins. What a wrapper says it owns beats "gradient",
# because a gradient may be a view of its bucket.
_RANK_NAMED, _RANK_OWNED, _RANK_GRADIENT, _RANK_STATE = range(4)


class Attribution:
    """Collects claims on a tracker's storages, then answers `category_of(number)`.

    What nobody claims is, in this order:
    - taken by an operator for itself: "workspace";
    - alive between steps: "bucket" where the job has a `wrap` (memory that the wrapper holds for
      itself, such as DistributedDataParallel's C++ buckets), else "unknown";
    - made in a forward phase and alive at its end: "activation";
    - anything else: "temporary". Activations recomputed in backward are among these.
    """

    def __init__(self, tracker: MemoryTracker, owned: Owned | None, *, wrapped: bool) -> None:
        self._tracker = tracker
        self._owned = owned
        self._unclaimed: Category = "bucket" if wrapped else "unknown"
        self._claims: dict[int, tuple[int, Category]] = {}
        self._activations: set[int] = set()
        self._between_steps: set[int] = set()

    def category_of(self, number: int) -> Category:
        """The category of the storage with this number."""
        if number in self._claims:
            return self._claims[number][1]
        if number in self._tracker.workspaces:
            return "workspace"
        if number in self._between_steps:
            return self._unclaimed
        return "activation" if number in self._activations else "temporary"

    def claim_batch(self, batch: Any) -> None:
        """The batch's tensors are "input"."""
        self._claim(_tensors(batch), "input", _RANK_NAMED)

    def claim_gradient(self, gradient: Tensor | None) -> None:
        """For a hook on a parameter: the raw gradient that backward hands over.

        None where a gradient of gradients does not depend on the parameter.
        """
        self._claim([] if gradient is None else [gradient], "gradient", _RANK_GRADIENT)

    def claim_model(self, built: Built) -> None:
        """Claim everything that model and optimizer hold at this moment."""
        model, optimizer = built
        self._claim(model.parameters(), "parameter", _RANK_NAMED)
        self._claim(model.buffers(), "buffer", _RANK_NAMED)
        for category, tensors in ({} if self._owned is None else self._owned(model)).items():
            if category not in CATEGORIES:
                raise ValueError(
                    f"owned() must use the categories {', '.join(CATEGORIES)}; got {category!r}"
                )
            self._claim(tensors, category, _RANK_OWNED)
        gradients = (parameter.grad for parameter in model.parameters())
        self._claim((g for g in gradients if g is not None), "gradient", _RANK_GRADIENT)
        if optimizer is not None:
            self._claim(_tensors(optimizer.state), "optimizer_state", _RANK_STATE)

    def end_of_forward(self) -> None:
        """What forward made and is alive now was saved for backward."""
        storages = self._tracker.storages
        self._activations.update(
            number for number in self._tracker.live() if storages[number].phase == "forward"
        )

    def between_steps(self) -> None:
        """What is alive now outlives a step."""
        self._between_steps.update(self._tracker.live())

    def _claim(self, tensors: Iterable[Tensor], category: Category, rank: int) -> None:
        for tensor in tensors:
            for number in self._tracker.see(tensor):
                held = self._claims.get(number)
                if held is None or rank < held[0]:
                    self._claims[number] = (rank, category)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested containers; optimizers keep state in mappings unknown to pytree."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(dict(leaf))
