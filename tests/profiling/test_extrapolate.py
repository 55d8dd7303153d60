"""What steps of other batch sizes would ask of their allocator, by what two of them asked."""

import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dpmem_profiling import AllocatorSettings, CachingAllocator, Job, measure
from dpmem_profiling.extrapolate import Extrapolated, Recorder, Requests, requests_of
from dpmem_profiling.replay import _recorded_peaks
from dpmem_profiling.snapshot import read_snapshot
from dpmem_profiling.trace_start import trace_start
from dpmem_profiling.tracker import Change

MIB = 1 << 20
DATA = Path(os.environ.get("DPMEM_DATA", Path(__file__).parents[3] / "shared" / "data"))
SNAPSHOTS = sorted((DATA / "snapshots").glob("gpt_*.json.gz"))


def asked(*sizes: int, settings: AllocatorSettings | None = None) -> Requests:
    """Blocks of these sizes, all held at once, then given back in the same order."""
    recorder = Recorder(settings)
    for number, size_bytes in enumerate(sizes):
        recorder.takes(number, size_bytes)
    for number in range(len(sizes)):
        recorder.gives(number)
    return recorder.requests()


@pytest.mark.parametrize("seed", range(5))
def test_a_replay_reserves_what_the_allocator_did(seed: int) -> None:
    rng = random.Random(seed)
    settings = AllocatorSettings(expandable_segments=seed % 2 == 1)
    allocator, recorder = CachingAllocator(settings), Recorder(settings)
    live: list[int] = []
    for _ in range(500):
        if live and rng.random() < 0.45:
            address = live.pop(rng.randrange(len(live)))
            recorder.gives(address)
            allocator.free(address)
        else:
            size_bytes, stream = rng.choice([600, 3 * MIB, 30 * MIB]), rng.choice([0, 77])
            live.append(allocator.malloc(size_bytes, stream))
            recorder.takes(live[-1], size_bytes, stream)
    assert recorder.requests().peak_bytes() == allocator.peak_reserved_bytes


def test_blocks_that_were_there_before_are_the_allocators_too() -> None:
    allocator = CachingAllocator()
    first, second = (allocator.malloc(3 * MIB) for _ in range(2))
    allocator.free(first)
    recorder = Recorder(allocator.settings, allocator.segments())
    assert recorder.knows(second)
    # The gap of 3 MiB serves it; then 17 MiB that were cached are too few for 18.
    for size_bytes in (3 * MIB, 18 * MIB):
        recorder.takes(allocator.malloc(size_bytes), size_bytes)
    recorder.gives(second)
    assert allocator.reserved_bytes == 38 * MIB
    assert recorder.requests().peak_bytes() == 38 * MIB


def test_without_a_caching_allocator_bytes_held_count() -> None:
    changes = [
        Change(0.0, "forward", None, 0),
        Change(1.0, "forward", 1, 40),
        # It is resized.
        Change(2.0, "forward", 1, 20),
        Change(3.0, "backward", 0, -10),
        Change(4.0, "backward", 2, 5),
    ]
    assert requests_of({0: 10}, changes).peak_bytes() == 70


def test_of_how_a_batch_is_made_only_the_batch_counts() -> None:
    def changes(n: int) -> list[Change]:
        samples = [Change(0.0, None, 1 + number, 10) for number in range(n)]
        batch = Change(1.0, None, 1 + n, 10 * n)
        gone = [change._replace(delta_bytes=-10) for change in samples]
        return [
            *samples,
            batch,
            *gone,
            Change(2.0, "forward", None, 0),
            batch._replace(phase="forward", storage=99),
        ]

    low, high = (requests_of({0: 7}, changes(n)) for n in (2, 5))
    assert list(low.sizes) == [7, 20, 20]
    assert Extrapolated(2, 5, low, high).requests(9).sizes[1] == 90
    # A step without phases is its whole.
    assert requests_of({}, changes(2)[:3]).peak_bytes() == 40


