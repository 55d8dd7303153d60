"""One storage, what is kept of it, and the views of it that were saved."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dpmem.activations.forms import Exact, Form, Recomputed, ShapeOnly
from dpmem.activations.policy import COMPRESSIBLE_DTYPES
from dpmem.activations.roles import Use
from dpmem.activations.sensitivity import GradientReader


class Slot:
    """What is kept of one storage, in one version of it.

    values   its values, in the most exact form that was needed
    sign     where they are positive: codes could not tell for values near zero
    """

    __slots__ = ("__weakref__", "dtype", "number", "sign", "storage", "values", "version")

    def __init__(self, tensor: Tensor, number: int, storage: StorageWeakRef) -> None:
        self.number = number
        # While this lives, no other storage takes the address that it is found by.
        self.storage = storage
        self.version, self.dtype = tensor._version, tensor.dtype
        self.values: Form | Exact | Recomputed | None = None
        self.sign: Form | None = None

    @property
    def bits(self) -> int:
        """Bits a value is kept in; 0: none is."""
        return 0 if self.values is None else self.values.bits

    def restore(self) -> Tensor:
        """A tensor over the whole storage."""
        assert self.values is not None
        return self.values.restore()

    def restore_for_two(self) -> Tensor:
        """`restore`, where the next who asks comes soon."""
        values = self.values
        assert values is not None
        return values.restore_for_two() if isinstance(values, Form) else values.restore()

    def restore_sign(self) -> Tensor:
        """A tensor over the whole storage whose values are positive where its are."""
        return self.restore() if self.sign is None else self.sign.restore()


class View:
    """The shape a saved tensor has within what is kept."""

    __slots__ = ("_form", "number", "of_sign", "source")

    def __init__(
        self, source: Slot | Form, tensor: Tensor, number: int, *, of_sign: bool = False
    ) -> None:
        self.source, self.number, self.of_sign = source, number, of_sign
        if isinstance(source, Slot):
            self._form = _form_of(tensor)
        else:
            self._form = tensor.shape, torch.empty(tensor.shape, device="meta").stride(), 0

    def restore(self) -> Tensor:
        source = self.source
        if self.of_sign:
            assert isinstance(source, Slot)
            kept = source.restore_sign()
        else:
            kept = source.restore()
        # What is kept exact is mostly this very tensor: to ask takes less time than a view.
        return kept if _form_of(kept) == self._form else kept.as_strided(*self._form)

    def values_key(self) -> object | None:
        """What its values are kept as, as `stored_bytes` names it; None: they are not."""
        held = self.source.values if isinstance(self.source, Slot) else self.source
        if isinstance(held, Exact):
            return exact_key(held)
        return held if isinstance(held, Form) else None

    def restore_and_read(self, reader: GradientReader) -> Tensor:
        """`restore`, and let `reader` see who asks."""
        restored = self.restore()
        if not self.of_sign and restored.dtype in COMPRESSIBLE_DTYPES:
            reader.read(self.number, restored, self.source.restore())
        return restored


def _form_of(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


Packed = Exact | ShapeOnly | View


class Saved(NamedTuple):
    """One tensor that autograd saved."""

    packed: Packed
    use: Use
    function: str | None
    module: str | None
    """Where it was saved, where somebody follows the modules."""
    tensor: str
    """Its shape and dtype."""
    storage: StorageWeakRef | None
    """Keeps the address from being reused, so that equal ones are one storage."""
    storage_bytes: int


def stored_bytes(saved: Iterable[Saved]) -> dict[object, int]:
    """Bytes kept for these tensors, the model's apart, by what is kept: a form, a storage."""
    return dict(kept for one in saved if one.use.role != "model" for kept in _kept(one.packed))


def _kept(packed: Packed) -> Iterator[tuple[object, int]]:
    if isinstance(packed, ShapeOnly):
        return
    source = packed.source if isinstance(packed, View) else packed
    for held in (source.values, source.sign) if isinstance(source, Slot) else (source,):
        if isinstance(held, Form):
            yield held, held.bytes()
        elif isinstance(held, Exact):
            yield exact_key(held), exact_bytes(held)


def exact_key(exact: Exact) -> int:
    """Identifies the storage that is kept."""
    try:
        return exact.tensor.untyped_storage()._cdata
    except NotImplementedError:
        return id(exact)


def exact_bytes(exact: Exact) -> int:
    """The storage's bytes; of a tensor without one, its values'."""
    try:
        return exact.tensor.untyped_storage().nbytes()
    except NotImplementedError:
        return exact.tensor.numel() * exact.tensor.dtype.itemsize
