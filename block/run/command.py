"""Run one experiment, or a sweep of them: ``block-run scheduler=block model=llama2-7b``, or run.py in a checkout.

    python run.py scheduler=block workload.qps=32     serve a workload, on simulated or real engines
    python run.py experiment=main_sweep               sweep over what a file of conf/experiment says
    python run.py experiment=length_estimation        Table 1: how far length estimators are off (needs BLOCK_DATA)

Sweep with ``-m``; ``--cfg job`` shows every key. The groups are the folders of conf/.
"""

from __future__ import annotations

from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from block.core.paths import shipped
from block.run import cli, hydra_schema, sweep
from block.run.execute import run_command

hydra_schema.register()


@hydra.main(version_base="1.3", config_path=str(shipped("conf")), config_name="config")
def main(settings: DictConfig) -> object:
    """One job; returns its objective."""
    job: Any = HydraConfig.get()
    if job.mode is RunMode.RUN:
        return cli.run_job(lambda: run_command(settings, job.runtime.choices))
    return sweep.try_job(lambda: run_command(settings, job.runtime.choices, sweep=job), job)


def command() -> int:
    """What the command line says; returns the exit code."""
    return cli.run_main(lambda: sweep.run_sweep(main)) or (1 if sweep.Tally.failed else 0)
