"""What is told of each request to who looks from outside: its line in the access log, and its spans.

A client's connection opens an account as it begins to have a request answered, and closes it as the answer ends or the
client is gone: each request has one line. Who answers it says what it knows. No account is kept of requests if nobody
asks for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from block.core.types import Forecast, RequestRecord
from block.gateway.access_log import AccessLog
from block.gateway.http1 import HTTPRequest
from block.gateway.metrics import CANCELLED, outcome_of
from block.gateway.openai import PromptUsage

if TYPE_CHECKING:
    from block.gateway.tracing import Trace, Tracing

REQUEST_ID = b"x-request-id"
MOST_CHARACTERS = 1000
"""Of each text that a client chooses: lines stay short."""
UNTRACED = frozenset({b"/health", b"/metrics"})
"""Asked for again and again, and answered by the gateway."""


class Accounts:
    """Of the requests of one gateway.

    policy: what places them usually. numbers: of requests that were never placed, and so have none.
    """

    def __init__(
        self, policy: str, numbers: Iterator[int], access_log: AccessLog | None, tracing: Tracing | None
    ) -> None:
        self.policy = policy
        self.numbers = numbers
        self.access_log = access_log
        self.tracing = tracing

    def open(self, peer: tuple[Any, ...] | None, http: HTTPRequest) -> Account:
        """Of a request that begins to be answered; peer: the client's address."""
        return Account(self, "" if peer is None else peer[0], http)


def open_tracing(endpoint: str) -> Tracing:
    """ValueError if what it takes is not installed, or its settings are wrong."""
    try:
        from block.gateway.tracing import Tracing

        return Tracing(endpoint)
    except ImportError as error:
        missing = f"needs pip install -e '.[tracing]' ({error.name} is not there)"
        raise ValueError(f"gateway.otlp_traces_endpoint={endpoint}: {missing}") from error


class Account:
    """Of one request."""

    __slots__ = (
        "_began",
        "_client",
        "_method",
        "_of",
        "_path",
        "_request_id",
        "_time",
        "_trace",
        "cached_tokens",
        "fallback",
        "forecast",
        "model",
        "number",
        "outcome",
        "output_tokens",
        "policy",
        "prompt_tokens",
        "retries",
        "server",
        "status",
        "ttft_s",
        "why",
    )

    def __init__(self, of: Accounts, client: str, http: HTTPRequest) -> None:
        self._of = of
        self._time = time.time_ns()
        self._began = time.perf_counter()
        self._client = client
        self._method, self._path = _text(http.method), _text(http.path)
        self._request_id: str | None = None
        for name, value in http.headers:
            if name.lower() == REQUEST_ID:
                self._request_id = _text(value)
        self.model: object = None
        """That it names, as it was read."""
        self.policy = of.policy
        """What places it."""
        self.status: int | None = None
        """That the client has been answered."""
        self.outcome: str | None = None
        """As metrics have it; None: it follows from the status."""
        self.why = ""
        """It failed."""
        self.number: int | None = None
        self.server: str | None = None
        """That it was sent to last."""
        self.retries = 0
        self.forecast: Forecast | None = None
        self.fallback: str | None = None
        self.ttft_s: float | None = None
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.cached_tokens: int | None = None
        tracing = of.tracing
        self._trace: Trace | None = None
        if tracing is not None and http.path not in UNTRACED:
            self._trace = tracing.begin(http, self._method, self._path, client, self._time)

    def chosen(self, record: RequestRecord, server: str, fallback: str | None) -> None:
        """The dispatcher has decided."""
        self.number = record.request.id
        self.forecast, self.fallback = record.forecast, fallback
        if self._trace is not None:
            self._trace.chosen(self, server)

    def sent(self, record: RequestRecord, server: str, fallback: str | None, http: HTTPRequest) -> HTTPRequest:
        """It is sent there, as the request that is returned: its headers name the span that the server's hang below."""
        self.chosen(record, server, fallback)
        self.server, self.retries = server, record.retries
        return http if self._trace is None else self._trace.sent(self, http)

    def answered(self, status: int) -> None:
        """The server begins to answer."""
        if self._trace is not None:
            self._trace.answered(status)

    def lost(self, error: Exception) -> None:
        """The server's answer will not be whole."""
        if self._trace is not None:
            self._trace.lost(error)

    def failed(self, why: str) -> None:
        """The server has not served it; it may begin anew elsewhere."""
        if self._trace is not None:
            self._trace.attempt_ended(self, why)

    def told(self, usage: PromptUsage) -> None:
        """The server has counted its prompt."""
        self.prompt_tokens, self.cached_tokens = usage.tokens, usage.cached

    def ended(self, outcome: str, why: str, record: RequestRecord | None = None, generates: bool = True) -> None:
        """It was answered, refused or given up; the answer may still be on its way to the client.

        generates: whether it asks a model for a response, which has tokens.
        """
        self.outcome, self.why = outcome, why
        if record is not None:
            self.retries = record.retries
            if generates:
                self.ttft_s = _known(record.first_token - record.request.arrival)
                self.output_tokens = record.output_tokens or None
                if self.prompt_tokens is None:
                    self.prompt_tokens = record.request.prompt_tokens
        if self._trace is not None:
            self._trace.attempt_ended(self, why, record)

    def close(self) -> None:
        """Nothing more is sent to the client."""
        if self.outcome is None:
            self.outcome = CANCELLED if self.status is None else outcome_of(self.status)
        if self._trace is not None:
            self._trace.ended(self)
        if self._of.access_log is not None:
            self._of.access_log.write(self._line())

    @property
    def model_name(self) -> str | None:
        """The model, if it is named as it should be."""
        return self.model[:MOST_CHARACTERS] if isinstance(self.model, str) else None

    def _line(self) -> dict[str, object]:
        number = next(self._of.numbers) if self.number is None else self.number
        came = datetime.fromtimestamp(self._time / 1e9, UTC)
        forecast = self.forecast
        return {
            "time": came.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "client": self._client or None,
            "method": self._method or None,
            "path": self._path or None,
            "model": self.model_name,
            "status": self.status,
            "outcome": self.outcome,
            "server": self.server,
            "retries": self.retries,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens,
            "ttft_s": self.ttft_s,
            "e2e_s": _known(time.perf_counter() - self._began),
            "predicted_ttft_s": None if forecast is None else _known(forecast.ttft),
            "predicted_e2e_s": None if forecast is None else _known(forecast.e2e),
            "fallback": self.fallback,
            "trace_id": None if self._trace is None else self._trace.id,
            "request_id": self._request_id or str(number),
        }


def _text(data: bytes) -> str:
    return data[:MOST_CHARACTERS].decode("utf-8", "replace")


def _known(seconds: float) -> float | None:
    return round(seconds, 6) if math.isfinite(seconds) else None
