"""Train a length estimator on pairs of prompts and responses, and say how far it is off on those held out.

    python scripts/train_lengths.py lengths=compact lengths.path=mine.npz    GPTeacher, from $BLOCK_DATA
    python scripts/train_lengths.py lengths=roberta estimation.data=sharegpt_text lengths.path=mine/roberta
    python scripts/train_lengths.py lengths=roberta lengths.encoder=FOLDER estimation.data=mine.jsonl

The model is written to `lengths.path`, over one of compact's that is there only with --force. Training that was
interrupted goes on where it was; the curves of roberta's go to W&B (`tracking`). Takes every key of run.py, and those
of the node `estimation` (--cfg job shows them).
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from block.core.files import NotStored
from block.lengths.estimation import train
from block.lengths.roberta import RoBERTa
from block.run import cli, config, effects, hydra_schema
from block.run.config_errors import ConfigError, explain
from block.run.console import progress
from block.store.wandb import curves

hydra_schema.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(settings: DictConfig) -> None:
    """One estimator."""
    cli.run_job(lambda: run(settings))


def run(settings: DictConfig) -> None:
    """Train what `settings` describe. ConfigError if that cannot be."""
    effects.refuse(settings, "train_lengths")
    lengths, wanted, tracking = (config.node(settings[key]) for key in ("lengths", "estimation", "tracking"))
    console = Console(stderr=True)
    settled = config.plain(settings)
    slow = isinstance(lengths, RoBERTa)
    mirror = curves(tracking, Path(lengths.path), settled) if slow else nullcontext(lambda step, values: None)
    trouble = None
    try:
        with mirror as log:
            found = train(lengths, wanted, settled["seed"], log, lambda steps: progress(console, "steps", steps))
    except NotStored as error:
        found, trouble = error.result, error
    except (ValueError, OSError) as error:
        why = getattr(error, "strerror", None)  # what the system says of a path names no key
        raise ConfigError(f"lengths.path={lengths.path}: {why}" if why else explain(error)) from error
    print(lengths.path, *(f"{name} {value:.4g}" for name, value in found._asdict().items()), sep="\n  ")
    if trouble is not None:
        raise trouble


if __name__ == "__main__":
    sys.exit(cli.run_main(main, {"--force": "estimation.force=true"}))
