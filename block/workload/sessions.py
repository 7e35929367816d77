"""Sessions: turns whose prompts hold all that was said before, as of chats and of agents.

A session begins with one of a few system prompts. Each turn adds a message to what was said and is answered; the next
one comes some seconds later, whatever the servers do (open loop), or so many seconds after the answer (closed loop:
`followers`). Sessions begin as a Poisson process; what is replayed is a piece of it in which as many end as begin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from block.core.arrays import Floats, Ints
from block.core.types import Request
from block.workload.length_sketch import LengthSketch

SETTLED = 4.0
"""Mean lengths of a session after which as many of them end as begin, nearly."""


@dataclass(frozen=True)
class Sessions:
    """How sessions are: turns (mean; their number is geometric, at least 1), seconds from turn to turn (mean;
    exponential), system prompts (so many, the i-th chosen in proportion to 1 / i) of a mean length in tokens.
    """

    turns: float
    gap_s: float
    system_prompts: int
    system_prompt_mean: float


@dataclass(frozen=True)
class Turns:
    """Requests in order of arrival: times float[n] in seconds, counted from the turn before the first; prompt and
    output int[n] in tokens; their sessions by number, and contents (`block.workload.content`).
    """

    times: Floats
    prompt: Ints
    output: Ints
    sessions: list[int]
    contents: list[Ints]


def draw(
    sessions: Sessions,
    lengths: LengthSketch,
    count: int,
    qps: float,
    longest: int,
    rng: np.random.Generator,
) -> Turns:
    """`count` turns at exactly `qps` requests/s.

    lengths: of a turn's message and response, in tokens. longest: tokens of a turn, prompt and response; a session ends
    before a turn that would be longer. A system prompt has at most half of it, and a first turn is cut to fit.
    """
    before = math.ceil(qps * SETTLED * sessions.turns * sessions.gap_s)
    number, offset, prompt, output, contents = _turns(sessions, lengths, 2 * (before + count), longest, rng)
    begins = np.cumsum(rng.exponential(size=number[-1] + 1))
    order, times = _at_rate(begins[number], offset, before, count, count / qps)
    return Turns(times, prompt[order], output[order], number[order].tolist(), [contents[i] for i in order])


def _turns(
    sessions: Sessions,
    lengths: LengthSketch,
    count: int,
    longest: int,
    rng: np.random.Generator,
) -> tuple[Ints, Floats, Ints, Ints, list[Ints]]:
    """At least `count` turns: their session, seconds since its beginning, tokens and contents."""
    weights = 1.0 / np.arange(1, sessions.system_prompts + 1)
    weights /= weights.sum()
    spread = rng.gamma(4.0, 0.25, size=sessions.system_prompts)
    tokens = sessions.system_prompt_mean * spread / (spread @ weights)
    system_tokens = tokens.clip(1.0, longest / 2).astype(int).tolist()
    messages, outputs = (one.tolist() for one in lengths.sample(count, rng))
    text = sessions.system_prompts  # the number of the next one
    found: list[tuple[int, float, int, int, Ints]] = []
    session = 0
    while len(found) < count:
        system = int(rng.choice(sessions.system_prompts, p=weights))
        said = [(system, system_tokens[system])]
        known, at = system_tokens[system], 0.0
        for turn in range(min(int(rng.geometric(1.0 / sessions.turns)), count - len(found))):
            message, output = messages[len(found)], outputs[len(found)]
            if turn == 0:
                output = min(output, longest - known - 1)
                message = min(message, longest - known - output)
            elif known + message + output > longest:
                break
            said += [(text, message), (text + 1, output)]
            text += 2
            found.append((session, at, known + message, output, np.array(said, dtype=np.int64)))
            known += message + output
            at += float(rng.exponential(sessions.gap_s))
        session += 1
    number, offset, prompt, response, contents = zip(*found, strict=True)
    return np.array(number), np.array(offset), np.array(prompt), np.array(response), list(contents)


def _at_rate(
    begins: Floats,
    offset: Floats,
    before: int,
    count: int,
    seconds: float,
) -> tuple[Ints, Floats]:
    """Which turns are replayed, in order, and when: `count` in `seconds`, after `before` others.

    begins: of each turn's session, on a clock whose speed is found. offset: of each turn after that, in seconds.
    """

    def lasts(speed: float) -> float:
        ends = np.partition(begins * speed + offset, [max(before - 1, 0), before + count - 1])
        return float(ends[before + count - 1] - (ends[before - 1] if before else 0.0))

    low, high = 0.0, 1.0
    while lasts(high) < seconds:
        high *= 2.0
    for _ in range(40):
        middle = (low + high) / 2.0
        low, high = (middle, high) if lasts(middle) < seconds else (low, middle)
    times = begins * high + offset
    order = np.argsort(times, kind="stable")
    chosen = order[before : before + count]
    since = times[chosen] - (times[order[before - 1]] if before else 0.0)
    return chosen, since * (seconds / since[-1])


def followers(requests: Sequence[Request]) -> dict[int, tuple[Request, float]]:
    """By the id of a request: the next of its session, and the seconds between the arrivals of the two."""
    found = {}
    latest: dict[int, Request] = {}
    for request in sorted(requests, key=lambda one: one.arrival):
        if request.session is not None:
            if (before := latest.get(request.session)) is not None:
                found[before.id] = request, request.arrival - before.arrival
            latest[request.session] = request
    return found
