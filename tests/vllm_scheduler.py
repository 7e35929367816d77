"""vLLM's own scheduler and engine loop in virtual time: no model, no worker, no process.

`VirtualEngine` is vLLM's `EngineCore` with the two things replaced that take time or cannot be had here: the executor,
whose batches last as long as its owner says, and the sockets through which requests come and go. What is scheduled,
when it is, and what an output does to the scheduler is vLLM's code.
"""

from __future__ import annotations

import contextlib
import copy
import json
import queue
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request as VllmRequest
from vllm.v1.structured_output import StructuredOutputManager

from block.core.types import Request
from block.engine.batch import Finished
from block.engine.config import EngineConfig

TOKEN, EOS = 1, 2  # what the model says, and what it ends with

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "max_position_embeddings": 4096,
}


def base_config(folder: Path) -> VllmConfig:
    """A configuration for engines to vary; making it is slow. `folder` receives the model's description."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    args = EngineArgs(model=str(folder), skip_tokenizer_init=True, enable_prefix_caching=False, max_model_len=2048)
    return args.create_engine_config()


def _vary(base: VllmConfig, config: EngineConfig, total_blocks: int) -> VllmConfig:
    """`base` with the settings of `config`, which have the same names, and `total_blocks` usable KV blocks."""
    made = copy.copy(base)
    for part in ("model_config", "cache_config", "scheduler_config"):
        setattr(made, part, copy.copy(getattr(base, part)))
    made.model_config.max_model_len = config.max_model_len
    made.cache_config.num_gpu_blocks = total_blocks + 1  # one is vLLM's null block
    made.cache_config.enable_prefix_caching = config.enable_prefix_caching
    for key in (
        "max_num_seqs",
        "max_num_batched_tokens",
        "watermark",
        "async_scheduling",
        "long_prefill_token_threshold",
        "scheduler_reserve_full_isl",
    ):
        assert hasattr(made.scheduler_config, key)
        setattr(made.scheduler_config, key, getattr(config, key))
    return made


class Batch:
    """A batch on its way, as the future of its outputs."""

    def __init__(self, engine: VirtualEngine, output: SchedulerOutput) -> None:
        requests = engine.scheduler.requests
        self.tokens = {int(id_): n for id_, n in output.num_scheduled_tokens.items()}
        self.samples = {int(id_) for id_ in output.num_scheduled_tokens if not requests[id_].is_prefill_chunk}
        self._engine = engine

    def result(self) -> ModelRunnerOutput:
        """Let it take its time, then say what the model has sampled."""
        if self.tokens:
            self._engine.elapse(self)
        sampled = [[self._engine.next_token(id_)] if id_ in self.samples else [] for id_ in self.tokens]
        names = [str(id_) for id_ in self.tokens]
        return ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)


class VirtualExecutor:
    """An executor that only notes what it is asked for."""

    def __init__(self, engine: VirtualEngine) -> None:
        self._engine = engine

    def execute_model(self, output: SchedulerOutput, non_block: bool) -> Batch:
        """Begin a batch; vLLM calls this right after each `schedule()`."""
        self._engine.preempted |= {int(id_) for id_ in output.preempted_req_ids or ()}
        self._batch = Batch(self._engine, output)
        return self._batch

    def sample_tokens(self, _: object, non_block: bool) -> Batch:
        """The outputs of that batch."""
        return self._batch


class VirtualEngine(EngineCore):  # type: ignore[misc]
    """vLLM's engine loop. `elapse(batch)` is called when all is scheduled that can be and a batch is waited for.

    Its owner adds and aborts requests meanwhile, sets `now` to the batch's end, and returns.
    """

    def __init__(
        self, base: VllmConfig, config: EngineConfig, total_blocks: int, elapse: Callable[[Batch], None]
    ) -> None:
        # Not EngineCore's own, which starts workers; these are the attributes that its steps use.
        made = self.vllm_config = _vary(base, config, total_blocks)
        size = config.block_size
        spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=64, dtype=torch.float16)
        self.scheduler = (AsyncScheduler if config.async_scheduling else Scheduler)(
            vllm_config=made,
            kv_cache_config=KVCacheConfig(
                num_blocks=made.cache_config.num_gpu_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(made),
            block_size=size,
            hash_block_size=size,
        )
        self.model_executor = VirtualExecutor(self)
        self.batch_queue_size = made.max_concurrent_batches
        self.batch_queue: deque[Any] | None = deque(maxlen=self.batch_queue_size) if self.batch_queue_size > 1 else None
        self.step_fn = self.step if self.batch_queue is None else self.step_with_batch_queue
        self.aborts_queue = queue.Queue[list[str]]()
        self.is_mm_encoder_only = self.is_pooling_model = self.check_for_draft_tokens = self.log_stats = False
        self._weight_version = "default"

        self.elapse = elapse
        self.now = 0.0
        self.tokens: dict[int, list[int]] = {}  # of prompt and response, by request, where they matter
        init_none_hash(sha256)
        self._block_hasher = get_request_block_hasher(size, sha256) if config.enable_prefix_caching else None
        self.inbox: deque[Callable[[], None]] = deque()  # what clients have sent since the last turn
        self.known: dict[int, VllmRequest] = {}
        self.preempted: set[int] = set()  # since the owner last cleared it
        self.finished: list[Finished] = []
        self._lengths: dict[int, int] = {}
        self._firsts: dict[int, float] = {}
        self._cached: dict[int, int] = {}

    def log_error_detail(self, _: SchedulerOutput) -> contextlib.AbstractContextManager[None]:
        """vLLM's own dumps its whole state when an assertion of a test fails in `elapse`."""
        return contextlib.nullcontext()

    def receive(self, request: Request) -> None:
        """A request comes in; it is seen at the beginning of the next turn."""
        ignore_eos = request.max_tokens is None
        params = SamplingParams(
            max_tokens=request.output_tokens if ignore_eos else request.max_tokens, ignore_eos=ignore_eos
        )
        params.update_from_generation_config({}, eos_token_id=EOS)
        prompt = self.tokens.get(request.id, [TOKEN] * request.prompt_tokens)[: request.prompt_tokens]
        one = VllmRequest(str(request.id), prompt, params, None, block_hasher=self._block_hasher)
        self.known[request.id] = one
        self._lengths[request.id] = request.output_tokens
        self.inbox.append(lambda: self.add_request(one))

    def cancel(self, id_: int) -> None:
        """A client is gone. As from vLLM's sockets, it is noted twice: for the end of the step, and in the inbox."""
        self.aborts_queue.put([str(id_)])
        self.inbox.append(lambda: self.abort_requests([str(id_)]))

    def next_token(self, id_: int) -> int:
        """What the model says next."""
        said = self.known[id_].num_output_tokens
        if said + 1 == self._lengths[id_]:
            return EOS
        left = self.tokens.get(id_, [])[self.known[id_].num_prompt_tokens + said :]
        return left[0] if left else TOKEN

    def abort_requests(self, ids: list[str]) -> None:
        """vLLM's own frees several in the order of a set, which is a different one each time."""
        for id_ in ids:
            super().abort_requests([id_])

    @property
    def queued(self) -> Iterator[Batch]:
        """The batches behind the one that is waited for, the oldest first; only asynchronous engines have any."""
        return (future for future, _, _ in reversed(self.batch_queue or ()))

    @property
    def busy(self) -> bool:
        """Is there anything to do?"""
        return bool(self.inbox or self.batch_queue or self.scheduler.has_requests())

    def turn(self) -> None:
        """Once around vLLM's busy loop."""
        while self.inbox:
            self.inbox.popleft()()
        if not self.busy:
            self.aborts_queue.queue.clear()  # they came too late, or too early
        outputs: dict[int, Any] | None = self.step_fn()[0]
        for output in outputs[0].outputs if outputs else ():
            id_ = int(output.request_id)
            if output.new_token_ids:
                self._firsts.setdefault(id_, self.now)
            if output.prefill_stats is not None:
                self._cached.setdefault(id_, output.prefill_stats.num_local_cached_tokens)
            if output.finish_reason is not None:
                one = self.known[id_]
                counts = one.num_preemptions, one.num_output_tokens, self._cached[id_]
                done = Finished(id_, self._firsts[id_], self.now, *counts)
                self.finished.append(done)
