"""What takes a while and is answered whole: changes of servers, and of the list of them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import aiohttp

from block.gateway.client_connections import ClientConnection
from block.gateway.discovery import Discovery
from block.gateway.fleet import Fleet
from block.gateway.http1 import Header, HTTPRequest, passed_on
from block.gateway.openai import JSON, error_json
from block.gateway.upstreams import Upstream
from block.gateway.urls import every_address, server_url

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """A whole one."""

    status: int
    headers: Sequence[Header]
    body: bytes

    @staticmethod
    def of(status: int, told: object) -> Answer:
        """`told` as JSON."""
        return Answer(status, JSON, json.dumps(told).encode())

    @staticmethod
    def error(status: int, message: str) -> Answer:
        """As OpenAI words it."""
        return Answer(status, JSON, error_json(status, message))


class Errand:
    """Has `client` get the answer once it is there. What was begun is done even if nobody waits for it."""

    def __init__(self, client: ClientConnection, answer: Coroutine[Any, Any, Answer]) -> None:
        client.serving = self
        self._client = client
        self._task = asyncio.get_running_loop().create_task(self._run(answer))

    async def _run(self, answer: Coroutine[Any, Any, Answer]) -> None:
        try:
            found = await answer
        except Exception:
            log.exception("a request failed")
            found = Answer.error(500, "the gateway failed; its log says why")
        self._client.reply(*found)

    def client_left(self) -> None:
        """It is done nevertheless."""

    def pause(self) -> None:
        """Answers are short."""

    def resume(self) -> None:
        """Answers are short."""


async def tell_everyone(
    session: aiohttp.ClientSession,
    servers: Sequence[Upstream],
    http: HTTPRequest,
    longest_s: float,
    then: Callable[[Upstream], Awaitable[None]],
) -> Answer:
    """Send a request to all servers; the answer is that of the first that refuses, or else of the first.

    longest_s: how long a server may be silent. then: is done for each before this returns.
    """
    answers = await asyncio.gather(*(_ask(session, one.url, http, longest_s) for one in servers))
    await asyncio.gather(*map(then, servers))
    refused = [one for one in answers if one.status >= 300]
    return next(iter([*refused, *answers]), Answer.error(503, "there is no server"))


async def _ask(session: aiohttp.ClientSession, url: str, http: HTTPRequest, longest_s: float) -> Answer:
    asked = session.request(
        http.method.decode(),
        f"{url}{http.target.decode('latin-1')}",
        data=http.body or None,
        headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in http.headers],
        allow_redirects=False,
        timeout=aiohttp.ClientTimeout(sock_connect=longest_s, sock_read=longest_s),
    )
    try:
        async with asked as answer:
            body = await answer.read()
            kept = [one for one in passed_on(answer.raw_headers) if one[0].lower() != b"content-encoding"]
            return Answer(answer.status, kept, body)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        return Answer.error(502, f"{url}: {error}")


async def change_list(http: HTTPRequest, servers: Mapping[int, Upstream], discovery: Discovery, fleet: Fleet) -> Answer:
    """What is asked of /servers: GET tells of all, POST adds one, DELETE has one leave once its requests are done."""
    if http.method in (b"GET", b"HEAD"):
        return Answer.of(200, {"servers": [fleet.told(one) for one in servers.values()]})
    if http.method not in (b"POST", b"DELETE"):
        refused = Answer.error(405, f"{http.method.decode()} /servers: choose from GET, POST and DELETE")
        return refused._replace(headers=[*refused.headers, (b"Allow", b"GET, HEAD, POST, DELETE")])
    named = _named(http)
    if named is None:
        return Answer.error(400, 'give the server as {"url": "http://host:port"}, or as ?url=http://host:port')
    try:
        url = server_url(named, "url")
    except ValueError as error:
        return Answer.error(400, str(error))
    if every_address(url):
        return Answer.error(400, f"url={url}: give each address, or the name in gateway.urls")
    if http.method == b"POST":
        await discovery.change(url, there=True)
        await fleet.follow(discovery.urls())
        found = _at(url, servers)
        return Answer.error(409, f"{url} was taken away again") if found is None else Answer.of(201, fleet.told(found))
    if _at(url, servers) is None:  # another worker may have been told of it
        await discovery.look()
    if url not in discovery.urls() and _at(url, servers) is None:
        return Answer.error(404, f"there is no server {url}")
    await discovery.change(url, there=False)
    found = _at(url, servers)
    await fleet.follow(discovery.urls())
    return Answer.of(202, {"url": url, "state": "leaving"} if found is None else fleet.told(found))


def _at(url: str, servers: Mapping[int, Upstream]) -> Upstream | None:
    return next((one for one in servers.values() if one.url == url), None)


def _named(http: HTTPRequest) -> str | None:
    """The URL in the query, or in the body."""
    query = parse_qs(http.target.partition(b"?")[2].decode("latin-1"))
    named: object = query.get("url", [None])[0]
    if named is None:
        try:
            fields = json.loads(http.body)
        except (ValueError, RecursionError):
            return None
        named = fields.get("url") if isinstance(fields, dict) else None
    return named if isinstance(named, str) and named else None
