"""docs/grafana: a dashboard and alerts of the gateway's metrics.

Two gateways before the same servers serve requests while a real Prometheus scrapes them. What is covered then: the
scrape config of docs/gateway.md; every query of the dashboard, its variables filled in as Grafana does, by Prometheus's
HTTP API; each panel, drawn by a browser in Prometheus's own graph page; the alerts, by promtool's unit tests; and that
Grafana's published schema knows each key of the dashboard. No package registry has Grafana itself: how it lays out and
colours the panels, and what it makes of units, thresholds and transformations, is not covered.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from browser import CHROMIUM, drawn
from commands import ROOT
from mock_servers import ASKED, STREAMED, Mock, run, running_gateway, says, stream
from prometheus_client.parser import text_string_to_metric_families
from test_gateway_lengths import Slow
from test_gateway_prefixes import LONG, CachingMock, Letters, asking

from block.backends.launch import free_ports
from block.dispatch import policies

FOLDER = ROOT / "docs" / "grafana"
BOARD = json.loads((FOLDER / "gateway.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel, target) for panel in PANELS for target in panel["targets"]]
GUIDE = (ROOT / "docs" / "gateway.md").read_text()
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")

needs_prometheus = pytest.mark.skipif(not (PROMETHEUS and PROMTOOL), reason="there is no Prometheus on this machine")


def scrape_config() -> dict[str, Any]:
    """That of docs/gateway.md."""
    (shown,) = re.findall(r"```yaml\n(rule_files:.+?)```", GUIDE, flags=re.DOTALL)
    return dict(yaml.safe_load(shown))


# --------------------------------------------------------------------------------------------------------- what it says


@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2")  # which Grafana has from version 12 on only
def test_grafanas_schema_knows_every_key_of_the_dashboard() -> None:
    """What it does not know is lost on the way there and back. It knows keys, and not which values they may have."""
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    def lost(there: Any, back: Any, path: str) -> Iterator[str]:
        if isinstance(there, dict) and isinstance(back, dict):
            for key, value in there.items():
                yield from lost(value, back.get(key), f"{path}.{key}")
        elif isinstance(there, list) and isinstance(back, list) and len(there) == len(back):
            for i, (one, other) in enumerate(zip(there, back, strict=True)):
                yield from lost(one, other, f"{path}[{i}]")
        elif there != back:
            yield f"{path}: {there} became {back}"

    register_default_plugins()
    back = json.loads(JSONEncoder().encode(Dashboard.from_json(BOARD)))
    assert list(lost(BOARD, back, "dashboard")) == []
    assert BOARD["schemaVersion"] == Dashboard().schema_version


def test_panels_fill_the_grid_without_overlap_and_each_shows_something_else() -> None:
    taken = [
        (x, y)
        for panel in BOARD["panels"]
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    height = max(y for _, y in taken) + 1
    assert sorted(taken) == sorted(itertools.product(range(24), range(height)))
    for what in ([panel["id"] for panel in BOARD["panels"]], [panel["title"] for panel in BOARD["panels"]]):
        assert len(set(what)) == len(what)
    queries = [target["expr"] for _, target in QUERIES]
    assert len(set(queries)) == len(queries)
    for panel in PANELS:
        assert panel["description"].endswith("."), panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
        if panel["type"] in ("stat", "timeseries"):
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_metrics_are_those_of_the_guide_and_those_that_are_shown_exist(tmp_path: Path) -> None:
    found: set[str] = set()

    async def main() -> None:
        keys = {"access_log": str(tmp_path / "log"), "otlp_traces_endpoint": "http://127.0.0.1:9"}
        async with running_gateway([Mock()], **keys) as one, one.client.get(one.url + "/metrics") as answer:
            for family in text_string_to_metric_families(await answer.text()):
                found.add(family.name + "_total" * (family.type == "counter"))

    run(main())
    table = re.findall(r"^\| (`.+?) \|", GUIDE.partition("\n## Metrics\n")[2].partition("\n#")[0], flags=re.MULTILINE)
    assert {name for names in table for name in re.findall(r"`(\w+)`", names)} == found
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
    for text in [target["expr"] for _, target in QUERIES] + [rule["expr"] for rule in rules]:
        for name in re.findall(r"\bblock_\w+", text):
            assert name.removesuffix("_bucket") in found


@needs_prometheus
def test_alerts_come_when_they_should_and_not_before(tmp_path: Path) -> None:
    def check(*arguments: str) -> None:
        done = subprocess.run([str(PROMTOOL), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    check("check", "rules", str(FOLDER / "alerts.yml"))
    check("test", "rules", str(Path(__file__).with_name("alerts.yml")))
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(scrape_config()))
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    check("check", "config", str(tmp_path / "prometheus.yml"))
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]
    cases = yaml.safe_load(Path(__file__).with_name("alerts.yml").read_text())["tests"]
    come = {one["alertname"] for case in cases for one in case["alert_rule_test"] if "exp_alerts" in one}
    assert come == {rule["alert"] for rule in rules}


# -------------------------------------------------------------------------------------------------------- what it shows


@dataclass
class Scraped:
    """A Prometheus that has scraped two gateways until `at`."""

    url: str
    at: float
    servers: list[str]

    def get(self, path: str, **parameters: Any) -> Any:
        return fetched(self.url, path, **parameters)["data"]

    def series(self, query: str, instant: bool = False) -> list[tuple[dict[str, str], list[float]]]:
        """Labels and values."""
        if instant:
            result = self.get("/api/v1/query", query=query, time=self.at)["result"]
        else:
            result = self.get("/api/v1/query_range", query=query, start=self.at - 3, end=self.at, step=1)["result"]
        return [(one["metric"], [float(value) for _, value in one.get("values", [one.get("value")])]) for one in result]


def fetched(url: str, path: str, **parameters: Any) -> Any:
    try:
        with urllib.request.urlopen(f"{url}{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            said = error.read().decode()
        raise (ConnectionError if error.code == 503 else AssertionError)(said) from None  # 503: it still starts


def filled(text: str, server: str = ".*", job: str = "block-gateway") -> str:
    """A query with Grafana's variables for it; the intervals hold all that was scraped."""
    intervals = {"$__rate_interval": "15s", "$__interval": "1m", "$__range": "15s"}
    for name, value in {**intervals, "$server": server, "$job": job}.items():
        text = text.replace(name, value)
    assert "$" not in text
    return text


