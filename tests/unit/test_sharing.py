"""What requests share: contents and the hashes of their blocks, sessions, and traces with numbered blocks."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import built
from hypothesis import given
from hypothesis import strategies as st

from block.core.arrays import Ints
from block.core.types import Request
from block.run.replay import Outcome, replay, requests_of
from block.workload.content import block_hashes, first_tokens, token_ids, with_hashes
from block.workload.sessions import followers
from block.workload.spec import Workload, generate, make

CHAT: dict[str, Any] = {"name": "chat", "source": "sessions", "num_requests": 600, "qps": 5.0, "turns": 5.0}


def content(*texts: tuple[int, int]) -> Ints:
    return np.array(texts, dtype=np.int64).reshape(-1, 2)


def common(one: Ints, other: Ints) -> int:
    """How many blocks two contents have in common, by their hashes."""
    pairs = zip(block_hashes(one, 16), block_hashes(other, 16), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(one[:, 1].sum(), other[:, 1].sum()) // 16)


def most_hits(requests: Sequence[Request], block_size: int) -> float:
    """The share of prompt tokens that a cache without end would hold: blocks that an earlier request has, less the
    last token of each prompt, in full blocks.
    """
    seen: set[int] = set()
    hit = total = 0
    for one in requests:
        hashes = [] if one.block_hashes is None else one.block_hashes.tolist()
        for block_hash in hashes[: (one.prompt_tokens - 1) // block_size]:
            if block_hash not in seen:
                break
            hit += block_size
        seen.update(hashes[: (one.prompt_tokens + one.output_tokens - 1) // block_size])
        total += one.prompt_tokens
    return hit / total


# ------------------------------------------------------------------------------------------------------------ contents


def test_blocks_are_alike_as_far_as_texts_are() -> None:
    base = content((1, 100), (2, 60))
    assert len(block_hashes(base, 16)) == 10
    assert common(base, content((1, 100), (2, 60), (3, 400))) == 10
    assert common(base, content((1, 100), (2, 30), (3, 400))) == 8  # 130 tokens
    assert common(base, content((1, 100), (4, 60))) == 6
    assert common(base, content((5, 100), (2, 60))) == 0
    assert common(base, content((1, 99), (2, 61))) == 6  # the same numbers, but cut elsewhere


def test_a_hash_says_all_that_stands_before_its_block() -> None:
    one, other = content((1, 16), (2, 16)), content((3, 16), (2, 16))
    assert block_hashes(one, 16)[1] != block_hashes(other, 16)[1]


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 70)), min_size=1, max_size=8), st.integers(1, 300))
def test_hashes_are_positive_and_a_beginning_has_those_of_the_whole(texts: list[tuple[int, int]], tokens: int) -> None:
    whole = content(*texts)
    tokens = min(tokens, int(whole[:, 1].sum()))
    part = first_tokens(whole, tokens)
    assert part[:, 1].sum() == tokens
    hashes = block_hashes(whole, 4)
    assert (hashes > 0).all()
    assert block_hashes(part, 4).tolist() == hashes[: tokens // 4].tolist()
    assert token_ids(part, tokens, 32000) == token_ids(whole, tokens, 32000)
    assert all(300 <= one < 32000 for one in token_ids(whole, tokens, 32000))


# ------------------------------------------------------------------------------------------------------------ sessions


def test_a_turn_s_prompt_is_all_that_was_said_before_and_a_message() -> None:
    requests = with_hashes(generate(Workload(**CHAT), 0), 16)
    last: dict[int, Ints] = {}
    followed = 0
    for one in requests:
        assert one.content is not None
        assert one.session is not None
        assert one.content[:, 1].sum() == one.prompt_tokens + one.output_tokens
        if one.session in last:
            before = last[one.session]
            assert one.content[: len(before)].tolist() == before.tolist()
            assert len(one.content) == len(before) + 2
            followed += 1
        last[one.session] = one.content
    assert followed > 200


def test_sessions_come_at_exactly_the_rate_and_stay_as_they_are_at_another() -> None:
    slow, fast = (generate(Workload(**{**CHAT, "qps": qps}), 0) for qps in (5.0, 10.0))
    assert slow[-1].arrival == pytest.approx(120.0)
    assert fast[-1].arrival == pytest.approx(60.0)
    gaps: list[list[float]] = [[], []]
    for requests, found in zip((slow, fast), gaps, strict=True):
        last: dict[int | None, float] = {}
        for one in requests:
            if one.session in last:
                found.append(one.arrival - last[one.session])
            last[one.session] = one.arrival
    assert 10 < np.mean(gaps[0]) < 30  # of 30 s, those that end within the run
    again, other = generate(Workload(**CHAT), 0), generate(Workload(**CHAT), 1)
    assert again == slow
    assert all(np.array_equal(one.content, two.content) for one, two in zip(again, slow, strict=True))  # type: ignore[arg-type]
    assert other != slow


def test_there_is_no_beginning_at_which_all_sessions_are_young() -> None:
    requests = generate(Workload(**{**CHAT, "num_requests": 3000, "qps": 20.0}), 0)
    prompts = np.array([one.prompt_tokens for one in requests])
    quarters = prompts.reshape(4, -1).mean(axis=1)
    assert quarters[0] > 0.8 * quarters[1:].mean()


def test_a_session_that_cannot_fit_is_cut_and_never_looked_for_without_end() -> None:
    small = {"max_total_tokens": 64, "system_prompt_mean": 5000.0, "prompt_mean": 60.0, "output_mean": 60.0}
    requests = generate(Workload(**(CHAT | small)), 0)
    assert max(one.prompt_tokens + one.output_tokens for one in requests) <= 64
    assert min(min(one.prompt_tokens, one.output_tokens) for one in requests) >= 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"turns": 0.5}, "workload.turns=0.5: must be at least 1"),
        ({"gap_s": 1e9}, "workload.gap_s=1000000000.0: 2.5e+10 turns would come while a session lasts"),
        ({"gap_s": 0.0}, "workload.gap_s=0.0: must be a finite number > 0"),
        ({"arrivals": "gamma"}, "workload.arrivals=gamma: sessions begin at random; take arrivals=poisson"),
        ({"too_long": "cut"}, "workload.too_long=cut: a session ends before a turn that is too long"),
        ({"qps": None}, "workload.qps=null: arrivals=poisson has no times"),
        ({"source": "synthetic"}, "workload.turns=5.0: has no effect without workload.source=sessions"),
    ],
)
def test_sessions_are_checked(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        Workload(**(CHAT | change))


# -------------------------------------------------------------------------------------------------------------- traces


def trace(folder: Path, *rows: tuple[int, int, list[Any]]) -> Path:
    path = folder / "trace.jsonl"
    names = ("input_length", "output_length", "hash_ids")
    lines = [json.dumps({"timestamp": 1000 * i, **dict(zip(names, row, strict=True))}) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines))
    return path


def replayed(path: Path, **changes: Any) -> Workload:
    settings: dict[str, Any] = {"name": "mine", "source": "trace", "trace_path": str(path), "num_requests": None}
    return Workload(**{**settings, "max_total_tokens": 8192, **changes})


def test_the_blocks_of_a_trace_are_what_its_prompts_share(tmp_path: Path) -> None:
    path = trace(tmp_path, (1100, 5, [7, 8, 9]), (1500, 5, [7, 8, 10]), (600, 5, [7, 11]))
    requests = generate(replayed(path), 0)
    assert [one.content.tolist()[:-1] for one in requests if one.content is not None] == [
        [[7, 512], [8, 512], [9, 76]],
        [[7, 512], [8, 512], [10, 476]],
        [[7, 512], [11, 88]],
    ]
    assert len({one.content[-1, 0] for one in requests if one.content is not None}) == 3  # each response is its own
    assert most_hits(with_hashes(requests, 16), 16) == (1024 + 512) / 3200


def test_a_trace_that_is_replayed_again_consists_of_other_texts(tmp_path: Path) -> None:
    path = trace(tmp_path, (1100, 5, [7, 8]), (1500, 5, [7]))  # with fewer numbers than blocks
    requests = with_hashes(generate(replayed(path, num_requests=6), 0), 16)
    assert [len(one.block_hashes) for one in requests if one.block_hashes is not None] == [69, 94] * 3
    hashes = [set(one.block_hashes[:30].tolist()) for one in requests if one.block_hashes is not None]
    assert hashes[0] == hashes[1]
    assert not hashes[0] & hashes[2]
    assert most_hits(requests, 16) == 3 * 512 / (3 * 2600)


def test_blocks_without_a_number_are_shared_by_nobody_where_rows_were_left_out(tmp_path: Path) -> None:
    path = trace(tmp_path, (600, 0, []), (600, 5, []), (600, 5, []))
    requests = with_hashes(generate(replayed(path, num_requests=8), 0), 16)
    assert most_hits(requests, 16) == 0


def test_two_texts_are_not_the_same_tokens() -> None:
    for vocabulary in (2048, 32000):
        beginnings = {tuple(token_ids(content((number, 16)), 16, vocabulary)) for number in range(-2000, 20000)}
        assert len(beginnings) == 22000


def test_a_prompt_that_is_cut_keeps_its_beginning(tmp_path: Path) -> None:
    path = trace(tmp_path, (1100, 5, [7, 8, 9]), (1500, 5, [7, 8, 10]))
    requests, facts = make(replayed(path, max_total_tokens=800, too_long="cut"), 0)
    assert facts.cut == 2
    assert [one.content[:2].tolist() for one in requests if one.content is not None] == [[[7, 512], [8, 283]]] * 2


@pytest.mark.parametrize("numbers", [["a"], [-1], [2**40], [1.5], 3, None])
def test_numbers_of_blocks_are_checked(numbers: Any, tmp_path: Path) -> None:
    path = trace(tmp_path, (1100, 5, [7, 8, 9]), (1500, 5, numbers))
    with pytest.raises(ValueError, match=r"trace\.jsonl: line 2: column 'hash_ids' holds"):
        generate(replayed(path), 0)


@pytest.mark.skipif("BLOCK_DATA" not in os.environ, reason="BLOCK_DATA is not set: no public traces")
def test_mooncake_s_conversations_share_what_is_published() -> None:
    requests = with_hashes(
        generate(Workload(name="mooncake", source="trace", num_requests=None, max_total_tokens=2**17), 0), 16
    )
    assert len(requests) == 12031
    assert most_hits(requests, 16) == pytest.approx(0.374, abs=0.005)  # FAST '25: about 40 % of blocks


# -------------------------------------------------------------------------------------------------------- closed loop


def test_what_follows_in_a_session_is_its_next_turn() -> None:
    def turn(id_: int, arrival: float, session: int | None) -> Request:
        return Request(id_, arrival, 10, 1, 1, session=session)

    turns = [turn(0, 0.0, 7), turn(1, 1.0, 8), turn(2, 2.5, 7), turn(3, 3.0, None), turn(4, 9.0, 7)]
    assert followers(turns) == {0: (turns[2], 2.5), 2: (turns[4], 6.5)}


def test_in_a_closed_loop_a_turn_waits_for_the_answer_and_then_thinks() -> None:
    run = built(
        *("workload=chat", "workload.closed_loop=true", "workload.num_requests=300", "workload.qps=8"),
        *("workload.gap_s=3", "cluster.num_gpus=2", "engine=vllm_v1", "engine.enable_prefix_caching=true"),
    )
    requests, _ = requests_of(run)
    outcome = Outcome()
    replay(run, requests, outcome)
    assert outcome.history is not None
    records = {record.request.id: record for record in outcome.history.records}
    assert [record.status for record in records.values()] == ["ok"] * 300
    planned = {request.id: request.arrival for request in requests}
    waiting = followers(requests)
    assert len(waiting) > 100
    for id_, (turn, thinking) in waiting.items():
        assert records[turn.id].request.arrival == pytest.approx(records[id_].finished + thinking)
        assert records[turn.id].request.arrival > planned[turn.id]
    for id_ in planned.keys() - {turn.id for turn, _ in waiting.values()}:
        assert records[id_].request.arrival == planned[id_]
