"""Workloads: who asks for how much, and when. Seeded and open-loop: nothing a server does moves an arrival.

`generate` draws lengths and arrivals from separate generators, so that the arrival process never moves a length, and a
rate only stretches the arrivals of its seed (see `arrivals`). What it makes of a trace beside replaying it, `Facts`
tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from block.core.arrays import Floats, Ints
from block.core.choices import did_you_mean
from block.core.files import file_state
from block.core.paths import shipped
from block.core.rng import generator
from block.core.types import Request
from block.workload import content as content_of
from block.workload import prompts, sessions
from block.workload.arrivals import constant_gaps, gamma_gaps, recorded_gaps
from block.workload.length_sketch import LengthSketch
from block.workload.sharing_sketch import SharingSketch, load_sketch
from block.workload.trace_formats import Columns, UnknownFormat, read
from block.workload.traces import TRACES, Trace, find_data

ARRIVALS = ("poisson", "gamma", "constant", "trace")
SOURCES = ("sketch", "trace", "synthetic", "sessions")
TOO_LONG = ("refuse", "cut", "drop")
MOST_REQUESTS = 1_000_000_000  # some hundred bytes each
RESPONSES = 1 << 50  # the number of the first response's text in a trace; above those of prompts
MOST_AT_ONCE = 1_000_000  # turns of other sessions that may come while one lasts: they are all made beforehand
SKETCHES = shipped("artifacts", "workloads")
SYNTHETIC = {"prompt_mean": 512.0, "prompt_cv": 1.0, "output_mean": 256.0, "output_cv": 1.0}
SESSIONS = {"turns": 6.0, "gap_s": 30.0, "system_prompts": 16, "system_prompt_mean": 1000.0}


@dataclass(frozen=True)
class Workload:
    """One workload: the Hydra group `workload`. ValueError if a value is outside its range, or a key has no effect.

    name: the data set; it picks the sketch, and the trace file unless `trace_path` is given.
    num_requests: of the run; None: each row of a trace once.
    qps: mean request rate of the whole cluster, 1/s; the last of the requests arrives at num_requests / qps. None: the
        times of a trace (or of a sketch's profile) as they are.
    arrivals: "poisson"; "gamma" (gaps with shape `burst_shape`: below 1 bursty, above 1 regular); "constant"; "trace"
        (a trace's own times, or a Poisson process with the rate profile of a sketch, scaled to `qps`).
    source: lengths from a "sketch" (tracked with the project), from the "trace" file itself (its rows in their order,
        again from the start when they run out), "synthetic" (independent lognormals), or "sessions" (turns of chats or
        agents, whose prompts hold all that was said before; the lognormals are then of a turn's message and response).
    max_total_tokens: the model's length.
    too_long: what becomes of a request longer than that. "cut": it loses its prompt first, as with a client that keeps
        the newest context; a response of this length or more becomes max_total_tokens - 1. "drop": it is left out of
        its trace. "refuse": it is an error. None: "refuse" for a trace, else "cut". What is known to be shared of a
        prompt that is cut is its beginning. Sessions end before a turn that would be longer.
    prompt_mean, prompt_cv, output_mean, output_cv: of the synthetic lengths: mean in tokens, coefficient of variation;
        None for those of `SYNTHETIC`.
    turns, gap_s, system_prompts, system_prompt_mean: of sessions (`block.workload.sessions.Sessions`); None for those
        of `SESSIONS`. A rate moves how many sessions there are, not the seconds between their turns.
    closed_loop: a turn comes as long after the answer to the one before it as it would come after that turn itself
        (think time), so that slow servers are asked less. Later turns than the first then do not come at their times.
    trace_path: a file of one's own in a format of `block.workload.trace_formats` (which tells what format, *_column and
        time_unit are for; None: by the file itself); its times are read if arrivals is "trace". A data set of prompts
        (gpteacher, sharegpt_text) or a file of prompts and responses gives its held-out side, and requests that have
        prompts; they have no times.
    """

    name: str = "sharegpt"
    num_requests: int | None = 10_000
    qps: float | None = 30.0
    arrivals: str = "poisson"
    burst_shape: float = 1.0
    source: str = "sketch"
    max_total_tokens: int = 4096
    too_long: str | None = None
    prompt_mean: float | None = None
    prompt_cv: float | None = None
    output_mean: float | None = None
    output_cv: float | None = None
    turns: float | None = None
    gap_s: float | None = None
    system_prompts: int | None = None
    system_prompt_mean: float | None = None
    closed_loop: bool = False
    trace_path: str | None = None
    format: str | None = None
    prompt_column: str | None = None
    output_column: str | None = None
    time_column: str | None = None
    time_unit: str | None = None

    def __post_init__(self) -> None:
        _choice("arrivals", self.arrivals, ARRIVALS)
        _choice("source", self.source, SOURCES)
        if self.num_requests is None:
            if self.source != "trace":
                raise ValueError(f"workload.num_requests=null: source={self.source} has no end; give a number")
        else:
            _at_least("num_requests", self.num_requests, 1)
            if self.num_requests > MOST_REQUESTS:
                raise ValueError(f"workload.num_requests={self.num_requests}: must be at most {MOST_REQUESTS:,}")
        _at_least("max_total_tokens", self.max_total_tokens, 2)
        for key in ("qps", "burst_shape", *SYNTHETIC, *SESSIONS):
            if getattr(self, key) is not None:
                _positive(key, getattr(self, key))
        if self.closed_loop and self.source != "sessions":
            raise ValueError(f"workload.closed_loop=True: source={self.source} has no sessions; take workload=chat")
        self._check_effects()
        if self.source == "sessions":
            if self.arrivals != "poisson":
                raise ValueError(f"workload.arrivals={self.arrivals}: sessions begin at random; take arrivals=poisson")
            if self.too_long is not None:
                raise ValueError(f"workload.too_long={self.too_long}: a session ends before a turn that is too long")
            if self._moment("turns") < 1:
                raise ValueError(f"workload.turns={self.turns}: must be at least 1")
            at_once = (self.qps or 0.0) * self._moment("turns") * self._moment("gap_s")
            if at_once > MOST_AT_ONCE:
                raise ValueError(
                    f"workload.gap_s={self.gap_s}: {at_once:.3g} turns would come while a session lasts, as turns and "
                    f"qps are; must be at most {MOST_AT_ONCE:,}"
                )
        if self.source in ("synthetic", "sessions"):
            for key in ("prompt_mean", "output_mean"):
                mean = self._moment(key)
                if not 1 <= mean < self.max_total_tokens:
                    raise ValueError(f"workload.{key}={mean}: must be in [1, max_total_tokens={self.max_total_tokens})")
        if self.source == "sketch":
            _choice("name", self.name, tuple(sorted(path.stem for path in SKETCHES.glob("*.json"))))
        if self.source == "trace" and self.trace_path is None and self.name not in TRACES:
            raise ValueError(
                f"workload.trace_path=null: {self.name!r} has no file of its own; give FILE.csv, "
                f"or choose workload.name from {', '.join(TRACES)}"
            )
        if self.too_long is not None:
            _choice("too_long", self.too_long, TOO_LONG)
            shares = self.source == "sketch" and isinstance(_sketch(self.name), SharingSketch)
            if self.source != "trace" and not shares and self.too_long != "cut":
                raise ValueError(
                    f"workload.too_long={self.too_long}: source={self.source} is cut; of a trace it can be chosen"
                )
        self._columns()  # which checks them
        if self.arrivals == "trace" and not self._may_have_times():
            raise ValueError(
                f"workload.arrivals=trace: {self.name} with source={self.source} has no arrival times; "
                f"choose from {', '.join(ARRIVALS[:-1])}, or another workload"
            )

    def _check_effects(self) -> None:
        """Refuse what is given and read by nothing."""
        own = ("trace_path", "format", "prompt_column", "output_column", "time_column", "time_unit")
        for keys, wanted, holds in (
            (own, "source=trace, as workload=trace has it", self.source == "trace"),
            (own[-2:], "arrivals=trace", self.arrivals == "trace"),
            (
                tuple(SYNTHETIC),
                "source=synthetic, as workload=synthetic has it, or sessions",
                self.source in ("synthetic", "sessions"),
            ),
            (tuple(SESSIONS), "source=sessions, as workload=chat has it", self.source == "sessions"),
        ):
            for key in keys:
                if not holds and getattr(self, key) is not None:
                    raise ValueError(f"workload.{key}={getattr(self, key)}: has no effect without workload.{wanted}")
        if self.trace_path in prompts.SETS:
            for key in own[1:]:
                if getattr(self, key) is not None:
                    raise ValueError(f"workload.{key}={getattr(self, key)}: has no effect on {self.trace_path}")
        if self.burst_shape != 1 and self.arrivals != "gamma":
            raise ValueError(f"workload.burst_shape={self.burst_shape}: needs arrivals=gamma, not {self.arrivals}")
        if self.qps is None and self.arrivals != "trace":
            raise ValueError(
                f"workload.qps=null: arrivals={self.arrivals} has no times to replay; take arrivals=trace, or a rate"
            )

    def _moment(self, key: str) -> float:
        given: float | None = getattr(self, key)
        return (SYNTHETIC | SESSIONS)[key] if given is None else given

    def _may_have_times(self) -> bool:
        """Whether there can be times of arrival; what a file of one's own holds, reading it tells."""
        if self.source == "sketch":
            return _sketch(self.name).profile is not None
        if self.trace_path is not None:
            return self.source == "trace" and self.trace_path not in prompts.SETS
        return self.source == "trace" and (TRACES[self.name].timed or self.time_column is not None)

    def _columns(self) -> Columns:
        return Columns(self.format, self.prompt_column, self.output_column, self.time_column, self.time_unit)


@dataclass(frozen=True)
class Facts:
    """What a workload was made of, and how it differs from that; as it stands in run.json.

    requests: their number. qps: the rate asked for, native_qps: that of the trace (or profile) itself, 1/s; None: it
    has none. file, format: of a trace. rows: that it holds; dropped: those of them that were left out, by the reason;
    unused: those that were not reached; rounds: how often the rest was replayed, if more than once.
    cut: requests that were shortened to `max_total_tokens`; mean_prompt: before and after that, in tokens.
    """

    requests: int
    qps: float | None
    native_qps: float | None = None
    file: str | None = None
    format: str | None = None
    rows: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    unused: int = 0
    rounds: float = 1.0
    cut: int = 0
    mean_prompt: tuple[float, float] = (0.0, 0.0)
    max_total_tokens: int = 0

    def lines(self, searched: bool = False) -> list[str]:
        """The same for people, a line for each thing; of a trace only. searched: a search tries rates of its own."""
        if self.file is None:
            return []
        said = [f"{self.file}: {self.rows:,} rows" + (f", read as {self.format}" if self.format else "")]
        said += [f"left out: {count:,} of {self.rows:,} rows: {reason}" for reason, count in self.dropped.items()]
        if self.cut:
            before, after = self.mean_prompt
            said.append(
                f"cut: {self.cut:,} of {self.requests:,} requests to {self.max_total_tokens:,} tokens, their prompts "
                f"first (mean prompt {before:,.0f} to {after:,.0f})"
            )
        if self.unused:
            said.append(f"not replayed: the last {self.unused:,} rows (workload.num_requests=null takes all)")
        if self.rounds > 1:
            said.append(f"replayed {self.rounds:,.1f} times, for {self.requests:,} requests")
        if self.native_qps is not None and searched:
            said.append(f"recorded at {self.native_qps:.3g} requests/s, replayed at each rate that the search tries")
        elif self.native_qps is not None and self.qps is not None:
            said.append(
                f"recorded at {self.native_qps:.3g} requests/s, replayed at {self.qps:.3g} "
                "(workload.qps=null replays it as it is)"
            )
        elif self.native_qps is not None:
            said.append(f"recorded at {self.native_qps:.3g} requests/s, replayed as it is")
        return said


def generate(workload: Workload, seed: int) -> list[Request]:
    """The run's requests, without the facts; see `make`."""
    return make(workload, seed)[0]


def make(workload: Workload, seed: int) -> tuple[list[Request], Facts]:
    """The run's requests in order of arrival, ids 0 .. n-1, and what was done for them.

    predicted_output_tokens is the truth until one estimates. The same for the same arguments on every machine.
    FileNotFoundError if a trace file is not there, ValueError if it is not of the expected form, or holds requests that
    are too long and to be refused.
    """
    if workload.source == "sessions":
        return _sessions(workload, seed)
    trace = _trace(workload, seed)
    rows = 0 if trace is None else len(trace.prompt)
    count = rows if workload.num_requests is None else workload.num_requests
    prompt, output = _lengths(workload, trace, count, generator(seed, "workload.lengths"))
    asked = prompt
    too_long = int(((prompt + output) > workload.max_total_tokens).sum())
    output = np.minimum(output, workload.max_total_tokens - 1)
    prompt = np.minimum(prompt, workload.max_total_tokens - output)
    recorded = trace if workload.source == "trace" else None
    gaps, native = _gaps(workload, recorded, count, generator(seed, "workload.arrivals"))
    arrival = np.cumsum(gaps) / workload.qps if workload.qps is not None else np.cumsum(gaps)
    outputs = output.tolist()
    texts = [None] * count if trace is None or trace.prompts is None else islice(cycle(trace.prompts), count)
    contents = _contents(trace, prompt, output) if trace is not None and trace.contents is not None else repeat(None)
    numbers = (range(count), arrival.tolist(), prompt.tolist(), outputs, outputs)
    facts = Facts(
        count,
        workload.qps,
        native,
        cut=too_long,
        mean_prompt=(float(asked.mean()), float(prompt.mean())),
        max_total_tokens=workload.max_total_tokens,
        **({} if recorded is None else _of_trace(workload, recorded, count)),
    )
    return list(map(Request, *numbers, repeat(None), texts, repeat(None), contents)), facts


def _sessions(workload: Workload, seed: int) -> tuple[list[Request], Facts]:
    """Turns of sessions."""
    assert workload.num_requests is not None  # Workload refuses sessions without an end
    assert workload.qps is not None  # … and without a rate
    wanted = sessions.Sessions(
        workload._moment("turns"),
        workload._moment("gap_s"),
        int(workload._moment("system_prompts")),
        workload._moment("system_prompt_mean"),
    )
    rng = generator(seed, "workload.sessions")
    turns = sessions.draw(
        wanted, _lognormal(workload), workload.num_requests, workload.qps, workload.max_total_tokens, rng
    )
    outputs = turns.output.tolist()
    numbers = (range(len(outputs)), turns.times.tolist(), turns.prompt.tolist(), outputs, outputs)
    mean = float(turns.prompt.mean())
    facts = Facts(len(outputs), workload.qps, mean_prompt=(mean, mean), max_total_tokens=workload.max_total_tokens)
    return list(map(Request, *numbers, repeat(None), repeat(None), turns.sessions, turns.contents)), facts


def _contents(trace: Trace, prompt: Ints, output: Ints) -> list[Ints]:
    """What the requests of a trace consist of; where it is replayed again, of other texts. A prompt that is cut keeps
    its beginning, and each response is a text of its own.
    """
    assert trace.contents is not None
    texts = 1 + max(int(content[:, 0].max()) for content in trace.contents)
    found = []
    for i, (tokens, response) in enumerate(zip(prompt.tolist(), output.tolist(), strict=True)):
        lap, row = divmod(i, len(trace.contents))
        content = content_of.first_tokens(trace.contents[row], tokens)
        content[:, 0] += np.where(content[:, 0] < 0, -lap * trace.rows, lap * texts)
        found.append(np.vstack([content, [RESPONSES + i, response]]))
    return found


def _of_trace(workload: Workload, trace: Trace, count: int) -> dict[str, Any]:
    """What `Facts` tell of a trace."""
    rows = len(trace.prompt)
    return {
        "file": workload.trace_path or TRACES[workload.name].path,
        "format": trace.format,
        "rows": trace.rows,
        "dropped": dict(trace.dropped),
        "unused": max(rows - count, 0),
        "rounds": max(count / rows, 1.0),
    }


def _lengths(workload: Workload, trace: Trace | None, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    if trace is not None:
        return np.resize(trace.prompt, count), np.resize(trace.output, count)
    if workload.source == "sketch":
        sketch = _sketch(workload.name)
        assert isinstance(sketch, LengthSketch)  # of the others a trace was drawn
        return sketch.sample(count, rng)
    return _lognormal(workload).sample(count, rng)


def _lognormal(workload: Workload) -> LengthSketch:
    prompt_mean, prompt_cv, output_mean, output_cv = map(workload._moment, SYNTHETIC)
    longest = workload.max_total_tokens - 1
    return LengthSketch.lognormal(prompt_mean, prompt_cv, output_mean, output_cv, longest)


def _gaps(workload: Workload, trace: Trace | None, count: int, rng: np.random.Generator) -> tuple[Floats, float | None]:
    """Gaps between arrivals, of mean 1 or, without a rate, in seconds; and the rate of what was recorded, 1/s."""
    if workload.arrivals == "constant":
        return constant_gaps(count), None
    if workload.arrivals in ("poisson", "gamma"):
        return gamma_gaps(count, workload.burst_shape, rng), None
    if trace is not None:
        assert trace.times is not None  # `read` gives them where they are asked for
        if workload.qps is not None:
            return recorded_gaps(count, trace.times), trace.rate
        between = np.diff(trace.times)
        gaps = np.resize(np.concatenate([[between.mean()], between]), count)
        gaps[0] = 0.0  # the first request is there at once
        return gaps, trace.rate
    profile = _sketch(workload.name).profile
    assert profile is not None  # Workload refuses arrivals=trace without one
    native = profile.requests / sum(profile.seconds)
    gaps = profile.gaps(count, rng)
    return gaps if workload.qps is not None else gaps / native, native


def _trace(workload: Workload, seed: int) -> Trace | None:
    """The rows of a trace that are to be replayed, or such as a sketch of sharing makes; None of other sources."""
    if workload.source == "trace":
        return _fitting(workload, _read(workload))
    sketch = _sketch(workload.name) if workload.source == "sketch" else None
    if not isinstance(sketch, SharingSketch):
        return None
    assert workload.num_requests is not None  # Workload refuses sketches without an end
    drawn = wanted = workload.num_requests
    while True:  # until enough of them are not too long
        trace = _fitting(workload, sketch.sample(drawn, generator(seed, "workload.lengths")))
        if len(trace.prompt) >= wanted:
            contents = None if trace.contents is None else trace.contents[:wanted]
            return replace(trace, prompt=trace.prompt[:wanted], output=trace.output[:wanted], contents=contents)
        drawn *= 2


def _fitting(workload: Workload, trace: Trace) -> Trace:
    """What of a trace is not too long, or to be cut."""
    total = trace.prompt + trace.output
    fits = total <= workload.max_total_tokens
    beyond = int((~fits).sum())
    if not beyond or workload.too_long == "cut":
        return trace
    where = workload.trace_path or workload.name
    if workload.too_long != "drop":
        raise ValueError(
            f"workload.max_total_tokens={workload.max_total_tokens}: {beyond:,} of {len(total):,} requests of {where} "
            f"are longer, up to {int(total.max()):,} tokens; raise it, and engine.max_model_len with it, as far as the "
            "model goes, or take workload.too_long=cut (prompts lose what is too much) or drop"
        )
    if not fits.any():
        raise ValueError(f"workload.too_long=drop: all requests of {where} are too long")
    kept = np.flatnonzero(fits)
    reason = f"longer than {workload.max_total_tokens:,} tokens"
    return replace(
        trace,
        prompt=trace.prompt[kept],
        output=trace.output[kept],
        times=None if trace.times is None else trace.times[kept] - trace.times[kept[0]],
        prompts=None if trace.prompts is None else [trace.prompts[i] for i in kept],
        contents=None if trace.contents is None else [trace.contents[i] for i in kept],
        dropped={**trace.dropped, reason: beyond},
    )


def _read(workload: Workload) -> Trace:
    timed = workload.arrivals == "trace"
    if workload.trace_path is None:
        advice = f"`python scripts/fetch_data.py {workload.name}` gets it"
        if (SKETCHES / f"{workload.name}.json").exists():
            advice += ", workload.source=sketch goes without"
        elif workload.name == "mooncake":
            advice = "`python scripts/fetch_data.py mooncake` says where it is to be had"
        return _recorded(find_data(TRACES[workload.name].path, advice), workload._columns(), timed)
    if workload.trace_path in prompts.SETS:
        return _held_out(workload)
    path = Path(workload.trace_path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"workload.trace_path={workload.trace_path}: no such file")
    try:
        return _recorded(path, workload._columns(), timed)
    except UnknownFormat as unknown:
        if not prompts.is_pairs(str(path)):
            raise
        try:
            held_out = _held_out(workload)
        except prompts.NoPairs:
            raise unknown from None
    if timed:
        raise ValueError(f"{path}: prompts and responses have no times; take workload.arrivals=poisson")
    return held_out


def _recorded(path: Path, columns: Columns, timed: bool) -> Trace:
    """What the file holds; a search asks for it at each rate, and it is read once until it changes."""
    return _kept(path, columns, timed, file_state(path))


@lru_cache(maxsize=1)
def _kept(path: Path, columns: Columns, timed: bool, state: tuple[int, ...]) -> Trace:
    return read(path, columns, timed=timed)


def _held_out(workload: Workload) -> Trace:
    """The held-out side of pairs of prompts and responses."""
    assert workload.trace_path is not None
    split = prompts.load(workload.trace_path)
    held_out = split.test
    if not held_out.prompts:
        raise ValueError(
            f"workload.trace_path={workload.trace_path}: none of its {split.pairs} pairs is held out; give more"
        )
    prompt = np.array([max(prompts.pieces(text), 1) for text in held_out.prompts], dtype=np.int64)
    left_out = {
        "no prompt and response, or the prompt of another": split.rows - split.pairs,
        "not of the held-out side": split.pairs - len(prompt),
    }
    dropped = {reason: count for reason, count in left_out.items() if count}
    return Trace(prompt, held_out.tokens, None, held_out.prompts, "pairs of texts", split.rows, dropped)


def _sketch(name: str) -> LengthSketch | SharingSketch:
    path = SKETCHES / f"{name}.json"
    return _kept_sketch(path, file_state(path))


@lru_cache
def _kept_sketch(path: Path, state: tuple[int, ...]) -> LengthSketch | SharingSketch:
    return load_sketch(path)


def _choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"workload.{key}={value!r}: {did_you_mean(value, choices)}")


def _at_least(key: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"workload.{key}={value}: must be an integer >= {least}")


def _positive(key: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"workload.{key}={value}: must be a finite number > 0")
