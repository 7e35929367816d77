"""The simulator against queueing theory: the engine, dispatcher and clock that serve everywhere else.

Every step takes the same time and prompts have one token, so that a response of n tokens is n steps of service.

Seeds are fixed, so a test passes or fails for good; the intervals are 99.9 % ones from batch means, and the
samples are as large as it takes to make them narrow.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from testbed import constant_latency, engine_config, lone_engine, request, simulate

from block.core.types import Request
from block.dispatch.policies import LeastRequests, Policy, Random, RoundRobin

STEP = 0.01
Floats = NDArray[np.float64]


def customers(count: int, rate: float, mean_tokens: float, seed: int) -> list[Request]:
    """Poisson arrivals with geometric responses: the exponential distribution's discrete counterpart."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    tokens = rng.geometric(1 / mean_tokens, count).tolist()
    return [request(i, 1, n, at) for i, (n, at) in enumerate(zip(tokens, arrivals, strict=True))]


def one_engine(requests: Sequence[Request], max_num_seqs: int) -> Floats:
    """Seconds from arrival to the start of service of each request; the first token comes a step after that."""
    config = engine_config("v1", max_num_seqs=max_num_seqs, max_model_len=8192, max_num_batched_tokens=4096)
    engine = lone_engine(config, constant_latency(STEP), 100_000)
    waits = np.empty(len(requests))
    done = []
    for one in requests:
        done += engine.advance(one.arrival)
        engine.add(one, one.arrival)
    done += engine.advance(1e9)
    for finish in done:
        waits[finish.id] = finish.first_token - STEP - requests[finish.id].arrival
    return waits


def many_engines(requests: Sequence[Request], policy: Policy, instances: int, seed: int = 1) -> Floats:
    """The same for instances that serve one request at a time, behind a dispatcher."""
    run = simulate(
        requests,
        policy,
        config=engine_config("v1", max_num_seqs=1, max_model_len=8192, max_num_batched_tokens=4096),
        latency=constant_latency(STEP),
        instances=instances,
        total_blocks=4096,
        seed=seed,
    )
    return np.array([record.first_token - STEP - record.request.arrival for record in run.records])


