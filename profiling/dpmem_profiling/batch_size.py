"""The largest batch that fits, from a handful of probes.

Two small probes tell what larger batches are expected to take (`outlook`): by what their steps
asked of the allocator, by a forecast that they correct, or by a line for each phase of the step.
That proposes the answer, and one probe confirms it. Where it is wrong (an algorithm changes with
the size, memory fragments) or only the total is known, the search brackets: each further probe at
least narrows what is possible, and three that did not halve it are followed by one that does.

What is measured and what is inferred: every batch size in the answer was itself probed and fitted.
That a percent more does not fit was either probed too, or inferred from what had predicted the
confirming probe to within half of that and puts more over by more than it was off; `limited_by`
says which. Reserved bytes grow in stairs: from them something is inferred only where the confirming
probe asked, block by block, for what two others let expect, or by a forecast that was right about
every probe, the first batch of a stair among them. A peak that falls again beyond a batch that
failed is not looked for.

Some jobs refuse small batches: batch normalization one sample, micro-batches what they cannot
split. The search starts at the first of `FIRST_BATCHES` that does not end in an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dpmem_profiling.outlook import (
    NEAREST,
    Corrected,
    Outlook,
    Replayed,
    first_reach,
    outlook,
    replayed,
    tolerance,
)
from dpmem_profiling.record import BatchSizeResult, Probe, Source
from dpmem_profiling.units import format_bytes

FIRST_BATCHES = (1, 2, 4, 8)
# How far ahead to look while the peak does not yet grow with the batch.
GROWTH = 4
# With a forecast: where to look first, and next, as parts of what it proposes.
SMALL, CAUTIOUS = 1 / 4, 0.9
# How much smaller the batch after one that the lines had promised and that failed.
STEP_BACK = 0.06


def search(
    probe: Callable[[int], Probe],
    *,
    limit_bytes: int,
    margin_bytes: int,
    max_batch: int = 2**20,
    on_probe: Callable[[Probe], None] | None = None,
    forecast: Callable[[int], float] | None = None,
    source: Source = "measured",
) -> BatchSizeResult:
    """Find the largest batches within `limit_bytes` and within `limit_bytes - margin_bytes`.

    Each is never above the largest there is, and below it by at most a percent: fewer than a
    hundred samples are exact.

    A probe's peak is its reserved_bytes, else allocated_bytes, else predicted_bytes. Any outcome
    but "fits" is an upper bound, except "error" at the first batches: then larger ones are tried,
    and where all of them end in errors, so does the search. `on_probe` is shown every probe as it
    comes in.

    On a straight line this takes 4 probes, or 3 where both answers agree: for a peak of
    100 + 10 * batch with limit_bytes=1000 and margin_bytes=100 it tries 1, 4, 80 and 90, and
    answers largest_safe=80, largest_fitting=90. The same on any curve where probes have `requests`
    that are alike but for sizes, each a line in the batch.

    `forecast` says what a batch is expected to take, in the bytes that probes name, a staircase of
    reserved ones included. The search then begins with a quarter of what it proposes, goes on with
    nine tenths, and confirms the answer with the third probe where the requests of the first two,
    or else the forecast corrected by them, are right about it. A forecast never stands in for a
    probe that fits.

    Raises ValueError for a limit that is not positive, a margin that is negative or leaves nothing,
    a max_batch below 1, and a probe that fits without naming its peak.
    """
    if limit_bytes <= 0:
        raise ValueError(f"limit_bytes must be positive; got {limit_bytes}")
    if not 0 <= margin_bytes < limit_bytes:
        raise ValueError(
            f"margin_bytes must be at least 0 and below limit_bytes={limit_bytes}; "
            f"got {margin_bytes}"
        )
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1; got {max_batch}")
    safe_bytes = limit_bytes - margin_bytes
    hunt = _Search(probe, max_batch, on_probe, forecast, safe_bytes)
    largest_safe = hunt.largest_within(safe_bytes)
    largest_fitting = hunt.largest_within(limit_bytes)
    timed = [
        done
        for done in hunt.probes.values()
        if done.seconds and largest_safe is not None and done.batch <= largest_safe
    ]
    fastest = max(timed, key=lambda done: done.batch / (done.seconds or 1), default=None)
    return BatchSizeResult(
        largest_fitting=largest_fitting,
        largest_safe=largest_safe,
        fastest=None if fastest is None else fastest.batch,
        peak_bytes=_peak_bytes(hunt.probes[largest_safe or hunt.first]),
        limit_bytes=limit_bytes,
        margin_bytes=margin_bytes,
        source=source,
        probes=tuple(done.told() for done in hunt.probes.values()),
        curve=tuple(sorted(hunt.peaks.items())),
        limited_by=_limited_by(hunt, largest_fitting, largest_safe, limit_bytes, margin_bytes),
    )


class _Search:
    """The probes so far, and how to choose the next."""

    def __init__(
        self,
        probe: Callable[[int], Probe],
        max_batch: int,
        on_probe: Callable[[Probe], None] | None,
        forecast: Callable[[int], float] | None,
        target_bytes: int,
    ) -> None:
        self._probe = probe
        self._on_probe = on_probe
        self.forecast = forecast
        self.max_batch = max_batch
        self.probes: dict[int, Probe] = {}
        self.peaks: dict[int, int] = {}
        # What two probes asked of the allocator, for their pair.
        self._replayed: dict[tuple[int, int], Replayed] = {}
        self._replays = True
        # How far what was expected was off, where that was within half a sample.
        self._foreseen: dict[int, float] = {}
        # By what it was inferred that a percent more does not fit.
        self.inferred_by: dict[int, str] = {}
        # The smallest batch that the job takes; the last one tried where it takes none.
        self.first = self._start(target_bytes)

    def _start(self, target_bytes: int) -> int:
        if self.forecast is not None:
            proposed = first_reach(self.forecast, target_bytes, 0, self.max_batch + 1)
            if 0 < proposed < self.max_batch:
                small = max(int(SMALL * proposed), 1)
                self._try(small)
                if small in self.peaks:
                    return small
            # It is of no use, or very wrong.
            self.forecast = None
        for batch in FIRST_BATCHES:
            if batch > self.max_batch:
                break
            first = batch
            self._try(batch)
            if self.probes[batch].outcome != "error":
                break
        return first

    def largest_within(self, target_bytes: int) -> int | None:
        """The largest batch whose peak is within `target_bytes`, probing as needed."""
        refusals, slow = 0, 0
        width = math.inf
        while True:
            failure = self._first_failure(target_bytes)
            best = max((batch for batch in self.peaks if batch < failure), default=None)
            if best is None or failure - best <= 1 + tolerance(best):
                return best
            # How many probes since what is possible was last halved.
            slow = 0 if failure - best <= width / 2 else slow + 1
            width = failure - best if slow == 0 else width
            measured = failure in self.peaks
            beyond = self._beyond(best, failure)
            if beyond.is_rising:
                aim = beyond.reach(target_bytes, failure)
                if isinstance(beyond, Corrected) and len(self.peaks) == 1:
                    # One probe may lie low on a stair that the forecast has elsewhere.
                    aim = min(aim, first_reach(beyond.forecast, target_bytes, best, failure))
                    aim = int(CAUTIOUS * aim)
                    # Where a forecast that is too high shows it.
                    aim = beyond.stair_start(aim) or aim
                error_bytes = self._foreseen.get(best)
                if error_bytes is not None:
                    over_bytes = self._most_bytes(beyond, best) - target_bytes
                    if error_bytes < over_bytes < math.inf:
                        self.inferred_by[best] = beyond.words
                        return best
            else:
                # Half of what would fit if the peak had no part that stays the same.
                aim = max(GROWTH * best, best * target_bytes // (2 * self.peaks[best] or 1))
            if failure <= self.max_batch and slow >= 3:
                aim = (best + failure) // 2
            elif failure <= self.max_batch and aim >= failure and not measured:
                aim = (best + failure) // 2
                if failure < GROWTH * best or self._has_stairs():
                    # A line that reaches little further than what it was drawn by, or fragments,
                    # which no line foresees, are off by a few percent; halving comes after.
                    aim = max(aim, failure - int(failure * STEP_BACK * 2**refusals))
            aim = min(max(aim, best + 1 + tolerance(best)), failure - 1)
            self._try(aim, beyond)
            refusals = 0 if aim in self.peaks else refusals + 1
            if refusals == 2:
                # Wrong about this device: lines and halving get there sooner.
                self.forecast = None
                self._replays = False
                self._foreseen.clear()

    def _beyond(self, best: int, failure: int) -> Outlook:
        known = replayed(self.probes, self.peaks, best, failure) if self._replays else None
        if known is None or (self.forecast is not None and not known.forecast.is_plain):
            return outlook(self.probes, self.peaks, best, failure, self.forecast)
        # What it worked out already is worth keeping.
        return self._replayed.setdefault((known.best, known.other or 0), known)

    def _most_bytes(self, beyond: Outlook, best: int) -> float:
        """What is expected of the one that takes most of the next percent: peaks may fall again."""
        last = best + 1 + tolerance(best)
        return max(beyond.at(batch) for batch in {*range(best + 1, last)[:NEAREST], last})

    def lowest_failure(self, target_bytes: int) -> int | None:
        """The smallest probed batch that does not fit, None where all did."""
        first = self._first_failure(target_bytes)
        return None if first > self.max_batch else first

    def bytes_per_sample(self) -> float:
        """How the peak grows beyond the largest probe that ran."""
        if not self.peaks:
            return 0.0
        largest = max(self.peaks)
        return outlook(self.probes, self.peaks, largest, largest + 1, None).slope(largest + 1)

    def _first_failure(self, target_bytes: int) -> int:
        failed = (
            batch
            for batch in self.probes
            if batch >= self.first and (batch not in self.peaks or self.peaks[batch] > target_bytes)
        )
        return min(failed, default=self.max_batch + 1)

    def _has_stairs(self) -> bool:
        """Do peaks grow in the steps in which an allocator reserves?"""
        return any(
            done.reserved_bytes not in (None, done.allocated_bytes) for done in self.probes.values()
        )

    def _try(self, batch: int, before: Outlook | None = None) -> None:
        """Probe `batch`; `before` is what was expected of it."""
        if batch in self.probes:
            return
        done = self._probe(batch)
        self.probes[batch] = done
        if self._on_probe is not None:
            self._on_probe(done.told())
        if done.outcome != "fits":
            return
        peak_bytes = _peak_bytes(done)
        if peak_bytes is None:
            raise ValueError(
                f"a probe that fits must name its peak; got none for batch {batch}. "
                "Set reserved_bytes, allocated_bytes or predicted_bytes."
            )
        self.peaks[batch] = peak_bytes
        if before is None:
            return
        error_bytes, slope = abs(peak_bytes - before.at(batch)), before.slope(batch)
        if self._has_stairs():
            error_bytes += before.hidden_bytes(done)
        is_close = slope > 0 and error_bytes <= slope * (1 + tolerance(batch)) / 2
        # What is reserved may fall from one batch to the next, and be foreseen for all that.
        if is_close or (isinstance(before, Replayed) and error_bytes == 0):
            self._foreseen[batch] = error_bytes


def _peak_bytes(probe: Probe) -> int | None:
    for peak_bytes in (probe.reserved_bytes, probe.allocated_bytes, probe.predicted_bytes):
        if peak_bytes is not None:
            return peak_bytes
    return None


def _limited_by(
    hunt: _Search,
    largest_fitting: int | None,
    largest_safe: int | None,
    limit_bytes: int,
    margin_bytes: int,
) -> str:
    """One phrase: what keeps `largest_safe` from being larger."""
    first = hunt.probes[hunt.first]
    if first.outcome == "error":
        tried = ", ".join(map(str, hunt.probes))
        return f"every batch tried ({tried}) failed for a reason other than memory"
    if first.outcome == "slow":
        return f"batch {first.batch} {first.error}"
    if largest_fitting is None:
        peak_bytes = _peak_bytes(first)
        if peak_bytes is None or peak_bytes <= limit_bytes:
            return f"batch {first.batch} does not fit in {format_bytes(limit_bytes)}"
        at_least = "" if first.outcome == "fits" else "at least "
        return (
            f"batch {first.batch} needs {at_least}{format_bytes(peak_bytes)}, "
            f"{format_bytes(peak_bytes - limit_bytes)} more than the limit"
        )
    if largest_safe is None:
        return f"batch {first.batch} fits, but within the margin of {format_bytes(margin_bytes)}"
    per_sample = hunt.bytes_per_sample()
    failure = hunt.lowest_failure(limit_bytes - margin_bytes)
    if failure is None and hunt.max_batch - largest_safe <= tolerance(largest_safe):
        most = f"max_batch={hunt.max_batch}"
        if largest_safe < hunt.max_batch:
            most += ", at most a percent away"
        if per_sample <= 0:
            return f"{most}; the peak does not grow with the batch"
        return f"{most}; the peak grows by {format_bytes(per_sample)} a sample"
    if failure is not None and failure - largest_safe <= 1 + tolerance(largest_safe):
        if hunt.probes[failure].outcome == "slow":
            return f"time: batch {failure} {hunt.probes[failure].error}"
        if hunt.probes[failure].outcome == "error":
            reason = hunt.probes[failure].error
            return f"batch {failure} failed" + (f": {reason}" if reason else "")
        if hunt.peaks.get(failure, limit_bytes + 1) <= limit_bytes:
            return f"memory: batch {failure} was tried and leaves too little of it free"
        return f"memory: batch {failure} was tried and takes too much"
    by = hunt.inferred_by[largest_safe]
    return (
        f"memory: {format_bytes(per_sample)} a sample, so batch "
        f"{largest_safe + 1 + tolerance(largest_safe)} would take too much by {by}"
    )
