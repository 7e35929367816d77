"""What is said of a policy of the user's that answers wrongly: one line with its name, what it did, and its place."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from block.core.types import Decision, InstanceView, Request, Views
from block.core.user_code import UserFault
from block.dispatch.policies import Needs, RoundRobin, least
from block.dispatch.policy_checks import check_policy, try_once, with_checks

REQUEST = Request(7, 0.0, 10, 5, 5)
VIEWS = Views([2, 0], [[], []], [0, 0], [0, 0], None, None)


class Answering:
    """A policy that answers what it is told to."""

    needs: ClassVar[Needs] = Needs.COUNTS

    def __init__(self, candidates: Any = (), decision: Any = None) -> None:
        self.answers = (candidates, decision)

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        return self.answers[0]  # type: ignore[no-any-return]

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        return self.answers[1]  # type: ignore[no-any-return]


NAME = f"scheduler._target_={__name__}.Answering: "
PLACES = {
    method: f"tests/unit/test_policy_checks.py:{inspect.getsourcelines(getattr(Answering, method))[1]})"
    for method in ("candidates", "choose")
}


@pytest.mark.parametrize("candidates", [[0], (2, 1), range(3), [np.int64(1)], range(2, -1, -1)])
def test_any_sequence_of_some_of_the_instances_will_do(candidates: Sequence[int]) -> None:
    assert with_checks(Answering(candidates)).candidates(3, 0, random.Random(0)) is candidates


@pytest.mark.parametrize(
    ("candidates", "told"),
    [
        (None, "returned None: must be a sequence of instances, such as a list"),
        ({0, 1}, "returned {0, 1}: must be a sequence"),
        (np.arange(2), "returned array([0, 1]): must be a sequence"),
        ("01", "returned '01': must be a sequence"),
        ([], "returned none: must name one at least"),
        ([0, 3], "returned [0, 3]: 3 is not between 0 and 2"),
        ([-1], "returned [-1]: -1 is not between 0 and 2"),
        ([1.0], "returned [1.0]: 1.0 is no integer"),
        ([True], "returned [True]: True is no integer"),
        ([1, 0, 1], "returned [1, 0, 1]: names one twice"),
        (range(3, 4), "returned range(3, 4): 3 is not between 0 and 2"),
    ],
)
def test_candidates_that_are_none_are_told(candidates: Any, told: str) -> None:
    with pytest.raises(UserFault) as fault:
        with_checks(Answering(candidates)).candidates(3, 5, random.Random(0))
    assert str(fault.value).startswith(f"{NAME}candidates, for request 5 of 3 instances, {told}")
    assert str(fault.value).endswith(PLACES["candidates"])


@pytest.mark.parametrize(
    "decision",
    [
        Decision(2, [2, 0], [1.0, 2.0]),
        Decision(0, [0], [math.inf], "no forecast"),
        Decision(np.int64(0), (0, 2), (np.float32(1), 2)),
        Decision(2, [], []),
    ],
)
def test_a_decision_for_one_of_the_candidates_will_do(decision: Decision) -> None:
    assert with_checks(Answering([2, 0], decision)).choose(REQUEST, VIEWS, random.Random(0)) is decision


@pytest.mark.parametrize(
    ("decision", "told"),
    [
        (None, "returned None: must return a Decision, such as least(views, scores, rng)"),
        (2, "returned 2: must return a Decision"),
        ((2, [2, 0], [0.0, 0.0], None), "returned (2, [2, 0], [0.0, 0.0], None): must return a Decision"),
        (Decision(1, [2, 0], [0.0, 0.0]), "chose instance 1: was to choose from its candidates [2, 0]"),
        (Decision(None, [2, 0], [0.0, 0.0]), "chose instance None: was to choose"),  # type: ignore[arg-type]
        (Decision(2, [0], [0.0]), "chose instance 2, which is not among the candidates that it returned"),
        (Decision(2, [2, 1], [0.0, 0.0]), "returned the candidates [2, 1]: was shown [2, 0]"),
        (Decision(2, [2, 0], [0.0]), "returned 1 scores for 2 candidates"),
        (Decision(2, [2, 0], None), "returned the scores None: must be a sequence"),  # type: ignore[arg-type]
        (Decision(2, [2, 0], [1.0, math.nan]), "gave instance 0 the score NaN"),
        (Decision(2, [2, 0], [1.0, "a"]), "gave instance 0 the score 'a': must be a number"),  # type: ignore[list-item]
        (Decision(2, [2, 0], [1.0, 2.0], 3), "returned the fallback 3: must be a string"),  # type: ignore[arg-type]
        (Decision(2, [2, 0], [1.0, 2.0], "\ud800"), "returned the fallback '\\ud800': must be of characters that"),
        (Decision(2, [2, 0], [1.0, 10**400]), "gave instance 0 the score 1000"),
    ],
)
def test_a_decision_that_is_none_is_told(decision: Any, told: str) -> None:
    with pytest.raises(UserFault) as fault:
        with_checks(Answering([2, 0], decision)).choose(REQUEST, VIEWS, random.Random(0))
    assert str(fault.value).startswith(f"{NAME}choose, for request 7, {told}")
    assert str(fault.value).endswith(PLACES["choose"])
    assert "\n" not in str(fault.value)


class Raising(Answering):
    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        return least(views, [1.0 / len(request.prompt or ""), 2.0], rng)


class Misplaced(Answering):
    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        return least(views, np.ones(2), rng)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (Raising, "choose raised ZeroDivisionError: float division by zero"),
        (Misplaced, "choose raised AttributeError: 'numpy.ndarray' object has no attribute 'count'"),
    ],
)
def test_an_error_of_a_policy_is_placed_at_the_policy_s_own_line(policy: type[Answering], told: str) -> None:
    with pytest.raises(UserFault) as fault:
        with_checks(policy([2, 0])).choose(REQUEST, VIEWS, random.Random(0))
    line = inspect.getsourcelines(policy.choose)[1] + 1
    assert str(fault.value) == (
        f"scheduler._target_={__name__}.{policy.__name__}: {told} (tests/unit/test_policy_checks.py:{line})"
    )


def test_a_method_that_takes_something_else_is_placed_where_it_is_defined() -> None:
    class Short(Answering):
        def candidates(self) -> Sequence[int]:  # type: ignore[override]
            return [0]

    with pytest.raises(
        UserFault, match=r"takes 1 positional argument but 4 were given \(tests/unit/test_policy_checks"
    ):
        with_checks(Short()).candidates(3, 0, random.Random(0))


def test_the_package_s_own_policies_are_not_looked_at() -> None:
    policy = RoundRobin()
    assert with_checks(policy) is policy


def test_what_is_no_policy_is_told() -> None:
    class Lacking:
        needs = Needs.COUNTS

    class Needy(Answering):
        needs = "counts"  # type: ignore[assignment]

    check_policy(Answering())
    with pytest.raises(UserFault, match=r"Lacking: has no method candidates \(tests/unit/test_policy_checks\.py:"):
        check_policy(Lacking())
    with pytest.raises(UserFault, match=r"needs='counts': choose from Needs\.COUNTS, Needs\.SNAPSHOT, Needs\.FOREC"):
        check_policy(Needy())


class Looking(Answering):
    """One that looks at all that it is shown, and counts how often it was asked."""

    needs: ClassVar[Needs] = Needs.FORECAST
    asked = 0

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        self.asked += 1
        shown = [(view.snapshot, view.forecast) for view in views]
        scores = [forecast.e2e / snapshot.free_blocks for snapshot, forecast in shown if snapshot and forecast]
        return least(views, scores, rng)


def test_a_rehearsal_shows_a_policy_all_that_it_needs() -> None:
    policy = Looking(range(4))
    try_once(with_checks(policy), 4)
    assert policy.asked == 1
    with pytest.raises(UserFault, match="1 is not between 0 and 0"):
        try_once(with_checks(policy), 1)