def escaped(value: str) -> str:
    """As Grafana does it: a regular expression in a string of a query."""
    return re.escape(value).replace("\\", "\\\\")


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    """Gateways that did all that there are metrics of."""
    folder = tmp_path_factory.mktemp("prometheus")
    usage = b'{"usage": {"prompt_tokens": 100, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 50}}}'
    started: list[subprocess.Popen[bytes]] = []
    found: list[Scraped] = []

    def start(*gateways: str) -> str:
        config = scrape_config()
        config["scrape_configs"][0]["static_configs"] = [{"targets": [url.removeprefix("http://") for url in gateways]}]
        config["global"] = {"scrape_interval": "500ms"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        shutil.copy(FOLDER / "alerts.yml", folder)
        (port,) = free_ports(1)
        keys = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data", "log.level": "error"}
        options = [f"--{key}={value}" for key, value in keys.items()]
        started.append(subprocess.Popen([str(PROMETHEUS), f"--web.listen-address=127.0.0.1:{port}", *options]))
        return f"http://127.0.0.1:{port}"

    async def main() -> None:
        goes_on = asyncio.Event()

        async def answer(mock: Mock, http: web.Request) -> web.StreamResponse:
            asked = await http.json()
            if asked.get("user") == "waits":
                await goes_on.wait()
            if asked.get("user") == "fails":
                return await says(500)(mock, http)
            return await (stream if asked.get("stream") else says(200, usage))(mock, http)

        async def well(prometheus: str) -> tuple[float, float]:
            """How often it has reached each gateway, and when it last had both."""

            def ask(query: str) -> float:
                result = fetched(prometheus, "/api/v1/query", query=query)["data"]["result"]
                return float(result[0]["value"][1]) if result else 0.0

            try:
                times = await asyncio.to_thread(ask, "min(sum_over_time(up[1m])) and count(up == 1) == 2")
                return times, await asyncio.to_thread(ask, "min(timestamp(up))")
            except OSError:  # it has not started yet
                return 0.0, 0.0

        mocks = [CachingMock(answer) for _ in range(3)]
        keys = {"lengths": Slow(), "tokenizer": Letters(), "estimate_timeout_s": 5.0}
        async with (
            running_gateway(mocks, policies.BlockCache(), **keys) as forecasting,
            running_gateway(mocks, started=[]) as plain,
        ):
            prometheus = start(forecasting.url, plain.url)
            waiting = asyncio.create_task(forecasting.ask(asking(LONG, user="waits")))
            at = 0.0
            async with asyncio.timeout(18):
                for i in itertools.count():
                    mocks[2].well, mocks[2].answer = (True, answer) if i % 2 else (False, says(503))
                    for mock in mocks:
                        mock.place(1, 100_000 if i % 2 else 100, 5)  # what no server can hold has no forecast
                    for body in (asking(LONG), STREAMED):
                        await forecasting.ask(body, headers={"x-slo-e2e-ms": "60000" if body is STREAMED else "0.001"})
                    for body in (ASKED, ASKED, ASKED, asking(LONG, user="fails"), b"[]"):
                        await plain.ask(body)
                    times, at = await well(prometheus)
                    if times >= 6:
                        break
                    await asyncio.sleep(0.2)
            goes_on.set()
            await waiting
            found.append(Scraped(prometheus, at, [mock.url for mock in mocks]))

    try:
        run(main())
        yield found[0]
    finally:
        for process in started:
            process.terminate()
            process.wait()


def is_finite(values: list[float]) -> bool:
    return any(map(math.isfinite, values))


@needs_prometheus
@pytest.mark.slow
def test_every_query_of_every_panel_finds_data_with_the_labels_of_its_legend(scraped: Scraped) -> None:
    for variable in BOARD["templating"]["list"][1:]:
        listing = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
        assert listing is not None
        assert variable["query"]["query"] == variable["definition"]
        values = scraped.get(f"/api/v1/label/{listing[2]}/values", **{"match[]": filled(listing[1])})
        assert values == {"job": ["block-gateway"], "server": sorted(scraped.servers)}[variable["name"]]
    for panel, target in QUERIES:
        shown = f"{panel['title']}: {target['expr']}"
        for instant in (True, False):
            found = scraped.series(filled(target["expr"]), instant)
            assert any(is_finite(values) for _, values in found), shown
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert all(labels.get(label) for labels, _ in found), shown
            assert "{{" in target["legendFormat"] or len(found) == 1, shown
        one = scraped.series(filled(target["expr"], server=escaped(scraped.servers[0])), instant=True)
        assert {labels["server"] for labels, _ in one if "server" in labels} <= {scraped.servers[0]}, shown


@needs_prometheus
@pytest.mark.slow
def test_panels_show_what_happened(scraped: Scraped) -> None:
    def now(title: str) -> dict[str, float]:
        """What a panel shows, by its legend."""
        (panel,) = [panel for panel in PANELS if panel["title"] == title]
        return {
            re.sub(r"{{(\w+)}}", lambda name, of=labels: of[name[1]], target["legendFormat"]): values[-1]
            for target in panel["targets"]
            for labels, values in scraped.series(filled(target["expr"]), instant=True)
        }

    assert sum(now("Active servers").values()) == 3
    assert 0 < now("Answered without failure")["answered"] < 1
    assert 0 < now("Objectives met")["met"] < 1
    assert now("Prompt tokens cached")["cached"] == pytest.approx(0.5, abs=0.02)  # as the servers say
    assert {name for name, rate in now("Requests by outcome").items() if rate > 0} == {"ok", "refused", "failed"}
    assert now("Requests by server")["none"] == pytest.approx(now("Requests by outcome")["refused"])
    assert (
        1 <= sum(now("In flight by server").values()) <= 3
    )  # one waits all the time, and each gateway may have another
    assert now("Ejections by server")[scraped.servers[2]] > 0
    assert now("Retries")["retries"] > 0
    assert now("Decisions not by the policy's own rule")["no forecast"] > 0
    assert now("Prompts whose tokens are not known")["other count"] > 0
    assert {name.partition(": ")[2] for name in now("How it is known what is cached")} == {"table"}


@needs_prometheus
@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine")
def test_a_browser_draws_every_panel(scraped: Scraped, tmp_path: Path) -> None:
    """Each is a graph without an error, with a line and a name for each series of all its queries."""
    try:
        urllib.request.urlopen(f"{scraped.url}/classic/graph", timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()
        pytest.skip("this Prometheus has another graph page than Debian's")

    def together(panel: dict[str, Any]) -> str:
        """Its queries as one, whose series have the legend as a label."""
        queries = [(filled(target["expr"]), json.dumps(target["legendFormat"])) for target in panel["targets"]]
        return " or ".join(f'label_replace({query}, "legend", {legend}, "", "")' for query, legend in queries)

    end = 60 * math.ceil(scraped.at / 60)  # a page takes whole minutes
    until = time.strftime("%Y-%m-%d %H:%M", time.gmtime(end))
    graphs: list[str] = []
    for first in range(0, len(PANELS), 10):  # as many as a page takes
        asked = {}
        for i, panel in enumerate(PANELS[first : first + 10]):
            of = {"expr": together(panel), "tab": 0, "range_input": "2m", "end_input": until, "step_input": 1}
            asked.update({f"g{i}.{key}": value for key, value in of.items()})
        # A second of the browser's own clock, which stands still while an answer is on its way.
        page = f"{scraped.url}/classic/graph?{urllib.parse.urlencode(asked)}"
        graphs += re.split(r'id="graph_wrapper\d+"', drawn(page, tmp_path, "--virtual-time-budget=1000"))[1:]
    assert len(graphs) == len(PANELS)
    for panel, graph in zip(PANELS, graphs, strict=True):
        assert re.findall(r'class="error [^>]*>([^<]*)<', graph) == [""], panel["title"]
        names = [unescape(name) for name in re.findall(r'<span class="label">([^<]*)<', graph)]
        lines = re.findall(r'<path class="path" d="(M[^"]+)"', graph)
        query = {"query": together(panel), "start": end - 120, "end": end, "step": 1}
        found = [one["metric"] for one in scraped.get("/api/v1/query_range", **query)["result"]]
        labels = [sorted(re.findall(r'(\w+)="([^"]*)"', name)) for name in names]
        assert sorted(labels) == sorted(sorted(one.items()) for one in found), panel["title"]
        assert {one["legend"] for one in found} == {target["legendFormat"] for target in panel["targets"]}
        assert len(lines) == len(found), panel["title"]
        assert not any("NaN" in line for line in lines), panel["title"]
