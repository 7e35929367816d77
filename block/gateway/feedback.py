"""What answers teach of the requests to come: how many tokens prompts have, and how long responses are.

Servers count both in the `usage` of their answers. What was learned is forgotten as more comes: the latest count.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from block.gateway.asked import AUDIO, IMAGE, TOOLS, VIDEO, Asked, user_of

BYTES_PER_TOKEN = 4
"""Length of an average token in UTF-8, for prompts that are text, as long as nothing else is known."""

TEXT = "text"
STEADY = 1.2
"""By how much a rate may be off before `PromptRates.steady` takes another."""


class _Kind(NamedTuple):
    """What one unit of something costs, in tokens, as long as nothing is known; as how many units that counts; and how
    many units are remembered.
    """

    cost: float
    prior: float
    remembered: float


_KINDS = {
    TEXT: _Kind(1 / BYTES_PER_TOKEN, 2_000, 400_000),  # a byte
    TOOLS: _Kind(1 / BYTES_PER_TOKEN, 2_000, 400_000),  # a byte of their JSON
    IMAGE: _Kind(576, 1, 100),  # LLaVA 1.5's
    AUDIO: _Kind(750, 1, 100),  # half a minute of Qwen2-Audio's 25 a second
    VIDEO: _Kind(8_192, 1, 100),  # 32 frames of 256
}


class PromptRates:
    """What a byte of text, an image and so on cost in each model's prompts, in tokens: by what servers count."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], tuple[float, float]] = {}  # by model and kind: tokens and units
        self._steady: dict[str, float] = {}

    def _cost(self, model: object, kind: str) -> float:
        known = self._of.get((model, kind)) if isinstance(model, str) else None
        return _KINDS[kind].cost if known is None else known[0] / known[1]

    def bytes_per_token(self, model: object) -> float:
        """Of a model's text, by what is known."""
        return 1 / self._cost(model, TEXT)

    def steady(self, model: object) -> float:
        """`bytes_per_token`, but the same as before as long as it is not off by more than `STEADY` times."""
        rate = self.bytes_per_token(model)
        if not isinstance(model, str):
            return rate
        kept = self._steady.get(model, BYTES_PER_TOKEN)
        if not 1 / STEADY < rate / kept < STEADY:
            kept = self._steady[model] = rate
        return kept

    def tokens(self, asked: Asked) -> int:
        """Of all prompts of a request together."""
        model = asked.fields.get("model")
        tokens = asked.known_tokens + asked.text_bytes * self._cost(model, TEXT)
        for kind, amount in asked.extras:
            tokens += amount * self._cost(model, kind)
        return math.ceil(tokens - 1e-9)

    def learn(self, asked: Asked, tokens: int) -> None:
        """A server has counted so many tokens of these prompts. Of two kinds of extras nobody knows which cost what."""
        model = asked.fields.get("model")
        if not isinstance(model, str) or not asked.complete or len(asked.extras) > 1:
            return
        more: float = tokens - asked.known_tokens
        kind, amount = TEXT, asked.text_bytes
        if asked.extras:
            more -= asked.text_bytes * self._cost(model, TEXT)
            kind, amount = asked.extras[0]
        if more <= 0 or amount == 0:
            return
        cost, prior, remembered = _KINDS[kind]
        count, units = self._of.get((model, kind), (cost * prior, prior))
        kept = max(1 - amount / remembered, 0.0)
        self._of[model, kind] = kept * count + more, kept * units + amount

    def learned(self, kind: str) -> Iterator[tuple[str, float]]:
        """Models, and what one unit of `kind` costs in their prompts, in tokens."""
        return ((model, count / units) for (model, one), (count, units) in self._of.items() if one == kind)


