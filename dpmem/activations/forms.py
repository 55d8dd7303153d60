"""The forms in which values wait for backward: codes, bits, offsets, nothing but a shape.

A form holds one flat run of values in memory order, and `restore` gives that run back, the same
tensor for all who ask while it lives. What a form keeps is a tuple of small tensors, handed to
`keep`, which leaves them on the device or takes them to host memory (see `offload`).
"""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dpmem.activations.roles import PoolGeometry
from dpmem_kernels import (
    Noise,
    Quantized,
    dequantize,
    narrow,
    pack_mask,
    pack_positive,
    unpack_mask,
    widen,
)
from dpmem_kernels.quantize import NAN_META, quantize_and_tell

Tensors = tuple[Tensor, ...]


class Kept(Protocol):
    """Tensors in their waiting place."""

    @property
    def device(self) -> torch.device:
        """Where `fetch` brings them."""

    def tensors(self) -> Tensors:
        """What is held, wherever it is."""

    def fetch(self) -> Tensors:
        """The tensors on their device."""


Keep = Callable[[Tensors], Kept]


class OnDevice:
    """Tensors that wait where they are."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    @property
    def device(self) -> torch.device:
        return self._tensors[0].device

    def tensors(self) -> Tensors:
        return self._tensors

    fetch = tensors


class Form:
    """`numel` values of `dtype`; `bits` of each are kept."""

    __slots__ = ("__weakref__", "_held", "_restored", "bits", "dtype", "kept", "numel")

    # The last that was asked for two.
    _holder: "ClassVar[Callable[[], Form | None]]" = staticmethod(lambda: None)

    def __init__(self, kept: Kept, flat: Tensor, bits: int) -> None:
        self.kept, self.bits = kept, bits
        self.numel, self.dtype = flat.numel(), flat.dtype
        # By storage, not by tensor: autograd keeps a restored view's storage, not its base.
        self._restored: StorageWeakRef | None = None
        self._held: Tensor | None = None

    def restore_for_two(self) -> Tensor:
        """`restore`, for one who expects that the next to ask comes soon: for that one it is held,
        until another form is asked. Backward may have gone another way, or may not come back."""
        flat = self.restore()
        self._held, Form._holder = flat, weakref.ref(self)
        return flat

    def restore(self) -> Tensor:
        """The values, flat, in memory order."""
        held, self._held = self._held, None
        if held is not None:
            return held
        if (holder := Form._holder()) is not None:
            holder._held = None
        if self._restored is not None:
            storage = torch.UntypedStorage._new_with_weak_ptr(self._restored.cdata)
            if storage is not None:
                return self._over(storage)
        flat = self._decode(*self.kept.fetch())
        self._restored = StorageWeakRef(flat.untyped_storage())
        return flat

    def _over(self, storage: torch.UntypedStorage) -> Tensor:
        flat = torch.empty(0, dtype=self.dtype, device=self.kept.device)
        return flat.set_(storage, 0, (self.numel,), (1,))

    def _decode(self, *kept: Tensor) -> Tensor:
        raise NotImplementedError

    def bytes(self) -> int:
        """Bytes kept."""
        return sum(tensor.nbytes for tensor in self.kept.tensors())


class Codes(Form):
    """Values rounded at random to codes of 8, 4 or 2 bits.

    On the CPU a group that holds a NaN, an infinity or a range that no scale covers is kept exact
    beside the codes. On a GPU that would take waiting for the device: there it comes back as NaN.
    """

    __slots__ = ("_group_size",)

    def __init__(self, flat: Tensor, bits: int, group_size: int, noise: Noise, keep: Keep) -> None:
        kept: Tensors
        kept, complete = quantize_and_tell(flat, bits, noise=noise, group_size=group_size)
        if complete is False:
            codes, meta = kept
            rows = (meta == NAN_META).nonzero()
            places = rows * group_size + torch.arange(group_size)
            places = places.view(-1).clamp_(max=flat.numel() - 1)
            kept = codes, meta, places, flat[places]
        super().__init__(keep(kept), flat, bits)
        self._group_size = group_size

    def _decode(self, *kept: Tensor) -> Tensor:
        codes, meta, *exact = kept
        flat = dequantize(
            Quantized(codes, meta), self.numel, self.dtype, self.bits, group_size=self._group_size
        )
        if exact:
            places, values = exact
            flat[places] = values
        return flat


class Bools(Form):
    """Booleans, a bit each."""

    __slots__ = ()

    def __init__(self, flat: Tensor, keep: Keep) -> None:
        super().__init__(keep((pack_mask(flat),)), flat, 1)

    def _decode(self, *kept: Tensor) -> Tensor:
        return unpack_mask(kept[0], self.numel)


class Positive(Form):
    """Where a ReLU's output is positive: 1 there and 0 elsewhere."""

    __slots__ = ()

    def __init__(self, flat: Tensor, keep: Keep) -> None:
        super().__init__(keep((pack_positive(flat),)), flat, 1)

    def _decode(self, *kept: Tensor) -> Tensor:
        return unpack_mask(kept[0], self.numel).to(self.dtype)


