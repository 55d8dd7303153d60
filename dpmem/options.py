"""What a search may be asked for, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dpmem.isolation import pickled_job
from dpmem_profiling import Job


class Options(NamedTuple):
    """Options of `find_batch_size` that all ranks must have alike."""

    safety: float | None
    max_batch: int
    max_step_s: float | None
    multiple_of: int
    timed_batches: int
    gpu: str | None
    isolate: bool

    def checked(self, target: Any) -> Options:
        """These options. Raises ValueError for what cannot be, TypeError for what does not go with
        `target` or with one another."""
        for name, value in (("max_batch", self.max_batch), ("multiple_of", self.multiple_of)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; received {value}")
        if self.timed_batches < 0:
            raise ValueError(f"timed_batches must not be negative; received {self.timed_batches}")
        if self.safety is not None and not 0 <= self.safety < 1:
            raise ValueError(f"safety must be a fraction from 0 to below 1; received {self.safety}")
        if self.max_step_s is not None and not self.max_step_s > 0:
            raise ValueError(f"max_step_s must be positive seconds; received {self.max_step_s}")
        if not isinstance(target, Job):
            if self.gpu is not None or self.isolate:
                option = "gpu=" if self.gpu is not None else "isolate=True"
                raise TypeError(
                    f"{option} needs a Job, which can be built elsewhere; "
                    f"received {type(target).__name__}; describe the step as a dpmem.Job"
                )
        elif self.isolate:
            pickled_job(target)
        if self.gpu is not None:
            self._check_forecast(self.gpu)
        return self

    def _check_forecast(self, gpu: str) -> None:
        for name, value in (
            ("max_step_s", self.max_step_s),
            ("timed_batches", self.timed_batches),
            ("isolate", self.isolate),
        ):
            if value:
                raise TypeError(
                    f"a forecast for {gpu} knows no times and runs no steps; received "
                    f"{name}={value}; leave it out, or search on the GPU"
                )


def refuse_to_differ(said: Sequence[Options]) -> None:
    """Raise ValueError where ranks search by other rules: each would wait at batches of its own."""
    first = said[0]
    for rank, other in enumerate(said):
        for name, mine, theirs in zip(Options._fields, first, other, strict=True):
            if mine != theirs:
                raise ValueError(
                    f"all ranks must search alike; rank 0 received {name}={mine} and "
                    f"rank {rank} {name}={theirs}; pass the same on all"
                )