class ResponseLengths:
    """By what factor responses are longer than was thought, per model and, for those who say who they are, per user.
    What an estimator says has another factor than the constant that stands in for it.

    It is the sum of their tokens over the sum of those believed, so that it corrects a constant (to the mean) as well
    as an estimator. Forecasts err less by it than by the geometric mean of the factors: docs/lengths.md has numbers. A
    response that was cut off by its limit would have been longer, nobody knows by how much: it counts as long as those
    beyond that limit are in the mean, if lengths are lognormal, by the mean and the spread of what is known.

    Before anything is known the factor is 1, which counts as MODEL_PRIOR tokens; a user's is that of the model, which
    counts as USER_PRIOR tokens of their own.
    """

    def __init__(self) -> None:
        self._models: dict[_Key, _Sums] = {}
        self._users: OrderedDict[int, _Sums] = OrderedDict()  # by the hash of key and user; the latest ones

    def factor(self, key: _Key, user: str | None = None) -> float:
        """Of the response to come."""
        known = self._models.get(key)
        if known is None:
            return 1.0
        own = self._users.get(hash((key, user))) if user is not None else None
        return known.factor if own is None else own.factor_from(known.factor)

    def corrected(self, asked: Asked, believed: int, *, estimated: bool) -> int:
        """Response tokens to expect of a request that is thought to have so many, before its limits.

        estimated: whether by an estimator, and not as all have.
        """
        return round(believed * self.factor(_key(asked, estimated=estimated), user_of(asked.fields)))

    def answered(self, asked: Asked, believed: int, most: int | None, tokens: int, *, estimated: bool) -> None:
        """The responses to a request have so many tokens together, and were thought to have `believed` each, by no
        factor. most: that each could have, if it is known. What does not end by itself teaches nothing.
        """
        each = tokens / asked.sequences
        cut = most is not None and each >= most
        some_cut = most is not None and tokens >= most
        if not asked.endless and each > asked.least_tokens and (cut or not some_cut):
            self.learn(_key(asked, estimated=estimated), user_of(asked.fields), believed, each, cut=cut)

    def learn(self, key: _Key, user: str | None, believed: int, actual: float, *, cut: bool) -> None:
        """A response was thought to have `believed` tokens, by no factor, and has `actual` ones; cut: or would have had
        more.
        """
        known = self._models.get(key)
        if known is None:
            known = self._models[key] = _Sums(MODEL_PRIOR)
        thought, believed = self.factor(key, user), max(believed, 1)
        found = actual / believed
        squared = (found - thought) ** 2
        if cut:
            found, squared = _beyond(found, thought, known.variance)
        known.add(believed, found, squared, MODEL_REMEMBERED)
        if user is not None:
            place = hash((key, user))
            own = self._users.get(place)
            if own is None:
                own = self._users[place] = _Sums(0.0)
                if len(self._users) > MOST_USERS:
                    self._users.popitem(last=False)
            self._users.move_to_end(place)
            own.add(believed, found, squared, USER_REMEMBERED)

    def __iter__(self) -> Iterator[tuple[str, str, float]]:
        """Models, by what their responses were thought of, and the factors."""
        return ((model, by, known.factor) for (model, by), known in self._models.items())


ESTIMATE, CONSTANT = "estimate", "constant"
_Key = tuple[str, str]  # a model, and one of these


def _key(asked: Asked, *, estimated: bool) -> _Key:
    model = asked.fields.get("model")
    return model if isinstance(model, str) else "", ESTIMATE if estimated else CONSTANT


MODEL_PRIOR, USER_PRIOR = 2_000.0, 2_000.0
MODEL_REMEMBERED, USER_REMEMBERED = 100_000.0, 20_000.0
"""Tokens, as believed, that are not forgotten yet: some 400 responses of a model, some 80 of a user."""
MOST_USERS = 4096
"""Users that are remembered, those who were answered last."""


class _Sums:
    """Tokens of responses, believed and actual, the older ones less; and how far the factors of each were off, squared,
    a believed token each. prior: believed tokens, at a factor of 1, to begin with.
    """

    __slots__ = ("actual", "believed", "variance")

    def __init__(self, prior: float) -> None:
        self.believed = self.actual = prior
        self.variance = 0.75  # of ShareGPT's lengths about their mean

    @property
    def factor(self) -> float:
        return self.actual / self.believed

    def factor_from(self, prior: float) -> float:
        """With another one to begin with."""
        return (USER_PRIOR * prior + self.actual) / (USER_PRIOR + self.believed)

    def add(self, believed: int, found: float, squared: float, remembered: float) -> None:
        """A response more, `found` times as long as believed."""
        kept = max(1 - believed / remembered, 0.0)
        self.actual = kept * self.actual + believed * found
        self.believed = kept * self.believed + believed
        self.variance += (squared - self.variance) * believed / self.believed


def _beyond(least: float, mean: float, variance: float) -> tuple[float, float]:
    """Of a lognormal variable of this mean and variance, as far as it is at least `least`: its mean, and its mean
    squared distance to `mean`.
    """
    squared_spread = math.log1p(variance / (mean * mean))
    spread = math.sqrt(squared_spread)
    at = (math.log(least / mean) + squared_spread / 2) / spread
    share = _above(at)
    if share < 1e-9:  # far beyond what was ever seen
        return least, (least - mean) ** 2
    first = mean * _above(at - spread) / share
    second = (mean * mean + variance) * _above(at - 2 * spread) / share
    return first, second - 2 * mean * first + mean * mean


def _above(at: float) -> float:
    """The share of a standard normal variable above this."""
    return 0.5 * math.erfc(at / math.sqrt(2))
