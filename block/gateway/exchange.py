"""One request of a client: placed by the dispatcher, sent to its server, the answer passed on as its bytes come.

Until the first byte of an answer's body has come, of a stream its first event, nothing is sent to the client, and the
request can begin anew elsewhere. An answer in JSON is passed on once it is whole.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

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
from block.gateway.server_connections import NotHTTP, OutOfResources, Sending, ServerSilent, TransportError
from block.gateway.sse import Events
from block.gateway.upstreams import Upstream
from block.gateway.watch import Watch

log = logging.getLogger(__name__)

EXPLAIN = b"x-block-explain"
"""A request with this header is told in its answer's where it went."""

_STREAMS = re.compile(rb'"stream"\s*:\s*true')

MISSES = "its forecast misses its objective"
TURNED_AWAY = (502, 503)
"""Statuses by which a server says that another one may serve the request."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all exchanges of a gateway have in common."""

    upstreams: Sequence[Upstream]
    dispatcher: Dispatcher
    clock: Clock
    metrics: Metrics
    watch: Watch
    slo: Slo
    queue: Queue
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """What goes on for no request in particular; an event loop keeps no hold of its tasks."""


class Exchange:
    """The request `http` of `client`. `place` sends it on its way; all else follows from what its server and its client
    do.

    generates: whether its answer is a response of a model's, which has tokens.
    """

    __slots__ = (
        "_around",
        "_body",
        "_checking",
        "_client",
        "_counted",
        "_events",
        "_generates",
        "_head",
        "_held",
        "_http",
        "_kept",
        "_objectives",
        "_on_usage",
        "_over",
        "_preparing",
        "_record",
        "_sending",
        "passing",
        "streams",
    )

    def __init__(
        self, around: Surroundings, client: ClientConnection, http: HTTPRequest, *, generates: bool = True
    ) -> None:
        self._around = around
        self._client: ClientConnection | None = client
        self._http = http
        self._generates = generates
        self._body = http.body
        self._record: RequestRecord | None = None
        self._sending: Sending | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._kept: tuple[int, Sequence[Header], bytes, int | None] | None = None  # the answer, if none is better
        self._on_usage: Callable[[PromptUsage], None] | None = None
        self.streams = generates and _STREAMS.search(http.body) is not None
        self.passing = False
        self._over = False  # the dispatcher and the metrics have been told how it ended
        client.serving = self

    # ------------------------------------------------------------------------------------------------- on its way there

    def prepare(self, task: asyncio.Task[None]) -> None:
        """It is not `place`d before this is done."""
        self._preparing = task

    def place(
        self,
        request: Request,
        body: bytes,
        by: Policy | None = None,
        among: Collection[int] | None = None,
        objectives: Objectives | None = None,
        on_usage: Callable[[PromptUsage], None] | None = None,
    ) -> None:
        """Send it where the dispatcher says, as `request`, with `body`; or let it wait, or refuse it, if it would miss
        its `objectives`.

        by: another policy than the dispatcher's. among: the only instances that may serve it; None: all. on_usage: told
        what its answer says of its prompt.
        """
        self._preparing = None
        self._body = body
        self._on_usage = on_usage
        self._objectives = objectives
        queue, now = self._around.queue, self._around.clock.now()
        behind_others = objectives is not None and len(queue) > 0
        if behind_others or not self._try(request, by, among, None):
            queue.add(lambda: self._try(request, by, among, now))

    def _try(
        self, request: Request, by: Policy | None, among: Collection[int] | None, waits_since: float | None
    ) -> bool:
        """Place it, unless its forecast misses; returns whether it need not be tried again.

        waits_since: when it began to wait, if it does.
        """
        around, slo = self._around, self._around.slo
        if self._over:  # the client has gone
            return True
        try:
            record = around.dispatcher.arrived(request, around.clock.now(), by, among)
            late_s = 0.0 if self._objectives is None else self._objectives.missed_by_s(record.forecast)
            if late_s > 0 and record.status == "pending" and slo.missed != SERVE:
                around.dispatcher.refused(record, MISSES, around.clock.now())
                waited_s = 0.0 if waits_since is None else around.clock.now() - waits_since
                if slo.missed == QUEUE and waited_s < slo.queue_s:
                    return False
                self._turn_away(late_s)
                return True
            self._record = record
            self._attempt(record)
        except Exception as error:
            self._crashed(error)
        return True

    def _turn_away(self, late_s: float) -> None:
        """It would be too late."""
        self._over = True
        self._around.metrics.refused_unplaced(429)
        self._around.metrics.judged(OUTCOME_REFUSED)
        client, self._client = self._client, None
        if client is not None:
            wait = (b"Retry-After", b"%d" % max(math.ceil(late_s), 1))
            client.reply(429, [*JSON, wait], error_json(429, f"{MISSES} by {late_s:.1f} s"))

    def _attempt(self, record: RequestRecord) -> None:
        around = self._around
        if record.status != "pending":
            self._give_up(503, record.error or "")
            return
        around.metrics.attempted()
        around.dispatcher.delivered(record, around.clock.now())
        self._held: list[bytes] = []
        self._counted = False
        self.passing = False
        self._events: Events | None = None
        pool = around.upstreams[record.instance_id].pool
        self._sending = pool.send(self, self._http, self._body)

    # ------------------------------------------------------------------------------------------------- on its way back

    def answer_begins(self, head: AnswerHead) -> None:
        """The status and headers of its answer: as of `Asking`, like the next three."""
        self._head = head
        if head.status == 200 and head.kind.startswith(b"text/event-stream") and not head.packed:
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
            self._ends()
        except Exception as error:
            self._crashed(error)

    def lost(self, error: TransportError) -> None:
        """It will not be whole."""
        self._sending = None
        if self._checking is not None:
            self._checking.cancel()
            self._checking = None
        try:
            self._loses(error)
        except Exception as bug:
            self._crashed(bug)

    @property
    def _whole(self) -> bool:
        """Whether the answer is passed on once it is whole: errors, and JSON."""
        head = self._head
        return head.status >= 400 or head.kind.startswith(b"application/json")

    def _pass_on(self, data: bytes) -> None:
        events = self._events
        if not self.passing:
            if events is not None:
                first = events.first(data)
                if first is None:
                    return
                if events.failed:
                    self._check(f"{self._url}: began with an error", gone_only=True, data=first)
                    return
                data = first
            elif self._whole:
                self._held.append(data)
                return
            self._begin_passing()
        if events is not None:
            events.note(data)
            record = self._record
            if record is not None and not self._counted:
                record.output_tokens = events.count  # about, as long as nobody has counted them
            self._note(data)
        client = self._client
        if client is not None:
            client.write(data)
        if events is not None and events.done and not self._over:
            self._finish()

    def _begin_passing(self) -> None:
        record = self._record
        assert record is not None
        self.passing = True
        now = self._around.clock.now()
        self._around.dispatcher.first_token(record, now)
        if self._events is not None:
            self._around.watch.began(record.instance_id, now - record.dispatched)
        if self._client is not None:
            self._client.begin(self._head.status, [*self._head.headers, *self._explained()])

    def _ends(self) -> None:
        events = self._events
        if not self.passing and events is not None and self._checking is None:
            if events.held:
                self._begin_passing()
                if self._client is not None:
                    self._client.write(events.held)
            elif self._head.length is None or self._head.length > 0:
                self._begin_passing()
        if self._checking is not None:  # which goes on when it is done
            return
        if self.passing:
            client, self._client = self._client, None
            if not self._over:
                self._finish()
            if client is not None:
                client.end()
            return
        head = self._head
        body = b"".join(self._held)
        unsent = head.length if self._http.method == b"HEAD" or head.status == 304 else None
        self._kept = head.status, [*head.headers, *self._explained()], body, unsent
        if head.status >= 500:
            self._check(f"{self._url}: answered {head.status}", gone_only=head.status not in TURNED_AWAY)
        else:
            self._answered()

    def _answered(self) -> None:
        """Pass on the answer that is kept, as what the server says."""
        assert self._kept is not None
        status, _, body, _ = self._kept
        if status >= 400:
            self._refuse(f"{self._url}: answered {status}")
        else:
            self._note(body)
            self._finish()
        self._reply()

    def _reply(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._kept is not None:
            client.reply(*self._kept)

    def _note(self, answer: bytes) -> None:
        """Note what an answer says of its tokens; in the record, what was cached, in tokens as the gateway counts."""
        record = self._record
        if record is None or not self._generates or b"_tokens" not in answer:
            return
        tokens, said = completion_tokens(answer), prompt_usage(answer)
        if tokens is not None:
            record.output_tokens = tokens
            self._counted = True
        if said is not None:
            if said.cached is not None:
                record.cached_tokens = round(said.cached / said.tokens * record.request.prompt_tokens)
            if self._on_usage is not None:
                self._on_usage(said)
                self._on_usage = None

    # -------------------------------------------------------------------------------------------------- what goes wrong

    def _loses(self, error: TransportError) -> None:
        record = self._record
        assert record is not None
        text = f"{self._url}: {error}"
        if self._over:  # the answer was whole, but for its last bytes
            if (client := self._client) is not None:
                self._client = None
                client.end()
        elif self.passing:
            self._break_off(text)
        elif isinstance(error, ServerSilent):  # the next one would be as slow
            self._kept = 504, JSON, error_json(504, text), None
            self._refuse(text)
            self._reply()
        elif isinstance(error, OutOfResources):
            text = f"the gateway cannot open a connection: {error}"
            self._kept = 503, [*JSON, (b"Retry-After", b"1")], error_json(503, text), None
            self._refuse(text)
            self._reply()
        else:  # what is no HTTP tells nothing of the next request
            self._again(text, gone=not isinstance(error, NotHTTP))

    def _again(self, why: str, *, gone: bool) -> None:
        """Begin anew elsewhere, if there is another."""
        record = self._record
        assert record is not None
        self._around.dispatcher.failed(record, why, self._around.clock.now(), gone=gone)
        self._attempt(record)

    def _break_off(self, why: str) -> None:
        """End what cannot go on, with an event that says so where one can be written. The server may be gone."""
        self._refuse(why)
        client, self._client = self._client, None
        if client is not None and self._events is not None:
            client.write(error_event(502, why))
            client.end()
        elif client is not None:
            client.cut()
        assert self._record is not None
        watched = asyncio.get_running_loop().create_task(self._look_after(self._record.instance_id, why))
        self._around.tasks.add(watched)
        watched.add_done_callback(self._around.tasks.discard)

    async def _look_after(self, instance_id: int, why: str) -> None:
        """A server that broke off may have died, and even be back already: then what was known of it is of nobody."""
        if not await self._around.upstreams[instance_id].healthy():
            self._around.dispatcher.instance_down(instance_id, why, self._around.clock.now())

    def _check(self, said: str, *, gone_only: bool, data: bytes | None = None) -> None:
        """A server answered with an error: find out whether it is well. If not, or if the error is that it takes no
        more, another may serve the request; else the answer counts.

        A vLLM server whose engine has died says 500, as it does when the request is at fault. data: of a stream that
        begins with an error, what has come.
        """
        if data is not None and self._sending is not None:
            self._sending.pause()
        self._checking = asyncio.get_running_loop().create_task(self._go_on(said, gone_only, data))

    async def _go_on(self, said: str, gone_only: bool, data: bytes | None) -> None:
        record = self._record
        assert record is not None
        well = await self._around.upstreams[record.instance_id].healthy()
        self._checking = None
        try:
            if not well or not gone_only:
                if self._sending is not None:
                    self._sending.cancel()
                    self._sending = None
                self._again(said if well else f"{said}, and is not healthy", gone=not well)
            elif data is None:
                self._answered()
            else:
                self._begin_passing()
                if self._client is not None:
                    self._client.write(data)
                assert self._events is not None
                self._events.note(data)
                if self._sending is not None:
                    self._sending.resume()
                else:
                    self._ends()
        except Exception as error:
            self._crashed(error)

    def _crashed(self, error: Exception) -> None:
        """A mistake of the policy's, or of the gateway's: one request fails, and no other."""
        if isinstance(error, UserFault):
            log.error("%s", error)  # which says where
        else:
            log.exception("a request failed", exc_info=error)
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        record, around = self._record, self._around
        if record is not None and not self._over:
            self._over = True
            if record.status == "pending":
                around.dispatcher.cancelled(record, around.clock.now())
            around.metrics.ended(record, FAILED, self._generates)
        client, self._client = self._client, None
        if client is not None:
            if client.begun:
                client.cut()
            else:
                client.reply(500, JSON, error_json(500, "the gateway failed; its log says why"))

    # ------------------------------------------------------------------------------------------------- how it ended

    def _finish(self) -> None:
        """The response is whole."""
        record, around = self._record, self._around
        assert record is not None
        events = self._events
        if events is not None and not self._counted:
            record.output_tokens = max(events.count - events.done, 0)  # without usage, a guess
        if events is not None and events.failed:
            self._refuse(f"{self._url}: the stream tells of an error")
            return
        self._over = True
        around.dispatcher.finished(record, around.clock.now())
        around.metrics.ended(record, OK, self._generates)
        if self._objectives is not None and (met := self._objectives.met(record)) is not None:
            around.metrics.judged(OUTCOME_MET if met else OUTCOME_MISSED)

    def _refuse(self, why: str) -> None:
        """It cannot be served."""
        record, around = self._record, self._around
        assert record is not None
        around.dispatcher.refused(record, why, around.clock.now())
        self._count_failure()

    def _give_up(self, status: int, why: str) -> None:
        """No server is left to try; the last answer that was to be passed on is, or else an error."""
        if self._kept is None:
            self._kept = status, JSON, error_json(status, why), None
        self._count_failure()
        self._reply()

    def _count_failure(self) -> None:
        self._over = True
        assert self._record is not None
        refused = self._kept is not None and 400 <= self._kept[0] < 500
        self._around.metrics.ended(self._record, REFUSED if refused else FAILED, self._generates)

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
        self._over = True
        if self._record is not None:
            self._around.dispatcher.cancelled(self._record, self._around.clock.now())
            self._around.metrics.ended(self._record, CANCELLED, self._generates)

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
        assert self._record is not None
        return self._around.upstreams[self._record.instance_id].url
