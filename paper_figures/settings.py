"""The settings in which capacities are compared, and their searches: the paper's testbed, and one thing changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

SEEDS = (0, 1, 2)
SLO_S = (3.0, 10.0)


class Setting(NamedTuple):
    """A setting by its name for people, what is set in it, and the step of the rates that are tried (requests/s)."""

    name: str
    values: Mapping[str, Any]
    tolerance: float = 0.5


SETTINGS = {
    "base": Setting("Llama-2-7B, ShareGPT", {}),
    "qwen": Setting("Qwen2-7B", {"model": "qwen2-7b"}, 1.0),
    "burstgpt": Setting("BurstGPT", {"workload": "burstgpt"}, 1.0),
    "batch24": Setting("batch 24", {"engine.max_num_seqs": 24}),
    "chunk2048": Setting("chunk 2048", {"engine.max_num_batched_tokens": 2048}),
    "azure_conv": Setting("Azure conversation", {"workload": "azure_conv", "workload.arrivals": "trace"}),
    "azure_code": Setting("Azure code", {"workload": "azure_code", "workload.arrivals": "trace"}, 1.0),
}

BEGINNINGS = yaml.safe_load((Path(__file__).parent / "beginnings.yaml").read_text())
"""About where capacities are, by setting, scheduler, and what else is changed. It decides how many runs a search takes,
and, where latency falls again with the rate as that of heuristics does, which of several crossings it finds.
"""


def searches(setting: str, policies: Sequence[str], variant: str | None = None) -> list[dict[str, Any]]:
    """The points of the capacity searches of a setting; they begin where BEGINNINGS has those of a policy, or of a
    variant of it.
    """
    one = SETTINGS[setting]
    beginnings = {name: BEGINNINGS[setting][f"{name}, {variant}" if variant else name] for name in policies}
    return [
        {
            "scheduler": scheduler,
            **one.values,
            "capacity.low": float(low),
            "capacity.high": float(high),
            "capacity.tolerance": one.tolerance,
            "seed": seed,
        }
        for scheduler, (low, high) in beginnings.items()
        for seed in SEEDS
    ]
