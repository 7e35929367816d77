"""GPUs, models, the roofline and KV blocks, against numbers published elsewhere."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from block.backends.model_files import emulated_model, tiny_model
from block.cluster.instance import LaunchFailed
from block.engine.latency import LatencyModel, decode_time, linear_time, prefill_time
from block.hardware.catalogue import GPUS, Model, gpu_named
from block.hardware.roofline import roofline
from block.hardware.tracked import TRACKED, kv_blocks, latency_model

CONF = Path(__file__).parents[2] / "conf" / "model"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
NO_FITS = CONF  # a folder without any


def is_tracked(model: LatencyModel) -> bool:
    """Whether it is a fit to a profile, and not a roofline."""
    return not model.source["method"].startswith("roofline")


def model(name: str) -> Model:
    values = dict(OmegaConf.load(CONF / f"{name}.yaml"))
    assert values.pop("defaults") == ["/schema/model@_here_", "_self_"]
    return Model(**values)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_the_name_of_its_file_and_a_step_time_on_some_gpu(name: str) -> None:
    chosen = model(name)
    assert chosen.name == name
    assert kv_blocks(gpu_named("b200"), chosen) > 1000
    times = latency_model("h100", chosen)
    assert 0 < linear_time(times.pack(), 1) < linear_time(times.pack(), 512) < 1.0


# Parameters as the model cards count them, in billions.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama2-7b", 6.738),
        ("llama2-13b", 13.016),
        ("llama2-70b", 68.977),
        ("llama3-8b", 8.030),
        ("llama3-70b", 70.554),
        ("llama3.2-1b", 1.236),
        ("mistral-7b", 7.248),
        ("qwen2-7b", 7.616),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-7b", 7.616),
        ("qwen2.5-14b", 14.770),
        ("qwen2.5-32b", 32.764),
        ("qwen2.5-72b", 72.706),
        ("qwen3-8b", 8.191),
        ("tiny-llama", 1.100),
        ("llama3.1-8b", 8.030),
        ("llama3.1-70b", 70.554),
        ("llama3.1-405b", 405.854),
        ("llama3.3-70b", 70.554),
        ("llama3.2-3b", 3.213),
        ("qwen2.5-3b", 3.086),
        ("qwen3-4b", 4.022),
        ("qwen3-14b", 14.768),
        ("qwen3-32b", 32.762),
        ("mistral-small-24b", 23.572),
        ("mistral-nemo-12b", 12.248),
        ("phi-4", 14.660),
        ("mixtral-8x7b", 46.703),
        ("qwen3-30b-a3b", 30.532),
        ("deepseek-v3", 671.026),
    ],
)
def test_weights_are_the_published_parameters(name: str, billions: float) -> None:
    whole = replace(model(name), tensor_parallel=1)
    assert whole.weight_bytes / whole.dtype_bytes == pytest.approx(billions * 1e9, rel=1e-3)


def test_the_published_parameters_of_a_token_are_those_of_its_experts() -> None:
    # As published, to their last digit: Mixtral 12.9, Qwen 3.3, DeepSeek 36.6, the input embedding left out.
    def active(name: str) -> float:
        return replace(model(name), tensor_parallel=1).active_weights / 1e9

    assert active("mixtral-8x7b") == pytest.approx(12.9, abs=0.05)
    assert active("qwen3-30b-a3b") == pytest.approx(3.3, abs=0.06)
    assert active("deepseek-v3") - 129280 * 7168 / 1e9 == pytest.approx(36.6, abs=0.05)
    assert active("llama3-8b") == pytest.approx(8.030, abs=0.001)


@pytest.mark.parametrize(("name", "kv"), [("deepseek-v3", 70_272), ("llama3-8b", 131_072), ("mixtral-8x7b", 131_072)])
def test_kv_bytes_of_a_token(name: str, kv: int) -> None:
    chosen = model(name)
    assert replace(chosen, tensor_parallel=1).kv_bytes * chosen.layers == kv
    if chosen.kv_lora_rank:  # every GPU has the whole latent
        assert chosen.tensor_parallel == 8
        assert chosen.kv_bytes * chosen.layers == kv


def test_a_step_reads_the_experts_that_its_tokens_hit() -> None:
    mixtral, card = replace(model("mixtral-8x7b"), tensor_parallel=1), GPUS["h200"]
    assert mixtral.experts_hit(np.array([1.0, 2.0, 10_000.0])) == pytest.approx([2.0, 3.5, 8.0])
    packed = roofline(card, mixtral).pack()
    seconds = {tokens: linear_time(packed, tokens) for tokens in (1, 2, 3, 64)}
    second = 32 * 3 * 4096 * 14336 * 2 / (card.bandwidth * 1e9 * 0.8)  # one more expert in each layer
    assert seconds[2] - seconds[1] == pytest.approx(1.5 * second, rel=0.02)
    assert seconds[3] - seconds[2] == pytest.approx(1.125 * second, rel=0.02)
    whole = mixtral.weight_bytes / (card.bandwidth * 1e9)
    assert whole < seconds[64] < 1.6 * whole
    # Many tokens: the time grows by the products of two experts of eight, not of all.
    per_token = (linear_time(packed, 8192) - linear_time(packed, 4096)) / 4096
    active = 2 * (mixtral.active_weights - 2 * mixtral.head_weights) / (card.tflops * 1e12 * 0.8)
    assert active < per_token < 1.2 * active


def test_latent_attention_reads_the_latent_and_computes_on_it() -> None:
    deepseek, h200 = model("deepseek-v3"), GPUS["h200"]
    read = 70_272 / (h200.bandwidth * 1e9 * 0.9)
    assert roofline(h200, deepseek).decode_per_kv == pytest.approx(read)  # 16 heads a GPU: bound by memory
    slow = replace(h200, tflops=1.0)
    flops = 61 * 2 * 16 * (2 * 512 + 64)
    assert roofline(slow, deepseek).decode_per_kv == pytest.approx(flops / (1e12 * 0.8))
    packed = roofline(h200, deepseek).pack()
    assert prefill_time(packed, 64, 8192) > prefill_time(packed, 64, 0) + 61 * 2 * 8192 * 512 * 16 * 256 / 989e12


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("llama3-8b", {"experts": 8}, "model.experts=8: .* also needs experts_per_token, expert_size"),
        ("llama3-8b", {"shared_size": 8}, "model.shared_size=8: .* also needs experts, "),
        ("llama3-8b", {"kv_lora_rank": 512}, "model.kv_lora_rank=512: .* also needs qk_rope_head_dim"),
        ("llama3-8b", {"q_lora_rank": 512}, "model.q_lora_rank=512: .* also needs kv_lora_rank"),
        ("mixtral-8x7b", {"experts_per_token": 9}, "model.experts_per_token=9: more than experts=8"),
        ("mixtral-8x7b", {"expert_size": -1}, "model.expert_size=-1: want an integer of at least 0"),
        ("mixtral-8x7b", {"dense_layers": 32}, "model.dense_layers=32: leaves no layer"),
        ("deepseek-v3", {"head_dim": 128}, "model.head_dim=128: want qk_nope_head_dim"),
        ("llama3-8b", {"kv_dtype_bytes": 3}, "model.kv_dtype_bytes=3: choose from 1, 2, 4"),
    ],
)
def test_experts_and_latent_attention_come_whole(name: str, change: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        replace(model(name), **change)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_fit_is_not_that_of_another_model_of_the_same_name() -> None:
    mine = replace(model("llama2-7b"), layers=16)
    assert not is_tracked(latency_model("a30", mine))
    assert kv_blocks(gpu_named("a30"), mine) == kv_blocks(gpu_named("a30"), mine, tracked=NO_FITS)
    assert is_tracked(latency_model("a30", replace(model("llama2-7b"), hf_id="/models/llama2")))


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("A100", "a100-40gb or a100-80gb"),
        ("a100", "a100-40gb or a100-80gb"),
        ("A100-80GB", "a100-80gb"),
        ("H100", "h100"),
        ("rtx4090", "rtx-4090"),
        ("h10", "h100 or h100-pcie or h100-nvl"),
    ],
)
def test_a_gpu_by_another_spelling_is_told_the_catalogue_s(given: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"^cluster\.gpu={given}: did you mean {hint}\? choose from t4, "):
        gpu_named(given)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3"])
def test_no_model_files_are_made_that_would_be_another_model_s(name: str) -> None:
    with pytest.raises(LaunchFailed, match=rf"model={name}: has .*, of which no model files are made"):
        tiny_model(model(name), 4096)
    if name == "deepseek-v3":
        with pytest.raises(LaunchFailed, match="has latent attention"):
            emulated_model(model(name), 4096)


def test_tensor_parallelism_divides_weights_and_kv() -> None:
    one, four = replace(model("llama2-70b"), tensor_parallel=1), model("llama2-70b")
    assert four.weight_bytes == pytest.approx(one.weight_bytes / 4, rel=1e-3)
    assert four.kv_bytes == one.kv_bytes / 4 == 1024  # 2 (K and V) × 2 heads × 128 × 2 bytes
    assert replace(one, tensor_parallel=16).kv_bytes == 512  # a KV head is the least a GPU holds


@pytest.mark.parametrize(
    ("gpu", "name", "blocks"), [("a30", "llama2-7b", 1052), ("a30", "qwen2-7b", 7289), ("a100-40gb", "llama2-70b", 806)]
)
def test_published_kv_blocks_and_how_near_the_memory_comes(gpu: str, name: str, blocks: int) -> None:
    chosen = model(name)
    assert kv_blocks(gpu_named(gpu), chosen) == blocks
    assert kv_blocks(gpu_named(gpu), chosen, block_size=32) == blocks // 2
    assert kv_blocks(gpu_named(gpu), chosen, tracked=NO_FITS) == pytest.approx(blocks, rel=0.125)


def test_more_memory_gives_more_blocks() -> None:
    a30, llama = gpu_named("a30"), model("llama2-7b")
    # 1.2 GiB more, in blocks of 16 tokens × 32 layers × 2 × 32 heads × 128 × 2 bytes = 8 MiB.
    assert kv_blocks(a30, llama, gpu_memory_utilization=0.95) - 1052 == pytest.approx(0.05 * 24 * 1024 / 8, abs=1)


def test_a_model_that_does_not_fit_is_named_with_the_choices() -> None:
    with pytest.raises(
        ValueError, match=r"model=llama3-70b does not fit on gpu=a30.*tensor_parallel=4.*h200"
    ) as caught:
        kv_blocks(gpu_named("a30"), model("llama3-70b"))
    assert "\n" not in str(caught.value)


def test_an_unknown_gpu_is_named_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"gpu=gone\.yaml: no such file"):
        gpu_named("gone.yaml")
    for call in (lambda: gpu_named("rtx"), lambda: latency_model("rtx", model("tiny-llama"))):
        with pytest.raises(
            ValueError,
            match=r"gpu=rtx: did you mean rtx-4090 or rtx-5090 or rtx-6000-ada\? choose from .*a30.*a100-40gb.*h200",
        ):
            call()


def test_a_data_sheet_of_one_s_own(tmp_path: Path) -> None:
    a30 = GPUS["a30"]
    path = tmp_path / "a30.yaml"
    path.write_text("memory_gib: 24\nbandwidth: 933.0\ntflops: 165\nlink: 100\n")
    gpu = gpu_named(str(path))
    assert replace(gpu, name="a30", source=a30.source) == a30
    times = latency_model(str(path), model("llama2-7b"))
    profiled = is_tracked(times)
    assert not profiled  # the profile of the A30 is that of the A30, not of a file of that name
    assert times.source["gpu"] == str(path)
    assert (times.pack() == roofline(a30, model("llama2-7b")).pack()).all()


@pytest.mark.parametrize(
    ("sheet", "complaint"),
    [
        ("", "must hold memory_gib, bandwidth, tflops, link, and no other key"),
        ("- 24", "must hold memory_gib"),
        ("memory_gib: 24\nbandwidth: 933\ntflops: 165\n", "must hold memory_gib, bandwidth, tflops, link"),
        ("memory_gib: 24\nbandwidth: 933\ntflops: 165\nlink: 1\nspeed: 2\n", "and no other key"),
        ("memory_gib: 24\nbandwidth: 933\ntflops: 0\nlink: 1\n", "tflops=0: must be a number greater than 0"),
        ("memory_gib: 24 GiB\nbandwidth: 933\ntflops: 1\nlink: 1\n", "memory_gib=24 GiB: must be a number"),
        ("memory_gib: .inf\nbandwidth: 933\ntflops: 1\nlink: 1\n", "memory_gib=inf: must be a number"),
    ],
)
def test_a_data_sheet_is_validated(sheet: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(sheet)
    with pytest.raises(ValueError, match=complaint) as caught:
        gpu_named(str(path))
    assert str(caught.value).startswith(f"cluster.gpu={path}: ")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layers": 0}, "model.layers=0"),
        ({"kv_heads": 5}, "model.kv_heads=5: choose a divisor of heads=28"),
        ({"tensor_parallel": 3}, "model.tensor_parallel=3: choose from 1, 2, 4, 28"),
        ({"tensor_parallel": 0}, "model.tensor_parallel=0"),
        ({"dtype_bytes": 3}, "model.dtype_bytes=3: choose from 1, 2, 4"),
    ],
)
def test_a_model_is_validated(change: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(model("qwen2-7b"), **change)  # type: ignore[arg-type]


def test_a_tracked_fit_is_preferred_if_it_has_the_same_parallelism() -> None:
    assert is_tracked(latency_model("a30", model("llama2-7b")))
    assert not is_tracked(latency_model("a30", model("tiny-llama")))
    assert not is_tracked(latency_model("a30", model("llama2-7b"), tracked=NO_FITS))
    assert is_tracked(latency_model("a100-40gb", model("llama2-70b")))
    assert not is_tracked(latency_model("a100-40gb", replace(model("llama2-70b"), tensor_parallel=8)))


def test_a_damaged_tracked_file_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a30-tiny-llama.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a30-tiny-llama\.json"):
        latency_model("a30", model("tiny-llama"), tracked=tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_no_roofline_beats_the_hardware(gpu: str, name: str) -> None:
    card, chosen = GPUS[gpu], model(name)
    packed = roofline(card, chosen).pack()
    unread = 0 if chosen.tied_embeddings else chosen.head_weights
    weights = (chosen.active_weights - unread) * chosen.dtype_bytes
    assert linear_time(packed, 1) > weights / (card.bandwidth * 1e9)
    products = chosen.active_weights - chosen.head_weights * (1 if chosen.tied_embeddings else 2)
    assert linear_time(packed, 4096) > 2 * 4096 * products / (card.tflops * 1e12)
    assert decode_time(packed, 8, 10_000) > chosen.layers * 10_000 * chosen.kv_bytes / (card.bandwidth * 1e9)


@pytest.mark.parametrize(("gpu", "name"), [("a30", "llama2-7b"), ("a30", "qwen2-7b"), ("a100-40gb", "llama2-70b")])
def test_the_roofline_is_near_the_profiles(gpu: str, name: str) -> None:
    chosen = model(name)
    fitted = latency_model(gpu, chosen)
    is_fit = is_tracked(fitted)
    assert is_fit
    measured, guessed = fitted.pack(), roofline(gpu_named(gpu), chosen).pack()
    for tokens in (1, 16, 48, 128, 512, 1024, 2048, 4096):
        assert linear_time(guessed, tokens) == pytest.approx(linear_time(measured, tokens), rel=0.25)
    for chunk in (512, 1024, 2048):
        assert prefill_time(guessed, chunk, 0) == pytest.approx(prefill_time(measured, chunk, 0), rel=0.25)


def test_a_small_step_of_llama2_on_the_a30_reads_its_weights() -> None:
    packed = latency_model("a30", model("llama2-7b")).pack()
    assert 13.2e9 / 933e9 < linear_time(packed, 1) < 1.6 * 13.2e9 / 933e9
    # 16,000 KV tokens of 512 KiB at 90 % of 933 GB/s.
    assert decode_time(packed, 48, 16_000) == pytest.approx(16_000 * 524_288 / (0.9 * 933e9), rel=0.06)


def test_tracked_files_are_small() -> None:
    for path in TRACKED.glob("*.json"):
        assert path.stat().st_size < 20_000, path.name


def test_a_package_without_its_fits_is_told_and_no_roofline_takes_their_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: no such folder: the package's fitted step times are missing"):
        latency_model("a30", model("llama2-7b"), tracked=tmp_path / "none")


def test_a_fit_that_is_replaced_is_read_anew_though_its_time_is_the_same(tmp_path: Path) -> None:
    source = TRACKED / "a30-llama2-7b.json"
    path = tmp_path / source.name
    path.write_text(source.read_text())
    before = latency_model("a30", model("llama2-7b"), tracked=tmp_path)
    time = path.stat()
    path.write_text(source.read_text().replace('"base": ', '"base": 1'))
    os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns))
    after = latency_model("a30", model("llama2-7b"), tracked=tmp_path)
    assert after.decode_base > before.decode_base
