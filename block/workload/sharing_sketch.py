"""SharingSketch: a compact stand-in for a trace whose prompts share prefixes: who goes on from whom, and with how much.

A request either begins anew, behind the few blocks that most have in common, or goes on from an earlier one. Those are
put into classes of equal numbers by the length of the earlier prompt. Of each class the sketch keeps how many requests
ago the earlier one came, how often all of its full blocks are kept and else which share of them, and how many tokens
are added. All are quantile functions, piecewise linear on uniform knots, and sampled in strata. So caches of any size
find as much as in the trace, nearly.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from block.core.arrays import Floats, Ints
from block.workload.arrivals import RateProfile
from block.workload.length_sketch import LengthSketch, quantile_knots
from block.workload.traces import Trace

CLASSES = 6
"""Of earlier prompts by their length, and of prompts by theirs for the responses."""
SEGMENTS, FIRST_SEGMENTS = 32, 128
PIECES = 512  # of the arrivals
COMMON = 0.5
"""Blocks that more than this share of the requests begin with are those that most have in common."""


class Shared(NamedTuple):
    """Of each request of a trace, int[n]: the earlier one that shares most with it, the latest such (−1: none shares
    more than what most have in common), and how many blocks the two have in common.
    """

    earlier: Ints
    blocks: Ints


def shared(contents: Sequence[Ints], common: int) -> Shared:
    """Who shares with whom. common: blocks that most requests begin with."""
    latest: dict[int, int] = {}  # by the number of a block, which says all before it: the request that had it last
    earlier, blocks = np.full(len(contents), -1), np.zeros(len(contents), dtype=np.int64)
    for i, content in enumerate(contents):
        numbers = content[:, 0].tolist()
        known = next((place for place, one in enumerate(numbers) if one not in latest), len(numbers))
        if known > common:
            earlier[i], blocks[i] = latest[numbers[known - 1]], known
        latest.update(dict.fromkeys(numbers, i))
    return Shared(earlier, blocks)


def common_blocks(contents: Sequence[Ints]) -> int:
    """How many blocks most requests begin with."""
    count = 0
    while True:
        firsts = [int(content[count, 0]) for content in contents if len(content) > count]
        if not firsts or np.unique(firsts, return_counts=True)[1].max() <= COMMON * len(contents):
            return count
        count += 1


@dataclass(frozen=True)
class SharingSketch:
    """Quantile functions at uniform knots, rows by class; lengths are tokens.

    block: tokens of a block, the least that is shared. common: blocks that all begin with. going_on: share of the
    requests that go on from an earlier one. first: float[knots], prompts that begin anew. earlier: float[classes +
    1], bounds of the classes of prompts that are gone on from; weight: float[classes], how many are of each. age:
    float[classes, knots], requests since then. whole: float[classes], how often all full blocks are kept; kept:
    float[classes, knots], the share of blocks that is kept else. added: float[classes, knots]. prompts: float[classes
    + 1], bounds of classes of all prompts; output: float[classes, knots], responses by these. profile: how the
    arrival rate moved, if there are times. source: where the numbers come from, for people.
    """

    block: int
    common: int
    going_on: float
    first: Floats
    earlier: Floats
    weight: Floats
    age: Floats
    whole: Floats
    kept: Floats
    added: Floats
    prompts: Floats
    output: Floats
    profile: RateProfile | None = None
    source: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(cls, trace: Trace) -> SharingSketch:
        """Sketch a trace with contents. ValueError if its prompts share too little to tell anything of it."""
        assert trace.contents is not None, "of prompts whose blocks have numbers"
        prompt, contents = trace.prompt, trace.contents
        common = common_blocks(contents)
        earlier, blocks = shared(contents, common)
        on = np.flatnonzero(earlier >= 0)
        if len(on) < 16 * CLASSES:
            raise ValueError(f"{len(on)} requests go on from others: a sketch of sharing needs {16 * CLASSES}")
        block = int(max(content[:, 1].max() for content in contents))
        before = earlier[on]
        bounds, group = _classes(prompt[before])
        length = np.array([len(contents[i]) for i in before])
        whole = blocks[on] >= prompt[before] // block
        groups = [group == one for one in range(CLASSES)]
        by_prompt, of_prompt = _classes(prompt)
        return cls(
            block,
            common,
            len(on) / len(prompt),
            _knots(prompt[earlier < 0], FIRST_SEGMENTS),
            bounds,
            np.array([mine.mean() for mine in groups]),
            np.array([_knots((on - before)[mine], SEGMENTS) for mine in groups]),
            np.array([whole[mine].mean() if mine.any() else 0.0 for mine in groups]),
            np.array([_knots((blocks[on] / length)[mine & ~whole], SEGMENTS) for mine in groups]),
            np.array([_knots((prompt[on] - blocks[on] * block)[mine], SEGMENTS) for mine in groups]),
            by_prompt,
            np.array([_knots(trace.output[of_prompt == one], SEGMENTS) for one in range(CLASSES)]),
            None if trace.times is None else RateProfile.fit(trace.times, min(PIECES, len(prompt))),
        )

    def sample(self, count: int, rng: np.random.Generator) -> Trace:
        """A trace of `count` requests, without times."""
        going_on = _strata(count, rng) < self.going_on
        drawn = self._going_on(int(going_on.sum()), rng)
        firsts = np.maximum(_at(self.first, _strata(count - len(drawn), rng)), 1).astype(np.int64).tolist()
        sampled = _Sampled(self)
        early: deque[_GoingOn] = deque()  # who wanted to go on from what was before the first
        for i, goes_on in enumerate(going_on.tolist()):
            if goes_on:
                early.append(drawn.pop())
            one = next((each for each in early if each.age <= i), None)
            earlier = sampled.near(i - one.age, one.group) if one is not None else None
            if one is not None:
                early.remove(one)
            if one is None or earlier is None:
                sampled.begin(firsts.pop() if firsts else max(int(_at(self.first, rng.random())), 1))
            else:
                sampled.go_on(earlier, one)
        prompt = np.array(sampled.prompt, dtype=np.int64)
        group, u = np.clip(np.searchsorted(self.prompts, prompt, side="right") - 1, 0, CLASSES - 1), _strata(count, rng)
        place_in = u * (self.output.shape[1] - 1)
        knot = np.minimum(place_in.astype(np.int64), self.output.shape[1] - 2)
        low, high = self.output[group, knot], self.output[group, knot + 1]
        output = np.maximum(np.rint(low + (high - low) * (place_in - knot)), 1).astype(np.int64)
        return Trace(prompt, output, None, None, rows=count, contents=sampled.contents)

    def _going_on(self, count: int, rng: np.random.Generator) -> list[_GoingOn]:
        """So many requests that go on from others."""
        upto = np.cumsum(self.weight)
        group = np.searchsorted(upto[:-1] / upto[-1], _strata(count, rng), side="right")
        age, kept, added = (np.empty(count) for _ in range(3))
        for one in range(CLASSES):
            mine = group == one
            size = int(mine.sum())
            age[mine] = np.maximum(np.rint(_at(self.age[one], _strata(size, rng))), 1)
            kept[mine] = _at(self.kept[one], _strata(size, rng))
            kept[mine] = np.where(_strata(size, rng) < self.whole[one], 1.0, kept[mine])
            added[mine] = np.rint(_at(self.added[one], _strata(size, rng)))
        columns = (group.tolist(), age.astype(int).tolist(), kept.tolist(), added.astype(int).tolist())
        return list(map(_GoingOn, *columns))

    def save(self, path: Path) -> None:
        """Write as JSON, a row of numbers a line."""
        values = {name: one for name, one in asdict(self).items() if name not in ("source", "profile")}
        profile = None if self.profile is None else asdict(self.profile)
        lines = [f'  "source": {json.dumps(self.source)}', f'  "profile": {json.dumps(profile, separators=(",", ":"))}']
        lines += [f'  "{name}": {_compact(one)}' for name, one in values.items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> SharingSketch:
        """Read what `save` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        profile = data["profile"] and RateProfile(data["profile"]["requests"], tuple(data["profile"]["seconds"]))
        values: dict[str, Any] = {name: np.array(one) if isinstance(one, list) else one for name, one in data.items()}
        return cls(**{**values, "profile": profile})


