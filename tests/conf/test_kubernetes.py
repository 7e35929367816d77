"""docs/kubernetes: what kubectl applies is sound, and its parts fit each other and the gateway.

No cluster is asked, and no image is built. Kinds of the Prometheus operator have no schema here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import dockerfile
import pytest
import yaml
from commands import ROOT, composed
from mock_servers import Mock, run, running_gateway

from block.gateway.config import GatewayConfig
from block.run import config
from block.run.effects import without_effect

FOLDER = ROOT / "docs" / "kubernetes"
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
FILES = ("vllm.yaml", "gateway.yaml", "autoscaling.yaml")
ALL = [one for name in FILES for one in yaml.safe_load_all((FOLDER / name).read_text())]
BY_NAME = {(one["kind"], one["metadata"]["name"]): one for one in ALL}
SERVERS, GATEWAYS = BY_NAME["StatefulSet", "vllm"], BY_NAME["Deployment", "block-gateway"]
DNS_S = 30.0
"""How long a name server of a cluster may say what was; CoreDNS's own setting of kubeadm."""
KUBECTL, PROMTOOL = shutil.which("kubectl"), shutil.which("promtool")

needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="there is no kubectl on this machine")


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    return dict(workload["spec"]["template"]["spec"])


def container_of(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod_of(workload)["containers"]
    return dict(only)


def pre_stop_s(workload: dict[str, Any]) -> float:
    return float(container_of(workload)["lifecycle"]["preStop"]["sleep"]["seconds"])


def arguments() -> list[str]:
    return list(container_of(GATEWAYS)["args"])


def gateway() -> GatewayConfig:
    made = config.node(composed(*arguments()).gateway)
    assert isinstance(made, GatewayConfig)
    return made


# -------------------------------------------------------------------------------------------------------------- schemas


def test_schemas_know_all_that_manifests_of_kubernetess_own_kinds_say() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from kubernetes_validate import validate
    for one in ALL:
        if one["kind"] != "PodMonitor":
            validate(one, "1.37", strict=True)


@needs_kubectl
def test_kustomize_makes_one_of_them() -> None:
    text = subprocess.run([str(KUBECTL), "kustomize", FOLDER], capture_output=True, text=True, check=True).stdout
    made = list(yaml.safe_load_all(text))
    applied = [one for name in FILES[:2] for one in yaml.safe_load_all((FOLDER / name).read_text())]
    assert {(one["kind"], one["metadata"]["name"]) for one in made} == {
        (one["kind"], one["metadata"]["name"]) for one in applied
    }
    assert {one["metadata"]["namespace"] for one in made} == {"block"}
    images = {container_of(one)["image"] for one in made if one["kind"] in ("StatefulSet", "Deployment")}
    assert images == set(re.findall(r"^docker build .* -t (\S+)", PAGE, flags=re.MULTILINE))
    assert images == set(re.findall(r"^docker push (\S+)", PAGE, flags=re.MULTILINE))


@needs_kubectl
@pytest.mark.parametrize("line", re.findall(r"^kubectl create .*", PAGE, flags=re.MULTILINE))
def test_kubectl_takes_what_the_page_creates(line: str) -> None:
    done = subprocess.run(["bash", "-c", f"{line} --dry-run=client -o yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------- what fits what


def test_the_gateways_arguments_are_a_command_without_an_idle_key() -> None:
    settings = composed(*arguments())
    config.build(settings)
    assert without_effect(settings, arguments(), "gateway") == {}


def test_selectors_find_pods_and_ports_are_those_of_containers() -> None:
    pods = {tuple(sorted(one["spec"]["template"]["metadata"]["labels"].items())): one for one in (SERVERS, GATEWAYS)}
    selectors = 0
    for one in ALL:
        if one["kind"] == "HorizontalPodAutoscaler":
            continue
        selector = one["spec"]["selector"]
        labels = tuple(sorted(selector.get("matchLabels", selector).items()))
        assert labels in pods, f"{one['kind']} {one['metadata']['name']}"
        selectors += 1
        ports = [port["name"] for port in container_of(pods[labels])["ports"]]
        if one["kind"] == "Service":
            assert [port["targetPort"] for port in one["spec"]["ports"]] == ports
        if one["kind"] == "PodMonitor":
            assert [point["port"] for point in one["spec"]["podMetricsEndpoints"]] == ports
            assert dict(labels)[one["spec"]["jobLabel"]] == "block-gateway"  # as docs/grafana has it
    assert selectors == len(ALL) - 1
    for workload in (SERVERS, GATEWAYS):
        (port,) = container_of(workload)["ports"]
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            ((_, asked),) = (item for item in container_of(workload)[name].items() if isinstance(item[1], dict))
            assert asked["port"] == port["name"]


def test_the_gateway_listens_and_looks_where_the_services_are() -> None:
    (listens,) = container_of(GATEWAYS)["ports"]
    assert (gateway().host, gateway().port) == ("0.0.0.0", listens["containerPort"])
    service = BY_NAME["Service", SERVERS["spec"]["serviceName"]]
    (port,) = service["spec"]["ports"]
    assert gateway().urls == (f"dns+http://{service['metadata']['name']}:{port['port']}",)
    assert service["spec"]["clusterIP"] == "None"
    (serves,) = container_of(SERVERS)["ports"]
    assert serves["containerPort"] == port["port"], "a headless service maps no ports"
    assert f"--port={port['port']}" in container_of(SERVERS)["args"]


def test_model_is_that_of_the_servers() -> None:
    said = container_of(SERVERS)["args"][0].removeprefix("--model=")
    assert said == f"{composed(*arguments()).model.hf_id}-Instruct"


def test_keys_are_those_of_the_secret_that_the_page_makes() -> None:
    (made,) = re.findall(r"kubectl .*create secret generic (\S+) (.*)", PAGE.replace("\\\n", " "))
    name, keys = made[0], re.findall(r"--from-literal=(\w+)=", made[1])
    (volume,) = pod_of(GATEWAYS)["volumes"]
    (mount,) = container_of(GATEWAYS)["volumeMounts"]
    assert (volume["secret"]["secretName"], mount["name"]) == (name, volume["name"])
    assert "subPath" not in mount
    files = [Path(file) for file in (gateway().api_key_file, gateway().server_key_file) if file is not None]
    assert [str(file.parent) for file in files] == [mount["mountPath"]] * 2
    assert [file.name for file in files] == keys
    (shown,) = (one["valueFrom"]["secretKeyRef"] for one in container_of(SERVERS)["env"] if "valueFrom" in one)
    assert shown == {"name": name, "key": files[1].name}


# --------------------------------------------------------------------------------------------------------- pods that go


def test_pods_end_what_they_have_begun() -> None:
    assert pod_of(GATEWAYS)["terminationGracePeriodSeconds"] >= pre_stop_s(GATEWAYS) + gateway().grace_s + 10
    (drains,) = (one for one in container_of(SERVERS)["args"] if one.startswith("--shutdown-timeout="))
    assert pod_of(SERVERS)["terminationGracePeriodSeconds"] >= pre_stop_s(SERVERS) + int(drains.partition("=")[2]) + 15


def test_gateways_know_of_a_pod_that_goes_or_comes_in_time() -> None:
    interval = gateway().discovery_interval_s or 5.0  # the default of one worker
    notice = DNS_S + interval + gateway().probe_interval_s
    assert pre_stop_s(SERVERS) > notice
    assert SERVERS["spec"]["minReadySeconds"] > notice
    assert not BY_NAME["Service", "vllm"]["spec"]["publishNotReadyAddresses"], "or a pod that goes keeps its address"


# ---------------------------------------------------------------------------------------------------------- autoscaling


def rules() -> dict[str, dict[str, Any]]:
    """Of the adapter, by the metric that each makes."""
    values = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())
    return {rule.get("name", {}).get("as", rule["seriesQuery"]): rule for rule in values["rules"]["external"]}


def test_the_autoscaler_goes_by_what_the_adapter_makes_of_metrics_that_there_are() -> None:
    scaler = BY_NAME["HorizontalPodAutoscaler", "vllm"]["spec"]
    assert {one["external"]["metric"]["name"] for one in scaler["metrics"]} == set(rules())
    target = scaler["scaleTargetRef"]
    assert target == {key: SERVERS[key] for key in ("apiVersion", "kind")} | {"name": SERVERS["metadata"]["name"]}
    half = int(scaler["metrics"][1]["external"]["target"]["averageValue"])
    assert f"--max-num-seqs={2 * half}" in container_of(SERVERS)["args"]


def test_a_gateway_has_the_metrics_that_the_adapter_asks_for() -> None:
    async def main() -> None:
        async with running_gateway([Mock()]) as gateway, gateway.client.get(f"{gateway.url}/metrics") as answer:
            there = set(re.findall(r"^block_\w+", await answer.text(), flags=re.MULTILINE))
        for rule in rules().values():
            assert set(re.findall(r"block_\w+", f"{rule['seriesQuery']} {rule['metricsQuery']}")) <= there

    run(main())


@pytest.mark.skipif(PROMTOOL is None, reason="there is no Prometheus on this machine")
def test_prometheus_answers_what_the_autoscaler_asks(tmp_path: Path) -> None:
    """Two gateways whose forecasts rise from below 0.1 s to between 1 and 2.5 s, one that is idle, and none."""

    def query(metric: str, namespace: str) -> str:
        rule = rules()[metric]
        filled = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"])
        return str(filled.replace("<<.LabelMatchers>>", f'namespace="{namespace}"'))

    forecasts = {"0.1": "0+10x20 200x20", "1.0": "0+10x20 200x20", "2.5": "0+10x40", "+Inf": "0+10x40"}
    series = [
        {"series": f'block_predicted_ttft_seconds_bucket{{namespace="busy", pod="{pod}", le="{le}"}}', "values": values}
        for pod in "ab"
        for le, values in forecasts.items()
    ]
    series += [
        {"series": 'block_predicted_ttft_seconds_bucket{namespace="idle", le="+Inf"}', "values": "7x40"},
        {"series": 'block_active_instances{namespace="idle"}', "values": "2x40"},
        *({"series": f'block_in_flight{{namespace="busy", server="{one}"}}', "values": "70x40"} for one in "ab"),
    ]
    expected = [
        ("block_predicted_ttft_p90", "busy", "4m", [0.09]),
        ("block_predicted_ttft_p90", "busy", "10m", [2.35]),
        ("block_predicted_ttft_p90", "idle", "10m", [0]),
        ("block_predicted_ttft_p90", "none", "10m", []),
        ("block_in_flight", "busy", "10m", [140]),
    ]
    asked = [
        {
            "expr": f"round({query(metric, namespace)}, 0.01)",
            "eval_time": at,
            "exp_samples": [{"labels": "{}", "value": value} for value in values],
        }
        for metric, namespace, at, values in expected
    ]
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": asked}]}))
    done = subprocess.run([str(PROMTOOL), "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --------------------------------------------------------------------------------------------------------------- images


def instructions() -> list[Any]:
    return list(dockerfile.parse_file(str(FOLDER / "Dockerfile")))


def test_the_images_are_those_that_manifests_and_page_name() -> None:
    stages = [one.value[-1] for one in instructions() if one.cmd == "FROM"]
    built = re.findall(r"^docker build -f (\S+) --target (\w+) ", PAGE, flags=re.MULTILINE)
    assert {target for _, target in built} == {"vllm", "gateway"} <= set(stages)
    assert {ROOT / file for file, _ in built} == {FOLDER / "Dockerfile"}
    (user,) = (one.value[0] for one in instructions() if one.cmd == "USER")
    assert int(user) == pod_of(GATEWAYS)["securityContext"]["runAsUser"]
    serves, takes = (one.value for one in instructions() if one.cmd == "ENTRYPOINT")
    assert (takes, serves) == (("block-gateway",), ("python3", "-m", "block.vllm_plugin.serve"))


@pytest.mark.slow
def test_a_wheel_is_made_of_what_is_copied(tmp_path: Path) -> None:
    """As the first stage does, but with the setuptools that there are."""
    for one in instructions():
        if one.cmd == "COPY":
            *sources, target = one.value
            for source in sources:
                if (ROOT / source).is_dir():
                    unwanted = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, tmp_path / target, symlinks=True, ignore=unwanted)
                else:
                    shutil.copy(ROOT / source, tmp_path / target)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-build-isolation"]
    subprocess.run([*pip, "--no-deps", "--wheel-dir", "wheels", "."], cwd=tmp_path, check=True, timeout=120)
    (wheel,) = (tmp_path / "wheels").glob("block_serving-*.whl")
    shipped = {f"block/shipped/{name}" for name in ("conf/config.yaml", "artifacts/latency/a30-llama2-7b.json")}
    assert shipped <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_last_step_of_the_gateways_image_ends_well(tmp_path: Path) -> None:
    """But for the compiling."""
    *_, step = (one.value[0] for one in instructions() if one.cmd == "RUN")
    (command, line) = ("block-gateway", f"{shlex.quote(sys.executable)} -m block.gateway")
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", step.replace(command, line)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
