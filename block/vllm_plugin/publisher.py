"""The scheduler that publishes: vLLM's own, with a mix-in that writes its state to a buffer after every `schedule()`.

    --scheduler-cls block.vllm_plugin.publisher.publishing

It changes no decision. The path of the state buffer comes in the environment (BLOCK_STATE_BUFFER), set by `serve`. With
BLOCK_RECORD, a file, every decision is written down too, a line of JSON each: what the twin is checked against.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from block.core.snapshot import (
    EXPECTED,
    ID,
    MAX_TOKENS,
    NUM_BLOCKS,
    NUM_CACHED_TOKENS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_PLACEHOLDERS,
    NUM_OUTPUT_TOKENS,
    NUM_PREEMPTIONS,
    NUM_PROMPT_TOKENS,
    NUM_SCHEDULED_NEXT,
    NUM_SCHEDULED_TOKENS,
    NUM_SHARED_BLOCKS,
    TARGET,
)
from block.engine.config import EngineSettings, blocks_kept
from block.vllm_plugin import state_buffer
from block.vllm_plugin.environment import RECORD, STATE_BUFFER
from block.vllm_plugin.lifetime import die_with_parent
from block.vllm_plugin.requirements import require
from block.vllm_plugin.tags import TAG_EXPECTED, TAG_ID

if TYPE_CHECKING:
    from block.vllm_plugin.prefixes import CachedPrefixes

_ROWS = [
    ID,
    NUM_PROMPT_TOKENS,
    TARGET,
    MAX_TOKENS,
    EXPECTED,
    NUM_CACHED_TOKENS,
    NUM_SHARED_BLOCKS,
    NUM_OUTPUT_TOKENS,
    NUM_COMPUTED_TOKENS,
    NUM_SCHEDULED_TOKENS,
    NUM_SCHEDULED_NEXT,
    NUM_OUTPUT_PLACEHOLDERS,
    NUM_PREEMPTIONS,
]
_COMPUTED = _ROWS.index(NUM_COMPUTED_TOKENS)
_CHUNK = _ROWS.index(NUM_SCHEDULED_TOKENS)
_PREEMPTED = _ROWS.index(NUM_PREEMPTIONS)


def publishing(*, vllm_config: Any, **arguments: Any) -> Any:
    """vLLM's scheduler for `vllm_config`, synchronous or asynchronous, with the mix-in."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return type(f"Publishing{base.__name__}", (Publishing, base), {})(vllm_config=vllm_config, **arguments)


