"""Oracles: what the twin should do, computed by other means than the twin's.

`ReferenceScheduler` states the step semantics of vLLM's schedulers with lists and plain objects, one sequence an object
and one decision a line. It knows nothing of columns, and forgets nothing for speed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import testbed

from block.core.types import Request
from block.engine.config import EngineConfig


@dataclass(eq=False)
class Sequence:
    """A request in the scheduler's hands."""

    id: int
    prompt: int
    target: int  # response tokens at which it stops
    most: int  # response tokens at which the scheduler knows that it stops
    output: int = 0  # tokens delivered
    owed: int = 0  # tokens that steps in flight will deliver
    computed: int = 0
    blocks: int = 0
    preempted: int = 0
    first: float = math.nan

    @property
    def known(self) -> int:
        """Tokens that exist: prompt and response so far."""
        return self.prompt + self.output


@dataclass
class Step:
    """One schedule: tokens of each sequence, what each saw before it, and who yields a token at its end."""

    tokens: dict[int, int] = field(default_factory=dict)
    context: dict[int, int] = field(default_factory=dict)
    members: list[Sequence] = field(default_factory=list)
    samples: set[int] = field(default_factory=set)
    preempted: list[int] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)  # members preempted while this step was in flight

    @property
    def seconds(self) -> float:
        """Its duration under `testbed.round_latency`; a sequence with one token counts as decoding."""
        decoding = [i for i, n in self.tokens.items() if n == 1]
        time = testbed.FIXED + testbed.PER_TOKEN * sum(self.tokens.values())
        if decoding:
            read = sum(self.context[i] + 1 for i in decoding)
            time += testbed.DECODE + testbed.PER_SEQUENCE * len(decoding) + testbed.PER_KV * read
        for i, n in self.tokens.items():
            if n > 1:
                time += n * (testbed.PREFILL + testbed.PREFILL_BY_CONTEXT * self.context[i])
        return time


