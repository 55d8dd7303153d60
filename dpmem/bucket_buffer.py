"""The memory of one bucket: gradients go in, travel, and come back as its views."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpmem.buckets import Bucket
from dpmem.layout import (
    dense_gradient,
    dense_strides,
    flatten_dense,
    real_dtype,
    real_numel,
    writable_gradient,
)
from dpmem_kernels import GradStats, PackPlan, bucket_pack, bucket_unpack, grad_stats

# What one launch packs; others (float64) are multiplied into their places one by one.
_PACKED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter with its place in the bucket, in elements of the bucket's dtype."""

    parameter: nn.Parameter
    strides: tuple[int, ...]
    offset: int
    numel: int

    def gradient(self) -> Tensor:
        """`parameter.grad`, flat, in the order of memory; complex numbers as pairs."""
        gradient = flatten_dense(dense_gradient(self.parameter), self.strides)
        if gradient.is_complex():
            gradient = torch.view_as_real(gradient.resolve_conj()).view(-1)
        return gradient

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's gradient inside the bucket `flat`."""
        shape = self.parameter.shape
        if self.parameter.is_complex():
            strides = (*(2 * stride for stride in self.strides), 1)
            return torch.view_as_complex(flat.as_strided((*shape, 2), strides, self.offset))
        return flat.as_strided(shape, self.strides, self.offset)


