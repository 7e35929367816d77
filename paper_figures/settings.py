"""The settings in which capacities are compared, and their searches: the paper's testbed, and one thing changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SEEDS = (0, 1, 2)
SLO_S = (3.0, 10.0)


class Setting(NamedTuple):
    """A setting by its name for people, what is set in it, and between which rates (requests/s) the search for Block's
    capacity begins. Where it begins decides how many runs a search takes, not what it finds.
    """

    name: str
    values: Mapping[str, Any]
    low: float
    high: float
    tolerance: float = 0.5


SETTINGS = {
    "base": Setting("Llama-2-7B, ShareGPT", {}, 31.5, 33),
    "qwen": Setting("Qwen2-7B", {"model": "qwen2-7b"}, 62, 67, 1.0),
    "burstgpt": Setting("BurstGPT", {"workload": "burstgpt"}, 45, 48, 1.0),
    "batch24": Setting("batch 24", {"engine.max_num_seqs": 24}, 28, 29),
    "chunk2048": Setting("chunk 2048", {"engine.max_num_batched_tokens": 2048}, 31.5, 33),
    "azure_conv": Setting("Azure conversation", {"workload": "azure_conv", "workload.arrivals": "trace"}, 15, 17),
    "azure_code": Setting("Azure code", {"workload": "azure_code", "workload.arrivals": "trace"}, 3, 13, 1.0),
}

SHARE = {
    "random": 0.7,
    "round_robin": 0.78,
    "min_qpm": 0.74,
    "infaas": 0.9,
    "llumnix_minus": 0.96,
    "block_star": 0.97,
    "po_k": 0.97,
}
"""What a scheduler carries of what Block does, about: where its searches begin."""


def searches(setting: str, schedulers: Sequence[str], seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """The cells of the capacity searches of a setting."""
    one = SETTINGS[setting]
    return [
        {
            "scheduler": scheduler,
            **one.values,
            "capacity.low": round(one.low * SHARE.get(scheduler, 1.0), 1),
            "capacity.high": round(one.high * SHARE.get(scheduler, 1.0), 1),
            "capacity.tolerance": one.tolerance,
            "seed": seed,
        }
        for scheduler in schedulers
        for seed in seeds
    ]
