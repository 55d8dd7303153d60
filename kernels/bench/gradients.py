"""Check, norm, unscale and pack beside torch's own: one read and one write at most."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.rows import Row
from dpmem_kernels import PackPlan, bucket_pack, grad_scale_, grad_stats

_ELEMENTS = 100_000_000
_TENSORS = 200
_PACK_ELEMENTS = 16_000_000
# Two sums of the same squares in fp32, n terms each, in trees or in double: far below this.
_SUM_TOLERANCE = 1e-4


def _tensors(total: int, count: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """`count` separate tensors of different sizes, `total` elements together."""
    generator = torch.Generator(device).manual_seed(0)
    weights = [1 + i % 7 for i in range(count)]
    sizes = [total * w // sum(weights) for w in weights]
    sizes[0] += total - sum(sizes)
    return [torch.randn(n, generator=generator, device=device).to(dtype) for n in sizes]


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def rows(device: torch.device) -> Iterator[Row]:
    """The gradient ops' rows; tensors of one row are freed before the next is asked for."""
    yield from _statistics(device)
    for source, destination in (
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ):
        yield from _packing(device, source, destination)


def _statistics(device: torch.device) -> Iterator[Row]:
    gradients = _tensors(_ELEMENTS, _TENSORS, torch.float32, device)
    flat = torch.randn(_ELEMENTS, device=device)
    norm = _norm(gradients)

    def check() -> None:
        stats = grad_stats(gradients)
        assert abs(float(stats.sum_of_squares) ** 0.5 / norm - 1) < _SUM_TOLERANCE
        assert float(stats.found_inf) == 0
        kept = gradients[-1][-1].item()
        gradients[-1][-1] = float("inf")
        assert float(grad_stats(gradients).found_inf) == 1
        gradients[-1][-1] = kept

    read_bytes = 4 * _ELEMENTS
    what = f"check + norm, {_ELEMENTS // 10**6} M fp32 in {_TENSORS} tensors"
    yield Row(
        name=what,
        beside="torch.sum of one flat tensor",
        ours=lambda: grad_stats(gradients),
        theirs=flat.sum,
        check=check,
        moved_bytes=read_bytes,
        at_most=1.3,
    )
    del flat
    parameters = [torch.nn.Parameter(torch.empty_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    one = torch.ones((), device=device)

    def unscale_and_clip() -> None:
        found_inf = torch.zeros((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, one)
        # A norm that is never exceeded still costs clip_grad_norm_ its multiplication.
        torch.nn.utils.clip_grad_norm_(parameters, 1e9)

    yield Row(
        name=what + ", unscale and clip deferred",
        beside="GradScaler's unscale + clip_grad_norm_",
        ours=lambda: grad_stats(gradients),
        theirs=unscale_and_clip,
        check=check,
        moved_bytes=read_bytes,
        at_most=1 / 3,
    )
    # 1 + 2^-20 keeps the gradients what they are, for all practical purposes, over many runs.
    factor = torch.tensor(1 + 2**-20, device=device)

    def check_scale() -> None:
        copies = [g.clone() for g in gradients[:3]]
        grad_scale_(copies, factor)
        for copy, gradient in zip(copies, gradients, strict=False):
            assert torch.equal(copy, gradient * factor)

    def stats_and_scale() -> None:
        grad_stats(gradients)
        grad_scale_(gradients, factor)

    def norm_and_multiply() -> None:
        norms = torch._foreach_norm(gradients)
        torch.stack(norms).norm()
        torch._foreach_mul_(gradients, factor)

    yield Row(
        name=what + ", then scaled in place",
        beside="_foreach_norm + _foreach_mul_ (two passes, as Apex)",
        ours=stats_and_scale,
        theirs=norm_and_multiply,
        check=check_scale,
        moved_bytes=3 * read_bytes,
    )
    yield Row(
        name=what + ", then scaled in place",
        beside="GradScaler's unscale + clip_grad_norm_",
        ours=stats_and_scale,
        theirs=unscale_and_clip,
        check=check_scale,
        moved_bytes=3 * read_bytes,
    )


def _packing(device: torch.device, source: torch.dtype, destination: torch.dtype) -> Iterator[Row]:
    gradients = _tensors(_PACK_ELEMENTS, _TENSORS, source, device)
    flat = torch.cat(gradients)
    bucket = torch.empty(_PACK_ELEMENTS, dtype=destination, device=device)
    copied = torch.empty_like(bucket)
    offsets = [0]
    for gradient in gradients[:-1]:
        offsets.append(offsets[-1] + gradient.numel())

    plan = PackPlan([g.numel() for g in gradients], [source] * _TENSORS, offsets, device)

    def pack() -> None:
        bucket_pack(plan, gradients, bucket, scale=0.5)

    def check() -> None:
        bucket.fill_(float("nan"))
        pack()
        assert torch.equal(bucket, (flat.float() * 0.5).to(destination))

    def flatten_and_divide() -> None:
        torch.cat(gradients).to(destination).div_(2)

    names = [str(dtype).removeprefix("torch.") for dtype in (source, destination)]
    what = f"pack x 1/2 with flag, {names[0]} to {names[1]}, {_PACK_ELEMENTS // 10**6} M"
    moved = _PACK_ELEMENTS * (source.itemsize + destination.itemsize)
    yield Row(
        name=what,
        beside="copy_ of one flat tensor",
        ours=pack,
        theirs=lambda: copied.copy_(flat),
        check=check,
        moved_bytes=moved,
        at_most=1.3,
    )
    yield Row(
        name=what,
        beside="torch's flatten + div",
        ours=pack,
        theirs=flatten_and_divide,
        check=check,
        moved_bytes=moved,
        at_most=1.0,
    )
