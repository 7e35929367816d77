"""One request of a client: placed by the dispatcher, sent to its server, the answer passed on as its bytes come.

Until the first byte of an answer's body has come, of a stream its first event, nothing is sent to the client, and the
request can begin anew elsewhere. An answer in JSON is passed on once it is whole.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from block.core.clock import Clock
from block.core.types import Request, RequestRecord
from block.core.user_code import UserFault
from block.dispatch.core import Dispatcher
from block.dispatch.policies import Policy
from block.gateway.admission import QUEUE, SERVE, Objectives, Queue, Slo
from block.gateway.client_connections import ClientConnection
from block.gateway.http1 import AnswerHead, Header, HTTPRequest
from block.gateway.metrics import (
    CANCELLED,
    FAILED,
    OK,
    OUTCOME_MET,
    OUTCOME_MISSED,
    OUTCOME_REFUSED,
    REFUSED,
    Metrics,
)
from block.gateway.openai import JSON, PromptUsage, completion_tokens, error_event, error_json, prompt_usage
from block.gateway.routes import MESSAGES
from block.gateway.server_connections import (
    ConnectionReset,
    NotHTTP,
    OutOfResources,
    Sending,
    ServerHangs,
    ServerSilent,
    TransportError,
)
from block.gateway.sse import Events, is_aborted
from block.gateway.upstreams import Upstream

log = logging.getLogger(__name__)

EXPLAIN = b"x-block-explain"
"""A request with this header is told in its answer's where it went."""
MISSES = "its forecast misses its objective"
GIVEN_UP = "has given the request up"
TURNED_AWAY = (502, 503)
"""Statuses by which a server says that another one may serve the request."""


class Watching(Protocol):
    """Who watches the servers."""

    def began(self, instance_id: int, seconds: float) -> None:
        """The first event of a stream came, so long after the request was sent."""
        ...

    def lost(self, instance_id: int, reason: str) -> None:
        """A server is."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all exchanges of a gateway have in common."""

    servers: Mapping[int, Upstream]
    clock: Clock
    metrics: Metrics
    watch: Watching
    slo: Slo
    queue: Queue
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """What goes on for no request in particular; an event loop keeps no hold of its tasks."""


class _Reply(NamedTuple):
    """A whole answer; length: of a body that is not sent, as of HEAD."""

    status: int
    headers: Sequence[Header]
    body: bytes
    length: int | None = None

    @staticmethod
    def error(status: int, message: str, *headers: Header) -> _Reply:
        return _Reply(status, [*JSON, *headers], error_json(status, message))


