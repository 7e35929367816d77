"""Spans of requests, by OpenTelemetry, to a collector that takes OTLP.

A request has a server span; below it, for each server that it was tried on, *choice*, from when it came, or was to
begin anew, until the policy had decided, and *proxy*, until that server's answer ended. Attributes have the names that
the semantic conventions for HTTP and GenAI have for them. All but the endpoint is read by OpenTelemetry from its own
OTEL_ variables. Imported only if traces are asked for.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from block.core.choices import did_you_mean
from block.core.errors import one_line
from block.core.types import RequestRecord
from block.gateway.http1 import HTTPRequest
from block.gateway.metrics import FAILED
from block.gateway.routes import GENERATES

if TYPE_CHECKING:
    from block.gateway.account import Account

log = logging.getLogger(__name__)

GRPC, HTTP = "grpc", "http/protobuf"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
"""Variables that say which of them the collector takes; the first that is set counts. As of vLLM, else it is gRPC."""
QUEUE_SIZE = "OTEL_BSP_MAX_QUEUE_SIZE"
CLOSE_S = 2.0
"""For the last spans to be taken."""
SWITCH_S = 0.0005
"""That the event loop waits, when it wakes, for the thread that encodes spans; Python's own 5 ms would be seen."""

_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
_OPERATIONS = {"/v1/completions": "text_completion"}
"""Of models, as the conventions call them; all other routes are "chat"."""
_propagator = TraceContextTextMapPropagator()
logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)  # clients may send what is no trace context


class Tracing:
    """Of one gateway, to the collector at `endpoint`, a URL. ValueError for a setting that cannot be, ImportError
    without an exporter for its protocol.
    """

    def __init__(self, endpoint: str) -> None:
        size = os.environ.get(QUEUE_SIZE, "2048")
        if not size.isdigit():
            raise ValueError(f"{QUEUE_SIZE}={size}: must be a whole number, at least 1")
        self._exporter = _Exporter(_exporter(endpoint))
        self._processor = _Processor(self._exporter, int(size))
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "block-gateway"}))
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(self._processor)
        self._provider = provider
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self.tracer = provider.get_tracer("block.gateway")

    @property
    def lost(self) -> int:
        """Spans that no collector has taken."""
        return self._processor.dropped + self._exporter.lost

    def begin(self, http: HTTPRequest, method: str, path: str, client: str, time_ns: int) -> Trace:
        """The spans of a request that came at this time."""
        given: dict[str, list[str]] = {}
        for header, value in http.headers:
            if (lower := header.lower()) in _CONTEXT_HEADERS:
                given.setdefault(lower.decode(), []).append(value.decode("latin-1"))
        if len(given.get("traceparent", ())) > 1:
            given = {}
        attributes = {"http.request.method": method or "_OTHER", "url.scheme": "http", "url.path": path}
        name = method or "HTTP"
        if http.path in GENERATES:
            attributes["http.route"] = path
            name = f"{name} {path}"
        if client:
            attributes["client.address"] = client
        context = _propagator.extract(given) if given else Context()
        span = self.tracer.start_span(name, context, SpanKind.SERVER, attributes, start_time=time_ns)
        return Trace(self, span, time_ns)

    async def close(self) -> None:
        """Send what is left, unless that takes too long."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)  # which may wait for long
        closing.start()
        await asyncio.to_thread(closing.join, CLOSE_S)
        if closing.is_alive():
            self._exporter.give_up()
        sys.setswitchinterval(self._switch_s)
        if lost := self.lost + self._processor.waiting:
            log.warning("%d spans are lost", lost)


class Trace:
    """The spans of one request. If it is not sampled, none is made below the first, and none is sent."""

    __slots__ = (
        "_attempt",
        "_context",
        "_error",
        "_heard_s",
        "_samples",
        "_sent",
        "_since",
        "_span",
        "_status",
        "_tracing",
    )

    def __init__(self, tracing: Tracing, span: Span, time_ns: int) -> None:
        self._tracing = tracing
        self._span = span
        self._context = set_span_in_context(span, Context())
        self._samples = span.is_recording()
        self._since = time_ns
        self._attempt: Span | None = None
        self._sent = 0.0
        self._heard_s: float | None = None
        self._status: int | None = None
        self._error: str | None = None

    @property
    def id(self) -> str | None:
        """As it is written; None if it is not sampled."""
        return f"{self._span.get_span_context().trace_id:032x}" if self._samples else None

    def chosen(self, account: Account, server: str) -> None:
        """The policy has decided."""
        if not self._samples:
            return
        forecast = account.forecast
        attributes = {
            "block.policy": account.policy,
            "block.server": server,
            "block.forecast.ttft": None if forecast is None else forecast.ttft,
            "block.forecast.e2e": None if forecast is None else forecast.e2e,
            "block.fallback": account.fallback,
        }
        tracer = self._tracing.tracer
        tracer.start_span("choice", self._context, attributes=_set(attributes), start_time=self._since).end()

    def sent(self, account: Account, http: HTTPRequest) -> HTTPRequest:
        """It is sent to the server that was chosen, as the request that is returned."""
        below = self._context
        if self._samples:
            assert account.server is not None
            place = urlsplit(account.server)
            attributes = {
                "http.request.method": http.method.decode("latin-1"),
                "server.address": place.hostname,
                "server.port": place.port or (443 if place.scheme == "https" else 80),
                "http.request.resend_count": account.retries or None,
                **_of_model(account, http.path),
            }
            self._attempt = self._tracing.tracer.start_span("proxy", below, SpanKind.CLIENT, _set(attributes))
            below = set_span_in_context(self._attempt, below)
            self._sent = time.perf_counter()
            self._heard_s = self._status = self._error = None
        context: dict[str, str] = {}
        _propagator.inject(context, below)
        if not context:
            return http
        kept = [one for one in http.headers if one[0].lower() not in _CONTEXT_HEADERS]
        kept += [(name.encode(), value.encode()) for name, value in context.items()]
        return http._replace(headers=kept)

    def answered(self, status: int) -> None:
        """The server begins to answer."""
        self._status = status
        self._heard_s = time.perf_counter() - self._sent

    def lost(self, error: Exception) -> None:
        """Its answer will not be whole."""
        self._error = type(error).__name__

    def attempt_ended(self, account: Account, why: str, record: RequestRecord | None = None) -> None:
        """The server is done with it, or has failed it. record: of a request that has ended."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        self._since = time.time_ns()
        attributes: dict[str, Any] = {
            "http.response.status_code": self._status,
            "block.time_to_first_byte": self._heard_s,
        }
        if record is not None:
            attributes |= _usage(account)
            if not math.isnan(record.first_token):
                attributes["gen_ai.response.time_to_first_chunk"] = record.first_token - record.dispatched
        attempt.set_attributes(_set(attributes))
        if why:
            _fail(attempt, why, self._error, self._status)
        attempt.end(self._since)

    def ended(self, account: Account) -> None:
        """The client has its answer, or is gone."""
        span = self._span
        if not self._samples:
            return
        attributes = {
            "http.response.status_code": account.status,
            "block.outcome": account.outcome,
            **_of_model(account),
            **_usage(account),
        }
        span.set_attributes(_set(attributes))
        if account.outcome == FAILED:
            _fail(span, account.why, self._error, account.status)
        span.end()


