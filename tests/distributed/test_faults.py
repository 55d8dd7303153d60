"""A rank that raises, dies or hangs: what the others see, and whether they can go on."""

import multiprocessing
import os
import signal
import tempfile
import time
from typing import Any

import fault_tasks
import pytest

TIMEOUT_S = 8


class Doomed:
    """Ranks of their own, some of which do not come back."""

    def __init__(self, task: str, ranks: int, **arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.scratch = tempfile.TemporaryDirectory()
        self.queue = context.Queue()
        self.processes = [
            context.Process(
                target=fault_tasks.run,
                args=(task, rank, ranks, self.scratch.name, TIMEOUT_S, self.queue, arguments),
                daemon=True,
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def answers(self, ranks: set[int]) -> dict[int, Any]:
        """What these ranks return or raise, within some timeouts of the process group."""
        answers: dict[int, Any] = {}
        while not ranks <= set(answers):
            rank, answer = self.queue.get(timeout=60)
            assert not str(answer).startswith("Traceback"), f"rank {rank}: {answer}"
            answers[rank] = answer
        return answers

    def wait_until_training(self, ranks: int) -> None:
        ready = {self.queue.get(timeout=60) for _ in range(ranks)}
        assert ready == {(rank, "training") for rank in range(ranks)}

    def __enter__(self) -> "Doomed":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.scratch.cleanup()


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "where", ["forward", *(pytest.param(where, marks=slow) for where in ("backward", "packing"))]
)
@pytest.mark.parametrize(
    ("ranks", "which"),
    [(2, 1), pytest.param(2, 0, marks=slow), pytest.param(4, 2, marks=slow)],
)
def test_one_ranks_exception_is_an_error_on_all_and_training_goes_on(
    where: str, ranks: int, which: int
) -> None:
    with Doomed("one_raises", ranks, where=where, which=which) as doomed:
        answers = doomed.answers(set(range(ranks)))
    for rank, (error, gradients_left, seconds, recovered) in answers.items():
        if rank == which:
            assert error.startswith("ArithmeticError: planned")
        else:
            assert f"rank {which} failed in this step: " in error
            assert {"forward": "ArithmeticError: planned", "packing": "packing a bucket"}.get(
                where, "the backward raised"
            ) in error
            assert gradients_left == 0
            # In seconds, not in timeouts.
            assert seconds < TIMEOUT_S - 2
        assert recovered


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("in turn", "the forward"),
        pytest.param("forwards first", "the forward", marks=slow),
        pytest.param("the second of a chain", "the forward", marks=slow),
        pytest.param("the first of a chain", "the forward", marks=slow),
        pytest.param("a chain's backward", "the backward", marks=slow),
    ],
)
def test_what_one_wrapper_lost_does_not_meet_what_another_averages(how: str, where: str) -> None:
    """They share a group: its collectives match by their order alone."""
    with Doomed("one_of_several_raises", 2, how=how) as doomed:
        answers = doomed.answers({0, 1})
    for rank, (said, right) in answers.items():
        assert len(said) == 1
        reason = "planned" if rank == 0 else f"rank 0 failed in this step: {where} raised"
        assert said[0].startswith("step 2 loss 0: ")
        assert reason in said[0]
        assert right == [True] * (9 if how in ("in turn", "forwards first") else 4)


@pytest.mark.parametrize(
    ("which", "lost", "unused"),
    [
        (1, 1, True),
        pytest.param(0, 1, True, marks=slow),
        pytest.param(1, 0, False, marks=slow),
        pytest.param(0, 0, False, marks=slow),
    ],
)
def test_what_was_told_of_a_lost_step_is_not_told_again(
    which: int, lost: int, unused: bool
) -> None:
    """The other rank tells what it received, and in the first step in which order."""
    arguments = {"which": which, "lost": lost, "unused": unused}
    with Doomed("raises_behind_its_last_bucket", 2, **arguments) as doomed:
        answers = doomed.answers({0, 1})
    means = [(step + 0.5, step + 0.5) for step in range(4) if step != lost]
    assert answers[which] == ("planned", means)
    assert answers[1 - which][0].startswith(f"rank {which} failed in this step: the backward")
    assert answers[1 - which][1] == means


@pytest.mark.parametrize(
    ("task", "which", "means"),
    [
        ("loses_a_static_graphs_first_step", 0, [(1.5, 1.0), (2.5, 1.5), (3.5, 2.0)]),
        pytest.param(
            *("raises_in_a_communication_hook", 1, [(0.5, 0.5), (2.5, 2.5), (3.5, 3.5)]),
            marks=slow,
        ),
        pytest.param(
            *("raises_where_ranks_may_join", 1, [(0.5, 0.5), (2.5, 2.5), (3.5, 3.5)]),
            marks=slow,
        ),
        pytest.param(
            *("raises_between_a_chains_forwards", 0, [(0.5, 0.5), (1.5, 1.5), (3.5, 3.5)]),
            marks=slow,
        ),
    ],
)
def test_the_step_after_a_lost_one_is_right(
    task: str, which: int, means: list[tuple[float, float]]
) -> None:
    with Doomed(task, 2) as doomed:
        answers = doomed.answers({0, 1})
    assert answers[which] == ("planned", means)
    assert answers[1 - which][0].startswith(f"rank {which} failed in this step: the ")
    assert answers[1 - which][1] == means