class ReferenceScheduler:
    """Running, waiting and free blocks. `unseen` holds what arrived since the last schedule."""

    def __init__(self, config: EngineConfig, total_blocks: int) -> None:
        self.config = config
        self.free = total_blocks
        self.watermark = int(config.watermark * (total_blocks + (config.version == "v1")))  # V1 counts the one it keeps
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.unseen: list[Sequence] = []
        self.in_flight: Step | None = None
        self.queued: Step | None = None
        self.finished: list[tuple[int, float, float, int, int]] = []
        self.aborted: list[int] = []
        self.leaving: list[Sequence] = []  # aborted during the step in flight

    # ------------------------------------------------------------------------------------------------ one schedule

    def schedule(self) -> Step:
        self.waiting += self.unseen
        self.unseen = []
        step = Step()
        victims: list[Sequence] = []
        if not self.config.enable_chunked_prefill:
            self.prefill(step)
            if not step.tokens:
                self.decode(step)
            return step
        budget = self.config.max_num_batched_tokens
        threshold = self.config.long_prefill_token_threshold
        alone = len(self.running) + len(self.waiting) == 1
        most = threshold if threshold and not alone else budget

        for sequence in list(self.running):
            if budget == 0:
                break
            if sequence not in self.running:
                continue  # preempted a moment ago
            if sequence.owed and sequence.output + sequence.owed >= sequence.most:
                continue  # all it may ever say is on its way
            missing = sequence.known + sequence.owed - sequence.computed
            room = self.config.max_model_len - 1 - sequence.computed
            tokens = min(missing, most, budget, room)
            if tokens <= 0:
                continue
            while sequence in self.running and not self.has_room(sequence, tokens):
                victim = self.running.pop()
                self.preempt(victim)
                victims.insert(0, victim)
                step.preempted.append(victim.id)
            if sequence not in self.running:
                break
            self.take_blocks(sequence, sequence.computed + tokens)
            self.grant(step, sequence, tokens)
            budget -= tokens

        if self.config.version == "v0" or not victims:
            while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs:
                head = self.waiting[0]
                tokens = min(head.known, most, budget)
                if not self.admissible(head, tokens):
                    break
                self.running.append(self.waiting.pop(0))
                self.take_blocks(head, head.known if self.config.version == "v0" else tokens)
                self.grant(step, head, tokens)
                budget -= tokens
        self.waiting = victims + self.waiting
        return step

    def prefill(self, step: Step) -> None:
        """Without chunks: whole prompts, in order, until one finds no blocks, tokens or seat."""
        spent = 0
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            head = self.waiting[0]
            spent += head.known
            if spent > self.config.max_num_batched_tokens or not self.admissible(head, head.known):
                return
            self.running.append(self.waiting.pop(0))
            self.take_blocks(head, head.known)
            self.grant(step, head, head.known)

    def decode(self, step: Step) -> None:
        """Without chunks, when nobody can be admitted: a token for everyone who runs, the oldest first."""
        todo = list(self.running)
        while todo:
            sequence = todo.pop(0)
            while not self.has_room(sequence, 1):
                victim = todo.pop() if todo else sequence
                self.running.remove(victim)
                self.waiting.insert(0, victim)
                self.preempt(victim)
                step.preempted.append(victim.id)
                if victim is sequence:
                    return
            self.take_blocks(sequence, sequence.computed + 1)
            self.grant(step, sequence, 1)

    def pages(self, tokens: int) -> int:
        return math.ceil(tokens / self.config.block_size)

    def has_room(self, sequence: Sequence, tokens: int) -> bool:
        """May a running sequence take `tokens` more?"""
        wanted = self.pages(sequence.computed + tokens) - sequence.blocks
        if self.config.version == "v1":
            return wanted <= self.free
        # V0 asks for the blocks that appending the tokens not yet in its block table would touch: one for a decode, be
        # it new or half full; for the rest of a prompt, whose blocks are all there, one if the last is not full. (Of a
        # prompt with a single token left, vLLM would still say that; here and in the twin it counts as a decode.)
        rest_of_a_prompt = sequence.computed + 1 < sequence.known
        touched = 0 if rest_of_a_prompt and sequence.known % self.config.block_size == 0 else 1
        return max(wanted, touched) <= self.free

    def admissible(self, head: Sequence, tokens: int) -> bool:
        if self.config.version == "v0":
            return self.free - self.pages(head.known) >= self.watermark
        whole = head.known if self.config.scheduler_reserve_full_isl else tokens
        spare = self.watermark if self.running else 0
        return self.pages(whole) + spare <= self.free

    def take_blocks(self, sequence: Sequence, tokens: int) -> None:
        new = max(self.pages(tokens) - sequence.blocks, 0)
        sequence.blocks += new
        self.free -= new
        assert self.free >= 0

    def grant(self, step: Step, sequence: Sequence, tokens: int) -> None:
        step.tokens[sequence.id] = tokens
        step.context[sequence.id] = sequence.computed
        step.members.append(sequence)
        sequence.computed += tokens
        if sequence.computed == sequence.known + sequence.owed:
            step.samples.add(sequence.id)
            sequence.owed += 1

    def preempt(self, victim: Sequence) -> None:
        self.free += victim.blocks
        victim.blocks = victim.computed = victim.owed = 0
        victim.preempted += 1
        if self.in_flight is not None and victim.id in self.in_flight.tokens:
            self.in_flight.lost.add(victim.id)

    # ------------------------------------------------------------------------------------------------ one step's end

    def update(self, step: Step, now: float) -> None:
        """Deliver the tokens of `step`; a preempted sequence gets its own too, but owes it no longer.

        Who has left gets none: it stopped, before the scheduler could know, in the step before this one.
        """
        for sequence in step.members:
            if sequence.id not in step.samples or sequence not in self.running + self.waiting:
                continue
            if sequence.id not in step.lost:
                sequence.owed -= 1
            sequence.output += 1
            if math.isnan(sequence.first):
                sequence.first = now
            if sequence.output >= sequence.target or sequence.known >= self.config.max_model_len:
                self.remove(sequence)
                self.finished.append((sequence.id, sequence.first, now, sequence.preempted, sequence.output))

    def remove(self, sequence: Sequence) -> None:
        for queue in (self.running, self.waiting, self.unseen):
            if sequence in queue:
                queue.remove(sequence)
        self.free += sequence.blocks

    # ------------------------------------------------------------------------------------------------ the engine's loop

    def add(self, request: Request) -> None:
        most = request.output_tokens if request.max_tokens is None else request.max_tokens
        self.unseen.append(Sequence(request.id, request.prompt_tokens, min(request.output_tokens, most), most))

    def abort(self, id_: int) -> None:
        """It is noted, and happens when the step in flight ends."""
        for sequence in self.running + self.waiting + self.unseen:
            if sequence.id == id_ and sequence not in self.leaving:
                self.leaving.append(sequence)
                self.aborted.append(id_)

    def begin(self) -> None:
        """The queued step starts, or a new one; an asynchronous scheduler then decides the one behind it."""
        self.in_flight = self.queued
        self.queued = None
        for _ in range(2):  # an empty schedule that preempted is followed by another at once
            if self.in_flight is None:
                step = self.schedule()
                self.in_flight = step if step.tokens else None
        if self.in_flight is not None and self.config.async_scheduling:
            step = self.schedule()
            self.queued = step if step.tokens else None

    def complete(self, now: float) -> None:
        assert self.in_flight is not None
        done, self.in_flight = self.in_flight, None
        for sequence in self.leaving:
            self.remove(sequence)
        self.leaving = []
        self.update(done, now)
        self.begin()

    @property
    def busy(self) -> bool:
        return self.in_flight is not None
