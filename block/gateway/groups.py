"""Models and how requests for them are placed: each group of models has a policy of its own, over its own servers.

A server belongs to the group that its models are of, as it tells; to the default group as long as it tells none, or
only of models that no group is named for.
"""

from __future__ import annotations

import random
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from block.cluster.instance import one_by_one
from block.core.arrays import Floats
from block.core.clock import Clock
from block.core.hashing import hash_tokens
from block.core.types import Request
from block.dispatch.config import DispatchConfig
from block.dispatch.core import Dispatcher, Forecaster, History, Observer
from block.dispatch.correction import CorrectedForecaster
from block.dispatch.policies import Needs, Policy
from block.engine.latency import LatencyModel
from block.gateway.admission import Objectives
from block.gateway.asked import Asked, prompt_text
from block.gateway.config import GatewayConfig
from block.gateway.estimates import Estimator
from block.gateway.exchange import Exchange
from block.gateway.feedback import PromptRates, ResponseLengths
from block.gateway.forecasts import FleetForecaster
from block.gateway.metrics import Metrics
from block.gateway.modelled import Going, ModelledInstance
from block.gateway.models import Models
from block.gateway.openai import PromptUsage, tagged
from block.gateway.prefixes import UpstreamPrefixes
from block.gateway.prompts import UNKNOWN, Prompt, Prompts, TextPieces, TokenizedPrompts
from block.gateway.upstreams import SeenInstance, Upstream
from block.lengths import Lengths, Oracle, Reader

HISTORY = 1000
"""Requests that a dispatcher remembers; nothing here needs more than the latest."""
TOKENIZE_S = 0.2
"""That a request waits for its tokens, if `gateway.tokenize_timeout_s` does not say."""


class Plan(NamedTuple):
    """How requests are placed.

    latency: the servers' step times; policies that need forecasts need it. lengths: estimates responses, if it reads
    prompts and the policy looks at more than counts; else each is expected to have `expected_output_tokens`.
    tokenizer: the model's, as `block.workload.prompts.load_tokenizer` has it; None: prompts are known by their text.
    """

    policy: Policy
    dispatch: DispatchConfig
    rng: random.Random
    latency: LatencyModel | None = None
    lengths: Lengths = Oracle()
    tokenizer: Any = None

    @property
    def tags(self) -> bool:
        """Whether requests carry their numbers, by which servers show them."""
        return self.policy.needs is not Needs.COUNTS

    @property
    def forecasts(self) -> bool:
        """Whether it makes forecasts."""
        return self.policy.needs is Needs.FORECAST

    @property
    def block_size(self) -> int | None:
        """Of a policy that only counts, and goes by what of prompts it sent itself: tokens of its blocks."""
        return getattr(self.policy, "block_size", None) if not self.tags else None

    @property
    def learns_lengths(self) -> bool:
        """Whether it looks at lengths of responses."""
        return self.tags or self.block_size is not None


class Arrived(NamedTuple):
    """A request for a response: its number, when it came, what its `body` asks for, the only servers that may serve it
    (None: all), and its objectives.
    """

    number: int
    arrived: float
    asked: Asked
    body: bytes
    among: Container[int] | None
    objectives: Objectives | None


