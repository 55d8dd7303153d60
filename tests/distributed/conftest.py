"""Real processes for distributed tests: `ranks(n)` gives n of them, joined over gloo.

The processes are kept between tests, because importing torch costs more than most tests; after
any failure they are thrown away and started afresh.
"""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import rank_process

TIMEOUT_S = 180


class Ranks:
    """`world_size` processes; `run(name, **arguments)` calls tasks.<name>(rank, …) on each."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.pipes: list[Any] = []

    def run(self, task: str, **arguments: Any) -> list[Any]:
        """Each rank's return value; fails the test with the first rank's traceback."""
        results = self._call(task, arguments)
        for rank, (_, trace) in enumerate(results):
            if trace is not None:
                pytest.fail(f"rank {rank}:\n{trace}")
        return [value for value, _ in results]

    def errors(self, task: str, **arguments: Any) -> list[Exception]:
        """The exception each rank raises; fails the test where one raises none."""
        results = self._call(task, arguments)
        assert all(trace is not None for _, trace in results), results
        return [error for error, _ in results]

    def _call(self, task: str, arguments: dict[str, Any]) -> list[tuple[Any, str | None]]:
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((task, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT_S):
                self.stop()
                pytest.fail(f"rank {rank} did not finish {task} within {TIMEOUT_S} s")
            results.append(pipe.recv())
        if any(trace is not None for _, trace in results):
            self.stop()
        return results

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.scratch = tempfile.TemporaryDirectory()
        for rank in range(self.world_size):
            # No daemon, which may have no children of its own. Without this process it ends, too.
            here, there = context.Pipe()
            process = context.Process(
                target=rank_process.serve,
                args=(rank, self.world_size, self.scratch.name, there),
            )
            process.start()
            self.processes.append(process)
            self.pipes.append(here)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        if self.processes:
            self.scratch.cleanup()
        self.processes, self.pipes = [], []


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    pools: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        return pools.setdefault(world_size, Ranks(world_size))

    yield get
    for pool in pools.values():
        pool.stop()
