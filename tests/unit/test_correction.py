"""Online correction: what is observed, what is made of it, and what it does to forecasts and runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from test_replay import run, served
from testbed import (
    DECODE,
    FIXED,
    PER_KV,
    PER_SEQUENCE,
    PER_TOKEN,
    engine_config,
    lone_engine,
    predictor_for,
    request,
    round_latency,
)

from block.backends.simulated import Simulated
from block.cluster.spec import ClusterConfig
from block.core.snapshot import Snapshot
from block.core.types import Forecast, Request
from block.dispatch import policies
from block.dispatch.config import DispatchConfig
from block.dispatch.correction import CorrectedForecaster, expected_time
from block.engine.engine import Engine
from block.workload.spec import Workload

CONFIG = engine_config("v1", max_num_seqs=8, max_num_batched_tokens=64, max_model_len=400)
PACKED = round_latency().pack()
ASKED = request(99, 10, 10)


class Fixed:
    """Forecasts 1 s and 10 s for whatever is asked, and keeps the snapshots that it was shown."""

    def forecasts(
        self, snapshots: Sequence[Snapshot], in_transit: Sequence[Sequence[Request]], request: Request, now: float
    ) -> list[Forecast]:
        self.shown = list(snapshots)
        return [Forecast(1.0, 10.0) for _ in snapshots]


def seen(engine: Engine, now: float, instance_id: int = 0) -> Snapshot:
    """What the engine shows at `now`, to keep."""
    engine.advance(now)
    snapshot = engine.snapshot(instance_id, now)
    return snapshot._replace(seqs=snapshot.seqs.copy())


def between(before: Snapshot, after: Snapshot) -> float:
    return expected_time(before.seqs[:, : before.running], after.seqs[:, : after.running], PACKED)


def decode_step(sequences: int, kv: int) -> float:
    return FIXED + PER_TOKEN * sequences + DECODE + PER_SEQUENCE * sequences + PER_KV * kv


def test_one_step_and_a_run_of_decodes_are_known_and_nothing_else() -> None:
    engine = lone_engine(CONFIG, round_latency(), 1000)
    engine.add(request(0, 20, 50), 0.0)
    prompt = seen(engine, 0.0)
    ends = engine.step_ends
    first = seen(engine, ends)
    assert between(prompt, first) == pytest.approx(ends), "the prompt's step, whatever it is made of"
    assert between(prompt, prompt) == 0.0
    ends += decode_step(1, 21) + decode_step(1, 22) + decode_step(1, 23)
    fourth = seen(engine, ends + 1e-9)
    assert between(first, fourth) == pytest.approx(decode_step(1, 21) + decode_step(1, 22) + decode_step(1, 23))
    assert between(prompt, fourth) == 0.0, "several steps, of which one was a prompt's"
    engine.add(request(1, 20, 50), ends + 1e-9)
    both = seen(engine, engine.step_ends)
    assert between(fourth, both) == pytest.approx(decode_step(1, 24)), "one step, after which another sequence joined"
    later = seen(engine, ends + 1.0)
    assert between(fourth, later) == 0.0, "another sequence joined meanwhile"
    assert between(later, seen(lone_engine(CONFIG, round_latency(), 1000), 0.0)) == 0.0, "nothing in common"


def test_expected_and_actual_agree_in_any_engine_without_noise() -> None:
    """Whatever can be told of the time between two looks at a busy engine is what passed between them."""
    rng = np.random.default_rng(1)
    for config in (engine_config("v0", max_model_len=100), engine_config("v1", async_scheduling=True)):
        engine = lone_engine(config, round_latency(), 30)
        now, told, last = 0.0, 0, seen(lone_engine(config, round_latency(), 30), 0.0)
        for i in range(400):
            now += rng.exponential(0.03)
            engine.advance(now)
            if i % 4 == 0:
                engine.add(request(i, int(rng.integers(1, 30)), int(rng.integers(1, 20))), now)
            snapshot = seen(engine, now)
            if not math.isnan(last.step_started) and snapshot.step_started > last.step_started:
                expected = expected_time(
                    last.seqs[:, : last.running + last.stale],
                    snapshot.seqs[:, : snapshot.running + snapshot.stale],
                    PACKED,
                )
                if expected > 0:
                    assert expected == pytest.approx(snapshot.step_started - last.step_started, rel=1e-6)
                    told += 1
            last = snapshot
        assert told > 50


def slow_and_exact(steps: int) -> tuple[CorrectedForecaster, Fixed]:
    """Asked of instance 0, 1.5 times as slow as its model, 1, which is as it says, and 2, which is never used."""
    inner = Fixed()
    corrected = CorrectedForecaster(inner, round_latency(), steps)
    engines = [lone_engine(CONFIG, round_latency().scaled(factor), 1000) for factor in (1.5, 1.0)]
    for engine in engines:
        engine.add(request(0, 20, 200), 0.0)
    idle = lone_engine(CONFIG, round_latency(), 1000)
    for tick in range(300):
        shown = [seen(engine, 0.01 * tick, i) for i, engine in enumerate([*engines, idle])]
        corrected.forecasts(shown, [[]] * 3, ASKED, 0.01 * tick)
    return corrected, inner


def test_a_slow_instance_is_found_out() -> None:
    corrected, inner = slow_and_exact(50)
    assert corrected.factor(0) == pytest.approx(1.5)
    assert corrected.factor(1) == pytest.approx(1.0)
    assert 1.0 < corrected.factor(2) < 1.5, "what is never used is taken to be like the others"
    assert corrected.factor(7) == corrected.factor(2)
    slow, exact = inner.shown[0], inner.shown[1]
    now = slow.taken_at
    found = corrected.forecasts([slow, exact], [[], []], ASKED, now)
    assert found[0] == pytest.approx((1.5, 15.0))
    assert found[1] == pytest.approx((1.0, 10.0))


def test_stretched_forecasts_are_those_of_the_model_that_is_right() -> None:
    slow = round_latency().scaled(1.5)
    engine = lone_engine(CONFIG, slow, 1000)
    corrected = CorrectedForecaster(predictor_for(CONFIG, round_latency(), 1000), round_latency(), 50)
    knowing = predictor_for(CONFIG, slow, 1000)
    for i in range(5):
        engine.add(request(i, 20 + i, 60 + i), 0.0)
    for tick in range(1, 200):
        now = 0.011 * tick
        snapshot = seen(engine, now)
        mine = corrected.forecasts([snapshot], [[]], ASKED, now)
        if tick > 100:
            assert mine[0] == pytest.approx(knowing.forecasts([snapshot], [[]], ASKED, now)[0])


def test_a_factor_follows_an_instance_that_changes() -> None:
    corrected = CorrectedForecaster(Fixed(), round_latency(), 20)
    now = 0.0
    for factor in (1.0, 2.0, 1.0):
        engine = lone_engine(CONFIG, round_latency().scaled(factor), 1000)
        began = now
        engine.add(request(0, 20, 300), 0.0)
        for _ in range(200):
            now += 0.02
            snapshot = seen(engine, now - began)
            started = snapshot.step_started + began
            corrected.forecasts([snapshot._replace(step_started=started)], [[]], ASKED, now)
        assert corrected.factor(0) == pytest.approx(factor, rel=0.02)


def test_in_a_run_forecasts_are_as_good_as_with_the_right_model() -> None:
    parts = {
        "policy": policies.Block(),
        "cluster": ClusterConfig("a30", 3),
        "workload": Workload("synthetic", 300, 6.0, source="synthetic", prompt_mean=200.0, output_mean=150.0),
    }

    def error(**backend: object) -> float:
        correcting = DispatchConfig(correction_steps=50)
        dispatch = correcting if backend.pop("corrected", False) else DispatchConfig()
        outcome = served(run(**parts, dispatch=dispatch, backend=Simulated(**backend)))  # type: ignore[arg-type]
        assert outcome.history is not None
        records = list(outcome.history.records)[50:]
        return float(
            np.mean([abs(r.forecast.e2e / (r.finished - r.request.arrival) - 1) for r in records if r.forecast])
        )

    right, wrong = error(), error(predictor_gpu="h100")
    corrected = error(predictor_gpu="h100", corrected=True)
    assert wrong > 0.5
    assert corrected < right + 0.1 * (wrong - right)


def test_wrong_values_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"dispatch\.correction_steps=-1"):
        DispatchConfig(correction_steps=-1)
    with pytest.raises(ValueError, match=r"backend\.slowdown=\[1\.0, 0\.0\]"):
        Simulated(slowdown=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"backend\.predictor_gpu=z80"):
        Simulated(predictor_gpu="z80")


def test_a_slow_instance_is_slow() -> None:
    outcome = served(replace(run(), backend=Simulated(slowdown=(1.0, 2.0), step_noise=0.0)))
    assert outcome.history is not None
    tpot: dict[int, list[float]] = {0: [], 1: []}
    for record in outcome.history.records:
        tpot[record.instance_id].append((record.finished - record.first_token) / (record.output_tokens - 1))
    assert min(tpot[1]) > 1.5 * np.median(tpot[0])
