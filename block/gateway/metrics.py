"""What /metrics says, in Prometheus's text format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from block.core.types import RequestRecord
from block.dispatch.core import Dispatcher
from block.gateway import prompts
from block.gateway.asked import AUDIO, IMAGE, VIDEO
from block.gateway.estimates import FAILED as FAILED_TO
from block.gateway.estimates import NO_TEXT, TIMEOUT
from block.gateway.feedback import TEXT, PromptRates, ResponseLengths
from block.gateway.prefixes import SOURCES, UpstreamPrefixes
from block.gateway.upstreams import SeenInstance, Upstream

OK, REFUSED, FAILED, CANCELLED = "ok", "refused", "failed", "cancelled"
OUTCOME_MET, OUTCOME_MISSED, OUTCOME_REFUSED = "met", "missed", "refused"
SUMMED_GAUGES = frozenset({"block_in_flight", "block_queued"})
"""Gauges that several gateways add up; of the others, the highest holds."""
NONE = "none"
"""In place of an instance, for requests that reached none."""


def outcome_of(status: int) -> str:
    """Of a request that got an answer of the gateway's own."""
    if status < 400:
        return OK
    return REFUSED if status < 500 or status == 501 else FAILED


disable_created_metrics()  # type: ignore[no-untyped-call]  # a time beside each of them

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
_RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
_ESTIMATE = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25)
_FORECAST = (1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 1e-2)


class Group(Protocol):
    """What a server is in."""

    prefixes: UpstreamPrefixes | None
    """What is known of prefix caches there."""


class Placing(Protocol):
    """What places requests, and counts where."""

    @property
    def active(self) -> int:
        """How many servers requests may go to."""
        ...

    def of(self, instance_id: int) -> Group:
        """What a server is in."""
        ...

    def is_active(self, instance_id: int) -> bool:
        """Whether requests may go there."""
        ...

    def outstanding(self, instance_id: int) -> int:
        """Sequences of requests placed there and not finished."""
        ...

    def ejected(self, instance_id: int) -> int:
        """Times that it was ejected."""
        ...