class Publishing:
    """The mix-in. A *step* is what one `schedule()` decided, from then until `update_from_output`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        die_with_parent()  # SIGKILL of the API server would orphan this process
        super().__init__(*args, **kwargs)
        pool = "kv_cache_manager.block_pool.get_num_free_blocks"
        groups = "kv_cache_config.kv_cache_groups"
        require(self, "running", "waiting", "requests", pool, groups, "_free_request", "block_size", "vllm_config")
        self._buffer = state_buffer.StateBuffer.open(os.environ[STATE_BUFFER])
        self._steps: deque[dict[str, tuple[int, bool]]] = deque()  # in flight: tokens, and whether it samples
        self._features: deque[tuple[float, ...]] = deque()  # what of them goes into StepTime
        self._tags: dict[str, tuple[int, ...]] = {}
        self._untagged = 0  # minus the number of requests without a tag so far
        self._preempted = 0  # preemptions of the requests that are gone
        self._queues = [queue for queue in ("kv_holding_waiting", "skipped_waiting", "waiting") if hasattr(self, queue)]
        self._started = float("nan")  # when the step in flight began
        self._timing: tuple[float, tuple[float, ...]] | None = None  # the ended step that waits for its successor
        self._prefixes = self._watched_cache()
        self._write_settings()
        record = os.environ.get(RECORD)
        self._record = Path(record).open("a", buffering=1) if record else None  # noqa: SIM115 — as long as this

    def _watched_cache(self) -> CachedPrefixes | None:
        """Who tells what the prefix cache has; None without one, and where a hit is not just the longest run of blocks
        from the first on (groups of layers that cache each for itself, sliding windows, speculation), or where several
        schedulers would write to one state buffer.
        """
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        if not config.cache_config.enable_prefix_caching:
            return None
        # Imported here, as numba is with them: when vLLM's worker for CPUs begins, before this, it looks through all
        # modules that there are, and stumbles over one of llvmlite's objects.
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from block.engine.prefix_table import table_size
        from block.vllm_plugin.prefixes import CachedPrefixes

        places = table_size(config.cache_config.num_gpu_blocks)
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]  # type: ignore[attr-defined]
        plain = len(specs) == 1 and isinstance(specs[0], FullAttentionSpec)
        plain = plain and not (specs[0].sliding_window or specs[0].attention_chunk_size or config.speculative_config)
        alone = config.parallel_config.data_parallel_size == 1
        self._buffer.header[state_buffer.PLAIN_HITS] = plain and alone
        if not (plain and alone and places <= state_buffer.MOST_PLACES):
            return None
        self._buffer.header[state_buffer.PLACES] = places
        table = self._buffer.prefix_table
        assert table is not None
        return CachedPrefixes(self.kv_cache_manager.block_pool, table, self.block_size)  # type: ignore[attr-defined]

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own."""
        tag = self._tag(request)
        if self._record is not None:
            self._note("add", tag[:5])
        return super().add_request(request, *args, **kwargs)  # type: ignore[misc]

    def _note(self, kind: str, what: Any) -> None:
        assert self._record is not None
        self._record.write(json.dumps([kind, what]) + "\n")

    def _note_step(self, output: Any) -> None:
        """What was decided, by the requests' numbers: tokens, preempted, running, waiting; the free blocks; and what of
        those that are new was found in the prefix cache.
        """
        waiting = chain.from_iterable(getattr(self, queue) for queue in self._queues)
        number = {id_: tag[0] for id_, tag in self._tags.items()}
        self._note(
            "step",
            {
                "tokens": {number[id_]: tokens for id_, tokens in output.num_scheduled_tokens.items()},
                "preempted": sorted(number[id_] for id_ in output.preempted_req_ids or ()),
                "running": [number[one.request_id] for one in self.running],  # type: ignore[attr-defined]
                "waiting": [number[one.request_id] for one in waiting],
                "free": self.kv_cache_manager.block_pool.get_num_free_blocks(),  # type: ignore[attr-defined]
                "found": {number[new.req_id]: new.num_computed_tokens for new in output.scheduled_new_reqs},
            },
        )

    def _write_settings(self) -> None:
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        scheduler, cache = config.scheduler_config, config.cache_config
        settings = EngineSettings(
            is_v1=True,
            total_blocks=cache.num_gpu_blocks - blocks_kept(is_v1=True),
            block_size=self.block_size,  # type: ignore[attr-defined]
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_model_len=config.model_config.max_model_len,
            watermark_blocks=getattr(self.kv_cache_manager, "watermark_blocks", 0),  # type: ignore[attr-defined]
            long_prefill_token_threshold=scheduler.long_prefill_token_threshold,
            scheduler_reserve_full_isl=getattr(scheduler, "scheduler_reserve_full_isl", False),
            async_scheduling=bool(scheduler.async_scheduling),
            enable_prefix_caching=bool(cache.enable_prefix_caching),
        )
        self._buffer.begin()
        self._buffer.header[state_buffer.SETTINGS : state_buffer.SETTINGS + len(settings)] = settings
        self._buffer.header[state_buffer.FREE] = settings.total_blocks
        self._buffer.end()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own decision, published."""
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        now = time.monotonic()
        if self._prefixes is not None:
            self._note_hits(output.scheduled_new_reqs)
        requests = self.requests  # type: ignore[attr-defined]
        step = {}
        decodes = kv = chunks = chunk_context = chunk_squared = 0
        for id_, tokens in output.num_scheduled_tokens.items():
            request = requests[id_]
            step[id_] = (tokens, not request.is_prefill_chunk)
            computed = request.num_computed_tokens  # this step's included
            if tokens == 1:
                decodes += 1
                kv += computed
            else:
                chunks += 1
                chunk_context += tokens * (computed - tokens)
                chunk_squared += tokens * tokens
        if not self._steps:  # else it begins when the one in flight ends
            self._begin(now)
        self._steps.append(step)
        self._features.append((output.total_num_scheduled_tokens, decodes, kv, chunks, chunk_context, chunk_squared))
        self._publish()
        if self._record is not None:
            self._note_step(output)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own; the step in flight has ended."""
        now = time.monotonic()
        if self._record is not None:
            self._note("end", None)
        if self._steps:
            self._steps.popleft()
            features = self._features.popleft()
            self._timing = (self._started, features) if features[0] else None
            self._started = float("nan")
            if self._steps:
                self._begin(now)
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        if not self._steps and not self.requests:  # type: ignore[attr-defined]
            self._publish()  # nothing may be scheduled any more
        return outputs

    def _begin(self, now: float) -> None:
        """A step begins: the duration of the one before it is known."""
        if self._timing is not None:
            started, features = self._timing
            buffer = self._buffer
            timed = int(buffer.header[state_buffer.TIMED])
            buffer.steps[timed % state_buffer.RING] = (*features, now - started)
            buffer.header[state_buffer.TIMED] = timed + 1
            self._timing = None
        self._started = now

    def _publish(self) -> None:
        running = self.running  # type: ignore[attr-defined]
        waiting = list(chain.from_iterable(getattr(self, queue) for queue in self._queues))
        hidden = max(len(running) + len(waiting) - state_buffer.CAPACITY, 0)
        first = self._steps[0] if self._steps else {}
        second = self._steps[1] if len(self._steps) > 1 else {}
        none = (0, False)
        rows = []
        for request in chain(running, waiting[: state_buffer.CAPACITY - len(running)]):
            id_ = request.request_id
            tokens, samples = first.get(id_, none)
            more, samples_too = second.get(id_, none)
            rows.append(
                (
                    *(self._tags.get(id_) or self._tag(request)),
                    request.num_output_tokens,
                    request.num_computed_tokens,
                    tokens,
                    more,
                    samples + samples_too,
                    request.num_preemptions,
                )
            )
        columns = np.array(rows, dtype=np.int64).reshape(-1, len(_ROWS)).T
        chunks = np.flatnonzero(columns[_CHUNK, len(running) :])
        stale = int(chunks[-1]) + 1 if len(chunks) else 0  # of those waiting, up to the last that a step in flight has
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()  # type: ignore[attr-defined]
        buffer = self._buffer
        buffer.begin()
        if self._prefixes is not None:
            self._prefixes.publish()
        header, seqs, count = buffer.header, buffer.seqs, columns.shape[1]
        seqs[_ROWS, :count] = columns
        seqs[NUM_BLOCKS, :count] = -(-columns[_COMPUTED] // self.block_size)  # type: ignore[attr-defined]
        header[state_buffer.COLUMNS : state_buffer.HIDDEN + 1] = (
            count,
            len(running),
            stale,
            free,
            self._preempted + int(columns[_PREEMPTED].sum()),
            header[state_buffer.STEPS] + 1,
            hidden,
        )
        buffer.times[state_buffer.STARTED] = self._started if any(self._steps) else np.nan
        buffer.end()

    def _tag(self, request: Any) -> tuple[int, ...]:
        """The entries of a request that never change: number, prompt, the most it may answer, the answer expected, and
        what of its prompt was cached when it came.

        What came without a tag gets a negative number and is expected to use all that it may.
        """
        params = request.sampling_params
        extra = (params.extra_args or {}) if params is not None else {}
        if TAG_ID in extra:
            number = int(extra[TAG_ID])
        else:
            self._untagged -= 1
            number = self._untagged
        expected = int(extra.get(TAG_EXPECTED, request.max_tokens))
        found = (0, 0) if self._prefixes is None else self._prefixes.found(request)
        tag = (number, request.num_prompt_tokens, request.max_tokens, request.max_tokens, expected, *found)
        self._tags[request.request_id] = tag
        return tag

    def _note_hits(self, admitted: Any) -> None:
        """What the first admission of requests found takes the place of what was there when they came. What more there
        is was cached since, by others that use it.
        """
        for new in admitted:
            if self.requests[new.req_id].num_preemptions > 0:  # type: ignore[attr-defined]
                continue  # it has been admitted before
            *kept, tokens, shared = self._tags[new.req_id]
            more = (new.num_computed_tokens - tokens) // self.block_size  # type: ignore[attr-defined]
            found = new.num_computed_tokens // self.block_size  # type: ignore[attr-defined]
            self._tags[new.req_id] = (*kept, new.num_computed_tokens, min(shared + max(more, 0), found))

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's own; the request will not be published any more."""
        tag = self._tags.pop(request.request_id, None)
        if self._prefixes is not None:
            hashes = self._prefixes.forget(request.request_id)
            if self._record is not None and tag is not None:
                self._note("gone", [tag[0], hashes])
        self._preempted += request.num_preemptions
        if tag is not None:
            buffer = self._buffer
            finished = int(buffer.header[state_buffer.FINISHED])
            buffer.gone[finished % state_buffer.GONE] = tag[0], request.num_preemptions
            buffer.header[state_buffer.FINISHED] = finished + 1
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
