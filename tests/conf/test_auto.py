"""backend=auto: real engines where there are GPUs for them, else the simulated testbed."""

from __future__ import annotations

import pytest
from commands import built

from block.backends.simulated import Simulated
from block.backends.vllm import VLLM
from block.run import config
from block.run.config_errors import ConfigError


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


@pytest.mark.parametrize(
    "override",
    ["backend.slowdown=[1.5]", "backend.predictor_gpu=t4", "backend.step_noise=0.0", "backend.dispatch_delay_s=0.0"],
)
def test_what_real_engines_cannot_do_is_refused_where_they_would_be_taken(
    override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "visible_gpus", lambda: 12)
    with pytest.raises(ConfigError) as told:
        built(override)
    assert str(told.value) == f"{override}: real GPUs are here, which cannot do it; take backend=simulated"
    assert isinstance(built(override, "backend=simulated").backend, Simulated)
    assert isinstance(built(override, "cluster.num_gpus=13").backend, Simulated)


def test_settings_of_real_engines_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "visible_gpus", lambda: 12)
    assert built("backend.step_time_factor=1.2", "backend.step_overhead_s=0.001").backend == VLLM(
        step_time_factor=1.2, step_overhead_s=0.001
    )