def interval(waits: Floats, batches: int = 25) -> tuple[float, float]:
    """Mean and half of its 99.9 % interval, from the means of batches (Student's t with 24 degrees of freedom)."""
    steady = waits[len(waits) // 20 :]
    means = np.array([batch.mean() for batch in np.array_split(steady, batches)])
    return float(means.mean()), 3.745 * float(means.std(ddof=1)) / math.sqrt(batches)


def agrees(waits: Floats, theory: float, precision: float, bias: float = 0.0) -> None:
    """The mean is `theory`, up to a known `bias`, and the test is sharp: the interval is no wider than `precision`."""
    mean, half = interval(waits)
    assert half < precision * theory, f"{mean} ± {half} says too little about {theory}"
    assert abs(mean - theory) < half + bias, f"{mean} ± {half}, theory {theory}"


# ---------------------------------------------------------------------------------------------------- formulas


def pollaczek_khinchine(rate: float, mean_tokens: float) -> float:
    """Mean wait in M/G/1 with geometric service of `mean_tokens` steps: λ E[S²] / 2 (1 − ρ)."""
    p = 1 / mean_tokens
    second = (2 - p) / p**2 * STEP**2
    return rate * second / (2 * (1 - rate * mean_tokens * STEP))


def erlang_c(servers: int, load: float) -> float:
    """Probability of waiting in M/M/c with `load` = λ / μ, by the recursion of Erlang's B formula."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = load * blocked / (n + load * blocked)
    return blocked / (1 - load / servers * (1 - blocked))


def join_the_shortest_of_two(load: float, size: int = 60) -> float:
    """Mean wait, in mean service times, joining the shorter of two M/M/1 queues: its Markov chain, solved."""

    def index(i: int, j: int) -> int:
        return i * size + j

    rates = np.zeros((size * size, size * size))
    arrival = 2 * load
    for i in range(size):
        for j in range(size):
            here = index(i, j)
            if i < size - 1 and i <= j:
                rates[here, index(i + 1, j)] += arrival if i < j else arrival / 2
            if j < size - 1 and j <= i:
                rates[here, index(i, j + 1)] += arrival if j < i else arrival / 2
            if i:
                rates[here, index(i - 1, j)] += 1.0
            if j:
                rates[here, index(i, j - 1)] += 1.0
    rates -= np.diag(rates.sum(axis=1))
    equations = rates.T.copy()
    equations[0] = 1.0  # probabilities add up to 1
    share = np.linalg.solve(equations, np.eye(size * size)[0])
    customers_ = sum(share[index(i, j)] * (i + j) for i in range(size) for j in range(size))
    return float(customers_ / arrival - 1.0)  # Little's law, less the service


def test_the_formulas_know_textbook_values() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(5, 4.0) == pytest.approx(0.5541, abs=1e-4)
    # With long service times the geometric distribution is exponential: M/M/1 has ρ / (1 − ρ) service times of wait.
    assert pollaczek_khinchine(0.7 / (10_000 * STEP), 10_000) == pytest.approx(0.7 / 0.3 * 10_000 * STEP, rel=1e-4)
    # Between M/M/2 (one queue for both) and M/M/1 (no choice).
    assert erlang_c(2, 1.6) / (2 - 1.6) < join_the_shortest_of_two(0.8, 40) < 0.8 / 0.2


# ---------------------------------------------------------------------------------------------------- one server


def test_a_batch_of_one_is_lindleys_recursion() -> None:
    """Exact, request by request: it waits for the rest of those before it."""
    requests = customers(20_000, 0.8 / (20 * STEP), 20, seed=1)
    waits = one_engine(requests, max_num_seqs=1)
    free = 0.0
    expected = []
    for one in requests:
        start = max(free, one.arrival)
        expected.append(start - one.arrival)
        free = start + one.output_tokens * STEP
    np.testing.assert_allclose(waits, expected, atol=1e-6)
    assert max(expected) > 1.0


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_a_batch_of_one_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    rate = load / (20 * STEP)
    waits = one_engine(customers(150_000, rate, 20, seed=2), max_num_seqs=1)
    agrees(waits, pollaczek_khinchine(rate, 20), precision=0.08)


# ------------------------------------------------------------------------------------------------ one queue, c servers


@pytest.mark.parametrize("servers", [2, 4, 16])
def test_a_batch_of_c_is_c_servers_behind_one_queue(servers: int) -> None:
    """Each of c running sequences gets a token a step, however many run. Starts are later by less than a step."""
    requests = customers(20_000, 0.85 * servers / (100 * STEP), 100, seed=3)
    waits = one_engine(requests, max_num_seqs=servers)
    free = [0.0] * servers
    expected = []
    for one in requests:
        start = max(heapq.heappop(free), one.arrival)
        expected.append(start - one.arrival)
        heapq.heappush(free, start + one.output_tokens * STEP)
    late = waits - np.array(expected)
    assert late.min() > -1e-6
    assert late.max() < STEP + 1e-6
    assert max(expected) > 50 * STEP


@pytest.mark.parametrize("servers", [2, 4])
def test_a_batch_of_c_waits_as_erlang_says(servers: int) -> None:
    mean_tokens = 200
    service = mean_tokens * STEP
    load = 0.75 * servers
    waits = one_engine(customers(400_000, load / service, mean_tokens, seed=4), max_num_seqs=servers)
    theory = erlang_c(servers, load) * service / (servers - load)
    agrees(waits, theory, precision=0.1, bias=STEP)  # one waits for a step to end


# ---------------------------------------------------------------------------------------------------- many instances


def test_random_dispatch_makes_independent_queues() -> None:
    """A Poisson stream split at random is as many Poisson streams."""
    instances, load = 4, 0.6
    rate = load / (20 * STEP)
    waits = many_engines(customers(120_000, instances * rate, 20, seed=5), Random(), instances)
    agrees(waits, pollaczek_khinchine(rate, 20), precision=0.12)


def test_the_shorter_of_two_queues_waits_as_its_markov_chain_says() -> None:
    load, mean_tokens = 0.7, 100
    service = mean_tokens * STEP
    waits = many_engines(customers(100_000, 2 * load / service, mean_tokens, seed=6), LeastRequests(), 2)
    theory = join_the_shortest_of_two(load, 40) * service
    agrees(waits, theory, precision=0.12, bias=0.01 * theory)  # geometric service varies 1 % less


def test_the_more_a_dispatcher_knows_the_shorter_the_wait() -> None:
    """Random > round robin > power of two > the shortest queue > one queue for all, as theory orders them."""
    instances, mean_tokens = 4, 100
    rate = 0.85 * instances / (mean_tokens * STEP)
    requests = customers(10_000, rate, mean_tokens, seed=7)
    policies = (Random(), RoundRobin(), LeastRequests(k=2), LeastRequests())
    waits = [many_engines(requests, policy, instances).mean() for policy in policies]
    waits.append(one_engine(requests, max_num_seqs=instances).mean())
    assert all(worse > 1.1 * better for worse, better in pairwise(waits)), waits