def test_sizes_are_lines_in_the_batch_or_grow_with_its_pairs() -> None:
    # A constant; 12 + 5 a sample; 3 a pair; 3 a pair and 7 a sample; a mask of an odd 3 bits each.
    def sizes(n: int) -> tuple[int, ...]:
        return 700, 12 + 5 * n, 3 * n * n, 3 * n * n + 7 * n, -(-3 * n // 8)

    for low, high in ((1, 4), (3, 50), (20, 21)):
        known = Extrapolated(low, high, asked(*sizes(low)), asked(*sizes(high)))
        for batch in (1, 2, 7, 300):
            found = known.requests(batch).sizes
            assert list(found)[:3] == list(sizes(batch))[:3]
        assert list(known.requests(low).sizes) == list(sizes(low))
        assert list(known.requests(high).sizes) == list(sizes(high))
        assert known(300) == sum(known.requests(300).sizes)
        assert known.grows


def test_what_is_no_line_is_not_plain() -> None:
    def is_plain(low_bytes: int, high_bytes: int) -> bool:
        return Extrapolated(4, 10, asked(low_bytes), asked(high_bytes)).is_plain

    assert is_plain(40, 100)
    assert is_plain(700, 700)
    assert is_plain(3 * 16, 3 * 100)
    # Steps of 16 samples; the third power.
    assert not is_plain(16_000, 16_001)
    assert not is_plain(64, 1000)
    # A hundredth of the bytes may be otherwise.
    scratch = Extrapolated(4, 10, asked(40_000, 31), asked(100_000, 45), {})
    assert scratch.is_plain
    assert not Extrapolated(4, 10, asked(400, 31), asked(1000, 45)).is_plain


def test_what_shrinks_or_stays_does_not_grow() -> None:
    assert not Extrapolated(1, 2, asked(5, 9), asked(5, 8)).grows


def test_sizes_stay_what_an_array_holds() -> None:
    known = Extrapolated(1, 2, asked(10, 9), asked(10**12, 1))
    assert list(known.requests(1 << 40).sizes) == [2**62, 1]


def test_a_step_was_foreseen_where_its_blocks_are() -> None:
    known = Extrapolated(1, 2, asked(1000, 5), asked(2000, 5))
    assert known.foresaw(9, asked(9000, 5))
    # In blocks of 512 bytes: 9216 for either.
    assert known.foresaw(9, asked(9200, 5))
    assert not known.foresaw(9, asked(9217, 5))
    assert not known.foresaw(9, asked(9000))
    assert not known.foresaw(9, None)


def test_requests_are_alike_whatever_their_sizes() -> None:
    settings = AllocatorSettings()
    assert asked(1, 2).is_like(asked(3, 4))
    assert not asked(1, 2).is_like(asked(1, 2, 3))
    assert not asked(1, 2).is_like(asked(1, 2, settings=settings))
    streams = []
    for number in (0, 77, 0x5581):
        recorder = Recorder(settings)
        recorder.takes(0, 5, stream=number)
        streams.append(recorder.requests())
    # What a stream is called differs between processes.
    assert streams[1].is_like(streams[2])
    assert not streams[0].is_like(streams[1])


def recorded(script: str) -> Requests:
    """One letter a block, taken as it appears and given back as it does again; a digit before it
    is its size. What is left is held."""
    recorder, size_bytes = Recorder(AllocatorSettings()), 1
    for letter in script:
        if letter.isdigit():
            size_bytes = int(letter)
        elif recorder.knows(ord(letter)):
            recorder.gives(ord(letter))
        else:
            recorder.takes(ord(letter), size_bytes)
    return recorder.requests()


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        # Scratch within scratch, s and t, and scratch that both have, x.
        ("a b xx a", "a b xx stts a", True),
        ("a b a", "a ss b tt a", True),
        # What is there while something else comes or goes is no scratch.
        ("a b a", "a s b s a", False),
        ("a b a", "a b s a s", False),
        ("a b a", "a b b", False),
    ],
)
def test_kernels_may_take_scratch_at_one_batch_alone(one: str, other: str, alike: bool) -> None:
    low, high = (recorded(script.replace(" ", "")) for script in (one, other))
    assert low.is_like(high) == high.is_like(low) == alike


def test_scratch_may_lie_in_scratch_however_deep() -> None:
    """A list of tensors gives back the last first, as foreach optimizers do with one for each
    parameter."""

    def of_a_list(length: int, size_bytes: int) -> Requests:
        recorder = Recorder()
        for number in range(length):
            recorder.takes(number, size_bytes)
        for number in reversed(range(length)):
            recorder.gives(number)
        return recorder.requests()

    length = 100_000
    known = Extrapolated(1, 2, of_a_list(length, 10), of_a_list(length, 20))
    assert known(5) == 50 * length
    # What lies deeper than at the other batch is a kernel's own.
    known = Extrapolated(1, 2, of_a_list(2, 10), of_a_list(3, 20))
    assert known(5) == 50 + 50 + 20


def test_scratch_of_one_batch_alone_is_constant() -> None:
    # s and t are there once; x, in which they are, twice.
    low, high = recorded("2a5xx3b"), recorded("4a7x9s6ttsx5b")
    known = Extrapolated(1, 2, low, high)
    assert list(known.requests(5).sizes) == [10, 13, 9, 6, 11]
    assert list(Extrapolated(1, 2, high, low).requests(3).sizes) == [1, 3, 1]
    # Each batch's own is its own.
    assert known.requests(1) is low
    assert known.foresaw(2, high)
    assert not known.foresaw(1, low)
    # Which of two the one was is not known, so both grow.
    known = Extrapolated(1, 2, recorded("2a5xx3b"), recorded("4a7xx8yy5b"))
    assert list(known.requests(4).sizes) == [8, 15, 16, 9]


