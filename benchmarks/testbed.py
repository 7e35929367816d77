"""What the benchmarks share: a run composed as run.py composes it, served in this process."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir

from block.run import config, hydra_schema
from block.run.replay import Outcome, replay, requests_of

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


def warm_up() -> None:
    """Load or compile all that is compiled."""
    simulate("workload.num_requests=200")
