"""The settings in which capacities are compared, and their searches: the paper's testbed, and one thing changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SEEDS = (0, 1, 2)
SLO_S = (3.0, 10.0)


class Setting(NamedTuple):
    """A setting by its name for people, what is set in it, and where a search begins (requests/s)."""

    name: str
    values: Mapping[str, Any]
    low: float
    high: float


SETTINGS = {
    "base": Setting("Llama-2-7B, ShareGPT", {}, 24, 34),
    "qwen": Setting("Qwen2-7B", {"model": "qwen2-7b"}, 50, 75),
    "burstgpt": Setting("BurstGPT", {"workload": "burstgpt"}, 35, 50),
    "batch24": Setting("batch 24", {"engine.max_num_seqs": 24}, 18, 30),
    "chunk2048": Setting("chunk 2048", {"engine.max_num_batched_tokens": 2048}, 24, 34),
    "azure_conv": Setting("Azure conversation", {"workload": "azure_conv", "workload.arrivals": "trace"}, 15, 30),
    "azure_code": Setting("Azure code", {"workload": "azure_code", "workload.arrivals": "trace"}, 15, 30),
}


def searches(setting: str, schedulers: Sequence[str], seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """The cells of the capacity searches of a setting."""
    one = SETTINGS[setting]
    return [
        {"scheduler": scheduler, **one.values, "capacity.low": one.low, "capacity.high": one.high, "seed": seed}
        for scheduler in schedulers
        for seed in seeds
    ]
