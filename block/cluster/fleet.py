"""A cluster that runs, and who brings it up: what the rest of the package asks of any backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from block.cluster.instance import ReplayInstance
from block.cluster.live import Health, ServerProcesses
from block.cluster.migration import Migrator
from block.cluster.simulation import Simulation
from block.cluster.spec import Testbed
from block.core.clock import Clock
from block.dispatch.prefixes import Telling
from block.engine.latency import LatencyModel
from block.engine.predictor import Predictor, Predictors


class Fleet(NamedTuple):
    """Servers that run, the predictor that knows their engines, and what these said of themselves.

    Without a predictor, the instances show no snapshots either, and only policies that count can be used.
    servers: starts and stops single ones; None: all are there already. prefixes: what they have in their prefix caches;
    None: that is not known. snapshots: tells how each instance's came, in so many seconds of the run. health: tells of
    servers that are lost, and back; None: that is not known.
    """

    instances: Sequence[ReplayInstance]
    predictor: Predictor | Predictors | None
    engines: Mapping[str, Any]
    servers: ServerProcesses | None = None
    prefixes: Telling | None = None
    snapshots: Callable[[float], Sequence[Mapping[str, Any]]] = lambda seconds: ()
    health: Health | None = None


class SimulatedFleet(NamedTuple):
    """A simulation, the predictor of its engines, and what moves requests between them, if anything does."""

    simulation: Simulation
    predictor: Predictor | Predictors
    migrator: Migrator | None = None


class Backend(Protocol):
    """What runs a testbed: a `RealBackend` on the wall clock, or the simulated one on `virtual` time."""

    virtual: ClassVar[bool]

    @property
    def dispatch_delay_s(self) -> float:
        """Modelled seconds from a request's arrival to its arrival at an instance."""
        ...

    def latency(self, testbed: Testbed) -> LatencyModel:
        """The step times of a testbed's engines, which are alike, as the predictor knows them."""
        ...


class RealBackend(Backend, Protocol):
    """Brings up real servers."""

    @property
    def time_dilation(self) -> float:
        """Wall-clock seconds for a second of the run."""
        ...

    def start(self, testbed: Testbed, clock: Clock, logs: Path) -> AbstractAsyncContextManager[Fleet]:
        """A context in which the servers run; what they say goes to the folder `logs`."""
        ...
