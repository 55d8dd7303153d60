"""Accelerate's cases for its decorator, asked of ours and of the original alike.

Source: accelerate, tests/test_memory_utils.py.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import dpmem


def originals() -> list[Any]:
    accelerate = pytest.importorskip("accelerate.utils")
    return [accelerate.find_executable_batch_size]


@pytest.fixture(params=["dpmem", "accelerate"])
def decorator(request: pytest.FixtureRequest) -> Callable[..., Any]:
    if request.param == "dpmem":
        return dpmem.find_executable_batch_size
    return originals()[0]


@pytest.fixture(autouse=True)
def few_objects_to_collect() -> Iterator[None]:
    """Each failure collects garbage: without what other tests' imports left, in no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def runs_out() -> None:
    raise RuntimeError("CUDA out of memory.")


SIZES = [128, 115, 103, 92, 82, 73, 65, 58, 52, 46, 41, 36, 32, 28, 25, 22, 19, 17, 15, 13, 11, 9]


def test_goes_down_by_tenths(decorator: Callable[..., Any]) -> None:
    tried = []

    @decorator(starting_batch_size=128)
    def train(batch_size: int) -> None:
        tried.append(batch_size)
        if batch_size != 8:
            runs_out()

    train()
    assert tried == [*SIZES, 8]


def test_passes_arguments_and_results(decorator: Callable[..., Any]) -> None:
    @decorator(starting_batch_size=128)
    def train(batch_size: int, word: str) -> tuple[int, str]:
        if batch_size != 8:
            runs_out()
        return batch_size, word

    assert train("hello") == (8, "hello")
    assert train(word="again") == (8, "again")


def test_reaches_zero_from_zero(decorator: Callable[..., Any]) -> None:
    @decorator(starting_batch_size=0)
    def train(batch_size: int) -> None:
        pass

    with pytest.raises(RuntimeError, match=r"No executable batch size found, reached zero\."):
        train()


def test_reaches_zero_after_failures(decorator: Callable[..., Any]) -> None:
    @decorator(starting_batch_size=16)
    def train(batch_size: int) -> None:
        runs_out()

    with pytest.raises(RuntimeError, match=r"No executable batch size found, reached zero\."):
        train()


def test_a_batch_size_passed_by_hand(decorator: Callable[..., Any]) -> None:
    @decorator(starting_batch_size=128)
    def train(batch_size: int, first: str, second: str) -> None:
        raise AssertionError

    with pytest.raises(TypeError, match="Batch size was passed into `train`") as caught:
        train(128, "hello", "world")
    assert "train(first=hello, second=world)" in str(caught.value)


def test_other_errors_pass_through(decorator: Callable[..., Any]) -> None:
    @decorator(starting_batch_size=16)
    def train(batch_size: int) -> None:
        raise ValueError("Oops, we had an error!")

    with pytest.raises(ValueError, match="Oops"):
        train()


def test_a_reduction_of_ones_own(decorator: Callable[..., Any]) -> None:
    sizes = iter([64, 3])

    @decorator(starting_batch_size=128, reduce_batch_size_fn=lambda: next(sizes))
    def train(batch_size: int) -> int:
        if batch_size > 3:
            runs_out()
        return batch_size

    assert train() == 3


def test_nothing_of_a_failed_attempt_is_alive_in_the_next() -> None:
    import weakref

    held: list[weakref.ref[torch.UntypedStorage]] = []

    @dpmem.find_executable_batch_size(starting_batch_size=10)
    def train(batch_size: int) -> int:
        assert all(reference() is None for reference in held)
        tensor = torch.empty(batch_size)
        held.append(weakref.ref(tensor.untyped_storage()))
        if batch_size > 7:
            runs_out()
        return batch_size

    assert train() == 7
    assert train.__name__ == "train"
    assert len(held) == 4