class TwoValued(Form):
    """A mask of 0 and one positive value."""

    __slots__ = ()

    def __init__(self, flat: Tensor, keep: Keep) -> None:
        super().__init__(keep((pack_positive(flat), flat.amax())), flat, 1)

    def _decode(self, *kept: Tensor) -> Tensor:
        bits, value = kept
        return unpack_mask(bits, self.numel).to(self.dtype).mul_(value)


class Copied(Form):
    """The values themselves, for what goes to host memory exact."""

    __slots__ = ()

    def __init__(self, flat: Tensor, keep: Keep) -> None:
        super().__init__(keep((flat,)), flat, 8 * flat.dtype.itemsize)

    def _decode(self, *kept: Tensor) -> Tensor:
        return kept[0]


class PoolOffsets(Form):
    """A max_pool2d's int64 indices, as places within each window: a byte for windows up to 256."""

    __slots__ = ("_geometry", "_shape", "_strides")

    def __init__(self, indices: Tensor, geometry: PoolGeometry, keep: Keep) -> None:
        self._geometry, self._shape, self._strides = geometry, indices.shape, indices.stride()
        rows, columns = geometry.kernel
        row, column = self._starts(indices.device)
        y = torch.div(indices, geometry.width, rounding_mode="floor")
        x = (indices - y * geometry.width).sub_(column).floor_divide_(geometry.dilation[1])
        places = y.sub_(row).floor_divide_(geometry.dilation[0]).mul_(columns).add_(x)
        flat = places.as_strided((places.numel(),), (1,))
        super().__init__(keep((narrow(flat, rows * columns),)), flat, 8)

    def _starts(self, device: torch.device) -> Tensors:
        """The first row of each window, [height, 1], and its first column, [width]."""
        (height, width), g = self._shape[-2:], self._geometry
        row = torch.arange(height, device=device).mul_(g.stride[0]).sub_(g.padding[0])
        column = torch.arange(width, device=device).mul_(g.stride[1]).sub_(g.padding[1])
        return row[:, None], column

    def _decode(self, *kept: Tensor) -> Tensor:
        g = self._geometry
        places = widen(kept[0]).as_strided(self._shape, self._strides)
        row, column = self._starts(places.device)
        y = torch.div(places, g.kernel[1], rounding_mode="floor")
        x = places.sub_(y * g.kernel[1]).mul_(g.dilation[1]).add_(column)
        indices = y.mul_(g.dilation[0]).add_(row).mul_(g.width).add_(x)
        return indices.as_strided((self.numel,), (1,))


class ShapeOnly:
    """A tensor of which backward reads no value: as much memory again, its contents arbitrary."""

    __slots__ = ("_device", "_dtype", "_shape", "_strides")

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._strides = tensor.shape, tensor.stride()
        self._dtype, self._device = tensor.dtype, tensor.device

    def restore(self) -> Tensor:
        return torch.empty_strided(
            self._shape, self._strides, dtype=self._dtype, device=self._device
        )


class Exact:
    """A tensor kept as it is, and refused once it was changed in place."""

    __slots__ = ("tensor", "version")

    bits = 128
    """More than any other form has."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached: a tensor that reached its own graph node from here would never be freed.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version

    def restore(self) -> Tensor:
        return unchanged(self.tensor, self.version)


def unchanged(tensor: Tensor, version: int) -> Tensor:
    """`tensor`, refused where it is no more at the version at which it was saved."""
    if tensor._version != version:
        raise RuntimeError(
            "a tensor saved for backward must not change before it is used; one of shape "
            f"{tuple(tensor.shape)} is at version {tensor._version}, saved at version {version}; "
            "replace the in-place operation by one that makes a new tensor"
        )
    return tensor


class Recomputed:
    """The result of arithmetic (`0.5 * x`, `x + x**3`) on a storage that is kept."""

    __slots__ = ("_again", "_recompute", "_source", "bits", "numel")

    def __init__(
        self, source: Any, recompute: Callable[[Tensor], Tensor], tensor: Tensor, *, again: bool
    ) -> None:
        """Of `source`, a slot; `again`: the next backward asks for its values, too."""
        self._source, self._recompute, self.bits = source, recompute, source.bits
        self.numel, self._again = tensor.numel(), again

    def restore(self) -> Tensor:
        """The values, flat, in memory order."""
        source = self._source
        kept = source.restore_for_two() if self._again else source.restore()
        flat = kept.as_strided((self.numel,), (1,), 0)
        with torch.no_grad():
            return self._recompute(flat)
