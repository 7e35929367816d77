"""Run one experiment, or a sweep of them: ``python run.py scheduler=block model=llama2-7b``.

Sweep with ``-m``; ``--cfg job`` shows every key. The groups are the folders of conf/.
"""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from block import config, experiment, sweep

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(settings: DictConfig) -> None:
    """One job."""
    job = HydraConfig.get()
    if job.mode is RunMode.RUN:
        config.told(lambda: experiment.execute(settings, job.runtime.choices))
    else:
        sweep.attempt(lambda: experiment.execute(settings, job.runtime.choices, sweep=job), job)


if __name__ == "__main__":
    sys.exit(config.guard(main) or (1 if sweep.Tally.failed else 0))