class Metrics:
    """Of one gateway. `attempted` after each decision, `ended` once for each request."""

    def __init__(
        self,
        upstreams: Mapping[int, Upstream],
        placing: Placing,
        rates: PromptRates | None = None,
        lengths: ResponseLengths | None = None,
        queue: Sized = (),
    ) -> None:
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        registry.register(_Counts(upstreams, placing, rates or PromptRates(), lengths, queue))
        self._requests_by = Counter(
            "block_requests", "Requests by their last instance and outcome", ["server", "status"], registry=registry
        )
        self._requests: dict[tuple[int, str], Counter] = {}
        self._count_requests_of(-1, NONE)
        self._retries = Counter("block_retries", "Attempts that were repeated on another instance", registry=registry)
        judged = Counter(
            "block_slo", "Requests with objectives, by what became of them", ["outcome"], registry=registry
        )
        self._objectives = {one: judged.labels(one) for one in (OUTCOME_MET, OUTCOME_MISSED, OUTCOME_REFUSED)}
        self._fallbacks = Counter(
            "block_fallbacks", "Decisions not by the policy's own rule", ["reason"], registry=registry
        )
        self._not_estimated = Counter(
            "block_length_fallbacks", "Requests whose response length was not estimated", ["reason"], registry=registry
        )
        for reason in (TIMEOUT, FAILED_TO, NO_TEXT):
            self._not_estimated.labels(reason)
        self._not_tokenized = Counter(
            "block_prompt_fallbacks", "Requests whose prompt's tokens are not known", ["reason"], registry=registry
        )
        for reason in (prompts.TIMEOUT, prompts.FAILED, prompts.NOT_TEXT):
            self._not_tokenized.labels(reason)
        self._miscounted = Counter(
            "block_prompt_mismatches",
            "Prompts of which a server counted other tokens than the tokenizer",
            registry=registry,
        )
        self._by_server: dict[str, Any] = {
            "prompt": Counter(
                "block_prompt_tokens",
                "Prompt tokens of answers that tell what was cached",
                ["server"],
                registry=registry,
            ),
            "cached": Counter(
                "block_cached_tokens", "Prompt tokens that were cached, by the answers", ["server"], registry=registry
            ),
        }
        self._estimate_s = histogram("block_length_seconds", "Time that a request waits for its estimate", _ESTIMATE)
        self._forecast_s = histogram("block_forecast_seconds", "Time that one forecast takes", _FORECAST)
        self._predicted, self._ratio = {}, {}
        for what, text in (("ttft", "ime to the first token"), ("e2e", "ime to the last token")):
            self._by_server[what] = Histogram(
                f"block_{what}_seconds", f"T{text}", ["server"], buckets=_SECONDS, registry=registry
            )
            self._predicted[what] = histogram(f"block_predicted_{what}_seconds", f"Predicted t{text}", _SECONDS)
            self._ratio[what] = histogram(f"block_predicted_{what}_ratio", f"Predicted over actual t{text}", _RATIOS)

        self._of: dict[int, dict[str, Any]] = {}  # those of one server, by its id
        self._length_ratio = histogram("block_predicted_length_ratio", "Believed over actual response tokens", _RATIOS)

    def _count_requests_of(self, instance_id: int, url: str) -> None:
        for status in (OK, REFUSED, FAILED, CANCELLED):  # so that each is there from the beginning
            self._requests[instance_id, status] = self._requests_by.labels(url, status)

    def begin(self, upstream: Upstream) -> None:
        """There is a server."""
        self._count_requests_of(upstream.instance_id, upstream.url)
        self._of[upstream.instance_id] = {what: metric.labels(upstream.url) for what, metric in self._by_server.items()}

    def end(self, upstream: Upstream) -> None:
        """There is a server no more: what it did is told no more."""
        for status in (OK, REFUSED, FAILED, CANCELLED):
            del self._requests[upstream.instance_id, status]
            self._requests_by.remove(upstream.url, status)
        del self._of[upstream.instance_id]
        for metric in self._by_server.values():
            metric.remove(upstream.url)

    def attempted(self, record: RequestRecord, dispatcher: Dispatcher) -> None:
        """It has just decided about a request."""
        fallback = dispatcher.history.decisions[-1][1].fallback
        if fallback is not None:
            self._fallbacks.labels(fallback).inc()
        if record.forecast is not None:
            self._forecast_s.observe(dispatcher.history.forecast_s[-1])

    def judged(self, outcome: str) -> None:
        """A request met or missed its objectives, or was refused because it would have missed them."""
        self._objectives[outcome].inc()

    def not_estimated(self, reason: str) -> None:
        """A request goes by the constant length."""
        self._not_estimated.labels(reason).inc()

    def miscounted(self) -> None:
        """A server counted other tokens of a prompt than the tokenizer."""
        self._miscounted.inc()

    def not_tokenized(self, reason: str) -> None:
        """A request goes by the bytes of its prompt, and shares nothing that is known."""
        self._not_tokenized.labels(reason).inc()

    def answered(self, expected: int, tokens: float) -> None:
        """A response, or each of several in the mean, was expected to have so many tokens, and has so many."""
        self._length_ratio.observe(expected / max(tokens, 1))

    def estimated(self, seconds: float) -> None:
        """A request has waited so long for its estimate."""
        self._estimate_s.observe(seconds)

    def ended(self, record: RequestRecord, status: str, generates: bool = True) -> None:
        """A request was answered, refused or given up. generates: whether it asked a model for a response."""
        self._requests[record.instance_id, status].inc()
        if record.retries:
            self._retries.inc(record.retries)
        if status != OK or not generates:
            return
        here = self._of[record.instance_id]
        if record.cached_tokens >= 0:
            here["prompt"].inc(record.request.prompt_tokens)
            here["cached"].inc(record.cached_tokens)
        arrival, forecast = record.request.arrival, record.forecast
        for what, at in (("ttft", record.first_token), ("e2e", record.finished)):
            actual = at - arrival
            if math.isnan(actual):
                continue
            here[what].observe(actual)
            predicted = math.nan if forecast is None else getattr(forecast, what)
            if not math.isnan(predicted):
                self._predicted[what].observe(predicted)
                self._ratio[what].observe(predicted / max(actual, 1e-3))

    def unplaced(self, outcome: str) -> None:
        """A request ended before any instance was chosen."""
        self._requests[-1, outcome].inc()

    def loses(self, name: str, text: str, lost: Callable[[], int]) -> None:
        """One more counter, whose value is asked for."""
        self._registry.register(_Lost(name, text, lost))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Counts(Collector):
    """What the dispatcher counts itself, read when it is asked for."""

    def __init__(
        self,
        upstreams: Mapping[int, Upstream],
        placing: Placing,
        rates: PromptRates,
        lengths: ResponseLengths | None,
        queue: Sized,
    ) -> None:
        self._upstreams = upstreams
        self._placing = placing
        self._rates = rates
        self._lengths = lengths
        self._queue = queue

    def collect(self) -> Iterable[Metric]:
        """The metrics of this moment."""
        placing = self._placing
        in_flight = GaugeMetricFamily("block_in_flight", "Sequences placed and not finished", labels=["server"])
        active = GaugeMetricFamily("block_instance_active", "Whether requests may go there", labels=["server"])
        ejections = CounterMetricFamily("block_ejections", "Times an instance was ejected", labels=["server"])
        sources = GaugeMetricFamily(
            "block_prefix_source", "How it is known what its prefix cache has", labels=["server", "source"]
        )
        for upstream in self._upstreams.values():
            i, url = upstream.instance_id, upstream.url
            in_flight.add_metric([url], placing.outstanding(i))
            active.add_metric([url], placing.is_active(i))
            ejections.add_metric([url], placing.ejected(i))
            prefixes = placing.of(i).prefixes
            if prefixes is not None and isinstance(upstream, SeenInstance):
                source = prefixes.source(upstream)
                for one in SOURCES:
                    sources.add_metric([url, one], one == source)
        count = GaugeMetricFamily("block_active_instances", "Instances that requests may go to", placing.active)
        rates = GaugeMetricFamily("block_bytes_per_token", "Of prompts, as servers count them", labels=["model"])
        for model, cost in self._rates.learned(TEXT):
            rates.add_metric([model], 1 / cost)
        parts = GaugeMetricFamily(
            "block_tokens_per_part", "Of images and the like, as servers count them", labels=["model", "kind"]
        )
        for kind in (IMAGE, AUDIO, VIDEO):
            for model, cost in self._rates.learned(kind):
                parts.add_metric([model, kind], cost)
        factors = GaugeMetricFamily("block_length_factor", "Of response lengths, as learned", labels=["model", "by"])
        for model, by, factor in self._lengths or ():
            factors.add_metric([model, by], factor)
        waiting = GaugeMetricFamily("block_queued", "Requests that wait for their objectives", len(self._queue))
        return [in_flight, active, ejections, count, sources, rates, parts, factors, waiting]


class _Lost(Collector):
    """What was told to nobody."""

    def __init__(self, name: str, text: str, lost: Callable[[], int]) -> None:
        self._name, self._text, self._lost = name, text, lost

    def collect(self) -> Iterable[Metric]:
        """The count of this moment."""
        return [CounterMetricFamily(self._name, self._text, self._lost())]
