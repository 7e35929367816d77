"""The emulated GPU: an executor without worker, model or KV tensors, whose steps take the time a LatencyModel says.

    --distributed-executor-backend block.vllm_plugin.executor.EmulatedExecutor

Everything before it is vLLM as it is: API server, engine core, scheduler, KV-cache manager. The latency model's file
and the time dilation come in the environment (BLOCK_LATENCY, BLOCK_DILATION), set by the launcher.

A step begins when the one before it has ended, as on a GPU that always has work queued: the scheduler's own time is in
the latency model's fixed overhead, and what this host's CPU needs more than that does not add up from step to step.
"""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from block.core.arrays import Floats
from block.engine.latency import LatencyModel, decode_time, linear_time, prefill_time
from block.vllm_plugin.environment import DILATION, LATENCY
from block.vllm_plugin.tags import TAG_RESPONSE

TOKEN = 68  # what a response consists of, unless its request says


class Step(Future):  # type: ignore[type-arg]
    """The output of a step, there when its time has passed."""

    def __init__(self, output: Any, ends: float) -> None:
        super().__init__()
        self._output, self._ends = output, ends

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the step's end (CLOCK_MONOTONIC), and return its output."""
        time.sleep(max(self._ends - time.monotonic(), 0.0))
        return self._output

    def done(self) -> bool:
        """Whether the step's time has passed."""
        return time.monotonic() >= self._ends


class EmulatedExecutor(Executor):  # type: ignore[misc]
    """Computes nothing, in the time that computing would take."""

    def _init_executor(self) -> None:
        self._packed: Floats = LatencyModel.load(Path(os.environ[LATENCY])).pack()
        self._dilation = float(os.environ.get(DILATION, "1"))
        self._prompts: dict[str, int] = {}  # prompt tokens of the requests that vLLM has told of
        self._responses: dict[str, list[int]] = {}  # of those that say what is to be answered
        self._scheduled: deque[Any] = deque()
        self._busy_until = 0.0
        self._idle = True
        step_seconds(self._packed, [(2, 0)])  # load what is compiled

    @staticmethod
    def supports_async_scheduling() -> bool:
        """Two steps may be in flight."""
        return True

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Take a step; its output is had from `sample_tokens`, or here if it is empty."""
        for id_ in scheduler_output.finished_req_ids:
            self._prompts.pop(id_, None)
            self._responses.pop(id_, None)
        output: Any = None
        if scheduler_output.total_num_scheduled_tokens == 0:
            output = EMPTY_MODEL_RUNNER_OUTPUT
            self._idle = True
        else:
            self._scheduled.append(self._step(scheduler_output))
        return Step(output, 0.0) if non_block else output

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """The output of the oldest step that `execute_model` took."""
        step = self._scheduled.popleft()
        return step if non_block else step.result()

    def _step(self, scheduled: Any) -> Step:
        tokens = scheduled.num_scheduled_tokens
        sequences = []
        sampled = {}
        for new in scheduled.scheduled_new_reqs:
            prompt = len(new.prompt_token_ids)
            self._prompts[new.req_id] = prompt
            extra = new.sampling_params.extra_args or {}
            if TAG_RESPONSE in extra:
                self._responses[new.req_id] = extra[TAG_RESPONSE]
            chunk, context = tokens[new.req_id], new.num_computed_tokens
            sequences.append((chunk, context))
            known = getattr(new, "prefill_token_ids", None) or new.prompt_token_ids  # with a response, if preempted
            sampled[new.req_id] = self._sampled(new.req_id, context + chunk, len(known))
        cached = scheduled.scheduled_cached_reqs
        for id_, context, answered in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            chunk = tokens[id_]
            sequences.append((chunk, context))
            sampled[id_] = self._sampled(id_, context + chunk, self._prompts[id_] + answered)
        now = time.monotonic()
        begins = now if self._idle else max(self._busy_until, now - 1.0)
        self._idle = False
        self._busy_until = begins + step_seconds(self._packed, sequences) * self._dilation
        output = ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={id_: i for i, id_ in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()),
        )
        return Step(output, self._busy_until)

    def _sampled(self, id_: str, computed: int, known: int) -> list[int]:
        """The token that follows the first `computed` tokens of a request, of which `known` there are; none before."""
        if computed < known:
            return []
        response, place = self._responses.get(id_, ()), computed - self._prompts[id_]
        return [response[place] if place < len(response) else TOKEN]

    # What vLLM asks of workers, of which there are none.

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        """One attention layer stands for all: blocks are counted, not kept."""
        import torch

        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size, num_kv_heads=1, head_size=64, dtype=torch.bfloat16
        )
        return [{"model.layers.0.self_attn.attn": spec}]

    def determine_available_memory(self) -> list[int]:
        """Plenty: the number of blocks is set by --num-gpu-blocks-override."""
        return [1 << 40]

    def get_supported_kv_cache_layouts(self, *args: Any, **kwargs: Any) -> list[list[str]]:
        """The plain one."""
        return [["NHD"]]

    def set_kv_cache_layout(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to lay out."""

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to allocate."""

    def compile_or_warm_up_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to compile."""

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """Text generation."""
        return ("generate",)

    def collective_rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        """No worker answers."""
        return []

    def check_health(self) -> None:
        """Always healthy."""

    def shutdown(self) -> None:
        """Nothing to shut down."""


def step_seconds(packed: Floats, sequences: list[tuple[int, int]]) -> float:
    """Duration of a step that computes (chunk, context) of each sequence; one token is a decode."""
    tokens = decodes = kv = 0
    prefill = 0.0
    for chunk, context in sequences:
        tokens += chunk
        if chunk == 1:
            decodes += 1
            kv += context + 1
        else:
            prefill += prefill_time(packed, chunk, context)
    return linear_time(packed, tokens) + decode_time(packed, decodes, kv) + prefill
