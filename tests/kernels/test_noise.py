"""The noise of quantize is unbiased and independent, as far as tests of this size can tell.

Each test compares a statistic with its limit: 6.5 of its standard deviations sigma, which chance
alone passes about once in 10^10, plus the bias of 2^-14 scales that the format admits. What is
found with probability 0.99 is the limit and 2.33 sigma more. s is the scale of a group, a step of
its codes; f in [0, 1) is where an element lies between two of them, taken as uniform.

| what | statistic | sigma | limit | found in 99 of 100 cases |
|---|---|---|---|---|
| bias of one element | mean of 16,384 roundings | at most 0.0039 s | 0.0255 s | 0.0346 s |
| bias common to all elements | mean of 512 * 16,384 roundings | 0.00014 s | 0.00098 s | 0.0013 s |
| variance that is not f (1 - f) s^2 | mean of as many squares | 0.00038 of it | 0.0032 | 0.0041 |
| correlation between two seeds, streams, steps or ranks, of elements 1, 2, 32 or 128 apart | of \
the errors of 2^20 elements | 0.00098 | 0.0063 | 0.0086 |

The last test of each kind injects what it is said to find.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dpmem_kernels.quantize import BITS, DTYPES, Noise, dequantize, quantize

SIGMAS = 6.5
# Of 100 draws from a normal distribution, 99 lie above its mean minus this many sigma.
FOUND_SIGMAS = 2.33
FORMAT_BIAS = 2**-14
ELEMENTS, DRAWS, DRAWS_PER_CALL = 512, 16_384, 256
PAIRED = 1 << 20
BASE = {"seed": 1, "stream": 2, "step": 3, "rank": 4}


class Roundings(NamedTuple):
    """Of ELEMENTS elements, float64: where they lie, the mean of their errors and of the errors'
    squares over DRAWS roundings; in scales."""

    fraction: Tensor
    bias: Tensor
    square: Tensor

    @property
    def variance(self) -> Tensor:
        return self.fraction * (1 - self.fraction)


def _roundings(bits: int, dtype: torch.dtype) -> Roundings:
    """A call draws 256 times, since the same values in other groups meet other noise."""
    x = torch.randn(ELEMENTS).to(dtype)
    repeated = x.repeat(DRAWS_PER_CALL)
    total = torch.zeros(ELEMENTS, dtype=torch.float64)
    squares = torch.zeros(ELEMENTS, dtype=torch.float64)
    for step in range(DRAWS // DRAWS_PER_CALL):
        quantized = quantize(repeated, bits, noise=Noise(seed=5, stream=0, step=step, rank=0))
        restored = dequantize(quantized, repeated.numel(), torch.float32, bits)
        error = restored.view(-1, ELEMENTS).double() - x.double()
        total += error.sum(0)
        squares += (error**2).sum(0)
    group = torch.arange(ELEMENTS) // 128
    scale = (quantized.meta & -0x10000).view(torch.float32).double()[group]
    zero = (quantized.meta << 16).view(torch.float32).double()[group]
    fraction = ((x.double() - zero) / scale) % 1
    return Roundings(fraction, total / DRAWS / scale, squares / DRAWS / scale**2)


def _biased_elements(found: Roundings) -> int:
    """Judged where f is in [0.1, 0.9] and the mean of thousands of draws is normal."""
    judged = (found.fraction > 0.1) & (found.fraction < 0.9)
    assert int(judged.sum()) > ELEMENTS // 2
    limit = SIGMAS * (found.variance / DRAWS).sqrt() + FORMAT_BIAS
    return int(((found.bias.abs() > limit) & judged).sum())


def _common_bias(found: Roundings) -> tuple[float, float]:
    """The mean error of all elements, and its sigma."""
    sigma = (found.variance.sum() / DRAWS).sqrt() / ELEMENTS
    return float(found.bias.mean()), float(sigma)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_unbiased(bits: int, dtype: torch.dtype) -> None:
    found = _roundings(bits, dtype)
    assert _biased_elements(found) == 0
    bias, sigma = _common_bias(found)
    assert abs(bias) < SIGMAS * sigma + FORMAT_BIAS

    # A squared error has mean v = f (1 - f) and variance v (1 - 3 v) - v^2.
    v = found.variance
    sigma = float(((v - 4 * v**2).sum() / DRAWS).sqrt()) / ELEMENTS
    assert abs(float((found.square - v).mean())) < SIGMAS * sigma + 2 * FORMAT_BIAS


def test_a_bias_of_the_stated_size_is_found() -> None:
    found = _roundings(4, torch.float32)
    middle = (found.fraction - 0.5).abs().argmin()
    biased = found.bias.clone()
    biased[middle] += 0.0346
    assert _biased_elements(found._replace(bias=biased)) == 1

    bias, sigma = _common_bias(found._replace(bias=found.bias + 0.0013))
    assert sigma == pytest.approx(0.00014, rel=0.05)
    assert bias > SIGMAS * sigma + FORMAT_BIAS


def test_rounding_to_nearest_would_be_found() -> None:
    found = _roundings(4, torch.float32)
    nearest = found.fraction.round() - found.fraction
    assert _biased_elements(found._replace(bias=nearest)) > ELEMENTS // 2


def _errors(values: dict[str, int]) -> Tensor:
    x = torch.rand(PAIRED, generator=torch.Generator().manual_seed(0))
    quantized = quantize(x, 4, noise=Noise(**values))
    error = dequantize(quantized, PAIRED, torch.float32, 4) - x
    return error - error.mean()


def _are_correlated(a: Tensor, b: Tensor) -> bool:
    """1 / sqrt(n) is the standard deviation of the correlation of n independent pairs."""
    correlation = torch.nn.functional.cosine_similarity(a.double(), b.double(), 0).item()
    return abs(correlation) > SIGMAS / a.numel() ** 0.5


@pytest.mark.parametrize(
    ("field", "highest"),
    [("seed", 1 << 63), ("stream", 1 << 31), ("step", 1 << 31), ("rank", 1 << 31)],
)
def test_noise_is_independent_across_every_field(field: str, highest: int) -> None:
    first = _errors(BASE)
    assert torch.equal(first, _errors(BASE))
    for change in (1, highest):
        assert not _are_correlated(first, _errors(BASE | {field: BASE[field] + change}))


@pytest.mark.parametrize("lag", [1, 2, 32, 128])
def test_noise_is_independent_across_elements(lag: int) -> None:
    errors = _errors(BASE)
    assert not _are_correlated(errors[lag:], errors[:-lag])


def test_a_correlation_of_the_stated_size_is_found() -> None:
    first, second = _errors(BASE), _errors(BASE | {"rank": 5})
    share = (SIGMAS + FOUND_SIGMAS) / PAIRED**0.5
    assert share == pytest.approx(0.0086, abs=0.0001)
    assert _are_correlated(first, share * first + (1 - share**2) ** 0.5 * second)
    assert not _are_correlated(first, second)