class Exchange:
    """The request `http` of `client`. `place` sends it where `dispatcher` says; all else follows from what its server
    and its client do.

    generates: whether its answer is a response of a model's, which has tokens. streams: whether as events.
    on_first: told the first bytes of its answer, and whose it is.
    """

    __slots__ = (
        "_account",
        "_around",
        "_body",
        "_checking",
        "_client",
        "_counted",
        "_dispatcher",
        "_events",
        "_generates",
        "_head",
        "_held",
        "_http",
        "_kept",
        "_objectives",
        "_on_first",
        "_on_response",
        "_on_usage",
        "_over",
        "_preparing",
        "_record",
        "_sending",
        "_server",
        "passing",
        "streams",
    )

    def __init__(
        self,
        around: Surroundings,
        dispatcher: Dispatcher,
        client: ClientConnection,
        http: HTTPRequest,
        *,
        generates: bool = True,
        streams: bool = False,
        on_first: Callable[[bytes, int], None] | None = None,
    ) -> None:
        self._around = around
        self._dispatcher = dispatcher
        self._client: ClientConnection | None = client
        self._account = client.account
        self._http = http
        self._generates = generates
        self._body = http.body
        self._objectives: Objectives | None = None
        self._on_first = on_first
        self._on_usage: Callable[[PromptUsage], None] | None = None
        self._on_response: Callable[[int], None] | None = None
        self._record: RequestRecord | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._kept: _Reply | None = None  # the answer, if none is better
        self._over = False  # the dispatcher and the metrics have been told how it ended
        self.streams = streams
        """As of `Asking`, like the next."""
        self._begin_anew()
        client.serving = self

    def _begin_anew(self) -> None:
        self._sending: Sending | None = None
        self._head: AnswerHead | None = None
        self._held: list[bytes] = []
        self._events: Events | None = None
        self._counted = False  # a server has counted the response's tokens
        self.passing = False

    # ------------------------------------------------------------------------------------------------- on its way there

    def prepare(self, prepared: Awaitable[None]) -> None:
        """It is not `place`d before this is done, which does it."""

        async def guarded() -> None:
            try:
                await prepared
            except Exception as error:
                self._crashed(error)

        self._preparing = asyncio.get_running_loop().create_task(guarded())

    def place(
        self,
        request: Request,
        body: bytes,
        by: Policy | None = None,
        among: Container[int] | None = None,
        objectives: Objectives | None = None,
        on_usage: Callable[[PromptUsage], None] | None = None,
        on_response: Callable[[int], None] | None = None,
    ) -> None:
        """Send it where the dispatcher says, as `request`, with `body`; or let it wait, or refuse it, if it would miss
        its `objectives`.

        by: another policy than the dispatcher's. among: the only instances that may serve it; None: all. on_usage: told
        what its answer says of its prompt. on_response: told the tokens of its response once it is whole, if its server
        has counted them.
        """
        self._preparing = None
        self._body = body
        self._on_usage = on_usage
        self._on_response = on_response
        self._objectives = objectives
        if self._account is not None and by is not None:
            self._account.policy = type(by).__name__
        queue = self._around.queue
        behind_others = objectives is not None and len(queue) > 0
        if behind_others or not self._try(request, by, among):
            queue.add(lambda: self._try(request, by, among))

    def _try(self, request: Request, by: Policy | None, among: Container[int] | None) -> bool:
        """Place it, unless its forecast misses; returns whether it need not be tried again."""
        around, slo = self._around, self._around.slo
        if self._over:  # the client has gone
            return True
        try:
            record = self._dispatcher.arrived(request, around.clock.now(), by, among)
            objectives, waited_s = self._objectives, around.clock.now() - request.arrival
            late_s = 0.0 if objectives is None else objectives.missed_by_s(record.forecast, waited_s)
            if objectives is not None and late_s > 0 and record.status == "pending" and slo.missed != SERVE:
                self._dispatcher.refused(record, MISSES, around.clock.now())
                if slo.missed == QUEUE and waited_s < slo.queue_s and not objectives.lost(waited_s):
                    return False
                around.metrics.judged(OUTCOME_REFUSED)
                if self._account is not None:
                    decision = self._dispatcher.history.decisions[-1][1]
                    self._account.chosen(record, around.servers[record.instance_id].url, decision.fallback)
                wait = (b"Retry-After", b"%d" % max(math.ceil(late_s), 1))
                self._kept = _Reply.error(429, f"{MISSES} by {late_s:.1f} s", wait)
                self._end(REFUSED)
                self._reply()
                return True
            self._record = record
            self._attempt()
        except Exception as error:
            self._crashed(error)
        return True

    def _attempt(self) -> None:
        around, record = self._around, self._record
        assert record is not None
        if record.status != "pending":  # no server is left to try
            if self._kept is None:
                troubles = {one.url: one.trouble for one in around.servers.values() if one.trouble}
                told = "; ".join([record.error or "", *(f"{url}: {why}" for url, why in troubles.items())])
                self._kept = _Reply.error(503, told)
            self._end(FAILED, record.error or "")
            self._reply()
            return
        self._server = around.servers[record.instance_id]
        http = self._http
        if self._account is not None:
            http = self._account.sent(record, self._url, self._dispatcher.history.decisions[-1][1].fallback, http)
        around.metrics.attempted(record, self._dispatcher)
        self._dispatcher.delivered(record, around.clock.now())
        self._begin_anew()
        self._sending = self._server.pool.send(self, http, self._body)
        if self._client is not None and self._client.full:
            self._sending.pause()

    @property
    def replaceable(self) -> bool:
        """Whether it could begin anew elsewhere: as of `Asking`."""
        record = self._record
        return not self.passing and record is not None and self._dispatcher.has_another(record)

    # ------------------------------------------------------------------------------------------------- on its way back

    def answer_begins(self, head: AnswerHead) -> None:
        """The status and headers of its answer: as of `Asking`, like the next three."""
        self._head = head
        if self._account is not None:
            self._account.answered(head.status)
        is_events = head.status == 200 and head.kind.startswith(b"text/event-stream")
        if is_events and not head.packed and self._http.method != b"HEAD":
            self._events = Events()

    def answer_goes_on(self, data: bytes) -> None:
        """More of its body."""
        try:
            self._pass_on(data)
        except Exception as error:
            self._crashed(error)

    def answer_ends(self) -> None:
        """It is whole."""
        self._sending = None
        try:
            if self._checking is None:  # else that goes on when it is done
                self._ends()
        except Exception as error:
            self._crashed(error)

    def lost(self, error: TransportError) -> None:
        """It will not be whole."""
        self._sending = None
        if self._account is not None:
            self._account.lost(error)
        if self._checking is not None:
            self._checking.cancel()
            self._checking = None
        try:
            self._loses(error)
        except Exception as bug:
            self._crashed(bug)

    def _pass_on(self, data: bytes) -> None:
        head, events = self._head, self._events
        assert head is not None
        if not self.passing:
            if events is not None:
                first = events.first(data)
                if first is None:
                    return
                data = first
                if events.failed:
                    if self._sending is not None:
                        self._sending.pause()
                    self._check(self._after_bad_beginning(data))
                    return
            elif head.status >= 400 or head.kind.startswith(b"application/json"):
                self._held.append(data)
                return
            self._begin_passing()
            self._note_first(data)
        if events is not None:
            self._read_events(events, data)
        if self._client is not None:
            self._client.write(data)
        if events is not None and events.done:
            self._finish()

    def _begin_passing(self) -> None:
        """From here on it cannot begin anew."""
        record, head = self._record, self._head
        assert record is not None
        assert head is not None
        self.passing = True
        self._body = b""
        self._http = self._http._replace(body=b"")
        if self._sending is not None:
            self._sending.request = b""
        now = self._around.clock.now()
        self._dispatcher.first_token(record, now)
        if self._events is not None:
            self._around.watch.began(record.instance_id, now - record.dispatched)
        if self._client is not None:
            self._client.begin(head.status, [*head.headers, *self._explained()])

    def _read_events(self, events: Events, data: bytes) -> None:
        events.note(data)
        if self._record is not None and not self._counted:
            self._record.output_tokens = max(events.count - events.done, 0)  # about: nobody has counted them
        self._note_usage(data)

    def _note_first(self, answer: bytes) -> None:
        if self._on_first is not None:
            self._on_first(answer, self._server.instance_id)

    def _note_usage(self, answer: bytes) -> None:
        """Note what an answer says of its tokens; in the record, what was cached, in tokens as the gateway counts."""
        record = self._record
        if record is None or not self._generates or b"_tokens" not in answer:
            return
        tokens, said = completion_tokens(answer), prompt_usage(answer)
        if tokens is not None:
            record.output_tokens = tokens
            self._counted = True
        if said is not None:
            if self._account is not None:
                self._account.told(said)
            if said.cached is not None:
                record.cached_tokens = round(said.cached / said.tokens * record.request.prompt_tokens)
            if self._on_usage is not None:
                self._on_usage(said)
                self._on_usage = None

    def _ends(self) -> None:
        head, events = self._head, self._events
        assert head is not None
        if events is not None and not self.passing and (events.held or head.length != 0):
            self._begin_passing()
            if self._client is not None and events.held:
                self._client.write(events.held)
        if self.passing:
            self._finish()
            client, self._client = self._client, None
            if client is not None:
                client.end()
            return
        bare = self._http.method == b"HEAD" or head.status == 304
        body = b"".join(self._held)
        self._kept = _Reply(head.status, [*head.headers, *self._explained()], body, head.length if bare else None)
        if head.status >= 500:
            self._check(self._after_error(head.status))
        elif b'"abort"' in body and head.status == 200 and is_aborted(body):
            self._check(self._after_reset(f"{self._url}: {GIVEN_UP}"))
        else:
            self._answered()

    def _answered(self) -> None:
        """Pass on the answer that is kept, as what the server says."""
        assert self._kept is not None
        if self._kept.status >= 400:
            self._fail(f"{self._url}: answered {self._kept.status}")
        else:
            self._note_first(self._kept.body)
            self._note_usage(self._kept.body)
            self._finish()
        self._reply()

    def _reply(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._kept is not None:
            client.reply(*self._kept)

    # -------------------------------------------------------------------------------------------------- what goes wrong

    def _loses(self, error: TransportError) -> None:
        text = f"{self._url}: {error}"
        if self._over:  # the answer was whole, but for its last bytes
            client, self._client = self._client, None
            if client is not None:
                client.end()
        elif self.passing:
            self._break_off(text)
        elif isinstance(error, ServerSilent):  # the next one would be as slow
            self._kept = _Reply.error(504, text)
            self._fail(text)
            self._reply()
        elif isinstance(error, OutOfResources):
            text = f"the gateway cannot open a connection: {error}"
            self._kept = _Reply.error(503, text, (b"Retry-After", b"1"))
            self._fail(text)
            self._reply()
        elif isinstance(error, ConnectionReset):  # by this request, perhaps
            self._check(self._after_reset(text))
        else:  # what is no HTTP tells nothing of the next request
            if isinstance(error, ServerHangs):
                self.streams = False  # it has been evidence once
            self._again(text, gone=not isinstance(error, NotHTTP))

    def _again(self, why: str, *, gone: bool) -> None:
        """Begin anew elsewhere, if there is another."""
        assert self._record is not None
        if self._account is not None:
            self._account.failed(why)
        self._dispatcher.failed(self._record, why, self._around.clock.now(), gone=gone)
        self._attempt()

    def _break_off(self, why: str) -> None:
        """End what cannot go on, with an event that says so where one can be written. The server may be gone."""
        self._fail(why)
        client, self._client = self._client, None
        if client is not None and self._events is not None:
            client.write(error_event(502, why, anthropic=self._http.path == MESSAGES))
            client.end()
        elif client is not None:
            client.cut()
        watched = asyncio.get_running_loop().create_task(self._look_after(self._server, why))
        self._around.tasks.add(watched)
        watched.add_done_callback(self._around.tasks.discard)

    async def _look_after(self, server: Upstream, why: str) -> None:
        """A server that broke off may have died, and even be back already: then what was known of it is of nobody."""
        if not await server.healthy():
            self._around.watch.lost(server.instance_id, why)

    def _check(self, then: Callable[[bool], None]) -> None:
        """Ask a server that has failed this request whether it is well, and go on by what it says."""
        server = self._server

        async def ask() -> None:
            try:
                well = await server.healthy()
                self._checking = None
                then(well)
            except Exception as error:
                self._crashed(error)

        self._checking = asyncio.get_running_loop().create_task(ask())

    def _after_reset(self, said: str) -> Callable[[bool], None]:
        return lambda well: self._again(said, gone=not well)

    def _after_error(self, status: int) -> Callable[[bool], None]:
        """A vLLM server whose engine has died says 500, as it does when the request is at fault."""
        said = f"{self._url}: answered {status}"

        def go_on(well: bool) -> None:
            if not well:
                self._again(f"{said}, and is not healthy", gone=True)
            elif status in TURNED_AWAY:
                self._again(said, gone=False)
            else:
                self._answered()

        return go_on

    def _after_bad_beginning(self, data: bytes) -> Callable[[bool], None]:
        """Of a stream whose first event is an error; data: what has come of it."""

        def go_on(well: bool) -> None:
            assert self._events is not None
            if not well or (self._events.aborted and self.replaceable):
                if self._sending is not None:
                    self._sending.cancel()
                why = GIVEN_UP if self._events.aborted else "began with an error, and is not healthy"
                self._again(f"{self._url}: {why}", gone=not well)
                return
            self._begin_passing()
            self._read_events(self._events, data)
            if self._client is not None:
                self._client.write(data)
            if self._sending is None:
                self._ends()
            elif self._client is None or not self._client.full:
                self._sending.resume()

        return go_on

    def _crashed(self, error: Exception) -> None:
        """A mistake of the policy's, or of the gateway's: one request fails, and no other."""
        if isinstance(error, UserFault):
            log.error("%s", error)  # which says where
        else:
            log.exception("a request failed", exc_info=error)
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        self._kept = _Reply.error(500, "the gateway failed; its log says why")
        self._fail("the gateway failed")
        client, self._client = self._client, None
        if client is not None:
            if client.begun:
                client.cut()
            else:
                client.reply(*self._kept)

    # ------------------------------------------------------------------------------------------------- how it ended

    def _finish(self) -> None:
        """The response is whole, unless an event of it has told of an error."""
        if self._events is not None and self._events.failed:
            self._fail(f"{self._url}: the stream tells of an error")
        else:
            self._end(OK)

    def _fail(self, why: str) -> None:
        """It was not served: by a fault of its own, if the client is told so."""
        kept = self._kept
        self._end(REFUSED if kept is not None and 400 <= kept.status < 500 else FAILED, why)

    def _end(self, outcome: str, why: str = "") -> None:
        """Tell the dispatcher and the metrics how it ended, the first time that it does."""
        if self._over:
            return
        self._over = True
        around, record = self._around, self._record
        if record is None:
            around.metrics.unplaced(outcome)
            if self._account is not None:
                self._account.ended(outcome, why)
            return
        now = around.clock.now()
        if outcome == OK:
            self._dispatcher.finished(record, now)
            if self._counted and self._on_response is not None:
                self._on_response(record.output_tokens)
            if self._objectives is not None and (met := self._objectives.met(record)) is not None:
                around.metrics.judged(OUTCOME_MET if met else OUTCOME_MISSED)
        elif record.status == "pending":
            if outcome == CANCELLED:
                self._dispatcher.cancelled(record, now)
            else:
                self._dispatcher.refused(record, why, now)
        around.metrics.ended(record, outcome, self._generates)
        if self._account is not None:
            self._account.ended(outcome, why, record, self._generates)

    # --------------------------------------------------------------------------------------------- what the client does

    def client_left(self) -> None:
        """Cancel what is under way; an answer that is whole but for its last bytes may come to its end."""
        self._client = None
        if self._over:
            if self._sending is not None:
                self._sending.resume()
            return
        for task in (self._preparing, self._checking):
            if task is not None:
                task.cancel()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        self._end(CANCELLED)

    def pause(self) -> None:
        """The client does not read: no more is read for it."""
        if self._sending is not None:
            self._sending.pause()

    def resume(self) -> None:
        """It reads again."""
        if self._sending is not None and self._checking is None:
            self._sending.resume()

    def _explained(self) -> Sequence[Header]:
        """Where it went and what was forecast, for a client that asks for it."""
        record = self._record
        if record is None or not any(name.lower() == EXPLAIN for name, _ in self._http.headers):
            return ()
        found = [(b"x-block-instance", self._url.encode())]
        if record.forecast is not None:
            found.append((b"x-block-forecast", b"ttft=%.3f, e2e=%.3f" % (record.forecast.ttft, record.forecast.e2e)))
        return found

    @property
    def _url(self) -> str:
        return self._server.url
