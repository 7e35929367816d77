"""The training loop of `roberta`: AdamW, a linear schedule, early stopping, and checkpoints to go on from.

A checkpoint holds weights, optimiser, schedule and the random state, and is written at once or not at all: training
that was killed and is started again with the same settings ends with the weights that it would have ended with.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from block.core.rng import generator
from block.lengths.encoder import Regressor, loss, write
from block.lengths.roberta import RoBERTa
from block.workload.prompts import Pairs

CHECKPOINT = "checkpoint.pt"
WARMUP_SHARE = 0.06


@dataclass(frozen=True)
class Settings:
    """How to train: passes over the data, pairs a step, AdamW's step size, passes without a better one until it stops,
    and steps between two checkpoints.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    patience: int
    checkpoint_every: int


def train(
    config: RoBERTa,
    settings: Settings,
    pairs: Pairs,
    tune: Pairs,
    seed: int,
    log: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    advance: Callable[[int], None] = lambda steps: None,
) -> Regressor:
    """The model of the best epoch, by the mean error on `tune` in tokens; it goes on from a checkpoint in its folder.

    config: the encoder and its folder. settings: of the training. pairs: prompts and lengths to train on; tune: those
    that choose the epoch. seed: of weights and order.
    log: told the step and what was measured. advance: told of steps done, those before a checkpoint at once.
    ValueError if the encoder is not to be had, or a checkpoint is not sound.
    """
    torch.manual_seed(seed)
    model = Regressor.start(config.encoder, config.max_prompt_tokens, config.device)
    with torch.no_grad():  # begin where a constant would be
        model.head.bias.copy_(torch.tensor([float(np.log(pairs.tokens).mean()), 0.0]))
    per_epoch = math.ceil(len(pairs.prompts) / settings.batch_size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _slope(per_epoch * settings.epochs))
    place = Path(config.path) / CHECKPOINT
    mark = _mark(config, settings, pairs, tune, seed)
    step, best, since = _resume(place, mark, model, optimiser, schedule)
    advance(step)
    kept = {name: value.clone() for name, value in model.state_dict().items()} if step == 0 else _best(place, model)
    while step < per_epoch * settings.epochs and since < settings.patience:
        epoch, within = divmod(step, per_epoch)
        order = generator(seed, f"lengths.training.{epoch}").permutation(len(pairs.prompts))
        batch = order[within * settings.batch_size : (within + 1) * settings.batch_size]
        model.train()
        value = loss(model([pairs.prompts[i] for i in batch]), pairs.tokens[batch])
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        step += 1
        advance(1)
        log(step, {"loss": value.item(), "learning_rate": schedule.get_last_lr()[0]})
        if step % per_epoch == 0:
            error = float(np.abs(model.predict(tune.prompts, config.batch_size).tokens - tune.tokens).mean())
            log(step, {"epoch": step // per_epoch, "tune_error_tokens": error})
            since += 1
            if error < best:
                best, since = error, 0
                kept = {name: value.clone() for name, value in model.state_dict().items()}
        if step % settings.checkpoint_every == 0 or step % per_epoch == 0:
            state = (model.state_dict(), optimiser.state_dict(), schedule.state_dict(), _random())
            _save(place, {"mark": mark, "state": state, "kept": kept, "step": step, "best": best, "since": since})
    model.load_state_dict(kept)
    model.eval()
    return model


def _slope(total: int) -> Callable[[int], float]:
    warmup = max(round(total * WARMUP_SHARE), 1)
    return lambda step: min((step + 1) / warmup, max(total - step, 0) / max(total - warmup, 1))


def _mark(config: RoBERTa, settings: Settings, pairs: Pairs, tune: Pairs, seed: int) -> str:
    """What a checkpoint must have been made with to be gone on from."""
    parts = [asdict(config), asdict(settings), seed, pairs.prompts, pairs.tokens.tolist(), tune.prompts]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _random() -> tuple[Any, ...]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _resume(place: Path, mark: str, model: Regressor, optimiser: Any, schedule: Any) -> tuple[int, float, int]:
    """Take up a checkpoint if there is one: steps done, the least error so far, epochs since."""
    if not place.exists():
        return 0, math.inf, 0
    found = _read(place, model)
    if found["mark"] != mark:
        raise ValueError(
            f"{place}: was made with other settings or data; move it away, or train to another lengths.path"
        )
    weights, optimisers, schedules, (cpu, cuda) = found["state"]
    model.load_state_dict(weights)
    optimiser.load_state_dict(optimisers)
    schedule.load_state_dict(schedules)
    torch.set_rng_state(cpu.cpu())
    if cuda:
        torch.cuda.set_rng_state_all([one.cpu() for one in cuda])
    return found["step"], found["best"], found["since"]


def _best(place: Path, model: Regressor) -> dict[str, torch.Tensor]:
    return _read(place, model)["kept"]  # type: ignore[no-any-return]


def _read(place: Path, model: Regressor) -> dict[str, Any]:
    try:
        return torch.load(place, map_location=model.device, weights_only=True)  # type: ignore[no-any-return]
    except Exception as error:  # whatever an unpickler stumbles over
        raise ValueError(f"{place}: is not a sound checkpoint; move it away to begin anew") from error


def _save(place: Path, content: dict[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    write(place, content)
