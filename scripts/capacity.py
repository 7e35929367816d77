"""Find a capacity: the request rate at which TTFT P99 crosses its objective, for several seeds, with an interval.

    python scripts/capacity.py scheduler=block capacity.slo_s=[3,10] capacity.seeds=3
    python scripts/capacity.py -m scheduler=block,llumnix_minus engine.max_num_seqs=24

Takes every key of run.py, and those of the node `capacity` (--cfg job shows them). The points tried are written to
artifacts/capacity/, and found there by the next call unless something that they follow from has changed; with --fresh
(or capacity.fresh=true) they are searched for anew.
"""

import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from block.run import capacity_search, cli, hydra_schema, sweep

hydra_schema.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(settings: DictConfig) -> object:
    """One search; returns the capacity, or a list of them for several objectives, for the sweeper if there is one."""
    job: Any = HydraConfig.get()
    if job.mode is RunMode.RUN:
        return cli.run_job(lambda: capacities(settings, job))
    return sweep.try_job(lambda: capacities(settings, job), job)


def capacities(settings: DictConfig, job: DictConfig) -> float | list[float]:
    """The capacity for each objective, alone if there is one."""
    found = [one["capacity_qps"] for one in capacity_search.search(settings, job.runtime.choices).values()]
    return found[0] if len(found) == 1 else found


if __name__ == "__main__":
    flags = {"--fresh": "capacity.fresh=true"}
    sys.exit(cli.run_main(lambda: sweep.run_sweep(main, "capacity"), flags) or (1 if sweep.Tally.failed else 0))
