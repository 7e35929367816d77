"""What it costs to have the state of many servers pushed, and what a decision then takes, beside shared memory.

    python benchmarks/push.py [servers=12,100] [seconds=5]

Each server shows 48 sequences that run and 100 that wait, and has 40 steps a second. It is the plugin's own route
behind uvicorn, which vLLM uses. The listener has a core for itself; the servers share the others, and where these are
too few, it is them that are late. Of the listener: its CPU time; how late what was published came (on one host there is
one clock); and, at 30 requests/s from another process, how long after a request was sent the policy `block` had chosen
among all servers, and how much of that it computed.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import aiohttp
import numpy as np
from testbed import busy_board, compose_run

from block.backends.instance import VLLMInstance
from block.backends.launch import free_ports
from block.backends.subscription import Subscription
from block.cluster.instance import InstanceFailed, one_by_one
from block.core import snapshot
from block.core.clock import Clock
from block.core.types import Request
from block.dispatch.core import Dispatcher
from block.engine.config import EngineConfig
from block.engine.predictor import Predictor
from block.vllm_plugin import state_buffer
from block.vllm_plugin.environment import STATE_BUFFER
from block.vllm_plugin.frames import Frame

SETTINGS = {key: value for key, _, value in (one.partition("=") for one in sys.argv[1:])}
SECONDS = float(SETTINGS.get("seconds", 5))
RUN, WAIT = 48, 100
STEP_S = 0.025
RATE = 30  # requests/s
CLIENTS = f"""
import os, random, struct, sys, time
while True:
    time.sleep(random.expovariate({RATE}))
    os.write(int(sys.argv[1]), struct.pack("d", time.monotonic()))
