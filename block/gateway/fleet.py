"""The servers as a policy needs them: which kind of instance each is, and forecasts for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import aiohttp

from block.core.clock import Clock
from block.core.snapshot import Snapshot
from block.core.types import Forecasts, Request
from block.dispatch.core import Forecaster
from block.dispatch.policies import Needs
from block.engine.config import EngineConfig, EngineSettings
from block.engine.latency import LatencyModel
from block.engine.predictor import Predictor, forecast_each
from block.gateway.modelled import ModelledInstance
from block.gateway.server_connections import ServerPool
from block.gateway.upstreams import HTTPInstance, PluginInstance, SeenInstance, Upstream


class Upstreams(NamedTuple):
    """The instances, and what makes forecasts for them if the policy needs any."""

    instances: Sequence[Upstream]
    forecaster: Forecaster | None


def make_upstreams(
    pools: Sequence[ServerPool],
    session: aiohttp.ClientSession,
    clock: Clock,
    needs: Needs,
    latency: LatencyModel | None,
    outrun_share: float,
    assumed: EngineConfig | None,
) -> Upstreams:
    """Instances for the servers of `pools` that can show what a policy needs. Nothing is asked of them yet.

    session: for all but what is proxied. clock: what snapshots are dated by.
    needs: of the policy. latency: the servers' step times, for forecasts. outrun_share: as of `Predictor`.
    assumed: what servers without the plugin are like; None: they have it.
    """
    if needs is Needs.COUNTS:
        return Upstreams([HTTPInstance(i, pool, session) for i, pool in enumerate(pools)], None)
    instances: Sequence[SeenInstance]
    if assumed is None:
        instances = [PluginInstance(i, pool, session, clock, latency) for i, pool in enumerate(pools)]
    else:
        instances = [ModelledInstance(i, pool, session, clock, assumed) for i, pool in enumerate(pools)]
    if needs is Needs.SNAPSHOT:
        return Upstreams(instances, None)
    assert latency is not None, "who asks for forecasts has a latency model"
    return Upstreams(instances, FleetForecaster(instances, latency, outrun_share))


class FleetForecaster:
    """Forecasts for servers that may differ in their settings, as they report them, but not in their step times."""

    def __init__(self, instances: Sequence[SeenInstance], latency: LatencyModel, outrun_share: float) -> None:
        self._outrun_share = outrun_share
        self._instances = instances
        self._latency = latency
        self._predictors: dict[EngineSettings, Predictor] = {}
        Predictor(EngineConfig().settings(1000), latency).warm_up()

    def forecasts(
        self, snapshots: Sequence[Snapshot], in_transit: Sequence[Sequence[Request]], request: Request, now: float
    ) -> Forecasts:
        """One forecast for each snapshot, in a compiled call for each kind of server."""
        kinds = [self._settings(snapshot.instance_id) for snapshot in snapshots]
        theirs = [[_fitting(one, settings) for one in some] for some, settings in zip(in_transit, kinds, strict=True)]
        requests = [_fitting(request, settings) for settings in kinds]
        return forecast_each([self._predictor(settings) for settings in kinds], snapshots, theirs, requests, now)

    def _settings(self, instance_id: int) -> EngineSettings:
        settings = self._instances[instance_id].settings
        assert settings is not None, "only servers that are attached to show snapshots"
        return settings

    def _predictor(self, settings: EngineSettings) -> Predictor:
        if settings not in self._predictors:
            self._predictors[settings] = Predictor(settings, self._latency, outrun_share=self._outrun_share)
        return self._predictors[settings]


def _fitting(request: Request, settings: EngineSettings) -> Request:
    """The request, no longer than a server takes: what is estimated too long would bring the twin to a halt."""
    longest = settings.max_model_len - 1
    return request if request.prompt_tokens <= longest else replace(request, prompt_tokens=longest)
