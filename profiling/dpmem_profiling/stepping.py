"""Run a job's training steps under a tracker, with an attribution that looks at every edge.

What measures a step and what predicts one share this: a prediction is the same step on tensors that
hold no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dpmem_profiling.attribution import Attribution
from dpmem_profiling.job import Built, Job, Phase, StepContext, run_step
from dpmem_profiling.tracker import MemoryTracker


@dataclass(frozen=True)
class Stepper:
    """The steps of `job`, come to life as `built`, told to `tracker` and `attribution`."""

    job: Job
    built: Built
    device: torch.device
    tracker: MemoryTracker
    attribution: Attribution

    def step(self, make_batch: Callable[[], Any]) -> None:
        """One step, every phase of it marked. Its batch is made and gone within."""
        self.attribution.claim_model(self.built)
        self.attribution.between_steps()
        with self.tracker.in_phase(None):
            batch = make_batch()
            self.attribution.claim_batch(batch)
            model, optimizer = self.built
            run_step(self.job, StepContext(model, batch, optimizer, self.device, self._phase))
            del batch
        self.attribution.claim_model(self.built)
        self.attribution.between_steps()

    @contextmanager
    def _phase(self, name: Phase) -> Iterator[None]:
        with self.tracker.in_phase(name):
            yield
            if name == "forward":
                self.attribution.end_of_forward()
            if name != "zero_grad":
                self.attribution.claim_model(self.built)


@contextmanager
def raw_gradients_claimed(built: Built, attribution: Attribution) -> Iterator[None]:
    """Claim gradients as backward produces them: a wrapper may drop them before backward ends."""
    with ExitStack() as undo:
        for parameter in built.model.parameters():
            if parameter.requires_grad:
                handle = parameter.register_hook(attribution.claim_gradient)
                undo.callback(handle.remove)
        yield
