"""The nouns. Times are seconds, lengths are tokens, and nothing here imports the rest of the package.

An instance's sequences travel as one integer array ``seqs[field, column]``: a column per sequence, running ones first in
admission order, then waiting ones in queue order; the rows are the constants below. The engine, the snapshot and the
predictor share this layout, so a snapshot is a slice of an engine and a forecast starts from a copy of a snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Rows of `seqs`.
ID = 0  # the request's number in its run
PROMPT = 1  # prompt tokens
OUTPUT = 2  # response tokens generated so far
TARGET = 3  # response length: the true one in an engine, the expected one in a snapshot
COMPUTED = 4  # tokens whose KV is computed, those of the step in flight included
BLOCKS = 5  # KV blocks held
CHUNK = 6  # tokens scheduled in the step in flight
PREEMPTED = 7  # times preempted
EXPECTED = 8  # response length that the request was tagged with
FIELDS = 9


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload. `output_tokens` is the truth, known to the engine only."""

    id: int
    arrival: float
    prompt_tokens: int
    output_tokens: int
    predicted_output_tokens: int


class Snapshot(NamedTuple):
    """What one instance publishes at the end of its scheduler's `schedule()`.

    `seqs` is int64[FIELDS, n], its first `running` columns the running sequences. TARGET holds the expected length:
    the tag, or tokens decoded so far + 10 once the sequence has outrun it. The array may be a view of a live engine:
    valid until the next await.
    """

    instance_id: int
    taken_at: float
    step_started: float
    running: int
    free_blocks: int
    seqs: Ints


class Forecast(NamedTuple):
    """Predicted seconds from now to the first token, and to the last."""

    ttft: float
    e2e: float


class Decision(NamedTuple):
    """Where a request goes, and why: `scores[i]` belongs to `candidates[i]`; the policy's best is chosen.

    `fallback` names the reason when the policy's own rule could not be applied.
    """

    instance_id: int
    candidates: Sequence[int]
    scores: Sequence[float]
    fallback: str | None = None


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request. Times are on the run's clock; NaN until they happen."""

    request: Request
    instance_id: int = -1
    dispatched: float = float("nan")
    first_token: float = float("nan")
    finished: float = float("nan")
    forecast: Forecast | None = None
    status: str = "pending"
    preemptions: int = 0
    output_tokens: int = field(default=0)
