"""Whether ranks train the same parameters: what is asked of the next rank, and until when."""

from typing import Any

import pytest

from dpmem.plan_check import PlanCheck


class Neighbour:
    """In a Lockstep's place: the next rank's answers, one after the other."""

    def __init__(self, *answers: tuple[int, str] | None) -> None:
        self.answers = list(answers)
        self.hopeless: RuntimeError | None = None

    def tell_plan(self, member: Any, plan: str) -> None:
        pass

    def plan_of_next(self, member: Any) -> tuple[int, str] | None:
        return self.answers.pop(0)

    def give_up(self, error: RuntimeError, where: str) -> None:
        self.hopeless = error


def check_of(neighbour: Neighbour) -> PlanCheck:
    check = PlanCheck(["a", "b"], neighbour)  # type: ignore[arg-type]
    check.changed([0, 1])
    return check


def test_a_neighbour_that_failed_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpmem.plan_check.dist.get_rank", lambda: 0)
    neighbour = Neighbour(None, (1, "10"))
    check = check_of(neighbour)
    check.ask(None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="rank 0 and rank 1 for 1, such as 'b'") as caught:
        check.ask(None)  # type: ignore[arg-type]
    assert neighbour.hopeless is caught.value


def test_one_that_trains_the_same_is_asked_once() -> None:
    neighbour = Neighbour((1, "11"))
    check = check_of(neighbour)
    for _ in range(3):
        check.ask(None)  # type: ignore[arg-type]
    assert neighbour.answers == []
