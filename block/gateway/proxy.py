"""One request of a client, proxied to the instance that the dispatcher chose; bytes pass unchanged.

Until the first byte of an answer's body has come, nothing is sent to the client, and the request can begin anew
elsewhere. An answer that is no stream is passed on once it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from block.cluster.instance import InstanceFailed, RequestFailed
from block.core.clock import Clock
from block.core.types import RequestRecord
from block.dispatch.core import Dispatcher
from block.gateway.openai import ERROR_EVENT, PromptUsage, completion_tokens, error_event, error_response, prompt_usage
from block.gateway.transport import Answer, NotHTTP, ServerSilent, TransportError
from block.gateway.upstreams import Upstream

TURNED_AWAY = (502, 503)
"""Statuses by which a server says that another one may serve the request."""

# Headers of a message as it was sent to us, not of what is passed on; the body of a request was read and unpacked.
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
    }
)
_OF_REQUESTS = frozenset(name.encode() for name in _HOP_BY_HOP | {"host", "content-encoding", "expect"})


class ProxiedRequest:
    """The request `http`, whose body goes on as `body`. `deliver` is for the dispatcher; when it is done, `reply` is
    what the client got, or is to get.

    attempted: told of each attempt.
    """

    def __init__(
        self,
        http: web.Request,
        upstreams: Sequence[Upstream],
        dispatcher: Dispatcher,
        clock: Clock,
        body: bytes,
        attempted: Callable[[], None],
    ) -> None:
        self._http = http
        self._upstreams = upstreams
        self._dispatcher = dispatcher
        self._clock = clock
        self._body = body
        self._attempted = attempted
        self.reply: web.StreamResponse | None = None
        self.record: RequestRecord | None = None
        self.client_gone = False
        self.usage: PromptUsage | None = None
        """What the answer has said of the prompt."""

    async def deliver(self, record: RequestRecord) -> None:
        """Have its instance answer the client, and note in `record` when it did, and its tokens.

        InstanceFailed if it did not answer, so that another one may; RequestFailed if it refused, or broke off after
        the first byte.
        """
        self._attempted()
        self.record = record
        upstream = self._upstreams[record.instance_id]
        http = self._http
        try:
            answer = await upstream.transport.post(http.rel_url.raw_path_qs, request_headers(http), self._body)
        except TransportError as error:
            raise self._failure(upstream, error) from error
        try:
            if answer.status == 200 and answer.headers.get("Content-Type", "").startswith("text/event-stream"):
                await self._stream(upstream, answer, record)
            else:
                await self._whole(upstream, answer, record)
        finally:
            answer.close()  # unless it was read to its end, this closes the connection, which cancels the request there

    async def _whole(self, upstream: Upstream, answer: Answer, record: RequestRecord) -> None:
        try:
            body = await answer.read()
        except TransportError as error:
            raise self._failure(upstream, error) from error
        status = answer.status
        self.reply = web.Response(status=status, headers=answer_headers(answer.headers), body=body)
        if status >= 500:
            await self._suspect(upstream, f"answered {status}", turned_away=status in TURNED_AWAY)
        if status >= 400:
            raise RequestFailed(f"{upstream.url}: answered {status}")
        record.finished = self._clock.now()
        record.output_tokens = completion_tokens(body) or 0
        self._note_usage(record, body)

    def _note_usage(self, record: RequestRecord, answer: bytes) -> None:
        """Note what an answer says of its prompt; in the record, what was cached, in tokens as the gateway counts."""
        said = prompt_usage(answer)
        if said is not None:
            self.usage = said
            if said.cached is not None:
                record.cached_tokens = round(said.cached / said.tokens * record.request.prompt_tokens)

    async def _stream(self, upstream: Upstream, answer: Answer, record: RequestRecord) -> None:
        chunk = await self._read(upstream, answer)
        if chunk.startswith(ERROR_EVENT):
            await self._suspect(upstream, "began with an error", turned_away=False)
        self._dispatcher.first_token(record, self._clock.now())
        reply = self.reply = web.StreamResponse(headers=answer_headers(answer.headers))
        tokens: int | None = None
        events = 0
        failed = False
        try:
            await reply.prepare(self._http)
            while chunk:
                await reply.write(chunk)
                failed = failed or chunk.startswith(ERROR_EVENT)
                events += chunk.count(b"\n\n")
                tokens = completion_tokens(chunk) or tokens
                self._note_usage(record, chunk)
                chunk = await self._read(upstream, answer)
            record.finished = self._clock.now()
            await reply.write_eof()
        except (InstanceFailed, RequestFailed) as error:
            await self._break_off(reply, str(error))
            raise RequestFailed(str(error)) from error
        except ConnectionError as error:
            raise self._client_gone() from error
        record.output_tokens = max(events - 1, 0) if tokens is None else tokens  # without usage, a guess
        if failed:
            raise RequestFailed(f"{upstream.url}: the stream tells of an error")

    async def _read(self, upstream: Upstream, answer: Answer) -> bytes:
        """What has come of the body; nothing at its end."""
        try:
            return await answer.read_some()
        except TransportError as error:
            raise self._failure(upstream, error) from error

    async def _suspect(self, upstream: Upstream, said: str, *, turned_away: bool) -> None:
        """InstanceFailed if a server that answered with an error is not well, or the error is that it is overloaded.

        A vLLM server whose engine has died says 500, as it does when the request is at fault.
        """
        if not await upstream.healthy():
            raise InstanceFailed(f"{upstream.url}: {said}, and is not healthy")
        if turned_away:
            raise InstanceFailed(f"{upstream.url}: {said}", gone=False)

    async def _break_off(self, reply: web.StreamResponse, why: str) -> None:
        """End a stream that cannot go on with an event that says so."""
        try:
            await reply.write(error_event(502, why))
            await reply.write_eof()
        except ConnectionError as error:
            raise self._client_gone() from error

    def _client_gone(self) -> RequestFailed:
        self.client_gone = True
        return RequestFailed("the client went away")

    def _failure(self, upstream: Upstream, error: TransportError) -> InstanceFailed | RequestFailed:
        """What an error on the way to or from a server means for it and for the request."""
        text = f"{upstream.url}: {error}"
        if isinstance(error, ServerSilent):  # the next one would be as slow
            if self.reply is None or not self.reply.prepared:
                self.reply = error_response(504, text)
            return RequestFailed(text)
        # What is no HTTP is an error of the server's, but tells nothing of the next request.
        return InstanceFailed(text, gone=not isinstance(error, NotHTTP))


def request_headers(http: web.BaseRequest) -> list[tuple[bytes, bytes]]:
    """The headers of a request that go on to a server."""
    dropped = _OF_REQUESTS
    named = http.headers.get("Connection")
    if named is not None:
        dropped = dropped.union(name.strip().lower().encode() for name in named.split(","))
    return [(name, value) for name, value in http.raw_headers if name.lower() not in dropped]


def answer_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The headers of an answer that go on to the client."""
    dropped = _HOP_BY_HOP
    named = headers.get("Connection")
    if named is not None:
        dropped = dropped.union(name.strip().lower() for name in named.split(","))
    return CIMultiDict([(name, value) for name, value in headers.items() if name.lower() not in dropped])
