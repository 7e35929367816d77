"""What a policy of the user's answers, checked before anything follows from it; a fault is one line with its place.

The package's own policies are not checked as they run: their tests do that, and a decision takes a microsecond.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from block.core.errors import one_line
from block.core.snapshot import FIELDS, Snapshot, Snapshots
from block.core.types import Decision, Forecast, InstanceView, Request, Views
from block.core.user_code import UserFault, defined_at, is_ours, location
from block.dispatch.policies import Needs, Policy


def check_policy(policy: Any) -> None:
    """UserFault if it is no `Policy`."""
    for method in ("candidates", "choose"):
        if not callable(getattr(policy, method, None)):
            raise _fault(policy, f"has no method {method}")
    needs = getattr(policy, "needs", None)
    if not isinstance(needs, Needs):
        choices = ", ".join(f"Needs.{one.name}" for one in Needs)
        raise _fault(
            policy, f"needs={_short(needs)}: choose from {choices}, as in `needs: ClassVar[Needs] = Needs.COUNTS`"
        )


def with_checks(policy: Policy) -> Policy:
    """The policy itself if it is of this package, else one that answers the same and raises UserFault if it errs."""
    return policy if is_ours(type(policy).__module__) else _Checked(policy)  # type: ignore[return-value]  # its `needs` is the policy's


def try_once(policy: Policy, instances: int) -> None:
    """Have a policy decide among idle instances, which loads what it has compiled."""
    rng = random.Random(0)
    ids = policy.candidates(instances, 0, rng)
    idle = [Snapshot(i, 0.0, math.nan, 0, 0, 1000, 0, np.zeros((FIELDS, 0), dtype=np.int64)) for i in ids]
    snapshots = None if policy.needs is Needs.COUNTS else Snapshots.of(idle)
    forecasts = [Forecast(0.1, 1.0)] * len(ids) if policy.needs is Needs.FORECAST else None
    views = Views(ids, [[] for _ in ids], [0] * len(ids), [0] * len(ids), snapshots, forecasts)
    policy.choose(Request(0, 0.0, 100, 100, 100), views, rng)


class _Checked:
    """A policy whose answers are looked at."""

    needs: Any  # of the policy

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.needs = policy.needs

    def candidates(self, instances: int, request_index: int, rng: random.Random) -> Sequence[int]:
        """The policy's."""
        try:
            found = self._policy.candidates(instances, request_index, rng)
        except (Exception, SystemExit) as error:
            raise _raised(self._policy, "candidates", error) from error
        if wrong := _wrong_candidates(found, instances):
            raise _fault(
                self._policy, f"candidates, for request {request_index} of {instances} instances, {wrong}", "candidates"
            )
        return found

    def choose(self, request: Request, views: Sequence[InstanceView], rng: random.Random) -> Decision:
        """The policy's."""
        try:
            decision = self._policy.choose(request, views, rng)
        except (Exception, SystemExit) as error:
            raise _raised(self._policy, "choose", error) from error
        if wrong := _wrong_decision(decision, Views.of(views).ids):
            raise _fault(self._policy, f"choose, for request {request.id}, {wrong}", "choose")
        return decision


def _wrong_candidates(found: Any, instances: int) -> str:
    """What is wrong with them; empty if nothing is."""
    if not isinstance(found, Sequence) or isinstance(found, str | bytes):
        return f"returned {_short(found)}: must be a sequence of instances, such as a list"
    if not found:
        return "returned none: must name one at least"
    for one in found:
        if not _is_integer(one):
            return f"returned {_short(found)}: {_short(one)} is no integer"
        if not 0 <= one < instances:
            return f"returned {_short(found)}: {one} is not between 0 and {instances - 1}"
    if len(set(found)) < len(found):
        return f"returned {_short(found)}: names one twice"
    return ""


def _wrong_decision(decision: Any, ids: Sequence[int]) -> str:
    """What is wrong with a decision among the candidates `ids`; empty if nothing is."""
    if not isinstance(decision, Decision):
        return f"returned {_short(decision)}: must return a Decision, such as least(views, scores, rng)"
    chosen, candidates, scores, fallback = decision
    if not _is_integer(chosen) or chosen not in ids:
        return f"chose instance {_short(chosen)}: was to choose from its candidates {_short(list(ids))}"
    if candidates is not ids:
        if not isinstance(candidates, Sequence) or any(one not in ids for one in candidates):
            return f"returned the candidates {_short(candidates)}: was shown {_short(list(ids))}"
        if candidates and chosen not in candidates:
            return f"chose instance {chosen}, which is not among the candidates that it returned"
    try:
        given = len(scores)
    except TypeError:
        return f"returned the scores {_short(scores)}: must be a sequence of numbers, one for each candidate"
    if given != len(candidates):
        return f"returned {given} scores for {len(candidates)} candidates"
    for one, score in zip(candidates, scores, strict=True):
        if type(score) is not float and (not isinstance(score, Real) or isinstance(score, bool)):
            return f"gave instance {one} the score {_short(score)}: must be a number"
        if type(score) is not float and not _fits_a_float(score):
            return f"gave instance {one} the score {_short(score)}: is too large for a float"
        if score != score:
            return f"gave instance {one} the score NaN: must be a number, infinite at most"
    if fallback is not None and not isinstance(fallback, str):
        return f"returned the fallback {_short(fallback)}: must be a string, or None"
    if fallback is not None and not fallback.isprintable():
        return f"returned the fallback {_short(fallback)}: must be of characters that can be printed"
    return ""


def _fits_a_float(score: Any) -> bool:
    try:
        float(score)
    except OverflowError:
        return False
    return True


def _is_integer(value: Any) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def _fault(policy: Any, what: str, method: str | None = None, where: str = "") -> UserFault:
    cls = type(policy)
    where = where or defined_at(getattr(cls, method, cls) if method else cls)
    return UserFault(f"scheduler._target_={cls.__module__}.{cls.__qualname__}: {what}{where and f' ({where})'}")


def _raised(policy: Policy, method: str, error: BaseException) -> UserFault:
    return _fault(policy, f"{method} raised {one_line(error)}", method, location(error))


def _short(value: Any) -> str:
    """Its repr in a line that can be read."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
