"""The scheduler twin: V0 and V1 step semantics case by case, and step by step against the reference in `oracle`.

All cases run with blocks of 4 tokens, 16 tokens a step, and steps of one second: the step begun at t is seen at t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ReferenceScheduler
from testbed import constant_latency, engine_config, examples, lone_engine, next_finish, replay, request

from block.core.snapshot import (
    ID,
    NUM_BLOCKS,
    NUM_COMPUTED_TOKENS,
    NUM_OUTPUT_PLACEHOLDERS,
    NUM_OUTPUT_TOKENS,
    NUM_PREEMPTIONS,
    NUM_SCHEDULED_NEXT,
    NUM_SCHEDULED_TOKENS,
    Snapshot,
)
from block.core.types import Request
from block.engine.batch import Finished
from block.engine.config import EngineConfig

BOTH = pytest.mark.parametrize("version", ["v0", "v1"])


@dataclass
class Seen:
    """One step as a specification reads: {sequence: tokens}, who waits, free blocks."""

    step: dict[int, int]
    waiting: list[int]
    free: int
    held: dict[int, int]


def seen(snapshot: Snapshot) -> Seen:
    ids = snapshot.seqs[ID].tolist()
    chunks = snapshot.seqs[NUM_SCHEDULED_TOKENS].tolist()
    return Seen(
        {i: n for i, n in zip(ids, chunks, strict=True) if n},
        ids[snapshot.running :],
        snapshot.free_blocks,
        {i: n for i, n in zip(ids, snapshot.seqs[NUM_BLOCKS].tolist(), strict=True) if n},
    )


def history(config: EngineConfig, total_blocks: int, *requests: Request) -> tuple[list[Seen], dict[int, Finished]]:
    """Every step, from the first, and how each request finished."""
    run = replay(config, total_blocks, requests)
    steps = []
    for now, snapshot in run.steps():
        assert now == len(steps), "a step begins every second"
        steps.append(seen(snapshot))
    return steps, {done.id: done for done in run.finished}


def primed(*lengths: tuple[int, int]) -> list[Request]:
    """Requests 1, 2, … of (prompt, output), all waiting when request 0 (1 token in, 1 out) has finished at t = 1."""
    return [request(0, 1, 1), *(request(i, p, o) for i, (p, o) in enumerate(lengths, start=1))]


# ---------------------------------------------------------------------------------------------------- chunked prefill


@BOTH
def test_a_prompt_is_prefilled_in_chunks_of_the_token_budget(version: str) -> None:
    steps, done = history(engine_config(version), 16, request(0, 40, 3))
    assert [step.step for step in steps] == [{0: 16}, {0: 16}, {0: 8}, {0: 1}, {0: 1}]
    # The first token comes at the end of the chunk that completes the prompt, the third step; then one a step.
    assert done[0] == Finished(0, first_token=3.0, finished=5.0, preemptions=0, output_tokens=3)


@BOTH
def test_a_prompt_of_exactly_the_budget_yields_its_first_token_in_that_step(version: str) -> None:
    steps, done = history(engine_config(version), 16, request(0, 16, 1))
    assert [step.step for step in steps] == [{0: 16}]
    assert (done[0].first_token, done[0].finished) == (1.0, 1.0)


@BOTH
def test_decodes_come_first_and_prompts_share_what_they_leave_of_the_budget(version: str) -> None:
    steps, done = history(engine_config(version), 16, request(0, 2, 4), request(1, 20, 2), request(2, 10, 1))
    assert [step.step for step in steps] == [
        {0: 2},  # an idle engine starts at once with what it has
        {0: 1, 1: 15},  # 2 finds no budget
        {0: 1, 1: 5, 2: 10},  # the rest of 1's prompt, then all of 2's
        {0: 1, 1: 1},
    ]
    assert steps[1].waiting == [2]
    assert {i: d.first_token for i, d in done.items()} == {0: 1.0, 1: 3.0, 2: 3.0}
    assert {i: d.finished for i, d in done.items()} == {0: 4.0, 1: 4.0, 2: 3.0}


@BOTH
def test_no_more_than_max_num_seqs_run(version: str) -> None:
    steps, _ = history(engine_config(version, max_num_seqs=2), 16, *primed((2, 3), (2, 2), (2, 1)))
    assert [step.step for step in steps] == [{0: 1}, {1: 2, 2: 2}, {1: 1, 2: 1}, {1: 1, 3: 2}]
    assert [step.waiting for step in steps] == [[], [3], [3], []]


def test_the_long_prefill_threshold_caps_prompts_while_others_are_there() -> None:
    config = engine_config("v1", long_prefill_token_threshold=6)
    steps, _ = history(config, 30, *primed((20, 2), (20, 1)))
    assert [step.step for step in steps] == [
        {0: 1},
        {1: 6, 2: 6},
        {1: 6, 2: 6},
        {1: 6, 2: 6},
        {1: 2, 2: 2},
        {1: 1},
    ]


def test_the_long_prefill_threshold_does_not_cap_a_lone_sequence() -> None:
    steps, _ = history(engine_config("v1", long_prefill_token_threshold=6), 16, request(0, 20, 1))
    assert [step.step for step in steps] == [{0: 16}, {0: 4}]


@BOTH
def test_a_response_stops_at_max_model_len(version: str) -> None:
    steps, done = history(engine_config(version, max_model_len=12), 16, request(0, 10, 50))
    assert [step.step for step in steps] == [{0: 10}, {0: 1}]
    assert done[0].output_tokens == 2


# ---------------------------------------------------------------------------------------------------- KV blocks


def test_v0_allocates_a_prompt_at_admission() -> None:
    steps, _ = history(engine_config("v0"), 20, request(0, 40, 2))
    # 40 tokens are 10 blocks at once; the decode writes token 41 into an eleventh.
    assert [step.free for step in steps] == [10, 10, 10, 9]


def test_v1_allocates_chunk_by_chunk() -> None:
    steps, _ = history(engine_config("v1"), 20, request(0, 40, 2))
    assert [step.free for step in steps] == [16, 12, 10, 9]


@BOTH
def test_a_decode_takes_a_block_when_its_last_one_is_full(version: str) -> None:
    steps, _ = history(engine_config(version), 20, request(0, 3, 6))
    # Written by each step: 3 tokens, then the 4th … 8th.
    assert [step.held[0] for step in steps] == [1, 1, 2, 2, 2, 2]


@BOTH
def test_a_finished_sequence_returns_its_blocks_before_the_next_schedule(version: str) -> None:
    steps, _ = history(engine_config(version, max_model_len=28), 8, request(0, 12, 2), request(1, 20, 1, arrival=0.5))
    # 1 needs 5 of 8 blocks. 0 holds 3, then 4, so 1 waits until 0 has finished at t = 2.
    assert steps[1].step == {0: 1}
    assert (steps[1].waiting, steps[1].free) == ([1], 4)
    assert steps[2].step == {1: 16}


def test_v0_admission_leaves_the_watermark_free() -> None:
    config = engine_config("v0", watermark=0.25, max_model_len=48)  # 4 of 16 blocks
    steps, _ = history(config, 16, *primed((4, 4), (44, 1)))
    # 1 holds 1 of 16 blocks, 15 are free: 11 blocks fit exactly.
    assert 2 in steps[1].step
    assert steps[1].free == 4
    steps, _ = history(config, 16, *primed((5, 4), (44, 1)))
    assert steps[1].waiting == [2]  # 14 − 11 < 4


def test_v1_admission_leaves_the_watermark_free_too() -> None:
    config = engine_config("v1", watermark=0.25, max_model_len=48)
    steps, _ = history(config, 16, *primed((4, 4), (44, 1)))
    assert 2 in steps[1].step  # 11 + 4 ≤ 15
    steps, _ = history(config, 16, *primed((5, 2), (44, 1)))
    assert [step.waiting for step in steps[1:3]] == [[2], [2]]  # 11 + 4 > 14
    assert steps[3].step == {2: 16}


def test_v1_admits_only_what_would_fit_as_a_whole() -> None:
    config = engine_config("v1", max_model_len=32)
    steps, _ = history(config, 8, *primed((8, 3), (28, 1)))
    # 2's first chunk (8 tokens, 2 blocks) would fit into the 6 free ones; all of it (7 blocks) does not.
    assert (steps[1].step, steps[1].waiting, steps[1].free) == ({1: 8}, [2], 6)


def test_v1_without_the_gate_asks_for_the_chunk_only() -> None:
    config = engine_config("v1", max_model_len=32, scheduler_reserve_full_isl=False)
    steps, _ = history(config, 8, *primed((8, 3), (28, 1)))
    assert (steps[1].step, steps[1].free) == ({1: 8, 2: 8}, 4)


@BOTH
def test_nobody_overtakes_a_head_that_does_not_fit(version: str) -> None:
    config = engine_config(version, max_model_len=28)
    steps, _ = history(config, 8, *primed((8, 2), (27, 1), (1, 1)))
    assert (steps[1].step, steps[1].waiting) == ({1: 8}, [2, 3])


# ---------------------------------------------------------------------------------------------------- preemption


def test_v1_preempts_the_youngest_who_comes_back_first_and_recomputes() -> None:
    # Three sequences of one block each in 4 blocks. Each wants a second block for its 5th token, at t = 3.
    config = engine_config("v1", max_model_len=16)
    steps, done = history(config, 4, *primed((3, 6), (3, 4), (3, 4), (3, 1)))
    assert [step.step for step in steps[:3]] == [{0: 1}, {1: 3, 2: 3, 3: 3, 4: 3}, {1: 1, 2: 1, 3: 1}]
    # t = 3: 1 takes the last free block. 2 finds none, 3 loses its block to it. Nobody is admitted in this step.
    assert (steps[3].step, steps[3].waiting, steps[3].free) == ({1: 1, 2: 1}, [3], 0)
    assert steps[4].waiting == [3]
    # 2 has its 4 tokens at t = 5. 3 then recomputes its prompt and the 2 tokens that it had, 5 tokens in 2 blocks.
    assert (steps[5].step, steps[5].held) == ({1: 1, 3: 5}, {1: 2, 3: 2})
    assert done[2].finished == 5.0
    assert (done[3].first_token, done[3].preemptions) == (2.0, 1)  # it had its first token before
    assert done[3].finished == 7.0  # the recomputation yields the third token at t = 6
    assert done[1].preemptions == done[2].preemptions == 0


def test_the_youngest_preempts_itself_last() -> None:
    # Two sequences in 3 blocks: both want a second block for their 5th token; 2, the youngest, finds none.
    config = engine_config("v1", max_model_len=12)
    steps, done = history(config, 3, *primed((4, 6), (4, 3)))
    assert steps[1].step == {1: 4, 2: 4}
    assert (steps[2].step, steps[2].waiting, steps[2].free) == ({1: 1}, [2], 1)
    assert done[2].preemptions == 1


def test_preemption_goes_on_until_there_is_room() -> None:
    # A prompt still being prefilled wants 3 blocks for its next chunk; the two that came after it hold one each.
    config = engine_config("v1", max_num_batched_tokens=16, long_prefill_token_threshold=12, max_model_len=32)
    steps, _ = history(config, 8, *primed((28, 1), (2, 9), (2, 9)))
    assert steps[1].step == {1: 12, 2: 2, 3: 2}  # 5 of 8 blocks
    assert (steps[2].step, steps[2].free) == ({1: 12, 2: 1, 3: 1}, 0)
    assert (steps[3].step, steps[3].waiting, steps[3].free) == ({1: 4, 2: 1}, [3], 0)


def test_v1_preempts_several_in_one_step() -> None:
    config = engine_config("v1", max_num_batched_tokens=16, long_prefill_token_threshold=8, max_model_len=32)
    steps, done = history(config, 9, *primed((24, 1), (4, 2), (4, 2), (5, 9)))
    # 1: 8 tokens (2 blocks); 2 and 3: 4 tokens (1 block each).                                          free 5
    assert steps[1].step == {1: 8, 2: 4, 3: 4}
    # 1: 2 blocks more; 2 and 3 want a second block for their 5th token: 4 taken; 4 does not fit.        free 1
    assert (steps[2].step, steps[2].waiting, steps[2].free) == ({1: 8, 2: 1, 3: 1}, [4], 1)
    # 2 and 3 have finished; 1 takes its last 2 blocks and 4 is admitted.
    assert (steps[3].step, steps[3].free) == ({1: 8, 4: 5}, 1)
    assert {d.preemptions for d in done.values()} == {0}
    # One block less for everybody, and responses that last: 1's third chunk takes two blocks from the two youngest.
    steps, done = history(config, 8, *primed((24, 1), (3, 9), (3, 9)))
    assert [step.step for step in steps[1:3]] == [{1: 8, 2: 3, 3: 3}, {1: 8, 2: 1, 3: 1}]
    assert (steps[3].step, steps[3].waiting, steps[3].free) == ({1: 8, 2: 1}, [3], 0)


def test_victims_of_one_step_keep_their_order() -> None:
    # 1 prefills 16 tokens a step. Its last block costs 3 its one, then 2 finds none for a fifth token.
    config = engine_config("v1", max_num_batched_tokens=22, long_prefill_token_threshold=16, max_model_len=40)
    steps, _ = history(config, 10, *primed((36, 1), (2, 9), (2, 9)))
    assert (steps[1].step, steps[1].free) == ({1: 16, 2: 2, 3: 2}, 4)
    assert (steps[2].step, steps[2].free) == ({1: 16, 2: 1, 3: 1}, 0)
    assert (steps[3].step, steps[3].waiting) == ({1: 4, 2: 1}, [3])
    steps, _ = history(config, 10, *primed((36, 1), (3, 9), (3, 9)))
    assert (steps[2].step, steps[2].free) == ({1: 16, 2: 1, 3: 1}, 0)
    assert (steps[3].step, steps[3].waiting, steps[3].free) == ({1: 4}, [2, 3], 1)


def test_v0_admits_in_a_step_that_preempted_and_victims_stay_behind() -> None:
    # 1 and 2 hold one block each of 3 and want a second; 2 loses its own. 3, one block, is admitted before it.
    config = engine_config("v0", max_model_len=12, max_num_seqs=2)
    steps, _ = history(config, 4, *primed((8, 5), (4, 5), (1, 3)))
    assert (steps[1].step, steps[1].waiting, steps[1].free) == ({1: 8, 2: 4}, [3], 1)
    # 1 takes the last block; 2 finds none and gives its own back, which 3 gets.
    assert (steps[2].step, steps[2].waiting, steps[2].free) == ({1: 1, 3: 1}, [2], 0)


def test_v1_does_not_admit_in_a_step_that_preempted() -> None:
    config = engine_config("v1", max_model_len=12, max_num_seqs=2)
    steps, _ = history(config, 4, *primed((8, 5), (4, 5), (1, 3)))
    assert (steps[1].step, steps[1].waiting, steps[1].free) == ({1: 8, 2: 4}, [3], 1)
    assert (steps[2].step, steps[2].waiting, steps[2].free) == ({1: 1}, [2, 3], 1)
    # The victim is first in line; its 5 tokens need 2 blocks, of which there is one, and 3 may not overtake it.
    assert (steps[3].step, steps[3].waiting) == ({1: 1}, [2, 3])


def test_v0_needs_a_free_block_in_reach_even_if_it_takes_none() -> None:
    # Two sequences of 5 tokens hold 2 blocks each of 4. Their decodes fit into the second block, yet V0 preempts.
    for version, second in (("v0", {1: 1}), ("v1", {1: 1, 2: 1})):
        config = engine_config(version, max_model_len=12)
        steps, _ = history(config, 4, *primed((5, 2), (5, 2)))
        assert steps[1].step == {1: 5, 2: 5}
        assert steps[2].step == second


def test_v0_a_prompt_that_ends_on_a_block_needs_nothing_in_reach() -> None:
    # 1's decode takes the last free block while 2 is in the middle of its prompt, whose 6 blocks it has. 24 tokens end
    # on a block, so 2's second chunk touches no other; 23 leave the last block open, V0 wants a free one, and 2 goes.
    config = engine_config("v0", max_model_len=28)
    for prompt, second, free in ((24, {1: 1, 2: 12}, 0), (23, {1: 1}, 6)):
        steps, _ = history(config, 8, *primed((4, 4), (prompt, 1)))
        assert (steps[1].step, steps[1].free) == ({1: 4, 2: 12}, 1)
        assert (steps[2].step, steps[2].free) == (second, free)


def test_v0_a_prompt_with_one_token_left_counts_as_a_decode() -> None:
    # 2's last token fits into the block that it has. 1's decode takes the last free one, and 2 wants one in reach.
    config = engine_config("v0", max_num_batched_tokens=4, max_model_len=8)
    steps, _ = history(config, 3, request(1, 3, 5), request(2, 4, 2))
    assert [step.step for step in steps[:3]] == [{1: 3}, {1: 1, 2: 3}, {1: 1}]
    assert (steps[1].free, steps[2].free, steps[2].waiting) == (1, 1, [2])


# ---------------------------------------------------------------------------------------------------- prompts first


def unchunked(**changes: Any) -> EngineConfig:
    return engine_config("v0", **{"enable_chunked_prefill": False, "max_num_batched_tokens": 60} | changes)


def test_without_chunks_a_step_is_all_prefill_or_all_decode() -> None:
    steps, done = history(unchunked(), 30, request(0, 40, 3), request(1, 50, 2, arrival=0.5), request(2, 9, 1, 0.75))
    assert [step.step for step in steps] == [
        {0: 40},
        {1: 50, 2: 9},  # both fit the 60 tokens of a step; 0, which has its first token, waits for them
        {0: 1, 1: 1},
        {0: 1},
    ]
    assert {i: d.first_token for i, d in done.items()} == {0: 1.0, 1: 2.0, 2: 2.0}
    assert {i: d.finished for i, d in done.items()} == {0: 4.0, 1: 3.0, 2: 2.0}


def test_without_chunks_a_prompt_beyond_the_budget_waits_for_the_next_step() -> None:
    steps, _ = history(unchunked(), 30, *primed((40, 2), (21, 2), (9, 1)))
    assert [step.step for step in steps] == [{0: 1}, {1: 40}, {2: 21, 3: 9}, {1: 1, 2: 1}]


def test_without_chunks_it_decodes_when_the_head_finds_no_blocks_or_no_seat() -> None:
    steps, _ = history(unchunked(max_model_len=28), 8, *primed((12, 3), (24, 1)))
    assert [step.step for step in steps] == [{0: 1}, {1: 12}, {1: 1}, {1: 1}, {2: 24}]  # 6 blocks beside 3 of 8
    steps, _ = history(unchunked(max_num_seqs=1), 30, *primed((4, 2), (4, 1)))
    assert [step.step for step in steps] == [{0: 1}, {1: 4}, {1: 1}, {2: 4}]


def test_without_chunks_nobody_is_admitted_in_a_step_that_preempted() -> None:
    # As with chunks, but 3 does not get the block that 2 gave back: the step was to decode, and prompts come first in
    # the next one. Then 2, first in line, has 5 tokens in 2 blocks, of which there is one.
    steps, _ = history(unchunked(max_model_len=12, max_num_seqs=2), 4, *primed((8, 5), (4, 5), (1, 3)))
    assert (steps[1].step, steps[1].waiting, steps[1].free) == ({1: 8, 2: 4}, [3], 1)
    assert (steps[2].step, steps[2].waiting, steps[2].free) == ({1: 1}, [2, 3], 1)
    assert (steps[3].step, steps[3].waiting) == ({1: 1}, [2, 3])


# ---------------------------------------------------------------------------------------------------- asynchronous


def test_asynchronous_scheduling_queues_the_next_step() -> None:
    config = engine_config("v1", async_scheduling=True)
    run = replay(config, 16, [request(0, 20, 3)])
    rows = [
        (
            now,
            *(
                int(s.seqs[row, 0])
                for row in (
                    NUM_SCHEDULED_TOKENS,
                    NUM_SCHEDULED_NEXT,
                    NUM_COMPUTED_TOKENS,
                    NUM_OUTPUT_PLACEHOLDERS,
                    NUM_OUTPUT_TOKENS,
                )
            ),
        )
        for now, s in run.steps()
    ]
    assert rows == [
        (0.0, 16, 4, 20, 1, 0),  # the first chunk runs, the second is queued and will yield a token
        (1.0, 4, 1, 21, 2, 0),  # the decode of a token that does not exist yet
        (2.0, 1, 1, 22, 2, 1),
        (3.0, 1, 0, 22, 1, 2),  # the last token is in flight: it is not scheduled again
    ]
    assert run.finished == [Finished(0, 2.0, 4.0, 0, 3)]


def test_an_arrival_waits_for_the_step_behind_the_queued_one() -> None:
    config = engine_config("v1", async_scheduling=True)
    steps, done = history(config, 16, request(0, 4, 5), request(1, 4, 1, arrival=0.5))
    assert [step.step for step in steps] == [{0: 4}, {0: 1}, {0: 1, 1: 4}, {0: 1}, {0: 1}]
    assert done[1].finished == 3.0


def test_a_preempted_sequence_still_receives_the_token_in_flight() -> None:
    # Two sequences in 3 blocks. At t = 1, with the prefills running, the decodes are queued: 1 takes the third block
    # and 2 is preempted, though its first token is on its way.
    config = engine_config("v1", async_scheduling=True, max_model_len=12)
    run = replay(config, 3, primed((4, 4), (4, 4)))
    snapshots = {now: (s.running, s.stale, s.seqs.copy()) for now, s in run.steps()}
    running, stale, seqs = snapshots[1.0]
    assert seqs[ID].tolist() == [1, 2]
    assert (running, stale) == (1, 1)
    assert (
        seqs[NUM_SCHEDULED_TOKENS, 1],
        seqs[NUM_BLOCKS, 1],
        seqs[NUM_COMPUTED_TOKENS, 1],
        seqs[NUM_PREEMPTIONS, 1],
    ) == (4, 0, 0, 1)
    _, stale, seqs = snapshots[2.0]
    assert seqs[ID].tolist() == [1, 2]
    assert (stale, seqs[NUM_OUTPUT_TOKENS, 1]) == (0, 1)
    done = {d.id: d for d in run.finished}
    assert (done[2].first_token, done[2].preemptions) == (2.0, 1)
    # 1 has its 4 tokens at t = 5; then 2 recomputes 5 tokens: tokens 2, 3, 4 at t = 6, 7, 8.
    assert (done[1].finished, done[2].finished) == (5.0, 8.0)


def test_a_preempted_sequence_finishes_if_its_last_token_was_in_flight() -> None:
    config = engine_config("v1", async_scheduling=True, max_model_len=12)
    # 2 wants one token only, which its prefill yields: it is never scheduled again, so nothing is taken from it for
    # its own sake. 1 needs two blocks at once (its second chunk) and takes 2's while that token is in flight.
    config = engine_config("v1", async_scheduling=True, max_model_len=16, long_prefill_token_threshold=8)
    run = replay(config, 4, primed((16 - 1, 1), (5, 1)))
    list(run.steps())
    done = {d.id: d for d in run.finished}
    assert done[2].finished == 2.0
    assert done[2].preemptions == 1


# ---------------------------------------------------------------------------------------------- early stops and aborts


def test_an_asynchronous_scheduler_does_not_foresee_that_a_model_stops() -> None:
    config = engine_config("v1", async_scheduling=True)
    run = replay(config, 16, [request(0, 4, 3, max_tokens=10), request(1, 4, 1, arrival=2.5)])
    rows = [
        (now, s.seqs[ID].tolist(), s.seqs[NUM_SCHEDULED_TOKENS].tolist(), s.seqs[NUM_SCHEDULED_NEXT].tolist())
        for now, s in run.steps()
    ]
    assert rows == [
        (0.0, [0], [4], [1]),
        (1.0, [0], [1], [1]),
        (2.0, [0], [1], [1]),  # 0 ends with this step, yet it is in the next one
        (3.0, [1], [0], [4]),  # which runs for nobody; only the one behind it has room for 1
        (4.0, [1], [4], [0]),
    ]
    assert run.finished == [Finished(0, 1.0, 3.0, 0, 3), Finished(1, 5.0, 5.0, 0, 1)]


@BOTH
def test_a_synchronous_scheduler_need_not_foresee_it(version: str) -> None:
    lengths = [(3, 6), (3, 4), (9, 4)]
    known = history(engine_config(version), 16, *primed(*lengths))
    unknown = history(
        engine_config(version), 16, *(replace(one, max_tokens=one.output_tokens + 9) for one in primed(*lengths))
    )
    assert known == unknown


@BOTH
def test_max_tokens_ends_what_would_go_on(version: str) -> None:
    steps, done = history(engine_config(version), 16, request(0, 4, 9, max_tokens=2))
    assert [step.step for step in steps] == [{0: 4}, {0: 1}]
    assert done[0].output_tokens == 2


@BOTH
def test_an_aborted_sequence_leaves_when_the_step_in_flight_ends(version: str) -> None:
    engine = lone_engine(engine_config(version, max_num_seqs=2), constant_latency(), 16)
    engine.add(request(0, 4, 1), 0.0)
    for i in (1, 2, 3):
        engine.add(request(i, 4, 3), 0.25)
    assert engine.advance(1.0) == [Finished(0, 1.0, 1.0, 0, 1)]
    assert seen(engine.snapshot(0, 1.0)).step == {1: 4, 2: 4}
    engine.abort(1, 1.5)
    engine.abort(3, 1.5)
    shown = seen(engine.snapshot(0, 1.5))
    assert (shown.step, shown.waiting, shown.free) == ({1: 4, 2: 4}, [3], 14)
    assert next_finish(engine) == 4.0
    engine.add(request(4, 4, 1), 1.75)
    assert engine.advance(2.0) == []
    shown = seen(engine.snapshot(0, 2.0))
    assert (shown.step, shown.waiting, shown.free) == ({2: 1, 4: 4}, [], 13)
    assert [done.id for done in engine.advance(9.0)] == [4, 2]
    assert engine.snapshot(0, 9.0).free_blocks == 16


def test_a_token_in_flight_of_an_aborted_sequence_is_lost() -> None:
    engine = lone_engine(engine_config("v1"), constant_latency(), 16)
    engine.add(request(0, 4, 1), 0.0)
    engine.abort(0, 0.5)
    assert next_finish(engine) == math.inf
    assert list(engine.advance(9.0)) == []
    assert engine.snapshot(0, 9.0).free_blocks == 16


def test_a_step_queued_for_an_aborted_sequence_takes_its_time() -> None:
    engine = lone_engine(engine_config("v1", async_scheduling=True), constant_latency(), 16)
    engine.add(request(0, 4, 5), 0.0)
    engine.abort(0, 0.5)  # the step of 0 … 1 and the one behind it are scheduled
    engine.add(request(1, 4, 1), 1.5)
    assert engine.advance(9.0) == [Finished(1, 3.0, 3.0, 0, 1)]


def test_aborting_nobody_or_twice_changes_nothing() -> None:
    engine = lone_engine(engine_config("v1"), constant_latency(), 16)
    engine.abort(0, 0.0)
    engine.add(request(0, 4, 2), 0.0)
    engine.add(request(1, 4, 2), 0.0)
    for id_ in (1, 1, 7):
        engine.abort(id_, 0.5)
    assert engine.advance(9.0) == [Finished(0, 1.0, 2.0, 0, 2)]
    engine.abort(0, 9.0)
    engine.add(request(0, 4, 1), 9.0)  # an id may come again
    assert engine.advance(20.0) == [Finished(0, 10.0, 10.0, 0, 1)]


# ---------------------------------------------------------------------------------------------------- the reference


def agree(
    config: EngineConfig, total_blocks: int, requests: list[Request], aborts: Sequence[tuple[float, int]] = ()
) -> ReferenceScheduler:
    """Run twin and reference side by side and compare them after every step. `aborts` are of (time, id)."""
    engine = lone_engine(config, constant_latency(), total_blocks)
    reference = ReferenceScheduler(config, total_blocks)
    finished: list[Finished] = []
    arrivals: list[tuple[float, Request | int]] = [(one.arrival, one) for one in requests]
    pending = sorted([*arrivals, *aborts], key=lambda event: event[0])
    begun = ends = 0.0
    for _ in range(20_000):
        if reference.busy:
            compare(engine.snapshot(0, begun), reference)
        elif not pending:
            break
        if pending and (not reference.busy or pending[0][0] < ends):
            at, event = pending.pop(0)
            finished += engine.advance(at)
            if not isinstance(event, Request):
                engine.abort(event, at)
                reference.abort(event)
                continue
            engine.add(event, at)
            reference.add(event)
            if not reference.busy:
                begun, ends = at, at + 1.0
                reference.begin()
        else:
            finished += engine.advance(ends)
            reference.complete(ends)
            begun, ends = ends, ends + 1.0
        assert [done[:5] for done in finished] == reference.finished
    assert sorted([*(done.id for done in finished), *reference.aborted]) == sorted(one.id for one in requests)
    assert reference.free == total_blocks
    return reference


def compare(snapshot: Snapshot, reference: ReferenceScheduler) -> None:
    columns = reference.running + reference.waiting
    assert snapshot.seqs[ID].tolist() == [one.id for one in columns]
    assert snapshot.running == len(reference.running)
    assert snapshot.free_blocks == reference.free
    for row, name in (
        (NUM_OUTPUT_TOKENS, "output"),
        (NUM_COMPUTED_TOKENS, "computed"),
        (NUM_BLOCKS, "blocks"),
        (NUM_PREEMPTIONS, "preempted"),
    ):
        assert snapshot.seqs[row].tolist() == [getattr(one, name) for one in columns], name
    for row, step in ((NUM_SCHEDULED_TOKENS, reference.in_flight), (NUM_SCHEDULED_NEXT, reference.queued)):
        tokens = step.tokens if step is not None else {}  # some perhaps of sequences that have left meanwhile
        assert snapshot.seqs[row].tolist() == [tokens.get(one.id, 0) for one in columns]


KINDS: dict[str, dict[str, Any]] = {
    "v0": {"version": "v0"},
    "v0-unchunked": {"version": "v0", "enable_chunked_prefill": False},
    "v1": {"version": "v1"},
    "v1-async": {"version": "v1", "async_scheduling": True},
}


@st.composite
def workloads(draw: st.DrawFn, kind: str) -> tuple[EngineConfig, int, list[Request], list[tuple[float, int]]]:
    """Engines with memory for one to three sequences of full length, and more requests than that; some leave early."""
    settings_: dict[str, Any] = dict(KINDS[kind])
    settings_["max_model_len"] = draw(st.integers(8, 60))
    settings_["max_num_batched_tokens"] = draw(st.integers(5, 40))
    settings_["max_num_seqs"] = draw(st.integers(1, 8))
    settings_["watermark"] = draw(st.sampled_from([0.0, 0.1]))
    if kind == "v0-unchunked":
        settings_["max_num_batched_tokens"] += max(settings_["max_model_len"], settings_["max_num_seqs"]) - 5
    if settings_["version"] == "v1":
        settings_["long_prefill_token_threshold"] = draw(st.sampled_from([0, 0, 4, 9]))
        settings_["scheduler_reserve_full_isl"] = draw(st.booleans())
    config = engine_config(**settings_)
    least = -(-config.max_model_len // 4)
    total = draw(st.integers(least + 1 + least // 4, 3 * least + 2))
    requests = []
    arrival = 0.0
    for i in range(draw(st.integers(1, 14))):
        arrival += draw(st.sampled_from([0.0, 0.0, 0.25, 1.0, 3.5]))
        prompt = draw(st.integers(1, config.max_model_len - 1))
        output = draw(st.integers(1, config.max_model_len + 5))
        most = draw(st.none() | st.integers(output, output + 6) | st.integers(1, 70))
        requests.append(request(i, prompt, output, arrival, max_tokens=most))
    moments = st.floats(0.0, arrival + 30.0, width=16)
    return config, total, requests, draw(st.lists(st.tuples(moments, st.integers(0, len(requests))), max_size=4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(300, 20))
@given(data=st.data())
def test_twin_and_reference_agree_at_every_step(kind: str, data: st.DataObject) -> None:
    agree(*data.draw(workloads(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_twin_and_reference_agree_on_a_crowded_engine(kind: str) -> None:
    from random import Random

    preemptions = 0
    for seed in range(examples(10, 2)):
        rng = Random(seed)
        tokens = 120 if kind == "v0-unchunked" else 48
        config = engine_config(**KINDS[kind], max_model_len=100, max_num_seqs=12, max_num_batched_tokens=tokens)
        arrival = 0.0
        requests = []
        for i in range(80):
            arrival += rng.expovariate(0.15)
            requests.append(request(i, rng.randint(1, 60), rng.randint(1, 40), arrival))
        reference = agree(config, 40, requests)
        preemptions += sum(done[3] for done in reference.finished)
    assert preemptions > 20 * examples(10, 2), "memory is too plentiful for this test to say anything"
