"""Backends of real servers as far as no server is needed: what they are told, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from block.backends import settings as backend_settings
from block.backends import vllm as backends
from block.backends.emulated import Emulated
from block.backends.servers import _unlike
from block.backends.vllm import VLLM
from block.backends.vllm_cpu import VLLMCPU
from block.cluster import spec as cluster
from block.cluster.instance import LaunchFailed
from block.cluster.spec import ClusterConfig
from block.engine.config import EngineConfig, EngineSettings
from block.engine.state import BLOCK_SIZE_LOG2, IS_V1, MAX_NUM_SEQS, SETTINGS, WATERMARK_BLOCKS
from block.hardware.catalogue import Model

LLAMA = Model("llama2-7b", "meta-llama/Llama-2-7b-hf", 32, 4096, 11008, 32, 32, 128, 32000)
TWO = Model("two", "-", 32, 4096, 11008, 32, 32, 128, 32000, tensor_parallel=2)
V1 = EngineConfig(version="v1", watermark=0.0)


def bed(model: Model = LLAMA, num_gpus: int = 4, engine: EngineConfig = V1) -> cluster.Testbed:
    return cluster.Testbed(model, ClusterConfig("a30", num_gpus), engine, 0)


def test_the_engine_s_settings_are_vllm_s_arguments() -> None:
    engine = EngineConfig(version="v1", max_num_seqs=24, max_num_batched_tokens=1024, watermark=0.02)
    arguments = backend_settings.engine_arguments(bed(engine=engine), 1052)
    assert {"--max-num-seqs=24", "--max-num-batched-tokens=1024", "--max-model-len=4096"} <= set(arguments)
    assert {"--num-gpu-blocks-override=1052", "--watermark=0.02", "--no-async-scheduling"} <= set(arguments)
    asynchronous = backend_settings.engine_arguments(
        bed(engine=EngineConfig("v1", watermark=0.0, async_scheduling=True)), None
    )
    assert "--async-scheduling" in asynchronous
    assert "--no-enable-prefix-caching" in arguments
    caching = EngineConfig("v1", watermark=0.0, enable_prefix_caching=True)
    assert "--enable-prefix-caching" in backend_settings.engine_arguments(bed(engine=caching), None)
    assert not [argument for argument in asynchronous if argument.startswith(("--num-gpu", "--watermark"))]


def test_each_instance_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert backends._devices(bed()) == [["4"], ["5"], ["6"], ["7"]]
    assert backends._devices(bed(TWO)) == [["4", "5"], ["6", "7"]]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(backends, "visible_gpus", lambda: 5)
    assert backends._devices(bed(TWO)) == [["0", "1"], ["2", "3"]]


def test_too_few_gpus_are_told_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(backends, "visible_gpus", lambda: 1)
    with pytest.raises(LaunchFailed, match=r"cluster\.num_gpus=4: 1 GPUs are visible; .*backend=emulated"):
        backends._devices(bed())


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_settings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LaunchFailed, match="vllm is not installed: pip install"):
        backend_settings.require(VLLM())
    monkeypatch.setattr(backend_settings.importlib.util, "find_spec", lambda name: name if name == "vllm" else None)
    backend_settings.require(VLLM())
    with pytest.raises(LaunchFailed, match=r"backend.launcher=ray: ray is not installed: pip install -e '\.\[ray\]'"):
        backend_settings.require(VLLM(launcher="ray"))


def test_a_server_reports_what_its_configuration_says() -> None:
    config = EngineConfig(
        version="v1",
        max_num_seqs=24,
        max_num_batched_tokens=1024,
        max_model_len=2048,
        watermark=12.5 / 501,
        async_scheduling=True,
        long_prefill_token_threshold=7,
        scheduler_reserve_full_isl=False,
    )
    settings = config.settings(500)
    assert (settings.watermark_blocks, settings.block_size, settings.total_blocks) == (12, 16, 500)
    array = settings.to_array()
    assert (array[IS_V1], array[MAX_NUM_SEQS], array[WATERMARK_BLOCKS], array[BLOCK_SIZE_LOG2]) == (1, 24, 12, 4)
    assert len(array) == SETTINGS
    assert EngineSettings.of(array[:-1].tolist()) == settings


def test_settings_that_differ_are_named() -> None:
    one = EngineConfig(version="v1").settings(500)
    assert _unlike(one._replace(max_num_seqs=24), one) == "max_num_seqs 24 and 48"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Emulated(time_dilation=0.0), "backend.time_dilation=0.0"),
        (lambda: Emulated(stream_interval=0), "backend.stream_interval=0"),
        (lambda: Emulated(step_overhead_s=-1.0), "backend.step_overhead_s=-1.0"),
        (lambda: Emulated(ready_timeout_s=0.0), "backend.ready_timeout_s=0.0"),
        (lambda: VLLMCPU(at_once=0), "backend.at_once=0"),
        (lambda: VLLM(urls=("localhost:8000",)), "backend.urls=localhost:8000: must begin with http"),
        (lambda: VLLM(step_time_factor=0.0), "backend.step_time_factor=0.0"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_step_times_are_the_gpu_s_or_those_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = Emulated(step_overhead_s=0.001).latency(bed())
    plain = Emulated().latency(bed())
    assert emulated.linear[1] - plain.linear[1] == pytest.approx(0.001)
    emulated.save(tmp_path / "mine.json")
    monkeypatch.chdir(tmp_path)
    for backend in (VLLM(latency_model="mine.json"), VLLMCPU(latency_model="mine.json")):
        assert backend.latency(bed()).linear[1] == pytest.approx(emulated.linear[1], rel=1e-5)
    assert VLLMCPU().latency(bed()).source["method"].startswith("steps of a live engine")
    with pytest.raises(ValueError, match=r"nothing\.json: No such file"):
        VLLM(latency_model="nothing.json").latency(bed())
