"""Forecasts for servers that may differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from block.core.snapshot import Snapshot
from block.core.types import Forecasts, Request
from block.engine.config import EngineConfig, EngineSettings
from block.engine.latency import LatencyModel
from block.engine.predictor import Predictor, forecast_each
from block.gateway.upstreams import SeenInstance


class FleetForecaster:
    """Forecasts for servers that may differ in their settings, as they report them, but not in their step times.

    latency: those. outrun_share: as of `Predictor`.
    """

    def __init__(self, instances: Mapping[int, SeenInstance], latency: LatencyModel, outrun_share: float) -> None:
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
