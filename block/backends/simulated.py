"""Backend: engine twins on virtual time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from block.backends.settings import check_latency
from block.cluster.fleet import SimulatedFleet
from block.cluster.migration import Migrator
from block.cluster.simulation import Simulation
from block.cluster.spec import Testbed
from block.core.arrays import Floats
from block.core.rng import generator
from block.engine.batch import EngineBatch, EngineSpec
from block.engine.latency import LatencyModel
from block.engine.predictor import Predictor, Predictors
from block.hardware.catalogue import gpu_named
from block.hardware.tracked import latency_model

NOISE_STEPS = 4096  # an instance's noise repeats after so many steps


@dataclass(frozen=True)
class Simulated:
    """Engine twins on virtual time.

    step_time_factor, step_overhead_s: calibration: a step takes its modelled time × factor + overhead.
    step_noise: standard deviation of the factor by which each step's duration differs from that; the predictor does not
        know it. The factors are at least 0.5.
    slowdown: factors on the step times of instances 0, 1, …, as of GPUs that throttle, unknown to the predictor.
    predictor_gpu: what GPUs the predictor takes the instances for; None: what they are.
    dispatch_delay_s: seconds from a request's arrival to its arrival at the instance chosen.
    auto: the backend before the user set anything, if real GPUs are to be taken where there are enough; else None.
    """

    step_time_factor: float = 1.0
    step_overhead_s: float = 0.0
    step_noise: float = 0.05
    slowdown: tuple[float, ...] = ()
    predictor_gpu: str | None = None
    dispatch_delay_s: float = 0.0
    auto: Any = None
    virtual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_latency(self)
        if not 0 <= self.step_noise <= 1:
            raise ValueError(f"backend.step_noise={self.step_noise}: must be between 0 and 1")
        object.__setattr__(self, "slowdown", tuple(self.slowdown))  # Hydra passes a list
        if not all(0 < factor < math.inf for factor in self.slowdown):
            raise ValueError(f"backend.slowdown={list(self.slowdown)}: must be greater than 0")
        if self.predictor_gpu is not None:
            gpu_named(self.predictor_gpu, "backend.predictor_gpu")
        if not 0 <= self.dispatch_delay_s < math.inf:
            raise ValueError(f"backend.dispatch_delay_s={self.dispatch_delay_s}: must be 0 or more seconds")

    def latency(self, testbed: Testbed) -> LatencyModel:
        """The profile of the GPU and model (or their roofline), calibrated."""
        return self._latency(self.predictor_gpu or testbed.gpu, testbed)

    def _latency(self, gpu: str, testbed: Testbed) -> LatencyModel:
        return latency_model(gpu, testbed.model).scaled(self.step_time_factor, self.step_overhead_s)

    def simulate(self, testbed: Testbed) -> SimulatedFleet:
        """A simulation of the testbed, in which nothing has happened yet."""
        specs: list[EngineSpec] = []
        predictors: list[Predictor] = []  # of each instance; those that are alike share one
        for kind in testbed.kinds:
            latency = self._latency(kind.gpu, kind)
            predictors += [Predictor(kind.settings, self.latency(kind))] * kind.instances
            for i in range(len(specs), len(predictors)):
                own = latency.scaled(self.slowdown[i]) if i < len(self.slowdown) else latency
                specs.append(EngineSpec(kind.settings, own, self._noise(testbed.seed, i)))
        simulation = Simulation(EngineBatch(specs), self.dispatch_delay_s)
        predictor = predictors[0] if len(testbed.kinds) == 1 else Predictors(predictors)
        migrator = None
        if testbed.migration.interval_s > 0:
            model, size = testbed.model, testbed.engine.block_size
            block_bytes = model.kv_bytes * model.tensor_parallel * model.layers * size
            migrator = Migrator(testbed.migration, size, block_bytes, simulation)
        return SimulatedFleet(simulation, predictor, migrator)

    def _noise(self, seed: int, instance_id: int) -> Floats | None:
        if self.step_noise == 0:
            return None
        return generator(seed, f"noise/{instance_id}").normal(1.0, self.step_noise, NOISE_STEPS).clip(0.5)
