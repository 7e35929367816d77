"""`compact`: a linear model over the words of a prompt, in one small file, read by numpy alone.

Features are the words of the prompt, pairs of neighbours, their first and last four letters and how it begins, hashed
into FEATURES columns, each there or not, weighted by the square root of its rarity and scaled to length 1; and a few
shares and counts (`_shape`). One column of weights gives the logarithm of the length, the other that of its spread.
How it came to be, and what else was tried: docs/lengths.md.
"""

from __future__ import annotations

import functools
import json
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from block.core.arrays import Floats, Ints
from block.core.paths import find
from block.lengths import Estimates
from block.lengths.errors import OUTRUN_SHARE, check_share, resampled

FEATURES = 1 << 14
SHAPE = 8
ENDS = 384
"""Characters of a prompt that are read at its beginning and at its end; what is between does not count."""
LONGEST = 1 << 20
"""Tokens that no estimate exceeds."""

ADVICE = "`python scripts/train_lengths.py lengths=compact` makes one, lengths=noisy goes without"

_TOKENS = re.compile(r"\w+|[^\w\s]")


@final
@dataclass(frozen=True)
class Compact:
    """The small linear model.

    path: its file, by scripts/train_lengths.py; looked for here, then beside the package.
    outrun_share: a response that has outrun its estimate is expected to go on for this share of what it has, and for 10
        tokens at least; 0 is the paper's rule.
    """

    path: str = "artifacts/lengths/compact.npz"
    outrun_share: float = OUTRUN_SHARE

    def __post_init__(self) -> None:
        check_share(self.outrun_share)

    def estimate(self, output_tokens: Ints, rng: np.random.Generator) -> Ints:
        """The truth, off by what the model was on prompts held out."""
        return resampled(load(self.path).errors, output_tokens, rng)

    def predict(self, prompts: Sequence[str]) -> Estimates:
        """What the model says."""
        return load(self.path).predict(prompts)


class CompactModel(NamedTuple):
    """What the file holds.

    weights: float32[FEATURES + SHAPE, 2], for the logarithm of the length and of its spread, times the rarity;
    rarity: float32[FEATURES]; centre, scale: of the shape, float[SHAPE]; bias: float[2]; errors: of
    `block.lengths.errors`; origin: where it came from, in words and numbers.
    """

    weights: Floats
    rarity: Floats
    centre: Floats
    scale: Floats
    bias: Floats
    errors: Floats
    origin: Mapping[str, Any]

    def predict(self, prompts: Sequence[str]) -> Estimates:
        """The estimates."""
        logs = np.empty((len(prompts), 2))
        for i, prompt in enumerate(prompts):
            columns, shape = features(prompt)
            norm = math.sqrt(float(np.square(self.rarity[columns]).sum())) or 1.0
            logs[i] = self.bias + self.weights[columns].sum(axis=0) / norm
            logs[i] += ((shape - self.centre) / self.scale) @ self.weights[FEATURES:]
        tokens = np.clip(np.rint(np.exp(np.minimum(logs[:, 0], 50.0))), 1, LONGEST).astype(np.int64)
        return Estimates(tokens, np.exp(np.clip(logs[:, 1], -10.0, 10.0)))

    def save(self, path: Path) -> None:
        """Write the file, weights at half precision."""
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {
            "weights": self.weights.astype(np.float16),
            "rarity": self.rarity.astype(np.float16),
            "centre": self.centre,
            "scale": self.scale,
            "bias": self.bias,
            "errors": self.errors.astype(np.float32),
            "origin": np.array(json.dumps(dict(self.origin), ensure_ascii=False)),
        }
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)


@functools.lru_cache
def load(path: str) -> CompactModel:
    """The model in a file. FileNotFoundError or ValueError, in one line, if there is none, or not one of this kind."""
    found = find(path)
    if not found.is_file():
        raise FileNotFoundError(f"lengths.path={path}: no such file; {ADVICE}")
    try:
        with found.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            origin = json.loads(str(file["origin"]))
            parts = {
                name: np.asarray(file[name], dtype=np.float64) for name in CompactModel._fields if name != "origin"
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"lengths.path={path}: is not a compact model, or not a whole one; {ADVICE}") from error
    parts["weights"] = parts["weights"].astype(np.float32)
    parts["rarity"] = parts["rarity"].astype(np.float32)
    shapes = (parts["weights"].shape, parts["rarity"].shape, parts["centre"].shape, parts["bias"].shape)
    sound = shapes == ((FEATURES + SHAPE, 2), (FEATURES,), (SHAPE,), (2,)) and parts["errors"].ndim == 2
    if not sound or not all(np.isfinite(part).all() for part in parts.values()):
        raise ValueError(f"lengths.path={path}: is not a compact model of this version; {ADVICE}")
    return CompactModel(**parts, origin=origin)


def features(prompt: str) -> tuple[Ints, Floats]:
    """The columns of a prompt's words, ascending and each once, and its shape, float[SHAPE]."""
    if len(prompt) > 2 * ENDS:
        prompt = f"{prompt[:ENDS]} {prompt[-ENDS:]}"
    words = _TOKENS.findall(prompt.lower())
    grams = set(words)
    grams.update([f"{a} {b}" for a, b in pairwise(words)])
    grams.update([part for word in grams & set(words) if len(word) > 4 for part in (f"<{word[:4]}", f"{word[-4:]}>")])
    grams.update([f"^{' '.join(words[:n])}" for n in (1, 2) if words])
    hashed = {zlib.crc32(gram.encode("utf-8", "replace")) % FEATURES for gram in grams}
    return np.array(sorted(hashed), dtype=np.int64), _shape(prompt, words)


def _shape(prompt: str, words: Sequence[str]) -> Floats:
    characters = max(len(prompt), 1)
    return np.array(
        [
            math.log(characters),
            math.log(len(words) + 1),
            math.log(prompt.count("\n") + 1),
            sum(map(prompt.count, "0123456789")) / characters,
            sum(map(prompt.count, "(){}[]<>=;:,_")) / characters,
            math.log(prompt.count("?") + 1),
            math.log(prompt.count('"') + prompt.count("'") + 1),
            len(set(words)) / max(len(words), 1),
        ]
    )
