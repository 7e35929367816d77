"""GPUs, models, the roofline and KV blocks, against numbers published elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from block.hardware import GPUS, TRACKED, Model, gpu_named, kv_blocks, latency_model, roofline
from block.latency import decode_time, linear_time, prefill_time

CONF = Path(__file__).parents[2] / "conf" / "model"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
NOWHERE = Path("no-such-folder")


def model(name: str) -> Model:
    values = dict(OmegaConf.load(CONF / f"{name}.yaml"))
    assert values.pop("defaults") == ["/schema/model@_here_", "_self_"]
    return Model(**values)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_the_name_of_its_file_and_a_step_time_on_some_gpu(name: str) -> None:
    chosen = model(name)
    assert chosen.name == name
    assert kv_blocks(gpu_named("b200"), chosen) > 1000
    times, _ = latency_model("h100", chosen)
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
    ],
)
def test_weights_are_the_published_parameters(name: str, billions: float) -> None:
    whole = replace(model(name), tensor_parallel=1)
    assert whole.weight_bytes / 2 == pytest.approx(billions * 1e9, rel=1e-3)


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
    assert kv_blocks(gpu_named(gpu), chosen, tracked=NOWHERE) == pytest.approx(blocks, rel=0.125)


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
        with pytest.raises(ValueError, match=r"gpu=rtx: choose from .*a30.*a100-40gb.*h200"):
            call()


def test_a_data_sheet_of_one_s_own(tmp_path: Path) -> None:
    a30 = GPUS["a30"]
    path = tmp_path / "a30.yaml"
    path.write_text("memory_gib: 24\nbandwidth: 933.0\ntflops: 165\nlink: 100\n")
    gpu = gpu_named(str(path))
    assert replace(gpu, name="a30", source=a30.source) == a30
    times, profiled = latency_model(str(path), model("llama2-7b"))
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
    assert latency_model("a30", model("llama2-7b"))[1]
    assert not latency_model("a30", model("tiny-llama"))[1]
    assert not latency_model("a30", model("llama2-7b"), tracked=NOWHERE)[1]
    assert latency_model("a100-40gb", model("llama2-70b"))[1]
    assert not latency_model("a100-40gb", replace(model("llama2-70b"), tensor_parallel=8))[1]


def test_a_damaged_tracked_file_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a30-tiny-llama.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a30-tiny-llama\.json"):
        latency_model("a30", model("tiny-llama"), tracked=tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_no_roofline_beats_the_hardware(gpu: str, name: str) -> None:
    card, chosen = GPUS[gpu], model(name)
    packed = roofline(card, chosen).pack()
    weights = chosen.weight_bytes - (0 if chosen.tied_embeddings else chosen.head_weights * chosen.dtype_bytes)
    assert linear_time(packed, 1) > weights / (card.bandwidth * 1e9)
    assert linear_time(packed, 4096) > 2 * 4096 * chosen.layers * sum(chosen.projections.values()) / (
        card.tflops * 1e12
    )
    assert decode_time(packed, 8, 10_000) > chosen.layers * 10_000 * chosen.kv_bytes / (card.bandwidth * 1e9)


@pytest.mark.parametrize(("gpu", "name"), [("a30", "llama2-7b"), ("a30", "qwen2-7b"), ("a100-40gb", "llama2-70b")])
def test_the_roofline_is_near_the_profiles(gpu: str, name: str) -> None:
    chosen = model(name)
    fitted, is_fit = latency_model(gpu, chosen)
    assert is_fit
    measured, guessed = fitted.pack(), roofline(gpu_named(gpu), chosen).pack()
    for tokens in (1, 16, 48, 128, 512, 1024, 2048, 4096):
        assert linear_time(guessed, tokens) == pytest.approx(linear_time(measured, tokens), rel=0.25)
    for chunk in (512, 1024, 2048):
        assert prefill_time(guessed, chunk, 0) == pytest.approx(prefill_time(measured, chunk, 0), rel=0.25)


def test_a_small_step_of_llama2_on_the_a30_reads_its_weights() -> None:
    packed = latency_model("a30", model("llama2-7b"))[0].pack()
    assert 13.2e9 / 933e9 < linear_time(packed, 1) < 1.6 * 13.2e9 / 933e9
    # 16,000 KV tokens of 512 KiB at 90 % of 933 GB/s.
    assert decode_time(packed, 48, 16_000) == pytest.approx(16_000 * 524_288 / (0.9 * 933e9), rel=0.06)


def test_tracked_files_are_small() -> None:
    for path in TRACKED.glob("*.json"):
        assert path.stat().st_size < 20_000, path.name
