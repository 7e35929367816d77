"""`roberta`: the paper's estimator, a transformers encoder with a regression head on the logarithm of the length.

Its folder holds the encoder and tokenizer as transformers saves them, the head, and what it was measured to err by.
Needs the extra `lengths` to predict; for a simulated workload without prompts it needs numpy only. torch and
transformers are imported when they are needed and not before.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np

from block.core.arrays import Floats, Ints
from block.core.paths import find
from block.lengths import Estimates
from block.lengths.errors import OUTRUN_SHARE, check_share, resampled

if TYPE_CHECKING:
    from block.lengths.encoder import Regressor

ERRORS = "errors.json"
ADVICE = "train one by `python scripts/train_lengths.py lengths=roberta`, or take lengths=compact, which needs none"

HEAD = "head.pt"  # what was trained, in the folder of a model


@final
@dataclass(frozen=True)
class RoBERTa:
    """An encoder with a regression head.

    path: folder of the trained model; looked for here, then beside the package.
    encoder: what training starts from: a name on the Hugging Face Hub, or a folder.
    max_prompt_tokens: longer prompts lose their middle. batch_size: prompts at a time, when predicting.
    device: cpu, cuda, or auto: cuda if there is one. outrun_share: as of `Compact`.
    """

    path: str = "artifacts/lengths/roberta"
    encoder: str = "roberta-base"
    max_prompt_tokens: int = 512
    batch_size: int = 32
    device: str = "auto"
    outrun_share: float = OUTRUN_SHARE

    def __post_init__(self) -> None:
        check_share(self.outrun_share)
        for key in ("max_prompt_tokens", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"lengths.{key}={getattr(self, key)}: must be at least 1")
        if self.device not in ("auto", "cpu") and not self.device.startswith("cuda"):
            raise ValueError(f"lengths.device={self.device}: choose from auto, cpu, cuda")

    def estimate(self, output_tokens: Ints, rng: np.random.Generator) -> Ints:
        """The truth, off by what the model was on prompts held out."""
        return resampled(_errors(self.path), output_tokens, rng)

    def predict(self, prompts: Sequence[str]) -> Estimates:
        """What the model says."""
        return _load(self).predict(prompts, self.batch_size)


def folder(path: str) -> Path:
    """Where the trained model is. FileNotFoundError if there is none."""
    found = find(path)
    if not (found / HEAD).is_file():
        raise FileNotFoundError(f"lengths.path={path}: no trained model there; {ADVICE}")
    return found


@functools.lru_cache
def _load(config: RoBERTa) -> Regressor:
    try:
        from block.lengths.encoder import Regressor
    except ImportError as error:
        raise ValueError(f"lengths=roberta: needs pip install -e '.[lengths]' ({error.name} is not there)") from error
    return Regressor.load(folder(config.path), config.max_prompt_tokens, config.device)


@functools.lru_cache
def _errors(path: str) -> Floats:
    place = folder(path) / ERRORS
    try:
        table = np.array(json.loads(place.read_text()), dtype=np.float64)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"lengths.path={path}: its {ERRORS} is not there or not sound; train it again") from error
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ValueError(f"lengths.path={path}: its {ERRORS} is not sound; train it again")
    return table
