"""Servers without the plugin: what they do is modelled by what this gateway has sent to them.

A stream tells how many tokens of its response there are; of an answer that comes whole, its forecast tells. Settings
come from /metrics and /v1/models, as far as vLLM tells them there, and what is cached from its own events, if it
publishes them (/kv_event_sources, of vLLM 0.32 on). What others send to such a server is not known.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np

from block.backends.cache_events import CacheEvents, EventSource, begin_to_follow
from block.core.arrays import Ints
from block.core.clock import Clock
from block.core.snapshot import (
    EXPECTED,
    FIELDS,
    ID,
    MAX_TOKENS,
    NUM_BLOCKS,
    NUM_CACHED_TOKENS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_TOKENS,
    NUM_PROMPT_TOKENS,
    NUM_SHARED_BLOCKS,
    TARGET,
    Snapshot,
)
from block.core.types import RequestRecord
from block.dispatch.core import Dispatcher, Observer
from block.engine.config import EngineConfig, EngineSettings, blocks_kept
from block.engine.prefix_table import held
from block.gateway.server_connections import ServerPool
from block.gateway.upstreams import SeenInstance

log = logging.getLogger(__name__)

UNTOLD_BLOCKS = 10_000
"""KV blocks of a server that does not tell how many it has."""

_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class ModelledInstance(SeenInstance):
    """A server whose snapshots show what was sent to it. It can be looked at once `healthy` was true.

    assumed: what it is like, where it does not tell.
    """

    def __init__(
        self,
        instance_id: int,
        pool: ServerPool,
        session: aiohttp.ClientSession,
        clock: Clock,
        assumed: EngineConfig,
    ) -> None:
        super().__init__(instance_id, pool, session)
        self.going: dict[int, RequestRecord] = {}
        """What was sent there and has not left it, by its number."""
        self._clock = clock
        self._assumed = assumed
        self._models: tuple[str, ...] = ()
        self._events: CacheEvents | None = None
        self._following: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------------------------------------------- what is told

    async def _is_well(self) -> bool:
        """Whether /health says so; then it is asked what it is, for it may be another process than before."""
        if not await super()._is_well():
            return False
        try:
            self.settings = await self._ask()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            if self.settings is None:  # else what it said before is nearer to the truth
                log.warning("%s: its settings are assumed: %s", self.url, error)
                self.settings = self._assumed.settings(UNTOLD_BLOCKS)
        if self._following is None and self.settings.enable_prefix_caching:
            await self._follow()
        return True

    async def _ask(self) -> EngineSettings:
        """Its settings. ValueError if what it tells is of no use."""
        told: dict[str, Any] = {}
        blocks = UNTOLD_BLOCKS
        async with self._session.get(f"{self.url}/metrics") as answer:
            found = _CACHE.search(await answer.text(errors="replace"))
        labels = dict(_LABEL.findall(found[1])) if found is not None else {}
        if labels.get("block_size", "").isdigit():
            told["block_size"] = int(labels["block_size"])
        if labels.get("num_gpu_blocks", "").isdigit():
            blocks = int(labels["num_gpu_blocks"]) - blocks_kept(is_v1=True)
        if "enable_prefix_caching" in labels:
            told["enable_prefix_caching"] = labels["enable_prefix_caching"] == "True"
        with suppress(OSError):
            cards = await self.cards() or ()
            self._models = tuple(str(card["id"]) for card in cards if not card.get("parent"))
            longest = [card["max_model_len"] for card in cards if isinstance(card.get("max_model_len"), int)]
            told |= {"max_model_len": max(longest)} if longest else {}
        return replace(self._assumed, **told).settings(blocks)

    async def _follow(self) -> None:
        """Hear what it publishes of its prefix cache, if it does; returns when what it replays was heard, or soon."""
        assert self.settings is not None
        try:
            async with self._session.get(f"{self.url}/kv_event_sources") as answer:
                sources = json.loads(await answer.read()) if answer.status == 200 else {}
            (one,) = sources.values()
            if not one.get("enable_kv_cache_events", True) or one.get("publisher") != "zmq":
                return
            source = EventSource(one["endpoint"], one.get("replay_endpoint"), one.get("topic") or "")
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError, AttributeError):
            return  # none, or of several engines, of which nobody knows which takes a request
        size = self.settings.block_size
        self._events, self._following = await begin_to_follow(source.seen_from(self.url), size)
        if self._left:
            await self.detach()

    async def detach(self) -> None:
        """Stop listening."""
        await super().detach()
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
            self._following = None

    # ---------------------------------------------------------------------------------------------------- what it shows

    @property
    def models(self) -> Sequence[str]:
        """As of `SeenInstance`, like the rest."""
        return self._models

    @property
    def tells_prefixes(self) -> str | None:
        """By "events", or not."""
        return None if self._events is None or self._events.told is None else "events"

    def look_up(self, hashes: Ints, most: int) -> tuple[int, int] | None:
        """By the events."""
        table = None if self._events is None else self._events.told
        return None if table is None else held(table, hashes, most)

    def snapshot(self) -> Snapshot:
        """What it should be doing now: between two steps, since nobody knows when the one in flight began."""
        assert self.settings is not None, "only servers that were asked are active"
        now, size = self._clock.now(), self.settings.block_size
        caches = self.settings.enable_prefix_caching
        going = [(record, i > 0) for record in self.going.values() for i in range(record.request.sequences)]
        seqs = np.zeros((FIELDS, len(going)), dtype=np.int64)
        free, running, waiting = self.settings.total_blocks, 0, len(going)
        for record, is_sibling in going:
            request = record.request
            shares = caches and is_sibling and request.block_hashes is not None
            shared = (request.prompt_tokens - 1) // size if shares else 0
            tokens = response_tokens(record, now)
            blocks = -(-(request.prompt_tokens + tokens - 1) // size)
            if tokens == 0 or blocks - shared > free or running == self.settings.max_num_seqs:
                waiting -= 1  # from the end on: those that run come first
                column, tokens, blocks = waiting, 0, 0
            else:
                column, running = running, running + 1
            free -= blocks and blocks - shared
            seqs[ID, column] = request.id
            seqs[NUM_PROMPT_TOKENS, column] = request.prompt_tokens
            seqs[NUM_OUTPUT_TOKENS, column] = tokens
            seqs[NUM_COMPUTED_TOKENS, column] = request.prompt_tokens + tokens - 1 if tokens else 0
            seqs[NUM_BLOCKS, column] = blocks
            seqs[NUM_CACHED_TOKENS, column], seqs[NUM_SHARED_BLOCKS, column] = shared * size, shared
            seqs[EXPECTED, column] = request.predicted_output_tokens
            most = max(self.settings.max_model_len - request.prompt_tokens, 1)
            seqs[[TARGET, MAX_TOKENS], column] = max(most, tokens + 1)
        seqs[:, running:] = seqs[:, running:][:, ::-1].copy()  # in the order in which they came
        return Snapshot(self.instance_id, now, math.nan, running, 0, free, 0, seqs)


class Going(Observer):
    """Tells `instances` what is sent to them."""

    def __init__(self, instances: Mapping[int, ModelledInstance]) -> None:
        self._instances = instances

    def delivered(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
        """It is there."""
        self._instances[record.instance_id].going[record.request.id] = record

    def left(self, dispatcher: Dispatcher, record: RequestRecord, now: float) -> None:
        """It is there no more."""
        self._instances[record.instance_id].going.pop(record.request.id, None)


def response_tokens(record: RequestRecord, now: float) -> int:
    """Tokens of a response by now: those that have come, or as its forecast has it; 0 before the first."""
    if not math.isnan(record.first_token):
        return max(record.output_tokens // record.request.sequences, 1)
    forecast, elapsed = record.forecast, now - record.dispatched
    if forecast is None or not elapsed > forecast.ttft:
        return 0
    share = (elapsed - forecast.ttft) / max(forecast.e2e - forecast.ttft, 1e-9)
    return max(int(min(share, 1.0) * record.request.predicted_output_tokens), 1)
