"""backend=auto: real engines where there are GPUs for them, else the simulated testbed."""

from __future__ import annotations

import pytest
from commands import built

from block import config
from block.backends import VLLM
from block.cluster import Simulated


@pytest.mark.parametrize("gpus", [0, 11])
def test_without_enough_gpus_it_is_the_simulated_testbed(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(config, "visible_gpus", lambda: gpus)
    run = built()
    assert isinstance(run.backend, Simulated)
    assert run.engine.version == "v0"


def test_with_enough_gpus_it_is_vllm_and_its_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "visible_gpus", lambda: 12)
    run = built()
    assert isinstance(run.backend, VLLM)
    assert run.backend.step_overhead_s == built("backend=simulated").backend.step_overhead_s > 0
    assert (run.engine.version, run.engine.watermark, run.engine.max_num_seqs) == ("v1", 0.0, 48)
    assert isinstance(built("backend=simulated").backend, Simulated)
    assert isinstance(built("cluster.num_gpus=13").backend, Simulated)