"""
EACH = 12  # servers of a process
ENGINE = EngineConfig("v1", max_num_seqs=RUN).settings(5000)


class Server:
    """One, with its scheduler."""

    def __init__(self, place: int) -> None:
        self.buffer, self.path = busy_board(RUN, WAIT, ENGINE)
        self.buffer.seqs[snapshot.NUM_SCHEDULED_TOKENS, :RUN] = 1
        self.place = place

    async def step(self) -> None:
        await asyncio.sleep(STEP_S * random.random())
        while True:
            self.buffer.begin()
            self.buffer.header[state_buffer.STEPS] += 1
            self.buffer.times[state_buffer.STARTED] = time.monotonic()
            self.buffer.end()
            await asyncio.sleep(STEP_S)

    async def serve(self, port: int) -> None:
        import uvicorn

        from block.vllm_plugin.routes import SnapshotView

        async def models(scope: object, receive: object, send: object) -> None:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[operator]
            await send({"type": "http.response.body", "body": b'{"data": [{"id": "mock"}]}'})  # type: ignore[operator]

        os.environ[STATE_BUFFER] = self.path
        config = uvicorn.Config(SnapshotView(models), port=port, log_level="warning", lifespan="off", loop="uvloop")
        await asyncio.gather(uvicorn.Server(config).serve(), self.step())


async def serve(ports: list[int]) -> None:
    await asyncio.gather(*(Server(place).serve(port) for place, port in enumerate(ports)))


async def attached(instance: VLLMInstance) -> None:
    for _ in range(300):
        try:
            await instance.attach()
            return
        except InstanceFailed:
            await asyncio.sleep(0.1)
    raise SystemExit(f"{instance.url} does not answer")


def timed(subscription: Subscription, late: list[float]) -> Callable[[Frame, float], None]:
    """What takes its frames, and notes how long after its publication each has come."""
    take = subscription._take

    def noting(frame: Frame, now: float) -> None:
        late.append(now - frame.state.published)
        take(frame, now)

    return noting


class Listener:
    """Those that are attached to all servers, and decide."""

    def __init__(self, instances: list[VLLMInstance], clock: Clock) -> None:
        run = compose_run("scheduler=block", "model=llama2-7b", "cluster.gpu=a30")
        predictor = Predictor(ENGINE, run.backend.latency(run.testbed))
        predictor.warm_up()
        self.instances, self.clock = instances, clock
        self.dispatcher = Dispatcher(
            *(len(instances), run.policy, predictor, run.dispatch, random.Random(0)),
            snapshot_many=one_by_one(instances),
        )

    async def idle(self) -> float:
        """The share of a core that it takes when nothing is to be decided."""
        began, before = time.monotonic(), time.process_time()
        await asyncio.sleep(SECONDS)
        return (time.process_time() - before) / (time.monotonic() - began)

    async def decide(self) -> tuple[list[float], list[float]]:
        """Seconds from the sending of each request to its decision, and those that deciding took of these."""
        took, computed = list[float](), list[float]()
        ours, theirs = socket.socketpair()
        clients = subprocess.Popen([sys.executable, "-c", CLIENTS, str(theirs.fileno())], pass_fds=[theirs.fileno()])

        def arrived() -> None:
            for (sent,) in struct.iter_unpack("d", ours.recv(8000)):
                began = time.monotonic()
                request = Request(len(took), self.clock.at(sent), 250, 300, 300)
                record = self.dispatcher.arrived(request, self.clock.at(began))
                now = time.monotonic()
                took.append(now - sent)
                computed.append(now - began)
                self.dispatcher.finished(record, self.clock.at(now))

        asyncio.get_running_loop().add_reader(ours, arrived)
        await asyncio.sleep(SECONDS + 1.0)
        asyncio.get_running_loop().remove_reader(ours)
        clients.kill()
        clients.wait()
        ours.close()
        theirs.close()
        return took[RATE:], computed[RATE:]  # the first second warms up


async def measure(shared_memory: bool, ports: list[int]) -> None:
    clock = Clock()
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        instances, late = [], list[float]()
        for i, port in enumerate(ports):
            url = f"http://127.0.0.1:{port}"
            one = VLLMInstance(i, url, session, clock, shared_memory=shared_memory)
            instances.append(one)
            await attached(one)
            stack.push_async_callback(one.detach)
            if one._subscription is not None:
                one._subscription._take = timed(one._subscription, late)  # type: ignore[assignment, method-assign]
        listener = Listener(instances, clock)
        await asyncio.sleep(1.0)
        for one in instances:
            one._received.frames = one._received.bytes = 0
        late.clear()
        share = await listener.idle()
        print(f"{len(ports)} servers, {'shared memory' if shared_memory else 'pushed'}: {share:.1%} of a core")
        if not shared_memory:
            frames, size = (sum(getattr(one._received, name) for one in instances) for name in ("frames", "bytes"))
            print(f"  {frames / SECONDS:.0f} frames/s of {size / frames / 1e3:.1f} kB,", end=" ")
            print(f"{share * SECONDS / frames * 1e6:.0f} µs each;", end=" ")
            p50, p99 = np.percentile(late, [50, 99]) * 1e3
            print(f"late by P50 {p50:.2f} ms, P99 {p99:.2f} ms")
        took, computed = (np.percentile(one, [50, 99]) * 1e3 for one in await listener.decide())
        print(f"  decided after P50 {took[0]:.2f} ms, P99 {took[1]:.2f} ms; computed for P50 {computed[0]:.2f} ms")


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        import uvloop

        uvloop.run(serve([int(port) for port in sys.argv[2:]]))
    *others, mine = sorted(os.sched_getaffinity(0))
    for servers in map(int, SETTINGS.get("servers", "12,100").split(",")):
        ports = free_ports(servers)
        started = []
        try:
            for begin in range(0, servers, EACH):
                command = [sys.executable, __file__, "serve", *map(str, ports[begin : begin + EACH])]
                started.append(subprocess.Popen(command))
                os.sched_setaffinity(started[-1].pid, others or [mine])
            os.sched_setaffinity(0, [mine])
            for shared_memory in (True, False):
                asyncio.run(measure(shared_memory, ports))
        finally:
            for process in started:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
