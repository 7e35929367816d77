"""The latency model: its compiled functions against plain arithmetic, and its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block.engine.latency import (
    LatencyModel,
    decode_run_time,
    decode_time,
    linear_time,
    prefill_time,
    table,
)

CHUNKS = np.array([16.0, 64.0, 256.0])
CONTEXTS = np.array([0.0, 100.0, 400.0, 1000.0])
GRID = np.array([[1.0, 2.0, 4.0, 7.0], [3.0, 5.0, 6.0, 9.0], [10.0, 11.0, 15.0, 30.0]]) * 1e-3


def model(**changes: object) -> LatencyModel:
    fields: dict[str, object] = {
        "linear": table([1, 10, 100], [0.01, 0.02, 0.2]),
        "decode_base": 1e-3,
        "decode_per_sequence": 2e-4,
        "decode_per_kv": 3e-6,
        "prefill_chunks": CHUNKS,
        "prefill_contexts": CONTEXTS,
        "prefill": GRID,
        "source": {"gpu": "test"},
        "decode_waves": np.array([1.0, 1.5, 0.5]),
    }
    return LatencyModel(**{**fields, **changes})  # type: ignore[arg-type]


def test_linear_follows_the_knots_and_goes_on_beyond_them() -> None:
    packed = model().pack()
    for tokens, seconds in ((1, 0.01), (4, 0.01 + 3 * 0.01 / 9), (10, 0.02), (55, 0.11), (100, 0.2), (150, 0.3)):
        assert linear_time(packed, tokens) == pytest.approx(seconds, rel=1e-12)


def test_decode_is_affine_times_the_factor_of_the_batch() -> None:
    packed = model().pack()
    assert decode_time(packed, 0, 0) == 0.0
    assert decode_time(packed, 1, 1000) == pytest.approx(1.5 * (1e-3 + 2e-4 + 3e-3))
    assert decode_time(packed, 2, 1000) == pytest.approx(0.5 * (1e-3 + 4e-4 + 3e-3))
    assert decode_time(packed, 7, 1000) == pytest.approx(0.5 * (1e-3 + 14e-4 + 3e-3))  # beyond the factors: the last


def test_without_factors_decode_is_affine() -> None:
    packed = model(decode_waves=np.ones(1)).pack()
    assert decode_time(packed, 5, 800) == pytest.approx(1e-3 + 5 * 2e-4 + 800 * 3e-6)


@settings(deadline=None)
@given(sequences=st.integers(1, 60), kv=st.integers(0, 50_000), steps=st.integers(0, 300))
def test_a_run_of_decode_steps_is_the_sum_of_its_steps(sequences: int, kv: int, steps: int) -> None:
    packed = model().pack()
    each = [
        linear_time(packed, sequences) + decode_time(packed, sequences, kv + step * sequences) for step in range(steps)
    ]
    assert decode_run_time(packed, sequences, kv, steps) == pytest.approx(sum(each), rel=1e-9, abs=1e-15)


def test_prefill_is_exact_at_knots_and_bilinear_between() -> None:
    packed = model().pack()
    for i, chunk in enumerate(CHUNKS):
        for j, context in enumerate(CONTEXTS):
            assert prefill_time(packed, int(chunk), int(context)) == pytest.approx(GRID[i, j], rel=1e-12)
    for chunk, context in ((40, 250), (64, 50), (200, 999), (17, 0)):
        by_chunk = [np.interp(context, CONTEXTS, row) for row in GRID]
        assert prefill_time(packed, chunk, context) == pytest.approx(
            float(np.interp(chunk, CHUNKS, by_chunk)), rel=1e-12
        )


def test_prefill_time_outside_the_grid_goes_on_by_the_last_slope() -> None:
    packed = model().pack()
    assert prefill_time(packed, 1, 0) == pytest.approx(1e-3)  # below the first chunk: its time
    assert prefill_time(packed, 16, 2200) == pytest.approx(7e-3 + 1200 * 3e-3 / 600)  # the last cell's slope
    assert prefill_time(packed, 448, 0) == pytest.approx(17e-3)


def test_scaled_multiplies_every_time_and_adds_overhead_once_a_step() -> None:
    plain, scaled = model().pack(), model().scaled(2.0, 0.005).pack()
    assert linear_time(scaled, 33) == pytest.approx(2 * linear_time(plain, 33) + 0.005)
    assert decode_time(scaled, 2, 700) == pytest.approx(2 * decode_time(plain, 2, 700))
    assert prefill_time(scaled, 50, 130) == pytest.approx(2 * prefill_time(plain, 50, 130))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(1e-4, 1.0)), min_size=2, max_size=12),
)
def test_save_and_load_keep_every_time(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, float]]
) -> None:
    tokens = 2 + np.cumsum([gap for gap, _ in steps])
    before = model(linear=table(tokens, np.array([seconds for _, seconds in steps])))
    path = tmp_path_factory.mktemp("latency") / "model.json"
    before.save(path)
    after = LatencyModel.load(path)
    assert after.max_tokens == before.max_tokens
    assert after.source == before.source
    np.testing.assert_allclose(after.pack(), before.pack(), rtol=1e-5)


def test_the_file_holds_knots_not_tokens(tmp_path: Path) -> None:
    model(linear=table([1, 5000], [0.01, 1.0])).save(tmp_path / "model.json")
    document = json.loads((tmp_path / "model.json").read_text())
    assert document["linear"] == {"tokens": [1, 5000], "seconds": [0.01, 1]}


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: d.pop("decode"), "no 'decode' in it"),
        (lambda d: d.update(format="other"), "format is 'other'"),
        (lambda d: d["decode"].update(base="much"), "could not convert"),
        (lambda d: d["decode"].update(base=-1.0), "decode_base holds a time that is negative"),
        (lambda d: d["linear"].update(tokens=[5, 1, 7]), "knots of linear"),
        (lambda d: d["linear"].update(seconds=[0.1]), "knots of linear"),
        (lambda d: d["prefill"].update(chunks=[1, 2]), "prefill has shape"),
        (lambda d: d["prefill"].update(chunks=[16, 16, 256]), "prefill_chunks must increase"),
        (lambda d: d["decode"].update(waves=[]), "decode_waves has shape"),
        (lambda d: d.update(source=3), "not iterable"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, damage: object, complaint: str) -> None:
    path = tmp_path / "model.json"
    model().save(path)
    document = json.loads(path.read_text())
    damage(document)  # type: ignore[operator]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=complaint) as caught:
        LatencyModel.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ValueError, match=r"latency model .*model\.json"):
        LatencyModel.load(tmp_path / "model.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        LatencyModel.load(tmp_path / "none.json")