def test_accumulating_after_a_lost_step_completes_it_on_no_rank() -> None:
    """Or the others step with an average that lacks a part."""
    with Doomed("goes_on_in_no_sync", 2) as doomed:
        answers = doomed.answers({0, 1})
    means = [(11 * (step + 0.5),) * 2 for step in (0, 2, 3)]
    assert answers[1] == ("planned", means)
    assert answers[0][0].startswith("rank 1 failed in this step: the backward")
    assert answers[0][1] == means


@slow
def test_groups_do_not_hear_of_each_others_failures() -> None:
    """And what they hear names ranks as the launcher does."""
    with Doomed("halves", 4) as doomed:
        answers = doomed.answers({0, 1, 2, 3})
    assert answers[0] == answers[1] == ("", True)
    assert answers[2][0].startswith("rank 3 failed in this step: the forward raised Arithmetic")
    assert answers[3] == ("planned", True)
    assert answers[2][1]


@slow
@pytest.mark.parametrize(("which", "differ"), [((2, 0), 4), ((None, 1), 2), ((1, None, 1), 2)])
def test_ranks_that_freeze_differently_are_told(which: tuple[int | None, ...], differ: int) -> None:
    """(2, 0): of the same size, so that the collectives would match."""
    with Doomed("frozen_differently", len(which), which=which) as doomed:
        answers = doomed.answers(set(range(len(which))))
    assert all(len(said) == 2 for said in answers.values())
    told = [said[0] for said in answers.values() if said[0].startswith("all ranks must train")]
    assert told
    for error in told:
        assert f"for {differ}, such as 'layers." in error
        assert "freeze alike on all ranks" in error
    for said in answers.values():
        assert "all ranks must train the same parameters" in said[0]


def test_running_out_of_memory_in_a_forward_is_that_on_all() -> None:
    with Doomed("out_of_memory", 2) as doomed:
        answers = doomed.answers({0, 1})
    assert answers[1][0] == "RuntimeError"
    assert answers[0][0] == "StepOutOfMemory"
    assert "rank 1 failed in this step: the forward raised RuntimeError" in answers[0][1]
    assert answers[0][2]
    assert answers[1][2]


@slow
def test_all_ranks_may_raise_and_go_on() -> None:
    with Doomed("all_raise", 2) as doomed:
        assert doomed.answers({0, 1}) == {0: True, 1: True}


@slow
def test_a_step_that_succeeded_elsewhere_is_not_passed_over() -> None:
    """Rank 1 raises when its last bucket is on its way: rank 0 has stepped."""
    with Doomed("raises_late", 2) as doomed:
        answers = doomed.answers({1})
    assert "succeeded on rank 0, so their models differ now; load a checkpoint" in answers[1]


@pytest.mark.parametrize(("ranks", "which"), [(2, 1), pytest.param(3, 1, marks=slow)])
def test_a_killed_rank_is_named(ranks: int, which: int) -> None:
    with Doomed("train_until_an_error", ranks) as doomed:
        doomed.wait_until_training(ranks)
        time.sleep(0.5)
        doomed.processes[which].kill()
        answers = doomed.answers(set(range(ranks)) - {which})
    for error in answers.values():
        assert f"rank {which} (its last averaged backward was number" in error
        assert "no longer answers" in error


@slow
def test_a_killed_host_of_the_store_is_said() -> None:
    with Doomed("train_until_an_error", 2, tcp=True) as doomed:
        doomed.wait_until_training(2)
        time.sleep(0.5)
        doomed.processes[0].kill()
        (error,) = doomed.answers({1}).values()
    assert "the process that hosts the process group's store, rank 0 unless" in error


@slow
def test_a_hung_rank_is_named_within_the_timeout() -> None:
    with Doomed("train_until_an_error", 2) as doomed:
        doomed.wait_until_training(2)
        time.sleep(0.5)
        assert doomed.processes[1].pid is not None
        os.kill(doomed.processes[1].pid, signal.SIGSTOP)
        started = time.monotonic()
        (error,) = doomed.answers({0}).values()
        assert time.monotonic() - started < 3 * TIMEOUT_S
    assert "rank 1 (its last averaged backward was number" in error


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=slow)])
def test_a_gradient_that_is_not_finite_reaches_all_ranks(value: str) -> None:
    """At every position of a bucket, padding's neighbours included: all ranks' norms say so."""
    with Doomed("one_is_not_finite", 2, value=value) as doomed:
        assert doomed.answers({0, 1}) == {0: [], 1: []}


def test_a_rank_whose_parameters_may_be_unused_takes_part_with_none_used() -> None:
    with Doomed("one_reaches_no_parameter", 2, unused=True) as doomed:
        answers = doomed.answers({0, 1})
    # Means of step and 10 + step; in step 1 of 1 and nothing.
    assert answers == {rank: [5.0, 0.5, 7.0, 8.0] for rank in (0, 1)}


@slow
def test_a_rank_without_gradients_is_named() -> None:
    """Its next step is not averaged with the others' last."""
    with Doomed("one_reaches_no_parameter", 2, unused=False) as doomed:
        answers = doomed.answers({0, 1})
    assert answers[0][0] == answers[1][0] == 5.0
    assert "rank 1 failed in this step: the step after a backward without" in answers[0][1]
    assert "on rank 1 it reached none, and rank 0 waits" in answers[1][2]
