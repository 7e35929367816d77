"""A forecast: its time on the states that a Block run meets, against stepping through the same forecast."""

from __future__ import annotations

import time

import numpy as np
from testbed import compose_run, simulate, warm_up

from block.core.snapshot import Snapshot
from block.core.types import Forecast, Forecasts, Request
from block.engine.predictor import Predictor

Asked = tuple[list[Snapshot], list[list[Request]], Request, float]


def states(qps: float, every: int = 50) -> list[Asked]:
    """Every `every`-th question that a run at `qps` asks of its predictor."""
    asked: list[Asked] = []
    original = Predictor.forecasts
    count = 0

    def spy(
        self: Predictor, snapshots: list[Snapshot], in_transit: list[list[Request]], request: Request, now: float
    ) -> Forecasts:
        nonlocal count
        count += 1
        if count % every == 0:
            kept = [snapshot._replace(seqs=snapshot.seqs.copy()) for snapshot in snapshots]
            asked.append((kept, [list(requests) for requests in in_transit], request, now))
        return original(self, snapshots, in_transit, request, now)

    Predictor.forecasts = spy  # type: ignore[method-assign, assignment]
    try:
        simulate(f"workload.qps={qps}")
    finally:
        Predictor.forecasts = original  # type: ignore[method-assign]
    return asked


def measure(predictor: Predictor, asked: list[Asked]) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds a forecast, and the forecasts themselves."""
    micros: list[float] = []
    results: list[Forecast] = []
    for question in asked:
        predictor.forecasts(*question)
        began = time.perf_counter()
        forecasts = predictor.forecasts(*question)
        micros.append((time.perf_counter() - began) * 1e6 / len(forecasts))
        results.extend(forecasts)
    return np.array(micros), np.array(results)


warm_up()
run = compose_run()
parts = (run.testbed.settings, run.backend.latency(run.testbed))
compressed, naive = Predictor(*parts), Predictor(*parts, compressed=False)
print("µs a forecast, in batches of 12      P50     P99   naive P50   ratio   largest difference")
for qps in (24, 30, 34):
    asked = states(qps)
    fast, fast_results = measure(compressed, asked)
    slow, slow_results = measure(naive, asked)
    difference = np.abs(fast_results / slow_results - 1).max()
    print(
        f"  states met at {qps} requests/s     {np.median(fast):6.1f}  {np.percentile(fast, 99):6.1f}   "
        f"{np.median(slow):9.1f}   {np.median(slow) / np.median(fast):5.1f}   {difference:.0e}"
    )
