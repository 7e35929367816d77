"""Traces: spans get to a collector, servers' spans hang below them, and one that is not there costs no request."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from mock_servers import (
    ASKED,
    EVENTS,
    STREAMED,
    Mock,
    PluginMock,
    cut,
    eventually,
    hang,
    run,
    running_gateway,
    says,
    stream,
)
from test_gateway_command import ends_in_one_line

from block.backends.launch import free_ports
from block.dispatch import policies
from block.gateway.admission import Slo

pytest.importorskip("opentelemetry.sdk")
pb = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
from block.gateway import tracing  # noqa: E402 — it needs them

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
GIVEN = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("NO_PROXY", "*")


@dataclass
class Span:
    """As it came."""

    name: str
    kind: int
    trace: str
    id: str
    parent: str
    began: int
    ended: int
    failed: bool
    said: str
    attributes: dict[str, Any]


@dataclass
class Collector:
    """Takes OTLP over HTTP."""

    status: int = 200
    url: str = ""
    services: set[str] = field(default_factory=set)
    spans: list[Span] = field(default_factory=list)

    def take(self, asked: Any) -> None:
        for of_resource in asked.resource_spans:
            self.services |= {
                one.value.string_value for one in of_resource.resource.attributes if one.key == "service.name"
            }
            for scope in of_resource.scope_spans:
                self.spans += [_read(span) for span in scope.spans]

    async def answer(self, http: web.Request) -> web.Response:
        if self.status == 200:
            self.take(pb.ExportTraceServiceRequest.FromString(await http.read()))
        return web.Response(status=self.status)

    async def got(self, count: int) -> tuple[Span, ...]:
        """So many spans, as they began, once they are there."""
        await eventually(lambda: len(self.spans) >= count)
        assert len(self.spans) == count
        return tuple(sorted(self.spans, key=lambda span: (span.began, span.ended < span.began, -span.ended)))


def _read(span: Any) -> Span:
    values = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}
    ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
    times = span.start_time_unix_nano, span.end_time_unix_nano
    return Span(span.name, span.kind, *ids, *times, span.status.code == 2, span.status.message, values)


@asynccontextmanager
async def collecting(**keys: Any) -> AsyncIterator[Collector]:
    collector = Collector(**keys)
    app = web.Application()
    app.router.add_post("/v1/traces", collector.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/traces"
    yield collector
    await runner.cleanup()


def header(mock: Mock, name: str = "traceparent") -> str:
    return mock.seen[-1][1][name]


def sent(mock: Mock) -> tuple[str, str, bool]:
    """The trace that the server was told last, the span that its own hang below, and whether they are sampled."""
    version, trace, span, flags = header(mock).split("-")
    assert version == "00"
    return trace, span, bool(int(flags, 16) & 1)


def test_the_spans_of_a_request_hang_together_and_the_server_s_hang_below() -> None:
    async def main() -> None:
        async with (
            collecting() as collector,
            running_gateway([PluginMock(stream)], policies.Block(), otlp_traces_endpoint=collector.url) as gateway,
        ):
            asked = STREAMED.replace(b"}}", b'},"max_tokens":5}')
            assert (await gateway.ask(asked, "/v1/completions?key=secret", headers=GIVEN))[0] == 200
            server, choice, proxy = await collector.got(3)
            mock = gateway.mocks[0]
            assert (server.trace, server.parent, server.name, server.kind) == (TRACE, PARENT, "POST /v1/completions", 2)
            assert (choice.trace, choice.parent, choice.name, choice.kind) == (TRACE, server.id, "choice", 1)
            assert (proxy.trace, proxy.parent, proxy.name, proxy.kind) == (TRACE, server.id, "proxy", 3)
            assert server.began == choice.began <= choice.ended <= proxy.began < proxy.ended <= server.ended
            assert sent(mock) == (TRACE, proxy.id, True)
            assert header(mock, "tracestate") == "vendor=1"
            assert len(mock.seen[0][1].getall("traceparent")) == 1
            assert collector.services == {"block-gateway"}
            assert not any(span.failed for span in (server, choice, proxy))
            usage = {"gen_ai.usage.input_tokens": 3, "gen_ai.usage.output_tokens": 5, "gen_ai.request.model": "m"}
            assert server.attributes == {
                "http.request.method": "POST",
                "http.route": "/v1/completions",
                "url.path": "/v1/completions",
                "url.scheme": "http",
                "client.address": "127.0.0.1",
                "http.response.status_code": 200,
                "block.outcome": "ok",
                **usage,
            }
            assert choice.attributes == {
                "block.policy": "Block",
                "block.server": mock.url,
                "block.forecast.ttft": pytest.approx(1.0),
                "block.forecast.e2e": pytest.approx(5.0),
            }
            first, chunk = (
                proxy.attributes.pop(name)
                for name in ("block.time_to_first_byte", "gen_ai.response.time_to_first_chunk")
            )
            assert first > 0
            assert 0 < chunk < (proxy.ended - proxy.began) / 1e9 + 0.1
            assert proxy.attributes == {
                "http.request.method": "POST",
                "http.response.status_code": 200,
                "server.address": "127.0.0.1",
                "server.port": mock.port,
                "gen_ai.operation.name": "text_completion",
                **usage,
            }

    run(main())


def test_each_attempt_has_spans_of_its_own_and_tells_its_error(tmp_path: Path) -> None:
    async def main() -> None:
        mocks = [Mock(says(503)), Mock(), Mock()]
        keys = {"access_log": str(tmp_path / "log")}
        async with (
            collecting() as collector,
            running_gateway(mocks, started=[0, 2], otlp_traces_endpoint=collector.url, **keys) as gateway,
        ):
            gateway.dispatcher.instance_up(1, 0.0)  # which is not there
            assert (await gateway.ask(b"{}", "/v1/chat/completions"))[0] == 200
            spans = await collector.got(7)
            server, *below = spans
            assert [span.name for span in below] == ["choice", "proxy"] * 3
            assert {span.parent for span in below} == {server.id}
            assert (server.parent, server.failed) == ("", False)
            one, two, three = below[1::2]
            assert (one.failed, one.attributes["error.type"], one.said) == (
                True,
                "503",
                f"{mocks[0].url}: answered 503",
            )
            assert (two.failed, two.attributes["error.type"]) == (True, "ConnectionLost")
            assert "http.response.status_code" not in two.attributes
            assert (three.failed, three.attributes["http.request.resend_count"]) == (False, 2)
            assert [span.attributes["server.port"] for span in (one, two, three)] == [mock.port for mock in mocks]
            for attempt, mock in ((one, mocks[0]), (three, mocks[2])):
                assert sent(mock) == (server.trace, attempt.id, True)
            for before, after in zip(below[1:-1:2], below[2::2], strict=True):
                assert before.ended == after.began  # the next choice
        assert f'"trace_id":"{server.trace}"' in (tmp_path / "log").read_text()

    run(main())


def test_requests_that_fail_are_refused_or_given_up_say_so() -> None:
    async def main() -> None:
        async with (
            collecting() as collector,
            running_gateway([Mock(says(500))], otlp_traces_endpoint=collector.url, admin=True) as gateway,
        ):
            mock = gateway.mocks[0]

            async def ends(count: int) -> list[tuple[Any, ...]]:
                spans = await collector.got(count)
                collector.spans.clear()
                names = ("block.outcome", "http.response.status_code", "error.type")
                return [(span.name, span.failed, *map(span.attributes.get, names)) for span in spans]

            choice = ("choice", False, None, None, None)
            await gateway.ask()
            proxy = ("proxy", True, None, 500, "500")
            assert await ends(3) == [("POST /v1/completions", True, "failed", 500, "500"), choice, proxy]
            mock.answer = says(422)
            await gateway.ask()
            proxy = ("proxy", True, None, 422, "422")
            assert await ends(3) == [("POST /v1/completions", False, "refused", 422, None), choice, proxy]
            mock.answer = cut(EVENTS[0])
            await gateway.ask(STREAMED)
            proxy = ("proxy", True, None, 200, "ConnectionReset")
            assert await ends(3) == [
                ("POST /v1/completions", True, "failed", 200, "ConnectionReset"),
                *(choice, proxy),
            ]
            await gateway.ask(b"{")
            assert await ends(1) == [("POST /v1/completions", False, "refused", 400, None)]
            mock.answer = hang
            asked = asyncio.create_task(gateway.ask())
            await eventually(lambda: gateway.in_flight() == 1 and len(mock.seen) == 4)
            asked.cancel()
            proxy = ("proxy", False, None, None, None)
            assert await ends(3) == [("POST /v1/completions", False, "cancelled", None, None), choice, proxy]
            mock.answer = says(200, b"{}")
            await gateway.ask(b"{}", "/v1/embeddings")
            proxy = ("proxy", False, None, 200, None)
            assert await ends(3) == [("POST", False, "ok", 200, None), choice, proxy]
            await gateway.ask(b"{}", "/sleep")
            assert await ends(1) == [("POST", False, "ok", 200, None)]
            await gateway.metrics()
            async with gateway.client.get(gateway.url + "/health"):
                pass
        assert collector.spans == []

    run(main())


def test_a_request_that_is_refused_by_its_forecast_shows_the_choice() -> None:
    async def main() -> None:
        slo = Slo(e2e_s=4.0, missed="refuse")
        async with (
            collecting() as collector,
            running_gateway([PluginMock()], policies.Block(), slo=slo, otlp_traces_endpoint=collector.url) as gateway,
        ):
            assert (await gateway.ask())[0] == 429
            server, choice = await collector.got(2)
            assert server.attributes["http.response.status_code"] == 429
            assert choice.attributes["block.forecast.e2e"] == pytest.approx(5.0)

    run(main())


def test_requests_sent_ahead_have_traces_of_their_own() -> None:
    async def main() -> None:
        async with (
            collecting() as collector,
            running_gateway([Mock()], otlp_traces_endpoint=collector.url) as gateway,
        ):
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(ASKED)
            given = b"traceparent: 00-%s-%s-01\r\n" % (TRACE.encode(), PARENT.encode())
            reader, writer = await gateway.connect()
            writer.write(head + given + b"\r\n" + ASKED + head + b"Connection: close\r\n\r\n" + ASKED)
            await reader.read()
            writer.close()
            spans = await collector.got(6)
            assert [span.trace == TRACE for span in spans] == [True] * 3 + [False] * 3
            assert len({span.trace for span in spans}) == 2

    run(main())


@pytest.mark.parametrize("given", [{}, {"traceparent": "00-xyz-01", "tracestate": "vendor=1"}], ids=["none", "unsound"])
def test_a_context_that_is_none_begins_a_trace(given: dict[str, str]) -> None:
    async def main() -> None:
        async with collecting() as collector, running_gateway([Mock()], otlp_traces_endpoint=collector.url) as gateway:
            await gateway.ask(headers=given)
            server, _, proxy = await collector.got(3)
            assert server.parent == ""
            assert sent(gateway.mocks[0]) == (server.trace, proxy.id, True)
            assert "tracestate" not in gateway.mocks[0].seen[0][1]

    run(main())


def test_what_is_not_sampled_is_not_sent_and_its_context_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    path = tmp_path / "log"

    async def main() -> None:
        async with (
            collecting() as collector,
            running_gateway([Mock()], otlp_traces_endpoint=collector.url, access_log=str(path)) as gateway,
        ):
            await gateway.ask()
            assert not sent(gateway.mocks[0])[2]
            await gateway.ask(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
            assert sent(gateway.mocks[0])[::2] == (TRACE, False)
            await gateway.ask(headers=GIVEN)  # whose client has it sampled
            await collector.got(3)
        assert path.read_text().count('"trace_id":null') == 2

    run(main())


def test_switched_off_the_client_s_context_passes_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway:
            await gateway.ask(headers=GIVEN)
            assert {name: header(gateway.mocks[0], name) for name in GIVEN} == GIVEN
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
        async with collecting() as collector, running_gateway([Mock()], otlp_traces_endpoint=collector.url) as gateway:
            await gateway.ask(headers=GIVEN)
            assert {name: header(gateway.mocks[0], name) for name in GIVEN} == GIVEN
            await gateway.ask()
            assert "traceparent" not in gateway.mocks[0].seen[1][1]
        assert collector.spans == []

    run(main())


def test_a_collector_that_takes_nothing_costs_spans_and_no_request(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with (
            collecting(status=400) as collector,
            running_gateway([Mock()], otlp_traces_endpoint=collector.url) as gateway,
        ):

            async def lost(count: int) -> None:
                while (await gateway.metrics()).get("block_spans_lost_total", 0) != count:
                    await asyncio.sleep(0.02)

            assert (await gateway.ask())[0] == 200
            await lost(3)
            assert (await gateway.ask())[0] == 200
            await lost(6)
            collector.status = 200
            assert (await gateway.ask())[0] == 200
            await collector.got(3)
            await eventually(lambda: len(said(caplog)) == 2)
        assert said(caplog) == [
            "traces: Failed to export spans batch code: 400, reason: Bad Request",
            "traces: spans are taken again; 6 are lost",
            "6 spans are lost",
        ]

    run(main())


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_is_not_there_holds_up_no_request_and_no_end(
    protocol: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    monkeypatch.setattr(tracing, "CLOSE_S", 0.05)

    async def main() -> None:
        async with running_gateway([Mock()], otlp_traces_endpoint=f"http://127.0.0.1:{free_ports(1)[0]}") as gateway:
            for _ in range(5):
                assert (await gateway.ask())[0] == 200
            await eventually(lambda: bool(said(caplog)))
            assert (await gateway.metrics())["block_spans_lost_total"] >= 15 - 4 - 1
        assert len(said(caplog)) == 2
        assert said(caplog)[0].startswith("traces: Transient error ")

    run(main())


def said(caplog: pytest.LogCaptureFixture) -> Sequence[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_grpc_is_spoken_unless_another_protocol_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    grpc = pytest.importorskip("grpc")
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as by_grpc

    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
    collector = Collector()

    class Service(by_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
            collector.take(request)
            return pb.ExportTraceServiceResponse()

    async def main() -> None:
        with ThreadPoolExecutor(1) as threads:
            server = grpc.server(threads)
            by_grpc.add_TraceServiceServicer_to_server(Service(), server)
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            async with running_gateway([Mock()], otlp_traces_endpoint=f"grpc://127.0.0.1:{port}") as gateway:
                await gateway.ask()
                await collector.got(3)
            server.stop(None).wait()

    run(main())


@pytest.mark.parametrize(
    ("key", "variables", "says"),
    [
        (
            "localhost:4317",
            {},
            "error: gateway.otlp_traces_endpoint=localhost:4317: must be of the form http://host:4317",
        ),
        (
            "http://h:1",
            {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"},
            "error: OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/json: choose from grpc, http/protobuf",
        ),
        ("http://h:1", {"OTEL_BSP_MAX_QUEUE_SIZE": "many"}, "error: OTEL_BSP_MAX_QUEUE_SIZE=many: must be"),
        (
            "http://h:1",
            {"": ""},
            "error: gateway.otlp_traces_endpoint=http://h:1: needs pip install -e '.[tracing]' (opentelemetry",
        ),
    ],
    ids=["endpoint", "protocol", "queue", "not installed"],
)
def test_what_cannot_be_is_told_in_one_line(
    key: str,
    variables: dict[str, str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        if name:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delitem(sys.modules, "block.gateway.tracing")
            monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    arguments = ["scheduler=random", "gateway.urls=[http://h:1]", f"gateway.otlp_traces_endpoint={key}"]
    ends_in_one_line(arguments, says, monkeypatch, capsys)