def _of_model(account: Account, path: bytes = b"") -> dict[str, Any]:
    operation = _OPERATIONS.get(path.decode(), "chat") if path in GENERATES else None
    return {"gen_ai.request.model": account.model_name, "gen_ai.operation.name": operation}


def _usage(account: Account) -> dict[str, Any]:
    return {
        "gen_ai.usage.input_tokens": account.prompt_tokens,
        "gen_ai.usage.output_tokens": account.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": account.cached_tokens,
    }


def _set(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are known; a forecast may be NaN."""
    return {name: value for name, value in attributes.items() if value is not None and value == value}


def _fail(span: Span, why: str, error: str | None, status: int | None) -> None:
    kind = error or (str(status) if status is not None and status >= 400 else "_OTHER")
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR, why or None)


def _exporter(endpoint: str) -> SpanExporter:
    key = next((one for one in PROTOCOLS if os.environ.get(one)), PROTOCOLS[0])
    protocol = os.environ.get(key) or GRPC
    if protocol == GRPC:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as ByGRPC

        return ByGRPC(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    if protocol == HTTP:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as ByHTTP

        return ByHTTP(endpoint=endpoint)
    raise ValueError(f"{key}={protocol}: {did_you_mean(protocol, (GRPC, HTTP))}")


class _Exporter(SpanExporter):
    """Hands batches, in the processor's thread, to OpenTelemetry's exporter, and counts those that it does not get rid
    of.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._complaints = _Complaints()
        self.taken = 0
        """Spans that have left the processor's queue."""
        self.lost = 0
        """Those of them that nobody took."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """As of `SpanExporter`."""
        self.taken += len(spans)
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            result = SpanExportResult.FAILURE
            self._complaints.tell(one_line(error))
        if result is SpanExportResult.SUCCESS:
            self._complaints.end(self.lost)
        else:
            self.lost += len(spans)
        return result

    def shutdown(self) -> None:
        """As of `SpanExporter`."""
        self._exporter.shutdown()
        self._complaints.close()

    def give_up(self) -> None:
        """Have it end its tries."""
        self._exporter.shutdown()


class _Processor(BatchSpanProcessor):
    """Collects spans that have ended; those beyond `most` are dropped, and counted."""

    def __init__(self, exporter: _Exporter, most: int) -> None:
        super().__init__(exporter, max_queue_size=most)
        self._taken_by = exporter
        self._most = most
        self._handed = 0
        self.dropped = 0
        """Spans for which there was no room."""

    @property
    def waiting(self) -> int:
        """Spans that are to be sent."""
        return self._handed - self._taken_by.taken

    def on_end(self, span: ReadableSpan) -> None:
        """As of `SpanProcessor`."""
        assert span.context is not None
        if span.context.trace_flags.sampled:
            if self.waiting >= self._most:
                self.dropped += 1
                return
            self._handed += 1
        super().on_end(span)


class _Complaints(logging.Handler):
    """Logs the first of what OpenTelemetry's exporters say at each try while a collector takes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._told = False
        self._logger = logging.getLogger("opentelemetry.exporter")
        self._logger.addHandler(self)
        self._logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """As of `Handler`, like the last."""
        self.tell(record.getMessage())

    def tell(self, complaint: str) -> None:
        """Log it, if it is the first."""
        if not self._told:
            self._told = True
            log.warning("traces: %s", complaint)

    def end(self, lost: int) -> None:
        """There is no more trouble."""
        if self._told:
            self._told = False
            log.warning("traces: spans are taken again; %d are lost", lost)

    def close(self) -> None:
        """Let them log themselves."""
        self._logger.removeHandler(self)
        self._logger.propagate = True
        super().close()
