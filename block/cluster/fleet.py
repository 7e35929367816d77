"""A cluster that runs, and who brings it up: what the rest of the package asks of any backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from block.cluster.migration import Migrator
from block.cluster.spec import Testbed
from block.dispatch.instance import Instance, Look
from block.engine.latency import LatencyModel
from block.engine.predictor import Predictor, Predictors


class Servers(Protocol):
    """The processes behind a fleet's instances."""

    async def start(self, instance_id: int) -> None:
        """Start the server of an instance that has none. LaunchFailed if it does not come up."""
        ...

    async def stop(self, instance_id: int) -> None:
        """Stop it, for certain."""
        ...


class Fleet(NamedTuple):
    """A running cluster, the predictor that knows its engines, and what real engines said of themselves.

    Without a predictor, the instances show no snapshots either, and only policies that count can be used.
    migrator: moves requests between the instances, if any does. servers: starts and stops those of single instances;
    None: all are there already. look: snapshots of many of them, faster than one by one.
    """

    instances: Sequence[Instance]
    predictor: Predictor | Predictors | None
    engines: Mapping[str, Any]
    migrator: Migrator | None = None
    servers: Servers | None = None
    look: Look | None = None


class Backend(Protocol):
    """Brings up a testbed. `virtual` says on which clock it lives, `dispatch_delay_s` what delay is to be modelled."""

    virtual: ClassVar[bool]

    @property
    def time_dilation(self) -> float:
        """Wall-clock seconds for a second of the run; 1 on virtual time."""
        ...

    @property
    def dispatch_delay_s(self) -> float:
        """Modelled seconds from a request's arrival to its arrival at an instance."""
        ...

    def latency(self, testbed: Testbed) -> LatencyModel:
        """The step times of a testbed's engines, which are alike, as the predictor knows them."""
        ...

    def start(self, testbed: Testbed, logs: Path) -> AbstractAsyncContextManager[Fleet]:
        """A context in which the cluster runs; what its servers say goes to the folder `logs`."""
        ...
