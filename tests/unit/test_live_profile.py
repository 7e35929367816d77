"""A latency model fitted to timed steps: synthetic ones, whose law is known."""

from __future__ import annotations

import numpy as np
import pytest

from block.backends import live_profile as live
from block.core.arrays import Floats
from block.engine.config import EngineSettings
from block.engine.latency import decode_time, linear_time, prefill_time

LIMITS = EngineSettings(True, 48, 512, 4096, block_size=16, total_blocks=1000, watermark_blocks=0)


def law(tokens: Floats, decodes: Floats, kv: Floats, by_context: Floats, squared: Floats) -> Floats:
    """Seconds: a fixed part, then all tokens, decodes, KV, and the attention of chunks."""
    return 2e-3 + 2e-5 * tokens + 1e-5 * decodes + 4e-8 * kv + 5e-9 * by_context + 4e-9 * squared


def steps(count: int, noise: float, seed: int = 0, outliers: int = 0) -> Floats:
    """Timed steps of all kinds; `noise` is the share by which a duration may be longer."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        decodes = int(rng.integers(0, 49))
        chunk = int(rng.integers(2, 512 - decodes)) if decodes == 0 or rng.random() < 0.4 else 0
        context = int(rng.integers(0, 3000)) if chunk else 0
        kv = int(rng.integers(1, 1000)) * decodes
        features = (decodes + chunk, decodes, kv, int(chunk > 0), chunk * context, chunk * chunk)
        seconds = law(*(np.float64(features[i]) for i in (0, 1, 2, 4, 5)))
        rows.append((*features, seconds * (1 + noise * (rng.random() - 0.5))))
    table = np.array(rows, dtype=np.float64)
    table[:outliers, -1] *= 20
    return table


def test_the_law_is_found() -> None:
    found = live.fit_steps(steps(3000, 0.0), LIMITS, {"method": "test"})
    assert found.error.median < 1e-3
    assert abs(found.total_error) < 1e-3
    assert found.steps == 3000
    assert 400 < found.error.rows < 800
    packed = found.model.pack()
    for decodes, kv, chunk, context in ((1, 10, 0, 0), (48, 20000, 0, 0), (0, 0, 256, 0), (16, 3000, 256, 2048)):
        seconds = linear_time(packed, decodes + chunk) + decode_time(packed, decodes, kv)
        seconds += prefill_time(packed, chunk, context) if chunk else 0.0
        expected = law(*map(np.float64, (decodes + chunk, decodes, kv, chunk * context, chunk * chunk)))
        assert seconds == pytest.approx(expected, rel=0.01)


def test_noise_does_not_pull_the_model_down() -> None:
    found = live.fit_steps(steps(4000, 1.0), LIMITS, {})
    assert abs(found.total_error) < 0.02
    assert 0.1 < found.error.median < 0.4  # the noise itself: uniform within ± 50 %


def test_no_time_is_negative() -> None:
    table = steps(2000, 0.3, seed=3)
    table[:, -1] = 2e-3  # nothing depends on anything
    found = live.fit_steps(table, LIMITS, {})
    packed = found.model.pack()
    assert (packed >= 0).all()
    assert linear_time(packed, 7) + decode_time(packed, 7, 900) == pytest.approx(2e-3, rel=0.01)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(live.TooFewSteps, match="100 timed steps, at least 200"):
        live.fit_steps(steps(100, 0.0), LIMITS, {})


def test_the_source_is_kept_and_the_model_survives_its_file(tmp_path) -> None:
    found = live.fit_steps(steps(600, 0.0), LIMITS, {"method": "test"})
    assert found.model.source["method"] == "test"
    assert found.model.source["steps"] == 600
    found.model.save(tmp_path / "fit.json")
    again = type(found.model).load(tmp_path / "fit.json")
    assert linear_time(again.pack(), 100) == pytest.approx(linear_time(found.model.pack(), 100), rel=1e-4)