class _GoingOn(NamedTuple):
    """A request that goes on from one of a class, so many requests ago: the share of its blocks that it keeps (1: all
    full ones), and the tokens that it adds.
    """

    group: int
    age: int
    kept: float
    added: int


class _Sampled:
    """The requests so far: their prompts in tokens, and contents by numbered blocks."""

    def __init__(self, sketch: SharingSketch) -> None:
        self._sketch = sketch
        self._next = sketch.common
        self._free: list[list[int]] = [[] for _ in range(CLASSES)]  # by class: from which nobody has gone on yet
        self.prompt: list[int] = []
        self.contents: list[Ints] = []

    def begin(self, tokens: int) -> None:
        """A request that goes on from none."""
        common = np.arange(self._sketch.common)
        self._add(common[: -(-tokens // self._sketch.block)], tokens)

    def go_on(self, earlier: int, how: _GoingOn) -> None:
        """A request that goes on from this one."""
        size, before = self._sketch.block, self.contents[earlier][:, 0]
        blocks = self.prompt[earlier] // size if how.kept == 1.0 else round(how.kept * len(before))
        blocks = min(max(blocks, self._sketch.common, 1), len(before))
        self._add(before[:blocks], max(blocks * size + how.added, (blocks - 1) * size + 1))

    def near(self, place: int, group: int) -> int | None:
        """The request nearest to this place of those of a class from which nobody has gone on; nobody can any more."""
        free = self._free[group]
        if not free:
            return None
        right = bisect_left(free, place)
        choice = min((at for at in (right - 1, right) if 0 <= at < len(free)), key=lambda at: abs(free[at] - place))
        return free.pop(choice)

    def _add(self, begin: Ints, tokens: int) -> None:
        size = self._sketch.block
        blocks = -(-tokens // size)
        content = np.full((blocks, 2), size, dtype=np.int64)
        content[-1, 1] = (tokens - 1) % size + 1
        known = min(len(begin), blocks)
        content[:known, 0] = begin[:known]
        content[known:, 0] = np.arange(self._next, self._next + blocks - known)
        self._next += blocks - known
        group = int(np.searchsorted(self._sketch.earlier, tokens, side="right")) - 1
        if 0 <= group < CLASSES:
            self._free[group].append(len(self.prompt))
        self.prompt.append(tokens)
        self.contents.append(content)


def load_sketch(path: Path) -> LengthSketch | SharingSketch:
    """What stands in a tracked file."""
    kind = SharingSketch if "going_on" in json.loads(path.read_text(encoding="utf-8")) else LengthSketch
    return kind.load(path)


def hit_rate(contents: Sequence[Ints], blocks: int | None) -> float:
    """The share of prompt tokens that one cache finds which keeps the `blocks` used last (None: all)."""
    known: dict[int, None] = {}  # in order of use
    hit = total = 0
    for content in contents:
        numbers = content[:, 0].tolist()
        found = next((place for place, one in enumerate(numbers) if one not in known), len(numbers))
        hit += int(content[:found, 1].sum())
        total += int(content[:, 1].sum())
        for one in reversed(numbers):
            known.pop(one, None)
            known[one] = None
        while blocks is not None and len(known) > blocks:
            del known[next(iter(known))]
    return hit / total


def _classes(lengths: Ints) -> tuple[Floats, Ints]:
    """Bounds of classes with equal numbers of these, and the class of each."""
    bounds = np.asarray(np.quantile(lengths, np.linspace(0.0, 1.0, CLASSES + 1)), dtype=np.float64)
    bounds[0], bounds[-1] = 0.0, float(2**40)
    return bounds, np.asarray(np.searchsorted(bounds, lengths, side="right") - 1)


def _knots(values: Ints | Floats, segments: int) -> Floats:
    """Of a sample's quantile function, `segments` + 1; fewer tell of a small sample, and 1 stands for an empty one."""
    if len(values) < 2:
        return np.full(segments + 1, values[0] if len(values) else 1.0)
    knots = quantile_knots(np.sort(np.asarray(values, dtype=np.float64)), min(segments, len(values) // 2))
    return np.interp(np.linspace(0.0, 1.0, segments + 1), np.linspace(0.0, 1.0, len(knots)), knots)


def _at(knots: Floats, u: float | Floats) -> Floats:
    return np.asarray(np.interp(u, np.linspace(0.0, 1.0, len(knots)), knots))


def _strata(count: int, rng: np.random.Generator) -> Floats:
    """float[count] in [0, 1), in random order, one from each of as many equal slices."""
    return np.asarray((rng.permutation(count) + rng.random(count)) / max(count, 1))


def _compact(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.ndim == 2:
        return "[\n    " + ",\n    ".join(_compact(row) for row in value) + "\n  ]"
    return json.dumps([float(f"{one:.4g}") for one in value]) if isinstance(value, np.ndarray) else json.dumps(value)
