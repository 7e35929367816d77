"""How `compact` is fitted: two ridge regressions, solved exactly, the second on the errors of the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from block.core.arrays import Floats
from block.lengths.compact import FEATURES, SHAPE, CompactModel, features
from block.lengths.errors import measured
from block.workload.prompts import Pairs

PENALTIES = (0.5, 1.0, 2.0, 4.0, 8.0)
FOLDS = 5
SHAPE_SCALE = 0.1
"""Of the shape's columns beside those of words, whose rows have length 1."""


def fit_compact(train: Pairs, tune: Pairs, origin: Mapping[str, Any]) -> CompactModel:
    """The model of the training pairs; its penalty and its spread's level come from those to tune by.

    Its `errors` are those on the pairs to tune by, until they are measured on others.
    """
    words, shape = _columns(train)
    rarity = np.sqrt(np.log((len(words) + 1) / (words.sum(axis=0) + 1))).astype(np.float32)
    centre, scale = shape.mean(axis=0), np.maximum(shape.std(axis=0), 1e-6)
    rows, tuned = (_rows(*columns, rarity, centre, scale) for columns in ((words, shape), _columns(tune)))
    target, aim = np.log(train.tokens), np.log(tune.tokens)
    gram = rows @ rows.T
    trials = [_ridge(rows, gram, target, penalty) for penalty in PENALTIES]
    off = [np.abs(np.exp(tuned @ weights + bias) - tune.tokens).mean() for weights, bias in trials]
    best = int(np.argmin(off))
    weights, bias = trials[best]
    # Of each pair, the error of a model that has not seen it; their logarithms' mean is that of a spread, less a level.
    missed = np.log(np.maximum(np.abs(target - _crossed(gram, target, PENALTIES[best])), 0.01))
    wide, level = _ridge(rows, gram, missed, 4 * PENALTIES[best])
    residuals = aim - (tuned @ weights + bias)
    level += np.log(np.sqrt(np.mean(np.square(residuals / np.exp(tuned @ wide + level)))))
    both = np.stack([weights, wide], axis=1)
    both[:FEATURES] *= rarity[:, None]
    both[FEATURES:] *= SHAPE_SCALE
    empty = np.zeros((1, 1))
    origin = {**origin, "penalty": PENALTIES[best]}
    model = CompactModel(both, rarity, centre, scale, np.array([bias, level]), empty, origin)
    return model._replace(errors=measured(model.predict(tune.prompts).tokens, tune.tokens))


def _columns(pairs: Pairs) -> tuple[Floats, Floats]:
    words: Any = np.zeros((len(pairs.prompts), FEATURES), dtype=np.float32)
    shape = np.zeros((len(pairs.prompts), SHAPE))
    for i, prompt in enumerate(pairs.prompts):
        columns, shape[i] = features(prompt)
        words[i, columns] = 1
    return words, shape


def _rows(words: Floats, shape: Floats, rarity: Floats, centre: Floats, scale: Floats) -> Floats:
    weighted = words * rarity
    weighted /= np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-6)
    return np.hstack([weighted, SHAPE_SCALE * ((shape - centre) / scale).astype(np.float32)])


def _ridge(rows: Floats, gram: Floats, target: Floats, penalty: float) -> tuple[Floats, float]:
    """Weights and bias; solved in the space of the rows, of which there are fewer than columns."""
    bias = float(target.mean())
    duals = np.linalg.solve(gram + penalty * np.eye(len(gram), dtype=gram.dtype), (target - bias).astype(gram.dtype))
    return (rows.T @ duals).astype(np.float64), bias


def _crossed(gram: Floats, target: Floats, penalty: float) -> Floats:
    """What models that lack each fifth of the rows say of it."""
    said = np.empty_like(target)
    for fold in range(FOLDS):
        out = np.arange(len(target)) % FOLDS == fold
        bias = target[~out].mean()
        inner = gram[np.ix_(~out, ~out)] + penalty * np.eye(int((~out).sum()), dtype=gram.dtype)
        duals = np.linalg.solve(inner, (target[~out] - bias).astype(gram.dtype))
        said[out] = gram[np.ix_(out, ~out)] @ duals + bias
    return said
