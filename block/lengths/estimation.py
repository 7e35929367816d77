"""Training an estimator, and Table 1: how far each is off on prompts that were held out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from block.core.arrays import Floats, Ints
from block.core.choices import did_you_mean
from block.core.files import check_writable, write_json, write_or_divert, write_whole
from block.lengths import Constant, Estimates, Lengths, Reader
from block.lengths.compact import Compact
from block.lengths.errors import measured
from block.lengths.roberta import ERRORS, RoBERTa
from block.workload.prompts import Pairs, Split, load

BASELINES = ("mean", "median", "prompt_length")
"""Fitted where they are evaluated: a constant, another one, and a parabola of the prompt's logarithm."""
LEARNED: Mapping[str, type[Compact | RoBERTa]] = {"compact": Compact, "roberta": RoBERTa}
LEVELS = tuple(round(0.1 * i, 1) for i in range(1, 10))
BINS = 10

Log = Callable[[int, dict[str, float]], None]
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


def _silent(steps: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class EstimationConfig:
    """How length estimators are trained and evaluated (the node `estimation` of the config).

    data: what to train on: gpteacher, sharegpt_text, or a FILE.json, .jsonl or .parquet of prompts and responses.
    tokenizer: name or folder of a Hugging Face tokenizer to count responses by; null counts without one.
    train, test: pairs of each side at most; the paper's are 40,000 and 10,000.
    data_sets, estimators: of the table. A learned estimator of another data set than gpteacher is looked for beside its
        own file, as NAME-DATA (artifacts/lengths/compact-sharegpt_text.npz). scores: where the table is written.
    epochs, batch_size, learning_rate, patience, checkpoint_every: of roberta's training: passes, pairs a step, AdamW's
        step size, passes without improvement until it stops, steps between checkpoints.
    force: write over a file of compact's that is there.
    """

    data: str = "gpteacher"
    tokenizer: str | None = None
    train: int = 40_000
    test: int = 10_000
    data_sets: tuple[str, ...] = ("gpteacher",)
    estimators: tuple[str, ...] = (*BASELINES, "compact")
    scores: str = "artifacts/lengths/scores.json"
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 2e-5
    patience: int = 3
    checkpoint_every: int = 200
    force: bool = False

    def __post_init__(self) -> None:
        for key in ("train", "test", "epochs", "batch_size", "patience", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"estimation.{key}={getattr(self, key)}: must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"estimation.learning_rate={self.learning_rate}: must be greater than 0")
        for key in ("data_sets", "estimators"):
            object.__setattr__(self, key, tuple(getattr(self, key)))  # Hydra passes a list
        for name in self.estimators:
            if name not in (*BASELINES, *LEARNED):
                raise ValueError(f"estimation.estimators={name}: {did_you_mean(name, (*BASELINES, *LEARNED))}")


class Scores(NamedTuple):
    """Table 1's columns; lengths in tokens.

    error_rate: sum of errors over sum of lengths. acc_10, acc_50, acc_100: share within so many tokens.
    bias: sum of estimates over sum of lengths, less 1. covered: share within one claimed spread (68 % of a normal one).
    """

    average_error: float
    error_rate: float
    acc_10: float
    acc_50: float
    acc_100: float
    bias: float
    covered: float


def scores(said: Estimates, truths: Ints) -> Scores:
    """Of estimates against true lengths."""
    off = np.abs(said.tokens - truths)
    acc_10, acc_50, acc_100 = (float(np.mean(off <= tokens)) for tokens in (10, 50, 100))
    return Scores(
        float(off.mean()),
        float(off.sum() / truths.sum()),
        acc_10,
        acc_50,
        acc_100,
        float(said.tokens.sum() / truths.sum() - 1),
        float(np.mean(_standing(said, truths) <= 1)),
    )


def calibration(said: Estimates, truths: Ints) -> dict[str, Any]:
    """How estimates lie against the truth, in tenths of the estimates, and how often intervals hold what they should.

    by_estimate: of each tenth, in tokens, the means of the estimate, of the P10 and P90 that are stated with it and of
    the truth, and the truth's P10, P50 and P90. coverage: of each of LEVELS, the share of the truths that lie within
    the interval that is stated to hold that share. Stated is a normal distribution of the length's logarithm.
    """
    reach = np.exp(_normal(0.8) * said.spread)
    rows = []
    for part in np.array_split(np.argsort(said.tokens, kind="stable"), BINS):
        estimates, low, middle, high = said.tokens[part], *np.quantile(truths[part], (0.1, 0.5, 0.9))
        stated = {"stated_p10": np.mean(estimates / reach[part]), "stated_p90": np.mean(estimates * reach[part])}
        true = {"true_mean": np.mean(truths[part]), "true_p10": low, "true_p50": middle, "true_p90": high}
        row = {"estimate": np.mean(estimates), **stated, **true}
        rows.append({key: round(float(value), 1) for key, value in row.items()})
    standing = _standing(said, truths)
    held = [{"stated": level, "held": round(float(np.mean(standing <= _normal(level))), 4)} for level in LEVELS]
    return {"by_estimate": rows, "coverage": held}


def _standing(said: Estimates, truths: Ints) -> Floats:
    """How many of its spreads each estimate is off."""
    return np.asarray(np.abs(np.log(said.tokens / truths)) / np.maximum(said.spread, 1e-9))


def _normal(level: float) -> float:
    """The z within which a normal variable lies with probability `level`, by bisection."""
    low, high = 0.0, 10.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle / math.sqrt(2)) < level else (low, middle)
    return low


def baseline(name: str, train: Pairs, prompts: Sequence[str]) -> Estimates:
    """What a baseline fitted to `train` says of prompts."""
    logs = np.log(train.tokens)
    if name != "prompt_length":
        tokens = train.tokens.mean() if name == "mean" else np.median(train.tokens)
        return Constant(max(round(float(tokens)), 1), float(logs.std())).predict(prompts)
    weights = np.linalg.lstsq(_parabola(train.prompts), train.tokens, rcond=None)[0]
    tokens = np.maximum(np.rint(_parabola(prompts) @ weights), 1).astype(np.int64)
    own = np.maximum(_parabola(train.prompts) @ weights, 1)
    return Estimates(tokens, np.full(len(prompts), float((logs - np.log(own)).std())))


def _parabola(prompts: Sequence[str]) -> Floats:
    size = np.log([len(prompt) + 1 for prompt in prompts])
    return np.stack([np.ones_like(size), size, size**2], axis=1)


def train(
    lengths: Lengths,
    config: EstimationConfig,
    seed: int,
    log: Log = lambda step, values: None,
    progress: Progress = _silent,
) -> Scores:
    """Train `lengths`, write it to its `path` with what it errs by on the test side, and return how it did there.

    config: the data and how it is split. seed: of the training.
    log: is told what was measured at a step. progress: a bar for so many steps, told of each as it is done.
    ValueError or OSError, in one line, if the data or the encoder is not to be had, or this kind is not trained, or if
    the place takes no files. NotStored, whose result are the scores, if that turns out afterwards.
    """
    if not isinstance(lengths, Compact | RoBERTa):
        raise ValueError(f"lengths={type(lengths).__name__.lower()}: is not trained; choose from {', '.join(LEARNED)}")
    if isinstance(lengths, Compact) and Path(lengths.path).exists() and not config.force:
        raise ValueError(f"lengths.path={lengths.path}: is there already; give another, or --force to write over it")
    check_writable(Path(lengths.path).parent)
    split = load(config.data, config.tokenizer, config.train, config.test)
    if not split.train.prompts or not split.tune.prompts or not split.test.prompts:
        raise ValueError(f"estimation.data={config.data}: too few pairs to train, tune and test")
    origin = {
        "data": config.data,
        "files": list(split.files),
        "counted": split.counted,
        "pairs": {side: len(getattr(split, side).prompts) for side in ("train", "tune", "test")},
    }
    if isinstance(lengths, Compact):
        return _train_compact(lengths, split, origin)
    return _train_roberta(lengths, config, split, seed, origin, log, progress)


def _train_compact(lengths: Compact, split: Split, origin: Mapping[str, Any]) -> Scores:
    from block.lengths.compact_fit import fit_compact

    model = fit_compact(split.train, split.tune, origin)
    said = model.predict(split.test.prompts)
    found = scores(said, split.test.tokens)
    described = {**model.origin, "scores": {name: round(value, 4) for name, value in found._asdict().items()}}
    model = model._replace(errors=measured(said.tokens, split.test.tokens), origin=described)
    _keep(lengths.path, lambda path: write_whole(path, model.save), found)
    return found


def _keep(path: str, write: Callable[[Path], None], found: Scores) -> None:
    """Write a model. NotStored, with its scores, if it is in the temporary folder."""
    _, trouble = write_or_divert(f"lengths.path={path}", Path(path), write)
    if trouble is not None:
        trouble.result = found
        raise trouble


def _train_roberta(
    lengths: RoBERTa,
    config: EstimationConfig,
    split: Split,
    seed: int,
    origin: Mapping[str, Any],
    log: Log,
    progress: Progress,
) -> Scores:
    try:
        from block.lengths import training
    except ImportError as error:
        raise ValueError(f"lengths=roberta: needs pip install -e '.[lengths]' ({error.name} is not there)") from error

    settings = training.Settings(
        config.epochs, config.batch_size, config.learning_rate, config.patience, config.checkpoint_every
    )
    steps = math.ceil(len(split.train.prompts) / config.batch_size) * config.epochs
    with progress(steps) as advance:
        model = training.train(lengths, settings, split.train, split.tune, seed, log, advance)
    said = model.predict(split.test.prompts, lengths.batch_size)
    found = scores(said, split.test.tokens)
    table = measured(said.tokens, split.test.tokens)

    def write(folder: Path) -> None:
        model.save(folder)
        (folder / ERRORS).write_text(json.dumps(table.round(4).tolist()) + "\n")
        write_json(folder / "origin.json", {**origin, "encoder": lengths.encoder, "scores": found._asdict()})

    _keep(lengths.path, write, found)
    return found


def evaluate(config: EstimationConfig) -> list[dict[str, Any]]:
    """A row for each data set and estimator: its scores and calibration, or `missing`: why there are none.

    Data sets of several files get a row for each of them as well.
    """
    rows: list[dict[str, Any]] = []
    for data in config.data_sets:
        try:
            split = load(data, config.tokenizer, config.train, config.test)
        except (OSError, ValueError) as error:
            rows += [{"data": data, "estimator": name, "missing": str(error)} for name in config.estimators]
            continue
        for name in config.estimators:
            try:
                said = _said(name, data, split)
            except (OSError, ValueError) as error:
                rows.append({"data": data, "estimator": name, "missing": str(error)})
                continue
            for number, file in [(-1, data), *(enumerate(split.files) if len(split.files) > 1 else ())]:
                chosen = split.test.files == number if number >= 0 else np.ones(len(said.tokens), dtype=bool)
                part = Estimates(said.tokens[chosen], said.spread[chosen])
                truths = split.test.tokens[chosen]
                row = {"data": file, "estimator": name, "pairs": int(chosen.sum()), "counted": split.counted}
                rows.append({**row, **scores(part, truths)._asdict(), "calibration": calibration(part, truths)})
    return rows


def _said(name: str, data: str, split: Split) -> Estimates:
    if name in BASELINES:
        return baseline(name, split.train, split.test.prompts)
    lengths: Reader = (own := LEARNED[name]())
    if data != "gpteacher":
        path = Path(own.path)
        lengths = replace(own, path=str(path.with_name(f"{path.stem}-{Path(data).stem}{path.suffix}")))
    return lengths.predict(split.test.prompts)