class BucketBuffer:
    """One bucket of dense gradients.

    wire_dtype  what its elements travel as; None: as they are
    """

    def __init__(
        self,
        plan: Bucket,
        parameters: Sequence[nn.Parameter],
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.plan = plan
        self.members = [
            Member(parameter, dense_strides(parameter), slot.offset, slot.numel)
            for parameter, slot in zip(parameters, plan.slots, strict=True)
        ]
        self._device = parameters[0].device
        travels_packed = plan.dtype in _PACKED and wire_dtype not in (None, plan.dtype)
        self._wire_dtype = wire_dtype if travels_packed else None
        self.flat: Tensor | None = None
        self._wire: Tensor | None = None
        # Of the last backward: which gradients are present seldom changes.
        self._pack_plan: PackPlan | None = None
        self._present: list[Member] = []
        self._stats: GradStats | None = None
        # The flat buffer's version when its stats were taken: views share the counter, so any
        # later write to a gradient shows.
        self._stats_version = -1

    def pack(self, scale: float) -> Tensor:
        """Take the gradients, times `scale`, out of `.grad`; the tensor that travels.

        Absent ones count as zeros.
        """
        self._present = [m for m in self.members if m.parameter.grad is not None]
        target = self._target()
        for member in self.members:
            if member.parameter.grad is None:
                target[member.offset : member.offset + member.numel].zero_()
        gradients = [member.gradient() for member in self._present]
        if self.plan.dtype in _PACKED:
            bucket_pack(self._plan_for(gradients), gradients, target, scale=scale)
        else:
            for member, gradient in zip(self._present, gradients, strict=True):
                place = target[member.offset : member.offset + member.numel]
                torch.mul(gradient, scale, out=place)
        for member in self._present:
            member.parameter.grad = None
        return target

    def pack_zeros(self) -> Tensor:
        """Take no part in the average; what was in `.grad` stays there. The tensor that travels."""
        dtype = self._wire_dtype or self.plan.dtype
        return torch.zeros(self.plan.numel, dtype=dtype, device=self._device)

    def arrive(self, reduced: Tensor | None, *, take_stats: bool) -> None:
        """What travelled is back, in place, or as `reduced` where a hook made a tensor of it."""
        travelled = self.flat if self._wire is None else self._wire
        assert travelled is not None
        if reduced is not None and reduced.data_ptr() != travelled.data_ptr():
            travelled.copy_(reduced.view(-1))
        if self._wire is not None:
            self.flat = torch.empty(self.plan.numel, dtype=self.plan.dtype, device=self._device)
            plan = PackPlan([self.plan.numel], [self.plan.dtype], [0], self._device)
            # One pass: the statistics come with it.
            stats = bucket_unpack(plan, self._wire, [self.flat])
            self._remember(stats)
            self._wire = None
        elif take_stats and self.plan.dtype in _PACKED:
            self._take_stats()

    def expose(self, members: Sequence[Member] | None = None, *, as_views: bool) -> None:
        """Give the averaged gradients back, of all that had one, or of `members`."""
        assert self.flat is not None
        for member in self._present if members is None else members:
            view = member.view(self.flat)
            member.parameter.grad = view if as_views else view.clone()

    def release(self) -> None:
        """Let go of the memory; gradients that are its views keep it."""
        self.flat = self._wire = None
        self._stats = None

    def has_gradients(self) -> bool:
        """Does any parameter hold a gradient now?"""
        return any(member.parameter.grad is not None for member in self.members)

    def gradients(self) -> list[Tensor]:
        """Every gradient once, flat: the whole bucket where all gradients are still its views."""
        if self._is_exposed():
            assert self.flat is not None
            return [self.flat]
        parameters = [member.parameter for member in self.members]
        return [writable_gradient(p) for p in parameters if p.grad is not None]

    def stats(self) -> list[GradStats]:
        """Sums of squares and finite flags that together cover `gradients()`.

        Those of the arrival, read while the bucket was warm, as long as nobody wrote to a gradient
        since; read again otherwise.
        """
        if not self._is_exposed():
            gradients = self.gradients()
            return [grad_stats(gradients)] if gradients else []
        assert self.flat is not None
        if self._stats is None or self.flat._version != self._stats_version:
            self._take_stats()
        assert self._stats is not None
        return [self._stats]

    def _target(self) -> Tensor:
        dtype = self._wire_dtype or self.plan.dtype
        target = self.flat if self._wire_dtype is None else None
        if target is None:
            target = torch.empty(self.plan.numel, dtype=dtype, device=self._device)
            # The padding travels too, and stats read the whole buffer.
            for start, end in self.plan.gaps:
                target[start:end].zero_()
        if self._wire_dtype is None:
            self.flat = target
        else:
            self.flat, self._wire = None, target
        return target

    def _plan_for(self, gradients: list[Tensor]) -> PackPlan:
        offsets = tuple(member.offset for member in self._present)
        # A member without elements shares its place with the next.
        numels = tuple(member.numel for member in self._present)
        known = self._pack_plan
        if known is None or (known.offsets, known.numels) != (offsets, numels):
            dtypes = [gradient.dtype for gradient in gradients]
            known = self._pack_plan = PackPlan(numels, dtypes, offsets, self._device)
        return known

    def _take_stats(self) -> None:
        assert self.flat is not None
        self._remember(grad_stats([self.flat]))

    def _remember(self, stats: GradStats) -> None:
        assert self.flat is not None
        self._stats = stats
        self._stats_version = self.flat._version

    def _is_exposed(self) -> bool:
        """True where every member's gradient is still the bucket's own view of it."""
        return self.flat is not None and all(
            (gradient := member.parameter.grad) is not None and gradient._base is self.flat
            for member in self.members
        )


class SparseBuffer(BucketBuffer):
    """One sparse gradient (of an embedding with sparse=True), which travels as it is."""

    def pack(self, scale: float) -> Tensor:
        """The gradient times `scale`, coalesced; an empty one where there is none."""
        (member,) = self.members
        gradient = member.parameter.grad
        self._present = [] if gradient is None else [member]
        if gradient is None:
            self.flat = self.pack_zeros()
        else:
            if not gradient.is_sparse:
                raise TypeError(
                    "an embedding with sparse=True must receive sparse gradients; that of a "
                    f"parameter of shape {tuple(member.parameter.shape)} is dense; use its weight "
                    "in no other layer, or sparse=False"
                )
            self.flat = (gradient.detach() * scale).coalesce()
            member.parameter.grad = None
        return self.flat

    def pack_zeros(self) -> Tensor:
        parameter = self.members[0].parameter
        indices = torch.empty((1, 0), dtype=torch.int64, device=self._device)
        values = torch.empty((0, *parameter.shape[1:]), dtype=parameter.dtype, device=self._device)
        return torch.sparse_coo_tensor(
            indices, values, parameter.shape, check_invariants=False, is_coalesced=True
        )

    def arrive(self, reduced: Tensor | None, *, take_stats: bool) -> None:
        if reduced is not None:
            self.flat = reduced

    def expose(self, members: Sequence[Member] | None = None, *, as_views: bool) -> None:
        for member in self._present if members is None else members:
            member.parameter.grad = self.flat

    def _is_exposed(self) -> bool:
        return False


def size_and_dtype(parameter: nn.Parameter) -> tuple[int, torch.dtype]:
    """What a plan needs to know of a parameter: complex numbers travel as pairs."""
    return real_numel(parameter), real_dtype(parameter.dtype)