class ModelGroup:
    """Requests for some models, placed by `plan` on `servers`, which are by id, and change. `close` it at the end."""

    def __init__(self, plan: Plan, config: GatewayConfig, clock: Clock, models: Models, rates: PromptRates) -> None:
        self.plan = plan
        self.servers: dict[int, Upstream] = {}
        """Those of them that there are, by id."""
        self.packed: Floats | None = None if plan.latency is None else plan.latency.pack()
        """Step times, as of `LatencyModel.pack`."""
        self._config = config
        self._models = models
        self._rates = rates
        self._reader = plan.lengths if plan.tags and isinstance(plan.lengths, Reader) else None
        self._block_size = plan.block_size
        self._prompts: Prompts | None = None
        self._estimator: Estimator | None = None
        self.prefixes: UpstreamPrefixes | None = None
        """What servers have cached, if the policy asks for that."""
        observers: list[Observer] = []
        if plan.tags:
            exact = plan.tokenizer is not None and plan.dispatch.prefixes == "told"
            self.prefixes = UpstreamPrefixes(cast(dict[int, SeenInstance], self.servers), exact=exact)
            observers.append(self.prefixes)
            if not config.plugin:
                observers.append(Going(cast(dict[int, ModelledInstance], self.servers)))
        self.dispatcher = Dispatcher(
            0,
            plan.policy,
            self._forecaster(),
            plan.dispatch,
            plan.rng,
            snapshot_many=one_by_one(self.servers),
            prefixes=self.prefixes,
            observers=observers,
            history=History(HISTORY),
        )

    def _forecaster(self) -> Forecaster | None:
        """What makes forecasts, if the policy needs any."""
        plan = self.plan
        if not plan.forecasts:
            return None
        assert plan.latency is not None, "who asks for forecasts has a latency model"
        outrun_share = float(plan.lengths.outrun_share) if isinstance(self._reader, Reader) else 0.0
        forecaster = FleetForecaster(cast(dict[int, SeenInstance], self.servers), plan.latency, outrun_share)
        steps = plan.dispatch.correction_steps
        return forecaster if steps == 0 else CorrectedForecaster(forecaster, plan.latency, steps)

    def begin(self, metrics: Metrics, lengths: ResponseLengths | None) -> None:
        """Requests may come, of which these are told. lengths: learns of responses; None: nothing is learned."""
        config, tokenizer = self._config, self.plan.tokenizer
        self._metrics = metrics
        self._lengths = lengths if self.plan.learns_lengths else None
        if tokenizer is not None:
            timeout_s = config.tokenize_timeout_s or TOKENIZE_S
            self._prompts = TokenizedPrompts(tokenizer, timeout_s, metrics.not_tokenized)
        elif self.prefixes is not None or self._block_size is not None:
            self._prompts = TextPieces(self._rates.steady)
        if self._prompts is not None:
            hash_tokens(np.zeros(1, dtype=np.int64), 1)  # compiled before a request comes
        if self._reader is not None:
            timeout_s = config.estimate_timeout_s
            self._estimator = Estimator(self._reader, timeout_s, metrics.not_estimated, metrics.estimated)

    def close(self) -> None:
        """Read no more prompts."""
        for one in (self._prompts, self._estimator):
            if one is not None:
                one.close()

    # --------------------------------------------------------------------------------------------------- one request

    def send(self, exchange: Exchange, one: Arrived) -> None:
        """Have `exchange` send a request to where the policy says, once its prompt is read."""
        if self._estimator is None and self._prompts is None:
            self._place(exchange, one)
        else:
            exchange.prepare(self._read_and_place(exchange, one))

    async def _read_and_place(self, exchange: Exchange, one: Arrived) -> None:
        fields = one.asked.fields
        estimate = await self._estimator.tokens(prompt_text(fields)) if self._estimator is not None else None
        self._place(exchange, one, estimate, await self._read_prompt(fields))

    def _place(self, exchange: Exchange, one: Arrived, estimate: int | None = None, prompt: Prompt = UNKNOWN) -> None:
        """estimate: of its response's tokens, if there is one."""
        asked, body, lengths, model = one.asked, one.body, self._lengths, one.asked.fields.get("model")
        tokens = asked.each_prompt(self._rates.tokens(asked) if prompt.tokens is None else prompt.tokens)
        longest = self._models.longest(model)
        room = None if longest is None else max(longest - tokens, 1)
        believed = self._config.expected_output_tokens if estimate is None else estimate
        thought = believed
        if lengths is not None and self._config.length_feedback:
            thought = lengths.corrected(asked, believed, estimated=estimate is not None)
        expected = asked.capped(thought, room)
        if self.plan.tags:
            body = tagged(body, asked.fields, one.number, expected)
        request = Request(
            one.number, one.arrived, tokens, expected, expected, block_hashes=prompt.hashes, sequences=asked.sequences
        )

        def learn(usage: PromptUsage) -> None:
            if not prompt.exact:
                self._rates.learn(asked, usage.tokens)
            elif usage.tokens != prompt.tokens and asked.complete:
                self._metrics.miscounted()

        def learn_length(response_tokens: int) -> None:
            assert lengths is not None
            most, estimated = asked.most_tokens(room), estimate is not None
            lengths.answered(asked, believed, most, response_tokens, estimated=estimated)
            self._metrics.answered(expected, response_tokens / asked.sequences)

        exchange.place(
            request,
            body,
            among=one.among,
            objectives=one.objectives,
            on_usage=learn,
            on_response=learn_length if lengths is not None else None,
        )

    async def _read_prompt(self, fields: Mapping[str, Any]) -> Prompt:
        """Its tokens and blocks, as far as the policy asks for them and they can be known."""
        size = self._block_size
        if self.prefixes is not None and self.prefixes.known():
            size = self.prefixes.block_size
        if self._prompts is None or size is None:
            return UNKNOWN
        model, known = fields.get("model"), self._served
        adapter = model if isinstance(model, str) and known and model not in known else None
        return await self._prompts.read(fields, size, adapter)

    @property
    def _served(self) -> set[str]:
        """What servers call their models, of those that tell."""
        return {name for one in self.servers.values() if isinstance(one, SeenInstance) for name in one.models}


