"""Find a capacity: the request rate at which TTFT P99 crosses its objective, for several seeds, with an interval.

    python scripts/capacity.py scheduler=block capacity.slo_s=[3,10] capacity.seeds=3
    python scripts/capacity.py -m scheduler=block,llumnix_minus engine.max_num_seqs=24

Takes every key of run.py, and those of the node `capacity` (--cfg job shows them). The points tried are written to
artifacts/capacity/, and found there by the next call unless something that they follow from has changed; with --fresh
(or capacity.fresh=true) they are searched for anew.
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
    sys.argv[1:] = ["capacity.fresh=true" if argument == "--fresh" else argument for argument in sys.argv[1:]]
    sys.exit(config.guard(main))
