"""The emulated GPU and the model folders, without a server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from testbed import round_latency

from block.engine.latency import decode_time, linear_time, prefill_time
from block.hardware.catalogue import Model

pytest.importorskip("tokenizers")

TINY = Model("tiny", "none", 2, 64, 128, 4, 2, 32, 2048, tied_embeddings=True, dtype_bytes=4)


def scheduled(
    tokens: dict[str, int],
    new: dict[str, int] | None = None,
    cached: Any = (),
    finished: Any = (),
    extra: dict[str, Any] | None = None,
) -> Any:
    """A SchedulerOutput: tokens by request; prompts of new requests; (id, computed, answered) of the others.

    extra: the `vllm_xargs` of the new requests.
    """
    cached = list(cached)
    return SimpleNamespace(
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=id_,
                prompt_token_ids=[7] * prompt,
                num_computed_tokens=0,
                sampling_params=SimpleNamespace(extra_args=extra),
            )
            for id_, prompt in (new or {}).items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[id_ for id_, _, _ in cached],
            num_computed_tokens=[computed for _, computed, _ in cached],
            num_output_tokens=[answered for _, _, answered in cached],
        ),
        finished_req_ids=set(finished),
    )


@pytest.fixture
def executor(vllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from block.vllm_plugin import executor as module

    round_latency().save(tmp_path / "latency.json")
    monkeypatch.setenv(module.LATENCY, str(tmp_path / "latency.json"))
    monkeypatch.setenv(module.DILATION, "2")
    made = object.__new__(module.EmulatedExecutor)
    made._init_executor()
    return made


def sampled(executor: Any, output: Any) -> dict[str, list[int]]:
    assert executor.execute_model(output) is None
    done = executor.sample_tokens(None)
    assert done.req_id_to_index == {id_: i for i, id_ in enumerate(done.req_ids)}
    return dict(zip(done.req_ids, done.sampled_token_ids, strict=True))


@pytest.mark.parametrize(
    ("extra", "first", "second", "third"),
    [(None, 68, 68, 68), ({"block_response": [700, 800, 900]}, 700, 800, 900), ({"block_response": [7]}, 7, 68, 68)],
)
def test_a_prompt_is_answered_when_its_last_chunk_is_done(
    executor: Any, extra: Any, first: int, second: int, third: int
) -> None:
    output = scheduled({"a": 6, "b": 4}, new={"a": 10, "b": 4}, extra=extra)
    assert sampled(executor, output) == {"a": [], "b": [first]}
    output = scheduled({"a": 4, "b": 1}, cached=[("a", 6, 0), ("b", 4, 1)])
    assert sampled(executor, output) == {"a": [first], "b": [second]}
    # b was preempted: prompt and answer are computed again, in two chunks
    assert sampled(executor, scheduled({"b": 3}, cached=[("b", 0, 2)])) == {"b": []}
    assert sampled(executor, scheduled({"b": 3}, cached=[("b", 3, 2)], finished=["a"])) == {"b": [third]}
    assert set(executor._prompts) == {"b"}
    assert set(executor._responses) <= {"b"}


def test_steps_take_the_model_s_time_dilated_one_after_the_other(executor: Any) -> None:
    packed = round_latency().pack()
    seconds = linear_time(packed, 12) + decode_time(packed, 1, 6) + prefill_time(packed, 11, 20)
    from block.vllm_plugin.executor import step_seconds

    assert step_seconds(packed, [(1, 5), (11, 20)]) == pytest.approx(seconds)
    began = time.monotonic()
    steps = []
    for _ in range(2):  # two in flight, as with asynchronous scheduling
        executor.execute_model(scheduled({"a": 4}, new={"a": 4}), non_block=True)
        steps.append(executor.sample_tokens(None, non_block=True))
    one = 2 * step_seconds(packed, [(4, 0)])
    assert not steps[1].done()
    for step in steps:
        step.result()
    assert 2 * one <= time.monotonic() - began < 2 * one + 1.0  # a busy machine wakes late
    assert steps[1].done()


def test_a_step_after_idleness_begins_at_once(executor: Any) -> None:
    executor.execute_model(scheduled({"a": 4}, new={"a": 4}))
    executor.sample_tokens(None)
    empty = executor.execute_model(scheduled({}), non_block=True).result()
    assert empty.req_ids == []
    time.sleep(0.05)
    began = time.monotonic()
    executor.execute_model(scheduled({"b": 4}, new={"b": 4}))
    assert executor._scheduled[0]._ends > began


def test_what_vllm_asks_of_workers_is_answered(executor: Any) -> None:
    executor.cache_config = SimpleNamespace(block_size=16)
    ((spec,),) = [specs.values() for specs in executor.get_kv_cache_specs()]
    assert spec.block_size == 16
    assert executor.determine_available_memory()[0] > 1 << 30
    assert executor.supported_tasks == ("generate",)
    assert executor.supports_async_scheduling()
    assert executor.collective_rpc("anything") == []
    executor.check_health()


def test_the_tiny_model_is_made_once_and_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    from block.backends import model_files

    monkeypatch.setenv("BLOCK_CACHE", str(tmp_path))
    folder = model_files.tiny_model(TINY, 512)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert model_files.tiny_model(TINY, 512) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert model_files.tiny_model(TINY, 1024) != folder
    assert not list((tmp_path / "models").glob(".making-*"))
    weights = load_file(folder / "model.safetensors")
    assert weights["model.layers.1.mlp.down_proj.weight"].shape == (64, 128)
    assert all(np.isfinite(tensor).all() for tensor in weights.values())
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 512
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "which of my N model servers should take this request?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) < len(text)
    assert len(tokenizer) <= 2048
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert said == "user: hello\nassistant:"


def test_an_emulated_model_has_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from block.backends import model_files

    monkeypatch.setenv("BLOCK_CACHE", str(tmp_path))
    folder = model_files.emulated_model(TINY, 512)
    assert not (folder / "model.safetensors").exists()
    assert (folder / "tokenizer.json").exists()
