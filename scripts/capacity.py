"""Find a capacity: the request rate at which TTFT P99 crosses its objective, for several seeds, with an interval.

    python scripts/capacity.py scheduler=block capacity.slo_s=[3,10] capacity.seeds=3
    python scripts/capacity.py -m scheduler=block,llumnix_minus engine.max_num_seqs=24

Takes every key of run.py, and those of the node `capacity` (--cfg job shows them). The points tried are written to
artifacts/capacity/.
"""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from block import config, experiment

config.register()


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(settings: DictConfig) -> None:
    """One search."""
    config.told(lambda: experiment.search(settings, HydraConfig.get().runtime.choices))


if __name__ == "__main__":
    sys.exit(config.guard(main))