class Groups:
    """All of them, by the models that they are named for, and the `default` one: what each server is in, and all of the
    dispatchers as one. They number the servers alike.
    """

    def __init__(self, default: ModelGroup, named: Mapping[str, ModelGroup], models: Models) -> None:
        self.all: Sequence[ModelGroup] = [default, *named.values()]
        self._default = default
        self._named = named
        self._models = models
        self._of: dict[int, ModelGroup] = {}

    def of(self, instance_id: int) -> ModelGroup:
        """The group that a server is in."""
        return self._of[instance_id]

    def of_model(self, name: object) -> ModelGroup:
        """The group that places requests for a model; of one that no group is named for, that of the servers that have
        it; of none, the first that has a server.
        """
        if not self._named:
            return self._default
        if isinstance(name, str) and name in self._named:
            return self._named[name]
        there = next((i for i in self._of if isinstance(name, str) and name in self._models.of(i)), None)
        if there is not None:
            return self._of[there]
        return next((one for one in self.all if one.dispatcher.active), self._default)

    # ------------------------------------------------------------------------------------------------------- servers

    def add_instance(self) -> int:
        """There is one more server, with this id; it is in no group before `join`."""
        ids = [one.dispatcher.add_instance() for one in self.all]
        return ids[0]

    def join(self, server: Upstream) -> None:
        """It is in the default group, until it tells what it serves."""
        self._of[server.instance_id] = self._default
        self._default.servers[server.instance_id] = server

    def settle(self, instance_id: int, now: float) -> None:
        """A server has told what it serves: it is in the group of that."""
        if not self._named or instance_id not in self._of:
            return
        names = self._models.of(instance_id)
        group = next((self._named[name] for name in names if name in self._named), self._default)
        before = self._of[instance_id]
        if group is before:
            return
        active = instance_id in before.dispatcher.active
        before.dispatcher.retire(instance_id)
        group.servers[instance_id] = before.servers.pop(instance_id)
        self._of[instance_id] = group
        if active:
            group.dispatcher.instance_up(instance_id, now)

    def remove_instance(self, instance_id: int, now: float) -> None:
        """It is gone for good, and has no request."""
        for one in self.all:
            one.dispatcher.remove_instance(instance_id, now)
        del self._of.pop(instance_id).servers[instance_id]

    def instance_up(self, instance_id: int, now: float) -> None:
        """As of `Dispatcher`, like all of these."""
        self._of[instance_id].dispatcher.instance_up(instance_id, now)

    def instance_down(self, instance_id: int, reason: str, now: float) -> None:
        """It is lost."""
        if instance_id in self._of:
            self._of[instance_id].dispatcher.instance_down(instance_id, reason, now)

    def retire(self, instance_id: int) -> None:
        """It gets nothing more, and has done nothing wrong."""
        self._of[instance_id].dispatcher.retire(instance_id)

    def is_active(self, instance_id: int) -> bool:
        """Whether requests may go there."""
        return instance_id in self._of and instance_id in self._of[instance_id].dispatcher.active

    def is_last(self, instance_id: int) -> bool:
        """Whether requests for its models may go to no other."""
        return len(self._of[instance_id].dispatcher.active) == 1

    @property
    def active(self) -> int:
        """How many servers requests may go to."""
        return sum(len(one.dispatcher.active) for one in self.all)

    def outstanding(self, instance_id: int) -> int:
        """Sequences of requests placed there and not finished."""
        return sum(one.dispatcher.outstanding(instance_id) for one in self.all)

    def ejected(self, instance_id: int) -> int:
        """Times that it was ejected."""
        return sum(one.dispatcher.ejected(instance_id) for one in self.all)
