"""search() where probes tell what they asked of the allocator: two of them tell of all others."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest

from dpmem_profiling import AllocatorSettings, CachingAllocator, OutOfDeviceMemory
from dpmem_profiling.batch_size import search
from dpmem_profiling.extrapolate import Recorder, Requests
from dpmem_profiling.record import BatchSizeResult, Probe

MIB = 1 << 20


class Model(NamedTuple):
    """A model on a device with so much memory, with what its layers keep and compute with."""

    weights_bytes: int
    layers: int
    activation_bytes: Callable[[int], int]
    capacity_bytes: int
    # Kernels that take scratch where there are few samples, and copies of their input.
    scratch_below: int = 0
    copies_below: int = 0

    def __call__(self, batch: int) -> Probe:
        """A trial. An allocator that had to give back did not fit."""
        device = CachingAllocator(capacity_bytes=self.capacity_bytes)
        recorder = Recorder(AllocatorSettings())

        def take(size_bytes: int) -> int:
            address = device.malloc(size_bytes)
            recorder.takes(address, size_bytes)
            return address

        def give(address: int) -> None:
            recorder.gives(address)
            device.free(address)

        layer_bytes = self.weights_bytes // self.layers
        try:
            for _ in range(self.layers):
                take(layer_bytes)
            for step in range(2):
                kept = [take(self.activation_bytes(batch)) for _ in range(self.layers)]
                gradients = []
                for address in reversed(kept):
                    gradients.append(take(layer_bytes))
                    temporary = take(self.activation_bytes(batch))
                    if batch < self.scratch_below:
                        give(take(32))
                    copy = take(9_000 * batch) if batch < self.copies_below else None
                    give(temporary)
                    if copy is not None:
                        give(copy)
                    give(address)
                if step == 0:
                    for _ in range(2 * self.layers):
                        take(layer_bytes)
                for address in gradients:
                    give(address)
        except OutOfDeviceMemory:
            return Probe(batch, "oom")
        return Probe(
            batch,
            "retry" if device.n_retries else "fits",
            allocated_bytes=device.peak_allocated_bytes,
            reserved_bytes=device.peak_reserved_bytes,
            requests=recorder.requests(),
        )

    def largest(self, limit_bytes: int) -> int:
        """The largest batch below which every batch fits, by trying all of them."""
        batch = 0
        while True:
            done = self(batch + 1)
            if done.outcome != "fits" or (done.reserved_bytes or 0) > limit_bytes:
                return batch
            batch += 1


def any_model(seed: int) -> Model:
    """Weights that matter or not, few layers or many, tens or hundreds of samples."""
    rng = random.Random(seed)
    capacity_bytes = rng.choice([512, 2048, 8192]) * MIB
    weights_bytes = int(capacity_bytes * rng.uniform(0.005, 0.2))
    layers = rng.randrange(2, 30)
    samples = rng.choice([8, 30, 100, 250])
    per_sample = (capacity_bytes - 4 * weights_bytes) // layers // samples
    constant = rng.choice([0, 0, rng.randrange(1_000_000)])
    return Model(weights_bytes, layers, lambda n: constant + per_sample * n, capacity_bytes)


def is_within_a_percent(answer: int | None, exact: int) -> bool:
    """Never above the exact one, and at most a percent or a sample below."""
    assert answer is not None
    return exact - max(1, exact // 100) <= answer <= exact


def forecast_of(model: Model, error: float) -> Callable[[int], float]:
    """The same allocator, with activations that are larger by `error`."""
    foreseen = model._replace(
        activation_bytes=lambda n: int((1 + error) * model.activation_bytes(n)),
        capacity_bytes=1 << 60,
    )
    return lambda n: float(foreseen(n).reserved_bytes or 0)


@pytest.mark.parametrize("error", [None, 0.0, -0.048, 0.048], ids=["blind", "right", "low", "high"])
@pytest.mark.parametrize("seed", range(6))
def test_two_probes_and_one_that_confirms(seed: int, error: float | None) -> None:
    """Fragments and stairs of the allocator included, with or without a forecast."""
    model = any_model(seed)
    forecast = None if error is None else forecast_of(model, error)
    margin_bytes = model.capacity_bytes // 50
    for margin in (0, margin_bytes):
        result = search(
            model, limit_bytes=model.capacity_bytes, margin_bytes=margin, forecast=forecast
        )
        safe = model.largest(model.capacity_bytes - margin)
        assert is_within_a_percent(result.largest_safe, safe)
        assert is_within_a_percent(result.largest_fitting, model.largest(model.capacity_bytes))
        assert len(result.probes) <= (4 if margin else 3)
        assert all(done.outcome == "fits" for done in result.probes)


def test_what_is_inferred_says_by_what() -> None:
    model = any_model(4)
    result = search(model, limit_bytes=model.capacity_bytes, margin_bytes=0)
    assert "would take too much by what the probes asked of the allocator" in result.limited_by


def test_what_grows_with_the_pairs_of_samples_takes_three_probes_too() -> None:
    model = Model(60 * MIB, 8, lambda n: 20_000 * n * n, 4096 * MIB)
    result = search(model, limit_bytes=model.capacity_bytes, margin_bytes=0)
    assert is_within_a_percent(result.largest_fitting, model.largest(model.capacity_bytes))
    assert len(result.probes) == 3


def test_steps_are_no_lines_and_a_forecast_that_knows_them_counts() -> None:
    model = Model(120 * MIB, 12, lambda n: 16_000_000 * -(-n // 16), 4096 * MIB)
    exact = model.largest(model.capacity_bytes)
    blind = search(model, limit_bytes=model.capacity_bytes, margin_bytes=0)
    right = search(
        model,
        limit_bytes=model.capacity_bytes,
        margin_bytes=0,
        forecast=forecast_of(model, 0.0),
    )
    assert is_within_a_percent(blind.largest_fitting, exact)
    assert is_within_a_percent(right.largest_fitting, exact)
    assert len(right.probes) == 3


@pytest.mark.parametrize("seed", range(4))
def test_scratch_that_few_samples_take_does_not_matter(seed: int) -> None:
    model = any_model(seed)._replace(scratch_below=4)
    result = search(model, limit_bytes=model.capacity_bytes, margin_bytes=0)
    assert is_within_a_percent(result.largest_fitting, model.largest(model.capacity_bytes))
    assert len(result.probes) == 3


@pytest.mark.parametrize("seed", [1, 2, 3, 5])
def test_where_few_samples_ask_otherwise_two_larger_batches_tell(seed: int) -> None:
    """The first probe is like no other: a dimension of 1 needs no copy, say, or needs one."""
    model = any_model(seed)._replace(copies_below=4)
    result = search(model, limit_bytes=model.capacity_bytes, margin_bytes=0)
    assert is_within_a_percent(result.largest_fitting, model.largest(model.capacity_bytes))
    assert len(result.probes) <= 5


@pytest.mark.parametrize("seed", range(20))
def test_requests_that_are_not_the_whole_truth_cost_probes_and_not_the_answer(seed: int) -> None:
    """Something takes memory past the allocator, or the allocator is another than its model."""
    rng = random.Random(seed)
    model = any_model(0)
    per_sample, more_bytes = rng.randrange(1 << 21), rng.randrange(100 * MIB)
    stair_bytes = rng.choice([1, 20 * MIB])

    def peak(batch: int) -> int | None:
        known = unlimited(batch).reserved_bytes or 0
        return (known + more_bytes + per_sample * batch) // stair_bytes * stair_bytes

    unlimited = model._replace(capacity_bytes=1 << 60)

    def probe(batch: int) -> Probe:
        peak_bytes = peak(batch)
        if peak_bytes > model.capacity_bytes:
            return Probe(batch, "oom")
        return replace(unlimited(batch), reserved_bytes=peak_bytes)

    result = search(probe, limit_bytes=model.capacity_bytes, margin_bytes=0)
    batch = 1
    while peak(batch) <= model.capacity_bytes:
        batch += 1
    assert is_within_a_percent(result.largest_fitting, batch - 1)
    assert {done.batch: done for done in result.probes}[result.largest_fitting].outcome == "fits"


def test_requests_that_promise_too_much_twice_are_believed_no_more() -> None:
    """A device with half the memory that its allocator takes itself to have."""
    model = Model(40 * MIB, 10, lambda n: 600_000 * n, 2048 * MIB)
    small = model.capacity_bytes // 2
    tried = []

    def probe(batch: int) -> Probe:
        tried.append(batch)
        done = model(batch)
        return Probe(batch, "oom") if (done.reserved_bytes or small + 1) > small else done

    result = search(probe, limit_bytes=model.capacity_bytes, margin_bytes=0)
    exact = model._replace(capacity_bytes=small).largest(small)
    assert is_within_a_percent(result.largest_fitting, exact)
    assert len(tried) <= 14


def test_on_a_plain_allocator_bends_are_foreseen() -> None:
    """As a small perceptron's backward on the CPU: gradients lead, then activations."""

    def probe(batch: int) -> Probe:
        recorder, peak_bytes = Recorder(), 0
        for number, size_bytes in enumerate((500_000, 100 * batch, 9_000 * batch)):
            recorder.takes(number, size_bytes)
            if number == 1:
                recorder.gives(0)
        peak_bytes = max(500_000 + 100 * batch, 9_100 * batch)
        return Probe(batch, "fits", allocated_bytes=peak_bytes, requests=recorder.requests())

    result = search(probe, limit_bytes=1_000_000, margin_bytes=0)
    assert (result.largest_fitting, len(result.probes)) == (109, 3)


def test_steps_that_do_not_grow_are_not_followed_to_no_end() -> None:
    def probe(batch: int) -> Probe:
        recorder = Recorder()
        recorder.takes(0, 500)
        return Probe(batch, "fits", allocated_bytes=500, requests=recorder.requests())

    result = search(probe, limit_bytes=1000, margin_bytes=0, max_batch=3000)
    assert [done.batch for done in result.probes][:4] == [1, 4, 16, 64]
    assert result.largest_fitting == 3000


def test_a_result_has_no_requests() -> None:
    model = any_model(2)
    seen: list[Probe] = []
    result = search(model, limit_bytes=model.capacity_bytes, margin_bytes=0, on_probe=seen.append)
    told: list[Requests | None] = [done.requests for done in (*result.probes, *seen)]
    assert set(told) == {None}
    text = json.dumps(result.to_json())
    assert "requests" not in text
    assert BatchSizeResult.from_json(json.loads(text)) == result
