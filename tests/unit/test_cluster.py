"""The cluster: what a testbed comes to, what is refused, and what the simulated backend brings up."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from testbed import request

from block.backends.simulated import Simulated
from block.cluster import spec as cluster
from block.cluster.spec import ClusterConfig, Mixed, Pool
from block.core.types import RequestRecord
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher
from block.dispatch.policies import Block, RoundRobin
from block.engine.config import EngineConfig
from block.engine.engine import Engine
from block.engine.latency import decode_time, linear_time, prefill_time
from block.hardware.catalogue import Model
from block.hardware.devices import visible_gpus

LLAMA = Model("llama2-7b", "meta-llama/Llama-2-7b-hf", 32, 4096, 11008, 32, 32, 128, 32000)
TWO_GPUS = Model("two", "-", 32, 4096, 11008, 32, 32, 128, 32000, tensor_parallel=2)


def on(model: Model = LLAMA, gpus: int = 4, seed: int = 1, **engine: Any) -> cluster.Testbed:
    settings: dict[str, Any] = {"num_gpu_blocks": 600, "max_model_len": 1024}
    return cluster.Testbed(model, ClusterConfig("a30", gpus), EngineConfig(**settings | engine), seed)


# ---------------------------------------------------------------------------------------------------- the testbed


def test_an_instance_takes_as_many_gpus_as_it_is_parallel() -> None:
    assert on(LLAMA, gpus=12).instances == 12
    assert on(TWO_GPUS, gpus=12).instances == 6
    assert on(TWO_GPUS, gpus=5).instances == 2


def test_too_few_gpus_for_one_instance_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cluster\.num_gpus=1: .*model\.tensor_parallel=2"):
        on(TWO_GPUS, gpus=1)


def test_v1_keeps_a_block_for_itself() -> None:
    assert on(version="v0").total_blocks == 600
    assert on(version="v1").total_blocks == 599


def test_blocks_are_computed_where_none_are_given() -> None:
    # The paper's: 1,056 blocks of an A30 beside Llama-2-7B, in the vLLM of its time.
    assert on(num_gpu_blocks=None).total_blocks == pytest.approx(1056, rel=0.05)


def test_memory_that_holds_no_whole_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.num_gpu_blocks=60: .*engine\.max_model_len=1024"):
        on(num_gpu_blocks=60)


def test_a_cluster_needs_a_gpu_and_a_known_kind() -> None:
    with pytest.raises(ValueError, match=r"cluster\.num_gpus=0: must be at least 1"):
        ClusterConfig("a30", 0)
    with pytest.raises(ValueError, match=r"a30"):  # the message lists the choices
        ClusterConfig("a31", 1)


# ---------------------------------------------------------------------------------------------------- several kinds

POOLS = (Pool("a30", 2), Pool("a30", 4, tensor_parallel=2), Pool("a100-40gb", 1))


def mixed(*pools: Pool, **engine: Any) -> cluster.Testbed:
    settings: dict[str, Any] = {"max_model_len": 1024}
    return cluster.Testbed(LLAMA, Mixed(pools or POOLS), EngineConfig(**settings | engine), 1)


def test_a_mixed_cluster_is_its_pools_one_after_the_other() -> None:
    bed = mixed()
    assert bed.instances == 5
    assert [(kind.gpu, kind.instances, kind.model.tensor_parallel) for kind in bed.kinds] == [
        ("a30", 2, 1),
        ("a30", 2, 2),
        ("a100-40gb", 1, 1),
    ]
    alone = [on(gpus=2, num_gpu_blocks=None), on(TWO_GPUS, num_gpu_blocks=None)]
    assert [kind.total_blocks for kind in bed.kinds[:2]] == [one.total_blocks for one in alone]
    assert bed.kinds[2].total_blocks > 2 * bed.kinds[0].total_blocks


def test_each_instance_has_the_memory_and_the_speed_of_its_kind_and_is_forecast_so() -> None:
    bed = mixed()
    one = request(0, 300, 40)

    simulation, predictor, _ = Simulated(step_noise=0.0).simulate(bed)
    snapshots = simulation.snapshot_many(range(5), 0.0)
    shuffled = [4, 0, 3, 1, 2]
    found = predictor.forecasts([snapshots[i] for i in shuffled], [[]] * 5, one, 0.0)
    forecasts = [found[shuffled.index(i)].e2e for i in range(5)]
    free = [snapshot.free_blocks for snapshot in snapshots]
    finished = []
    for i in range(5):
        Engine(simulation.engines, i).add(one, 0.0)
        finished.append(Engine(simulation.engines, i).advance(1e9)[0].finished)
    assert free == [kind.total_blocks for kind in bed.kinds for _ in range(kind.instances)]
    assert finished == pytest.approx(forecasts, rel=1e-9)
    assert forecasts[0] == forecasts[1] != forecasts[2] == forecasts[3]
    assert forecasts[0] > max(forecasts[2:])


def test_a_pool_of_one_kind_serves_as_a_cluster_of_it() -> None:
    alone = served(Simulated(), on(gpus=3), Block())
    pooled = cluster.Testbed(LLAMA, Mixed((Pool("a30", 1), Pool("a30", 2))), on().engine, 1)
    assert served(Simulated(), pooled, Block()) == alone


@pytest.mark.parametrize(
    ("pools", "said"),
    [
        ((), r"cluster\.pools=\[\]: needs one pool"),
        ((Pool("a31", 1),), "cluster.gpu=a31: did you mean a30"),
        ((Pool("a30", 1), Pool("a30", 1, tensor_parallel=2)), "cluster.num_gpus=1: .*tensor_parallel=2"),
        ((Pool("a30", 3, tensor_parallel=3),), "model.tensor_parallel=3: choose from"),
        ((Pool("a30", 0),), "cluster.num_gpus=0: must be at least 1"),
    ],
)
def test_pools_that_cannot_be_are_refused(pools: tuple[Pool, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cluster.Testbed(LLAMA, Mixed(pools), EngineConfig(max_model_len=1024), 1)


# ---------------------------------------------------------------------------------------------------- the backend


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"step_time_factor": 0.0}, "backend.step_time_factor=0.0"),
        ({"step_time_factor": math.inf}, "backend.step_time_factor=inf"),
        ({"step_noise": -0.1}, "backend.step_noise=-0.1"),
        ({"step_noise": 1.5}, "backend.step_noise=1.5"),
        ({"step_overhead_s": -1.0}, "backend.step_overhead_s=-1.0"),
        ({"dispatch_delay_s": -1.0}, "backend.dispatch_delay_s=-1.0"),
        ({"dispatch_delay_s": math.nan}, "backend.dispatch_delay_s=nan"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(changes: dict[str, float], key: str) -> None:
    with pytest.raises(ValueError, match=r"backend\.") as refused:
        Simulated(**changes)
    assert key in str(refused.value)


def test_calibration_scales_every_time_and_adds_to_every_step() -> None:
    plain = Simulated().latency(on()).pack()
    scaled = Simulated(step_time_factor=2.0, step_overhead_s=0.25).latency(on()).pack()
    assert linear_time(scaled, 100) == pytest.approx(2 * linear_time(plain, 100) + 0.25)
    assert decode_time(scaled, 8, 4000) == pytest.approx(2 * decode_time(plain, 8, 4000))
    assert prefill_time(scaled, 256, 500) == pytest.approx(2 * prefill_time(plain, 256, 500))


def served(backend: Simulated, bed: cluster.Testbed, policy: Any = None, count: int = 24) -> list[RequestRecord]:
    simulation, predictor, _ = backend.simulate(bed)
    blocks = [kind.total_blocks for kind in bed.kinds for _ in range(kind.instances)]
    assert [one.free_blocks for one in simulation.snapshot_many(range(bed.instances), 0.0)] == blocks
    dispatcher = Dispatcher(
        bed.instances,
        policy or RoundRobin(),
        predictor,
        DispatchConfig(),
        random.Random(0),
        snapshot_many=simulation.snapshot_many,
    )
    simulation.run((request(i, 300, 40, 0.02 * i), dispatcher) for i in range(count))
    return list(dispatcher.history.records)


def test_without_noise_the_predictor_knows_its_engines() -> None:
    records = served(Simulated(step_noise=0.0), on(gpus=1), Block(), count=1)
    forecast = records[0].forecast
    assert forecast is not None
    assert records[0].finished == pytest.approx(forecast.e2e, rel=1e-9)


def test_noise_moves_steps_but_not_what_the_predictor_expects() -> None:
    quiet = served(Simulated(step_noise=0.0), on(gpus=1), Block(), count=1)[0]
    noisy = served(Simulated(step_noise=0.05), on(gpus=1), Block(), count=1)[0]
    assert noisy.forecast == quiet.forecast
    assert noisy.finished != quiet.finished
    assert noisy.finished == pytest.approx(quiet.finished, rel=0.1)


def test_noise_has_mean_one_and_the_given_deviation_and_no_two_instances_share_it() -> None:
    backend = Simulated(step_noise=0.1)
    first, second = backend._noise(1, 0), backend._noise(1, 1)
    assert first is not None
    assert second is not None
    assert np.mean(first) == pytest.approx(1.0, abs=0.01)
    assert np.std(first) == pytest.approx(0.1, rel=0.05)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
    wild = Simulated(step_noise=1.0)._noise(1, 0)
    assert wild is not None
    assert wild.min() == 0.5
    assert Simulated(step_noise=0.0)._noise(1, 0) is None


def test_the_seed_decides_the_noise() -> None:
    def finished(seed: int) -> list[float]:
        return [record.finished for record in served(Simulated(), on(seed=seed))]

    assert finished(1) == finished(1)
    assert finished(1) != finished(2)


# ---------------------------------------------------------------------------------------------------- real GPUs


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == 0


@pytest.mark.parametrize(("script", "gpus"), [("printf '0\\n1\\n2\\n'", 3), ("exit 9", 0)])
def test_the_driver_lists_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, gpus: int) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == gpus
