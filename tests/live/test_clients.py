"""What clients get through a gateway from two real servers of a tiny model, and what the gateway counts of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from processes import eventually, kill_all, marked
from test_servers import finish, nothing_left, start

from block.vllm_plugin.frames import FrameReader

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
SERVER = [
    *("block.vllm_plugin.serve", "--dtype=float32", "--enforce-eager", "--no-enable-prefix-caching"),
    "--distributed-executor-backend=vllm.v1.executor.uniproc_executor.UniProcExecutor",
    *("--num-gpu-blocks-override=256", "--block-size=32", "--max-model-len=2048", "--max-num-seqs=8"),
    "--host=127.0.0.1",
]
GATEWAY = [
    *("block.gateway", "scheduler=block", "backend=vllm", "model=tiny", "cluster=cpu2"),
    f"backend.latency_model={ROOT}/artifacts/latency/cpu-tiny.json",
    *("gateway.host=127.0.0.1", "gateway.tokenize_timeout_s=10"),
]
QUESTION = "Which server should take this request?"
ASKS = [{"role": "user", "content": QUESTION}]


class Fleet(NamedTuple):
    """Two servers that run already, and a gateway that chooses between them by forecasts."""

    url: str
    servers: list[str]
    model: str
    mark: str

    @contextmanager
    def counts(self, **expected: int) -> Iterator[None]:
        """Within it the gateway gets so many requests, by outcome; then it is at rest, and has miscounted no prompt."""

        def counted() -> Counter[str]:
            counted: Counter[str] = Counter()
            for status, n in re.findall('block_requests_total{.*status="(.*)"} (.*)', read(self.url + "/metrics")):
                counted[status] += int(float(n))
            return counted

        before = counted()
        yield
        assert eventually(lambda: (counted() - before).total() >= sum(expected.values()), 20), counted() - before
        assert counted() - before == expected
        text = read(self.url + "/metrics")
        assert re.findall("block_in_flight{.*} (.*)", text) == ["0.0", "0.0"]
        assert "block_prompt_mismatches_total 0.0" in text

    def generated(self) -> float:
        """Tokens that the servers have generated so far."""
        texts = (read(url + "/metrics") for url in self.servers)
        return sum(float(n) for text in texts for n in re.findall("generation_tokens_total{.*} (.*)", text))

    def runs(self) -> bool:
        """Whether a server has a sequence."""
        texts = (read(url + "/metrics") for url in self.servers)
        return any(re.search("num_requests_(running|waiting){.*} [1-9]", text) for text in texts)


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        return str(response.read().decode())


def answers(url: str) -> bool:
    try:
        return read(url + "/health") is not None
    except OSError:
        return False


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    from block.backends.launch import free_ports
    from block.backends.model_files import tiny_model
    from block.hardware.catalogue import Model

    model = tiny_model(Model("tiny", "none", 2, 64, 128, 4, 2, 32, 2048, tied_embeddings=True, dtype_bytes=4), 2048)
    mark, folder = f"BLOCK_TEST_{uuid.uuid4().hex}", tmp_path_factory.mktemp("fleet")
    first, second, gateway = free_ports(3)
    urls = [f"http://127.0.0.1:{port}" for port in (first, second)]
    served = Fleet(f"http://127.0.0.1:{gateway}", urls, str(model), mark)
    started = []

    def begin(port: int, *command: str) -> None:
        with (folder / f"{port}.log").open("wb") as log:
            environment = {**os.environ, **SETTINGS, mark: "1"}
            arguments = [sys.executable, "-m", *command]
            started.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log))

    def answers_in_time(port: int) -> None:
        assert eventually(lambda: answers(f"http://127.0.0.1:{port}"), 120), (folder / f"{port}.log").read_text()

    try:
        for port in (first, second):
            begin(port, *SERVER, f"--model={model}", f"--port={port}")
        for port in (first, second):
            answers_in_time(port)
        addresses = [f"gateway.urls=[{','.join(urls)}]", f"gateway.port={gateway}"]
        begin(gateway, *GATEWAY, *addresses, f"gateway.tokenizer={model}")
        answers_in_time(gateway)
        yield served
        with urllib.request.urlopen(f"{urls[0]}/block/frames", timeout=5) as far:
            (frame,) = FrameReader().feed(far.read1(10**6))
            assert frame.state.settings.max_num_seqs == 8
            for process in started:
                process.terminate()
            for process in started:  # who listens keeps no server from ending
                process.wait(30)
        assert nothing_left(mark), marked(mark)
    finally:
        kill_all(mark)


@pytest.fixture
def openai(fleet: Fleet) -> Iterator[Any]:
    """OpenAI's client."""
    from openai import OpenAI

    with OpenAI(base_url=fleet.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_run_goes_through_the_gateway_to_servers_that_run_already(fleet: Fleet, tmp_path: Path) -> None:
    """The run knows the gateway only."""
    through = [f"backend.urls=[{fleet.url}]", "scheduler=round_robin"]
    small = ["backend=vllm", "model=tiny", "cluster=cpu2", "workload.num_requests=30", "workload.qps=20"]
    with fleet.counts(ok=30, refused=1):  # it looks for the plugin, which a gateway does not show
        run, _ = finish(start(fleet.mark, tmp_path, *small, *through), tmp_path)
    assert run.counts is not None
    assert (run.counts["sent"], run.counts["ok"]) == (30, 30)
    assert sorted(run.requests().output_tokens) == sorted(10 + i % 20 for i in range(30))


def test_openai_s_client_completes(fleet: Fleet, openai: Any) -> None:
    def complete(prompt: Any, **keys: Any) -> Any:
        return openai.completions.create(model=fleet.model, prompt=prompt, max_tokens=8, temperature=0, **keys)

    assert [one.id for one in openai.models.list()] == [fleet.model]
    with fleet.counts(ok=5):
        whole = complete(QUESTION)
        assert whole.usage.completion_tokens == 8
        *events, last = complete(QUESTION, stream=True, stream_options={"include_usage": True})
        assert "".join(event.choices[0].text for event in events) == whole.choices[0].text
        assert last.usage == whole.usage
        assert complete([5, 6, 7]).usage.prompt_tokens == 3
        assert complete([[5, 6, 7], [8, 9]]).usage.prompt_tokens == 5
        assert len(complete([QUESTION, "Why?"], n=2, extra_body={"temperature": 1}).choices) == 4


def test_openai_s_client_is_told_the_server_s_errors(fleet: Fleet, openai: Any) -> None:
    from openai import BadRequestError, NotFoundError

    with fleet.counts(refused=3):
        with pytest.raises(NotFoundError, match="`none` does not exist"):
            openai.completions.create(model="none", prompt=QUESTION)
        with pytest.raises(BadRequestError, match="max_model_len=2048"):
            openai.completions.create(model=fleet.model, prompt=QUESTION, max_tokens=4000)
        with pytest.raises(NotFoundError):  # the model embeds nothing
            openai.embeddings.create(model=fleet.model, input=QUESTION)


def test_openai_s_client_chats(fleet: Fleet, openai: Any) -> None:
    def chat(**keys: Any) -> Any:
        return openai.chat.completions.create(
            model=fleet.model, messages=ASKS, max_completion_tokens=8, temperature=0, **keys
        )

    with fleet.counts(ok=2):
        whole = chat()
        assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (8, "length")
        *events, last = chat(stream=True, stream_options={"include_usage": True})
        assert "".join(event.choices[0].delta.content or "" for event in events) == whole.choices[0].message.content
        assert last.usage == whole.usage


def test_openai_s_client_gets_responses_and_finds_them_again(fleet: Fleet, openai: Any) -> None:
    def respond(**keys: Any) -> Any:
        return openai.responses.create(
            model=fleet.model, input=QUESTION, **{"max_output_tokens": 8, "temperature": 0, **keys}
        )

    with fleet.counts(ok=8):
        whole = respond()
        assert whole.usage.output_tokens == 8
        assert openai.responses.retrieve(whole.id).output_text == whole.output_text
        assert respond(previous_response_id=whole.id).usage.input_tokens > 2 * whole.usage.input_tokens
        *events, last = respond(stream=True)
        assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == whole.output_text
        assert (last.type, last.response.usage) == ("response.completed", whole.usage)
        with respond(stream=True) as stream:  # which is closed before its connection says that it is whole
            assert next(event for event in stream if event.type == "response.completed")
        long = respond(background=True, max_output_tokens=1500)
        assert openai.responses.cancel(long.id).status == "cancelled"
        assert openai.responses.retrieve(long.id).status == "cancelled"


def test_a_stream_that_openai_s_client_closes_is_cancelled_at_the_server(fleet: Fleet, openai: Any) -> None:
    """And so is an answer that it does not wait for."""
    from openai import APITimeoutError

    long = {"model": fleet.model, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
    generated = fleet.generated()
    with fleet.counts(cancelled=3):
        with openai.completions.create(prompt=QUESTION, stream=True, **long) as stream:
            assert next(iter(stream)).choices
        with openai.chat.completions.create(messages=ASKS, stream=True, **long) as stream:
            assert next(iter(stream)).choices
        with pytest.raises(APITimeoutError):
            openai.completions.create(prompt=QUESTION, timeout=0.5, **long)
    assert eventually(lambda: not fleet.runs(), 10)
    assert fleet.generated() - generated < 3 * 1900


def test_anthropic_s_client_gets_messages(fleet: Fleet) -> None:
    from anthropic import Anthropic

    asked: dict[str, Any] = {"model": fleet.model, "max_tokens": 8, "system": "Be brief.", "messages": ASKS}
    with fleet.counts(ok=3), Anthropic(base_url=fleet.url, api_key="any", max_retries=0) as client:
        whole = client.messages.create(**asked)
        assert whole.usage.output_tokens == 8
        with client.messages.stream(**asked) as stream:
            assert stream.get_final_message().usage == whole.usage
        with client.messages.create(stream=True, **asked) as events:
            assert next(event for event in events if event.type == "message_stop")


BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""`vllm bench serve`; `vllm` itself fails where its distribution has another name."""


def test_vllm_bench_serve_is_served(fleet: Fleet, tmp_path: Path) -> None:
    arguments = [
        *(f"--base-url={fleet.url}", f"--model={fleet.model}", "--backend=openai-chat"),
        *("--endpoint=/v1/chat/completions", "--dataset-name=random", "--random-input-len=40"),
        *("--random-output-len=10", "--num-prompts=30", "--request-rate=30"),
        *("--save-result", f"--result-filename={tmp_path}/result.json"),
    ]
    with fleet.counts(ok=1 + 30):  # it tries one before
        environment = {**os.environ, **SETTINGS, fleet.mark: "1"}
        bench = [sys.executable, "-c", BENCH, *arguments]
        done = subprocess.run(bench, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"], result["total_output_tokens"]) == (30, 0, 300)
