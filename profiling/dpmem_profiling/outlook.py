"""What batches that were not tried are expected to take, judged by those that were: an outlook.

Best by what two of them asked of the allocator, which tells what any other would ask (`Requests`).
With a forecast: that, plus the line through what it was off where it was held to probes. Both know
the staircase in which an allocator reserves, which peaks alone cannot show. Without either: each
phase of a step is close to a straight line in the batch size, so small batches that peak in the
optimizer's step still tell of large ones that peak in forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from dpmem_profiling.extrapolate import Extrapolated
from dpmem_profiling.record import Probe

# A slope is taken over at least the last sixteenth, or allocator rounding would drown it.
LOCAL = 15 / 16
# So many batches next to one that is proposed are looked at, each of them.
NEAREST = 16
# A replay takes 7 microseconds for each request. Of so few a hundred batches are looked at, and of
# more, which are those of models that take a minute to try, about twenty.
FEW_REQUESTS = 20_000
# How far below a batch its stair is looked for, as a part of it.
STAIR = 0.9


class Outlook(Protocol):
    """Beyond a batch that fits.

    is_rising  the peak is expected to grow with the batch
    words      what it is made of
    """

    words: ClassVar[str]

    @property
    def is_rising(self) -> bool: ...

    def at(self, batch: int) -> float:
        """The peak that is expected of `batch`."""
        ...

    def reach(self, target_bytes: int, failure: int) -> int:
        """The largest batch below `failure` that is expected to stay within `target_bytes`."""
        ...

    def slope(self, batch: int) -> float:
        """Bytes a sample, from the batch that fits to `batch`."""
        ...

    def hidden_bytes(self, probe: Probe) -> float:
        """How far it may be off beyond `probe`, right about it, where peaks grow in stairs."""
        ...


class Line(NamedTuple):
    """A peak at some batch, and how it grows with each sample more."""

    peak_bytes: float
    slope: float

    def at(self, more: int) -> float:
        """The peak with `more` samples more."""
        return self.peak_bytes + self.slope * more


@dataclass(frozen=True)
class Lines:
    """The highest of several lines that start at the batch `best`."""

    words: ClassVar[str] = "the line through the probes"
    best: int
    lines: Sequence[Line]

    @property
    def is_rising(self) -> bool:
        return any(line.slope > 0 for line in self.lines)

    def at(self, batch: int) -> float:
        return max(line.at(batch - self.best) for line in self.lines)

    def reach(self, target_bytes: int, failure: int) -> int:
        rising = [line for line in self.lines if line.slope > 0]
        room = min((target_bytes - line.peak_bytes) / line.slope for line in rising)
        return self.best + int(room)

    def slope(self, batch: int) -> float:
        return max(self.lines, key=lambda line: line.at(batch - self.best)).slope

    def hidden_bytes(self, probe: Probe) -> float:
        # One more stair may hide many samples.
        return math.inf


@dataclass(frozen=True)
class Corrected:
    """`forecast`, right at the probed batch `best` and off elsewhere by a line in the batch.

    The line goes through `other`, probed too; with one probe alone the forecast is scaled.
    """

    words: ClassVar[str] = "the forecast, which the probes bear out"
    forecast: Callable[[int], float]
    peaks: Mapping[int, int]
    best: int
    other: int | None
    is_rising = True

    @property
    def off_bytes(self) -> float:
        """How far it was off, at most, where it was held to probes and not corrected."""
        return max(abs(self._error_bytes(batch)) for batch in self.peaks)

    def late(self, batch: int) -> float:
        """By how many samples a stair that it ends at `batch` may end later, for all that is known.

        Right about the first batch of a stair, it has its stairs in place; right about the last, it
        may be too high by all that the stair hides.
        """
        starts = {probed: self.stair_start(probed) for probed in self.peaks}
        parts = [probed / (start - 1) - 1 for probed, start in starts.items() if start]
        return batch * min(parts, default=math.inf)

    def stair_start(self, batch: int) -> int | None:
        """The first batch forecast to take what `batch` takes; None if not in its last tenth."""
        below = int(STAIR * batch)
        if below < 1 or self.forecast(below) >= self.forecast(batch):
            return None
        less_bytes = math.nextafter(self.forecast(batch), 0)
        return 1 + last_within(self.forecast, less_bytes, below, batch)

    def at(self, batch: int) -> float:
        if self.other is None:
            return self.forecast(batch) * self.peaks[self.best] / self.forecast(self.best)
        error_bytes = self._error_bytes(self.best)
        per_sample = (error_bytes - self._error_bytes(self.other)) / (self.best - self.other)
        return self.forecast(batch) + error_bytes + per_sample * (batch - self.best)

    def _error_bytes(self, batch: int) -> float:
        return self.peaks[batch] - self.forecast(batch)

    def reach(self, target_bytes: int, failure: int) -> int:
        return first_reach(self.at, target_bytes, self.best, failure)

    def slope(self, batch: int) -> float:
        return (self.at(batch) - self.peaks[self.best]) / max(batch - self.best, 1)

    def hidden_bytes(self, probe: Probe) -> float:
        is_close = self.late(probe.batch) < 2 + tolerance(probe.batch)
        return self.off_bytes if is_close else math.inf


@dataclass(frozen=True)
class Replayed(Corrected):
    """The same, where the forecast is what two probes asked of the allocator."""

    words: ClassVar[str] = "what the probes asked of the allocator"
    forecast: Extrapolated

    @property
    def is_rising(self) -> bool:  # type: ignore[override]
        return self.forecast.grows

    @property
    def off_bytes(self) -> float:
        # Other batches may have made other requests.
        assert self.other is not None
        return max(abs(self._error_bytes(batch)) for batch in (self.best, self.other))

    def reach(self, target_bytes: int, failure: int) -> int:
        finely = len(self.forecast.high_requests.events) <= FEW_REQUESTS
        return first_reach(self.at, target_bytes, self.best, failure, finely=finely)

    def hidden_bytes(self, probe: Probe) -> float:
        return self.off_bytes if self.forecast.foresaw(probe.batch, probe.requests) else math.inf


def tolerance(batch: int) -> int:
    """How many samples more, a percent, are not worth another probe."""
    return batch // 100


def outlook(
    probes: Mapping[int, Probe],
    peaks: Mapping[int, int],
    best: int,
    failure: int,
    forecast: Callable[[int], float] | None,
) -> Outlook:
    """Beyond the probed batch `best`, by it and one other: `failure` where its peak is known too,
    else the nearest below that is not almost the same."""
    other = _other(peaks, best, failure)
    if forecast is not None:
        return Corrected(forecast, peaks, best, other)
    if other is None:
        return Lines(best, [Line(peaks[best], 0.0)])
    return Lines(best, _chords(probes, peaks, other, best))


def replayed(
    probes: Mapping[int, Probe], peaks: Mapping[int, int], best: int, failure: int
) -> Replayed | None:
    """The same by what both asked of the allocator; None where that is not alike, or not known."""
    other = _other(peaks, best, failure)
    if other is None:
        return None
    low, high = sorted((best, other))
    one, two = probes[low].requests, probes[high].requests
    if one is None or two is None or not one.is_like(two):
        return None
    return Replayed(Extrapolated(low, high, one, two), peaks, best, other)


def _other(peaks: Mapping[int, int], best: int, failure: int) -> int | None:
    if failure in peaks:
        return failure
    below = [batch for batch in peaks if batch < best]
    return max(
        (batch for batch in below if batch <= LOCAL * best), default=min(below, default=None)
    )


def _chords(
    probes: Mapping[int, Probe], peaks: Mapping[int, int], other: int, best: int
) -> list[Line]:
    """Lines through two probed batches, starting at `best`: the peak's and each phase's.

    Phases are known in allocated bytes. Their lines are raised to the peak by as much as the peak
    of `best` exceeds them: what an allocator rounds and fragments.
    """
    more = best - other
    here, there = (probes[batch].peak_by_phase or {} for batch in (best, other))
    peak_bytes = peaks[best]
    raised = peak_bytes / max(here.values(), default=peak_bytes) if peak_bytes else 1.0
    lines = [
        Line(raised * size, raised * (size - there[name]) / more)
        for name, size in here.items()
        if name in there
    ]
    if not lines or probes[best].reserved_bytes is not None:
        lines.append(Line(peak_bytes, (peak_bytes - peaks[other]) / more))
    return lines


def first_reach(
    curve: Callable[[int], float],
    target_bytes: float,
    fits: int,
    failure: int,
    *,
    finely: bool = False,
) -> int:
    """`last_within` of a curve that may fall again: stops before what is found beyond the target.

    A larger batch may take less, where its activations' blocks are first large enough for gradients
    to use. So batches below the one found, at distances that double, are looked at too; `finely`,
    those nearest to it one by one, a third of all in steps of a percent, the others of three.
    """
    while True:
        found = last_within(curve, target_bytes, fits, failure)
        distances = {2**k for k in range((found - fits).bit_length())}
        if finely:
            step = max(tolerance(found), 1)
            distances.update(range(1, NEAREST), range(step, found // 3, step))
            distances.update(range(found // 3, found, 3 * step))
        beyond = [
            found - by for by in distances if fits < found - by and curve(found - by) > target_bytes
        ]
        if not beyond:
            return found
        failure = min(beyond)


def last_within(curve: Callable[[int], float], target_bytes: float, fits: int, failure: int) -> int:
    """The largest batch from `fits` to below `failure` whose `curve` is within `target_bytes`.

    Takes the curve to rise, and looks where a line meets the target or half way, in turn. `fits` is
    0 where nothing is known to fit.
    """
    fits_bytes = curve(fits) if fits else 0.0
    fails_bytes: float | None = None
    slope, halve = 0.0, False
    while failure - fits > 1:
        if fails_bytes is not None:
            slope = (fails_bytes - fits_bytes) / (failure - fits)
        aim = fits + int((target_bytes - fits_bytes) / slope) if slope > 0 else failure
        if fails_bytes is None:
            # A line through small batches may be far off.
            aim = min(aim, 4 * fits + 2)
        elif halve:
            aim = (fits + failure) // 2
        halve = not halve
        aim = min(max(aim, fits + 1), failure - 1)
        aim_bytes = curve(aim)
        if aim_bytes <= target_bytes:
            slope = (aim_bytes - fits_bytes) / (aim - fits)
            fits, fits_bytes = aim, aim_bytes
        else:
            failure, fails_bytes = aim, aim_bytes
    return fits