def of_a_gpu(name: str) -> Requests:
    """A recording's requests; what it held before it began is left out."""
    path = DATA / "snapshots" / f"{name}.json.gz"
    if not path.is_file():
        pytest.skip("needs the recorded snapshots: set DPMEM_DATA to the folder that holds them")
    snapshot = read_snapshot(path)
    recorder = Recorder(snapshot.settings)
    for event in snapshot.devices[0].events:
        if event.action == "alloc":
            recorder.takes(event.address, event.size_bytes, event.stream)
        elif event.action == "free_completed" and recorder.knows(event.address):
            recorder.gives(event.address)
    return recorder.requests()


def test_two_recordings_of_a_gpu_tell_of_a_third_to_the_byte() -> None:
    """Evaluations at 128, 256 and 1024 tokens, whose attention grows with the pairs of them."""
    runs = {n: of_a_gpu(f"gpt_medium_ctx{n}_inference") for n in (128, 256, 1024)}
    known = Extrapolated(128, 256, runs[128], runs[256])
    assert known(1024) == runs[1024].peak_bytes() == 1_486_880_768
    assert known.foresaw(1024, runs[1024])


def test_a_gpus_kernels_take_scratch_at_some_sizes_and_not_at_others() -> None:
    low, high = (of_a_gpu(f"gpt_medium_ctx{n}_training") for n in (128, 256))
    # 98 reductions in two passes, with two blocks each.
    assert len(high.events) - len(low.events) == 196
    assert low.is_like(high)
    assert Extrapolated(128, 256, low, high)(128) == low.peak_bytes()


def test_they_travel_in_few_bytes() -> None:
    requests = asked(*range(1, 10_001), settings=AllocatorSettings())
    pickled = pickle.dumps(requests)
    # 20,000 events of 4 bytes, 10,000 sizes of 8 and streams of 2.
    assert len(pickled) < 181_000
    copy = pickle.loads(pickled)
    assert copy.is_like(requests)
    assert copy.peak_bytes() == requests.peak_bytes()


@pytest.mark.parametrize("path", SNAPSHOTS, ids=lambda path: path.name.split(".")[0])
def test_a_real_gpus_requests_reserve_what_it_did(path: Path) -> None:
    """10 traces of published runs; what is recorded of a probe is what they hold."""
    snapshot = read_snapshot(path)
    (trace,) = snapshot.devices
    start = trace_start(trace, replace(snapshot.settings, per_process_memory_fraction=1.0))
    recorder = Recorder(snapshot.settings, start.segments)
    for event in trace.events:
        if event.action == "alloc":
            recorder.takes(event.address, event.size_bytes, event.stream)
        elif event.action == "free_completed":
            recorder.gives(event.address)
        else:
            assert event.action in ("free_requested", "segment_alloc")
    peak_bytes, _ = _recorded_peaks(trace, start)
    assert recorder.requests().peak_bytes() == peak_bytes


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh())


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())


def mean_square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def likeness(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Of each sample to each other, as contrastive losses have it."""
    features = model(batch)
    return (features @ features.T).logsumexp(1).mean()


JOBS = {
    "perceptron": Job(perceptron, lambda n: torch.randn(n, 64), mean_square, torch.optim.AdamW),
    "convolutions": Job(convolutions, lambda n: torch.randn(n, 1, 9, 9), mean_square),
    # A batch is made of a tensor for each sample, as a collate function makes it.
    "collated": Job(
        perceptron, lambda n: torch.stack([torch.randn(64) for _ in range(n)]), mean_square
    ),
    "contrastive": Job(perceptron, lambda n: torch.randn(n, 64), likeness, torch.optim.SGD),
}


@pytest.mark.parametrize("name", JOBS)
def test_two_small_steps_on_the_cpu_tell_the_peak_of_a_large_one(name: str) -> None:
    def run(batch: int) -> tuple[int, Requests]:
        told: list[Requests] = []
        record = measure(JOBS[name], batch, device="cpu", on_requests=told.append)
        (requests,) = told
        assert requests.peak_bytes() == record.peak_allocated_bytes
        return record.peak_allocated_bytes, requests

    known = Extrapolated(2, 7, run(2)[1], run(7)[1])
    peak_bytes, requests = run(500)
    assert known(500) == peak_bytes
    assert known.foresaw(500, requests)
