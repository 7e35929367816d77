"""Estimators that read prompts: the tracked model, its errors drawn again, its pairs, and Table 1's columns."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from testbed import request

from block.core.files import NotStored
from block.lengths import Constant, Estimates, Lengths, Noisy, Oracle, Reader, tag
from block.lengths import compact as c
from block.lengths.compact import Compact, CompactModel, load
from block.lengths.compact_fit import fit_compact
from block.lengths.errors import BINS, measured, resampled
from block.lengths.estimation import EstimationConfig, baseline, calibration, evaluate, scores, train
from block.lengths.roberta import RoBERTa
from block.workload.prompts import Pairs, is_pairs, pieces
from block.workload.prompts import load as load_pairs
from block.workload.spec import Workload, generate, make

TRACKED = Path(__file__).resolve().parents[2] / "artifacts" / "lengths" / "compact.npz"
ODD = ["", " ", "x" * 100_000, "word " * 20_000, "你好,世界。" * 50, "\x00\xff\x07\ud800" * 9, "🙂" * 300, "?"]


def some_pairs(count: int, first: int = 0) -> Pairs:
    """Prompts whose verb tells the length of the response, and whose number tells nothing."""
    numbers = range(first, first + count)
    prompts = [f"{'Name' if i % 2 else 'Describe at length'} the river {i * 7919 % 1000}" for i in numbers]
    tokens = np.array([10 + i % 3 if i % 2 else 400 + i % 90 for i in numbers], dtype=np.int64)
    return Pairs(prompts, tokens, np.zeros(count, dtype=np.int64))


# ------------------------------------------------------------------------------------------------------------ kinds


def test_learned_estimators_and_constants_read_prompts() -> None:
    readers: list[Lengths] = [Constant(), Compact(), RoBERTa()]
    assert all(isinstance(one, Reader) for one in readers)
    assert not any(isinstance(one, Reader) for one in (Oracle(), Noisy()))


@pytest.mark.parametrize("kind", [Compact, RoBERTa])
def test_a_share_below_nothing_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"lengths.outrun_share=-0.1: must be 0 or more"):
        kind(outrun_share=-0.1)


def test_a_constant_estimates_one_length_for_all() -> None:
    assert Constant(7).estimate(np.array([1, 500]), np.random.default_rng(0)).tolist() == [7, 7]
    assert Constant(7).predict(["a", "b" * 99]).tokens.tolist() == [7, 7]
    with pytest.raises(ValueError, match=r"lengths.tokens=0: must be at least 1"):
        Constant(0)


def test_requests_with_prompts_are_tagged_by_what_is_asked() -> None:
    with_prompts = [
        r.__class__(r.id, r.arrival, r.prompt_tokens, r.output_tokens, 0, None, prompt)
        for r, prompt in zip([request(i, 10, 99) for i in range(2)], some_pairs(2).prompts, strict=True)
    ]
    tagged = tag(with_prompts, Compact(), 0)
    assert [one.predicted_output_tokens for one in tagged] == Compact().predict(some_pairs(2).prompts).tokens.tolist()
    assert [one.predicted_output_tokens for one in tag(with_prompts, Oracle(), 0)] == [99, 99]


# ------------------------------------------------------------------------------------------------- the tracked model


def test_the_tracked_model_is_small_and_says_where_it_is_from() -> None:
    assert TRACKED.stat().st_size <= 2 * 2**20
    origin = load(str(TRACKED)).origin
    assert origin["data"] == "gpteacher"
    assert "ASCII letters" in origin["counted"]
    assert origin["scores"]["error_rate"] < 0.30


ASKED = "Write a Python function that returns the {}th prime number, and explain how it works."


@pytest.mark.parametrize("prompts", [[ASKED.format(i) for i in range(20)], [ASKED * 1200]], ids=["usual", "huge"])
def test_the_compact_model_answers_within_200_us_a_prompt(prompts: list[str]) -> None:
    """On a machine that hashes a thousand words in 200 µs; one that is twice as slow is given twice the time."""

    def hashes() -> set[int]:
        return {zlib.crc32(f"word {i}".encode()) for i in range(1000)}

    def seconds(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    rounds = [(seconds(hashes), seconds(lambda: Compact().predict(prompts))) for _ in range(50)]
    hashing, predicting = (min(times) for times in zip(*rounds, strict=True))  # other work only ever adds
    assert predicting / len(prompts) < hashing


def test_whatever_is_asked_gets_an_estimate_of_its_own() -> None:
    said = Compact().predict(ODD)
    assert said.tokens.dtype == np.int64
    assert (said.tokens >= 1).all()
    assert (said.tokens < 5000).all()
    assert (np.isfinite(said.spread) & (said.spread > 0)).all()
    assert [Compact().predict([prompt]).tokens[0] for prompt in ODD] == said.tokens.tolist()
    assert Compact().predict([]).tokens.shape == (0,)


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04" + bytes(50)])
def test_a_file_that_is_no_model_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"lengths.path={path}: is not a compact model") as told:
        Compact(str(path)).predict(["a"])
    assert "\n" not in str(told.value)


def test_a_model_cut_off_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    whole = TRACKED.read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    model = load(str(TRACKED))
    model._replace(bias=np.array([np.nan, 0.0])).save(tmp_path / "nan.npz")
    model._replace(rarity=model.rarity[:-1]).save(tmp_path / "short.npz")
    for name in ("cut", "nan", "short"):
        with pytest.raises(ValueError, match="is not a compact model"):
            Compact(str(tmp_path / f"{name}.npz")).estimate(np.array([5]), np.random.default_rng(0))


def test_a_file_that_is_not_there_names_the_way_out() -> None:
    with pytest.raises(FileNotFoundError, match=r"lengths.path=gone.npz: no such file; .*train_lengths.py"):
        Compact("gone.npz").predict(["a"])


# ---------------------------------------------------------------------------------------------------------- fitting


def test_fitting_finds_what_prompts_tell_and_saves_it(tmp_path: Path) -> None:
    model = fit_compact(some_pairs(200), some_pairs(60, first=1000), {"data": "rivers"})
    fresh = some_pairs(40, first=5000)
    said = model.predict(fresh.prompts)
    assert np.abs(said.tokens - fresh.tokens).sum() / fresh.tokens.sum() < 0.15
    model.save(tmp_path / "one.npz")
    again = load(str(tmp_path / "one.npz"))
    assert again.origin["data"] == "rivers"
    assert np.abs(np.log(again.predict(fresh.prompts).tokens / said.tokens)).max() < 0.1  # half precision
    assert np.array_equal(fit_compact(some_pairs(200), some_pairs(60, first=1000), {}).weights, model.weights)


def test_features_are_the_words_and_not_their_order_of_hashing() -> None:
    columns, shape = c.features("Sort a list, then sort it again")
    assert columns.tolist() == sorted(set(columns.tolist()))
    assert shape.shape == (c.SHAPE,)
    assert c.features("SORT A LIST, then sort it again")[0].tolist() == columns.tolist()


# ----------------------------------------------------------------------------------------------------------- errors


def test_errors_drawn_again_are_those_of_the_same_rank() -> None:
    truths = np.arange(1, 1601)
    short = truths <= 800
    estimates = np.where(short, truths * 3, np.maximum(truths // 2, 1))
    table = measured(estimates, truths)
    assert table.shape[0] == BINS
    other = np.random.default_rng(1).permutation(np.arange(5000, 9000))  # longer than anything measured
    drawn = resampled(table, other, np.random.default_rng(2))
    factors = drawn / other
    low = other < 7000
    assert factors[low] == pytest.approx(3, abs=0.01)
    assert factors[~low] == pytest.approx(0.5, abs=0.01)


def test_an_exact_estimator_errs_nowhere_and_equal_lengths_share_a_rank() -> None:
    truths = np.random.default_rng(0).integers(1, 2000, 500)
    assert resampled(measured(truths, truths), truths, np.random.default_rng(0)).tolist() == truths.tolist()
    table = np.repeat(np.log(np.arange(1, BINS + 1))[:, None], 4, axis=1)
    drawn = resampled(table, np.full(100, 10), np.random.default_rng(0))
    assert set(drawn.tolist()) == {10 * (BINS // 2 + 1)}
    assert resampled(table, np.array([], dtype=np.int64), np.random.default_rng(0)).tolist() == []
    with pytest.raises(ValueError, match="too few to measure"):
        measured(truths[:5], truths[:5])


def test_the_tracked_model_s_errors_are_what_a_simulated_run_is_tagged_with() -> None:
    requests = generate(Workload(num_requests=4000), 0)
    one, other = tag(requests, Compact(), 0), tag(requests, Compact(), 1)
    truth = np.array([r.output_tokens for r in requests])
    said = np.array([r.predicted_output_tokens for r in one])
    assert 0.2 < np.abs(said - truth).sum() / truth.sum() < 0.35
    assert one == tag(requests, Compact(), 0)
    assert one != other


# ------------------------------------------------------------------------------------------------------------ pairs


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def as_instruction(question: str, answer: str) -> dict[str, Any]:
    return {"instruction": question, "input": "", "response": answer}


def as_chat(question: str, answer: str) -> dict[str, Any]:
    turns = [("system", "be kind"), ("human", question), ("gpt", answer), ("human", "more"), ("gpt", "no")]
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in turns]}


def as_messages(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def as_prompt(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": question, "completion": answer}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("form", [as_instruction, as_chat, as_messages, as_prompt])
def test_pairs_of_every_form_are_read_alike(tmp_path: Path, form: Any, suffix: str) -> None:
    rows = [form(f"question number {i}", "word " * (i + 1)) for i in range(200)]
    split = load_pairs(write(tmp_path / f"data{suffix}", rows))
    found = {p: t for part in split[:3] for p, t in zip(part.prompts, part.tokens.tolist(), strict=True)}
    assert found == {f"question number {i}": i + 1 for i in range(200)}
    assert [round(len(part.prompts) / 200, 1) for part in split[:3]] == [0.7, 0.1, 0.2]


def test_the_split_is_fixed_and_no_prompt_is_on_both_sides(tmp_path: Path) -> None:
    rows = [as_prompt(f"Question {i % 150}{'?' * (i % 4)}", f"answer {'so ' * i}") for i in range(600)]
    straight = load_pairs(write(tmp_path / "a.json", rows))
    keys = [prompt.rstrip("?").lower() for part in straight[:3] for prompt in part.prompts]
    assert len(keys) == len(set(keys)) == 150
    backwards = load_pairs(write(tmp_path / "b.json", rows[::-1]))
    sides = [[{p.rstrip("?") for p in part.prompts} for part in split[:3]] for split in (straight, backwards)]
    assert sides[0] == sides[1]
    fewer = load_pairs(str(tmp_path / "a.json"), train=40, test=10)
    assert [len(part.prompts) for part in fewer[:3]] == [35, 5, 10]
    assert set(fewer.test.prompts) <= set(straight.test.prompts)


def test_tokens_are_counted_by_letters_lines_and_signs() -> None:
    assert pieces("int main() {\n  return 0;\n}") == len(
        ["int", "main", "(", ")", "{", "\n", "return", "0", ";", "\n", "}"]
    )
    assert pieces("responsibility") == 2
    assert pieces("你好 é") == 3
    assert pieces(" ") == 0


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.json", "{", "is no JSON"),
        ("a.json", "{}", "must hold a list"),
        ("a.jsonl", '{"a": 1}', "no record has a prompt"),
        ("a.json", '[{"prompt": "!!", "response": "x"}]', "holds no pair"),
        ("a.parquet", "nothing", "is no JSON"),
    ],
)
def test_a_file_without_pairs_is_told_in_one_line(tmp_path: Path, name: str, content: str, why: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=why) as told:
        load_pairs(str(tmp_path / name))
    assert "\n" not in str(told.value)


def test_conversations_of_lmsys_and_wildchat_are_read_by_lines(tmp_path: Path) -> None:
    records = [
        {"conversation": [{"role": "user", "content": f"question\u2028{i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(40)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    split = load_pairs(str(path))
    assert sum(map(len, (split.train.prompts, split.tune.prompts, split.test.prompts))) == 40


def test_data_that_are_not_there_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLOCK_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"fetch_data.py sharegpt_text"):
        load_pairs("sharegpt_text")
    with pytest.raises(FileNotFoundError, match=r"estimation.data=gone.json: no such file; choose from gpteacher"):
        load_pairs("gone.json")
    assert is_pairs("gpteacher")
    assert not is_pairs("mine.csv")


def test_a_workload_of_pairs_has_prompts_and_their_lengths(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [as_prompt(f"question number {i}", "word " * (i + 1)) for i in range(100)])
    held_out = load_pairs(path).test
    requests = generate(Workload(source="trace", trace_path=path, num_requests=50), 0)
    count = len(held_out.prompts)
    assert [r.prompt for r in requests] == (held_out.prompts * 9)[:50]
    assert [r.output_tokens for r in requests[:count]] == held_out.tokens.tolist()
    assert [r.prompt_tokens for r in requests[:count]] == [pieces(prompt) for prompt in held_out.prompts]
    with pytest.raises(ValueError, match=r"no times; take workload.arrivals=poisson"):
        generate(Workload(source="trace", trace_path=path, arrivals="trace"), 0)
    with pytest.raises(ValueError, match=r"workload.arrivals=trace: .* has no arrival times"):
        Workload(source="trace", trace_path="gpteacher", arrivals="trace")


def test_what_is_left_out_of_pairs_is_counted(tmp_path: Path) -> None:
    rows = [as_prompt(f"question number {i}", "word") for i in range(100)]
    path = write(tmp_path / "mine.jsonl", [*rows, *rows[:7], {"prompt": "no response"}, as_prompt("empty", " ")])
    _, facts = make(Workload(source="trace", trace_path=path, num_requests=None), 0)
    assert facts.rows == 109
    assert facts.dropped == {
        "no prompt and response, or the prompt of another": 9,
        "not of the held-out side": 100 - facts.requests,
    }


def test_pairs_of_which_none_is_held_out_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "few.jsonl", [as_prompt("the only question", "an answer")])
    with pytest.raises(ValueError, match=r"few.jsonl: none of its 1 pairs is held out; give more"):
        generate(Workload(source="trace", trace_path=path), 0)


# ---------------------------------------------------------------------------------------------------------- Table 1


def test_scores_are_those_of_pencil_and_paper() -> None:
    said = Estimates(np.array([100, 150, 200, 1]), np.array([0.1, 0.1, 0.1, 0.1]))
    found = scores(said, np.array([105, 100, 310, 1]))
    assert found.average_error == pytest.approx((5 + 50 + 110 + 0) / 4)
    assert found.error_rate == pytest.approx(165 / 516)
    assert (found.acc_10, found.acc_50, found.acc_100) == (0.5, 0.75, 0.75)
    assert found.bias == pytest.approx(451 / 516 - 1)
    assert found.covered == 0.5


def test_a_calibrated_estimator_covers_what_it_claims() -> None:
    rng = np.random.default_rng(0)
    middles = rng.integers(1000, 2000, 20_000)
    truths = np.rint(middles * np.exp(rng.normal(0, 0.3, len(middles)))).astype(np.int64)
    found = calibration(Estimates(middles, np.full(len(middles), 0.3)), truths)
    for row in found["coverage"]:
        assert row["held"] == pytest.approx(row["stated"], abs=0.02)
    assert len(found["by_estimate"]) == 10
    for row in found["by_estimate"]:
        assert row["true_p50"] == pytest.approx(row["estimate"], rel=0.05)
        assert row["true_mean"] == pytest.approx(row["estimate"] * math.exp(0.3**2 / 2), rel=0.05)
        assert row["true_p10"] == pytest.approx(row["stated_p10"], rel=0.1)
        assert row["true_p90"] == pytest.approx(row["stated_p90"], rel=0.1)
    sure = calibration(Estimates(middles, np.full(len(middles), 0.1)), truths)
    assert all(row["held"] < row["stated"] - 0.05 for row in sure["coverage"])


def test_baselines_are_fitted_to_the_training_side() -> None:
    pairs = Pairs(["a" * n for n in (10, 100, 1000)] * 4, np.array([20, 200, 2000] * 4), np.zeros(12, dtype=np.int64))
    assert set(baseline("mean", pairs, ["x"] * 3).tokens.tolist()) == {740}
    assert set(baseline("median", pairs, ["x"] * 3).tokens.tolist()) == {200}
    assert baseline("prompt_length", pairs, ["a" * 10, "a" * 1000]).tokens.tolist() == [20, 2000]


def test_a_model_that_the_disk_does_not_take_is_elsewhere_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [as_prompt(p, "word " * t) for p, t in zip(*some_pairs(600)[:2], strict=True)]
    config = EstimationConfig(data=write(tmp_path / "rivers.jsonl", rows), force=True)
    path = tmp_path / "models" / "one.npz"
    path.parent.mkdir()
    path.write_text("the one before")
    with pytest.raises(ValueError, match=r"one.npz: is there already; give another, or --force"):
        train(Compact(str(path)), replace(config, force=False), seed=0)
    assert path.read_text() == "the one before"
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    save = CompactModel.save

    def limited(model: CompactModel, path: Path) -> None:
        save(model, path)
        if "models" in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CompactModel, "save", limited)
    with pytest.raises(NotStored) as told:
        train(Compact(str(path)), config, seed=0)
    place = tmp_path / "temporary" / "block-one.npz"
    assert str(told.value) == f"lengths.path={path}: No space left on device; it is in {place} instead"
    assert told.value.result.error_rate < 0.15
    assert len(Compact(str(place)).predict(["a prompt"]).tokens) == 1
    assert [one.read_text() for one in path.parent.iterdir()] == ["the one before"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists"):
        train(Compact(str(tmp_path / "file" / "one.npz")), config, seed=0)


def test_the_command_s_parts_train_and_evaluate(tmp_path: Path) -> None:
    rows = [as_prompt(p, "word " * t) for p, t in zip(*some_pairs(600)[:2], strict=True)]
    data = write(tmp_path / "rivers.jsonl", rows)
    config = EstimationConfig(data=data, data_sets=(data, "gone.json"), estimators=("median", "compact"))
    found = train(Compact(str(tmp_path / "one.npz")), config, seed=0)
    assert found.error_rate < 0.15
    rows_of_table = evaluate(config)
    assert [(row["estimator"], "missing" in row) for row in rows_of_table] == [
        ("median", False),
        ("compact", True),  # there is none named after these data
        ("median", True),
        ("compact", True),
    ]
    assert rows_of_table[0]["error_rate"] > 0.3
    with pytest.raises(ValueError, match="lengths=oracle: is not trained; choose from compact, roberta"):
        train(Oracle(), config, seed=0)


@pytest.mark.skipif("BLOCK_DATA" not in os.environ, reason="BLOCK_DATA is not set")
def test_the_tracked_model_beats_what_needs_no_learning_by_a_quarter() -> None:
    rows = evaluate(EstimationConfig())
    rates = {row["estimator"]: row["error_rate"] for row in rows if row["data"] == "gpteacher"}
    assert rates["compact"] < 0.75 * min(rates[name] for name in ("mean", "median", "prompt_length"))
    assert rates["compact"] == pytest.approx(load(str(TRACKED)).origin["scores"]["error_rate"], abs=0.001)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"epochs": 0}, "estimation.epochs=0"),
        ({"learning_rate": -1.0}, "estimation.learning_rate=-1.0"),
        ({"estimators": ("gbm",)}, "estimation.estimators=gbm: choose from mean"),
    ],
)
def test_a_wrong_key_is_refused_by_name(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        EstimationConfig(**changes)
