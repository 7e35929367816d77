"""A backend of mock servers, which starts them as those of real ones are started."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from block.backends.launch import ServerSpec, Subprocesses
from block.backends.servers import launched_fleet, launcher_of
from block.backends.settings import latency_from
from block.cluster.fleet import Fleet
from block.cluster.spec import Testbed
from block.core.clock import Clock
from block.core.paths import PACKAGE
from block.engine.latency import LatencyModel

MARK = "BLOCK_TEST_MARK"
"""What this names in the environment of a run, its servers have in theirs."""


@dataclass(frozen=True)
class Mocks:
    launcher: str = "ray"
    placement: str = "spread"
    arguments: tuple[str, ...] = ()
    ready_timeout_s: float = 60.0
    virtual: ClassVar[bool] = False
    dispatch_delay_s: ClassVar[float] = 0.0
    time_dilation: ClassVar[float] = 1.0

    def latency(self, testbed: Testbed) -> LatencyModel:
        return latency_from("artifacts/latency/cpu-tiny.json")

    @asynccontextmanager
    async def start(self, testbed: Testbed, clock: Clock, logs: Path) -> AsyncIterator[Fleet]:
        logs.mkdir(parents=True, exist_ok=True)
        environment = {"PYTHONPATH": f"{PACKAGE.parent}:{Path(__file__).parent}", os.environ[MARK]: "1"}
        specs = [
            ServerSpec(list(self.arguments), logs / f"instance-{i}.log", environment, module="mock_vllm")
            for i in range(testbed.instances)
        ]
        needs = {"CPU": 1, "GPU": testbed.model.tensor_parallel}
        launching = launcher_of(self, Subprocesses(), testbed, needs)
        async with launched_fleet(specs, launching, self.latency(testbed), testbed, clock) as fleet:
            yield fleet
