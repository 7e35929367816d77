"""What the benchmarks share: a run composed as run.py composes it, served in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir

from block.core import snapshot
from block.engine.config import EngineSettings
from block.run import config, hydra_schema
from block.run.replay import Outcome, replay, requests_of
from block.vllm_plugin import state_buffer
from block.vllm_plugin.state_buffer import StateBuffer

CONF = str(Path(__file__).resolve().parent.parent / "conf")


def compose_run(*overrides: str) -> config.RunConfig:
    hydra_schema.register()
    with initialize_config_dir(CONF, version_base="1.3"):
        return config.build(compose("config", overrides=list(overrides)))


def simulate(*overrides: str) -> Outcome:
    run = compose_run(*overrides)
    outcome = Outcome()
    replay(run, requests_of(run)[0], outcome)
    return outcome


def busy_board(running: int, waiting: int, settings: EngineSettings) -> tuple[StateBuffer, str]:
    """A state buffer that shows so many sequences, and its path."""
    buffer, path = StateBuffer.create()
    header, seqs = buffer.header, buffer.seqs
    there = running + waiting
    header[state_buffer.SETTINGS : state_buffer.SETTINGS + len(settings)] = settings
    header[[state_buffer.COLUMNS, state_buffer.RUNNING]] = there, running
    seqs[snapshot.ID, :there] = -np.arange(1, there + 1)
    seqs[snapshot.NUM_PROMPT_TOKENS, :there] = 250
    seqs[[snapshot.TARGET, snapshot.MAX_TOKENS, snapshot.EXPECTED], :there] = 300
    seqs[snapshot.NUM_OUTPUT_TOKENS, :running] = np.arange(1, running + 1) * 5
    seqs[snapshot.NUM_COMPUTED_TOKENS, :running] = 249 + seqs[snapshot.NUM_OUTPUT_TOKENS, :running]
    seqs[snapshot.NUM_BLOCKS, :running] = -(-seqs[snapshot.NUM_COMPUTED_TOKENS, :running] // 16)
    header[state_buffer.FREE] = settings.total_blocks - seqs[snapshot.NUM_BLOCKS, :running].sum()
    return buffer, path


def warm_up() -> None:
    """Load or compile all that is compiled."""
    simulate("workload.num_requests=200")
