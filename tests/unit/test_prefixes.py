"""What a dispatcher has sent tells what instances may have cached, as far as answers do not say otherwise."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from commands import built

from block.core.types import Request, RequestRecord
from block.dispatch.config import DispatchConfig
from block.dispatch.prefixes import OldLookUps, Sent, SentPrefixes, ToldPrefixes
from block.run.replay import Outcome, replay, requests_of

ANY: Any = None
SIZE = 10


def asked(id_: int, *blocks: int, output: int = 11) -> Request:
    """A prompt of these blocks and of half a one; a response that fills the rest of that and of the one behind it."""
    prompt = SIZE * len(blocks) + SIZE // 2
    hashes = np.array([*blocks, 1000 * id_ + 1, 1000 * id_ + 2])
    return Request(id_, 0.0, prompt, output, output, block_hashes=hashes)


def placed(known: SentPrefixes | ToldPrefixes, request: Request, instance: int) -> RequestRecord:
    record = RequestRecord(request, instance_id=instance)
    known.placed(ANY, record, ANY, 0.0)
    return record


def leave(known: SentPrefixes | ToldPrefixes, record: RequestRecord, cached: int = -1, status: str = "ok") -> None:
    record.status, record.cached_tokens = status, cached
    known.left(ANY, record, 0.0)


def test_what_was_sent_may_be_cached_and_is_in_use_until_it_is_answered() -> None:
    known = SentPrefixes(SIZE, 100)
    assert known.hits(asked(1, 1, 2, 3), [0, 1]).tolist() == [[0, 0], [0, 0]]
    first = placed(known, asked(1, 1, 2, 3), 1)
    assert known.hits(asked(2, 1, 2, 9), [0, 1]).tolist() == [[0, 0], [20, 2]]
    second = placed(known, asked(2, 1, 2, 9), 1)
    leave(known, first)
    assert known.hits(asked(3, 1, 2, 3), [1, 0]).tolist() == [[30, 2], [0, 0]]
    leave(known, second)
    assert known.hits(asked(3, 1, 2, 3), [1, 0]).tolist() == [[30, 0], [0, 0]]


def test_a_response_is_cached_but_for_its_last_token() -> None:
    known = SentPrefixes(SIZE, 100)
    leave(known, placed(known, asked(1, 1, output=11), 0))  # 15 + 11 tokens: the second block is full, no third
    assert known.hits(asked(2, 1, 1001, 1002), [0]).tolist() == [[20, 0]]
    known = SentPrefixes(SIZE, 100)
    leave(known, placed(known, asked(1, 1, output=5), 0))  # 20 tokens, the last of which is not computed
    assert known.hits(asked(2, 1, 1001), [0]).tolist() == [[10, 0]]


def test_the_last_token_of_a_prompt_is_computed_always() -> None:
    known = SentPrefixes(SIZE, 100)
    whole = Request(1, 0.0, 20, 5, 5, block_hashes=np.array([1, 2]))
    leave(known, placed(known, whole, 0))
    assert known.hits(whole, [0]).tolist() == [[10, 0]]


def test_an_answer_that_fewer_tokens_were_cached_tells_what_else_is_gone() -> None:
    known = SentPrefixes(SIZE, 100)
    for id_, blocks in enumerate([(1, 2, 3), (4, 5), (6,)], start=1):
        leave(known, placed(known, asked(id_, *blocks), 0))
    again = placed(known, asked(4, 4, 5), 0)
    leave(known, again, cached=10)  # 5 was gone, and so what was used before it: 1, 2, 3
    assert [known.hits(asked(9, *blocks), [0])[0, 0] for blocks in ((1, 2, 3), (4, 5), (6,))] == [0, 20, 10]


def test_what_was_still_in_use_may_not_have_been_computed_and_tells_nothing_when_it_is_missing() -> None:
    known = SentPrefixes(SIZE, 100)
    leave(known, placed(known, asked(1, 6, 7), 0))
    first, second = placed(known, asked(2, 1, 2), 0), placed(known, asked(3, 1, 2), 0)
    leave(known, second, cached=0)  # it was served before the first
    leave(known, first, cached=0)
    assert [known.hits(asked(9, *blocks), [0])[0, 0] for blocks in ((6, 7), (1, 2))] == [20, 20]


def test_one_that_failed_leaves_nothing_of_its_own() -> None:
    known = SentPrefixes(SIZE, 100)
    leave(known, placed(known, asked(1, 1, 2), 0))
    other = placed(known, asked(2, 1, 2, 3), 0)
    leave(known, placed(known, asked(3, 1, 2, 3, 4), 0), cached=0, status="sent")
    assert known.hits(asked(9, 1, 2, 3, 4), [0]).tolist() == [[30, 3]]
    leave(known, other, status="sent")
    assert known.hits(asked(9, 1, 2, 3, 4), [0]).tolist() == [[20, 0]]


def test_an_instance_that_is_gone_has_nothing_any_more() -> None:
    known = SentPrefixes(SIZE, 100)
    leave(known, placed(known, asked(1, 1, 2), 0))
    known.instance_down(ANY, 0, "lost", 0.0)
    assert known.hits(asked(3, 1, 2), [0]).tolist() == [[0, 0]]


def test_a_real_model_answers_otherwise_than_the_workload_says() -> None:
    known = SentPrefixes(SIZE, 100, answers=False)
    leave(known, placed(known, asked(1, 1, output=11), 0))
    assert known.hits(asked(2, 1, 1001, 1002), [0]).tolist() == [[10, 0]]


def test_without_hashes_nothing_is_remembered() -> None:
    known = SentPrefixes(SIZE, 100)
    leave(known, placed(known, Request(1, 0.0, 50, 5, 5), 0))
    assert known.hits(asked(2, 1), [0]).tolist() == [[0, 0]]


def test_only_what_an_instance_can_hold_is_remembered() -> None:
    rng = random.Random(3)
    sent = Sent(20)
    for _ in range(200):
        sent.add([rng.randrange(1, 60) for _ in range(rng.randint(1, 8))], 0)
        assert sent.blocks(0) <= 20
    sent.forget(0)
    assert sent.blocks(0) == 0


@pytest.mark.slow
def test_what_a_run_thinks_is_cached_is_near_to_what_is(monkeypatch: Any) -> None:
    """Of a response, only what has ended is thought to be cached; its blocks are as they fill."""
    chat = ["workload=chat", "workload.gap_s=4", "workload.qps=3", "workload.num_requests=500", "cluster.num_gpus=4"]
    cache = ["engine=vllm_v1", "engine.enable_prefix_caching=true", "scheduler=block_cache", "dispatch.prefixes=sent"]
    run = built(*chat, *cache)
    thought: dict[int, int] = {}
    original = SentPrefixes.placed

    def spy(self: SentPrefixes, dispatcher: Any, record: RequestRecord, views: Any, now: float) -> None:
        thought[record.request.id] = int(self.hits(record.request, [record.instance_id])[0, 0])
        original(self, dispatcher, record, views, now)

    monkeypatch.setattr(SentPrefixes, "placed", spy)
    outcome = Outcome()
    replay(run, requests_of(run)[0], outcome)
    assert outcome.history is not None
    pairs = np.array([(thought[record.request.id], record.cached_tokens) for record in outcome.history.records])
    assert len(pairs) == 500
    assert (pairs[:, 0] > pairs[:, 1]).mean() < 0.05
    believed, cached = pairs.sum(axis=0)
    assert 0.95 * cached < believed < cached


def test_a_way_to_know_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dispatch\.prefixes=guessed: choose told or sent"):
        DispatchConfig(prefixes="guessed")


def test_instances_tell_what_they_have_and_others_go_by_what_they_were_sent() -> None:
    """Instance 0 tells of two blocks, of which one is in use; instance 1 tells nothing."""
    told = {0: (2, 1)}
    known = ToldPrefixes(lambda i, hashes, most: told.get(i), SIZE, SentPrefixes(SIZE, 100))
    assert known.hits(asked(1, 1, 2, 3), [0, 1]).tolist() == [[20, 1], [0, 0]]
    there, elsewhere = placed(known, asked(1, 1, 2, 3), 0), placed(known, asked(2, 1, 2, 3), 1)
    other = placed(known, asked(3, 1, 9), 0)
    assert known.hits(asked(4, 1, 2, 3), [0, 1]).tolist() == [[30, 3], [30, 3]]  # it is not told yet, but will be there
    told[0] = 3, 0
    assert known.hits(asked(4, 1, 2, 3), [0]).tolist() == [[30, 3]]  # it is told, but not who uses it
    told[0] = 2, 1
    leave(known, there)
    assert known.hits(asked(4, 1, 2, 3), [0]).tolist() == [[20, 1]]
    told[0] = 0, 0
    assert known.hits(asked(4, 1, 2, 3), [0]).tolist() == [[10, 1]]
    leave(known, other)
    leave(known, elsewhere)
    assert known.hits(asked(4, 1, 2, 3), [0, 1]).tolist() == [[0, 0], [30, 0]]
    known.instance_down(ANY, 1, "gone", 0.0)
    assert known.hits(asked(4, 1, 2, 3), [1]).tolist() == [[0, 0]]


def test_who_tells_nothing_and_was_judged_by_nothing_has_nothing() -> None:
    known = ToldPrefixes(lambda i, hashes, most: None, SIZE)
    leave(known, placed(known, asked(1, 1, 2), 0))
    leave(known, placed(known, Request(2, 0.0, 30, 1, 1), 0))
    assert known.hits(asked(3, 1, 2), [0]).tolist() == [[0, 0]]


def test_what_instances_have_is_as_old_as_snapshots_may_be() -> None:
    """Each is looked at again when what is kept of it is 5 s old."""
    now = [0.0]
    has = {0: 1, 1: 2}

    class Told:
        def keep(self, i: int) -> Any:
            blocks = has[i]
            return lambda hashes, most: (min(blocks, most), 0)

    told: Any = Told()
    old = OldLookUps(told, 5.0, lambda: now[0])
    hashes = np.arange(1, 9)
    assert old(0, hashes, 8) == (1, 0)
    now[0], has[0] = 4.9, 7
    assert (old(0, hashes, 8), old(1, hashes, 8)) == ((1, 0), (2, 0))
    now[0], has[1] = 5.0, 8
    assert (old(0, hashes, 8), old(1, hashes, 8)) == ((7, 0), (2, 0))


def test_a_run_with_old_snapshots_finds_less() -> None:
    """With snapshots that are never taken again nothing is known to be cached but of requests that are still there."""

    def found(interval_s: float) -> int:
        keys = ["engine=vllm_v1", "scheduler=block_cache", "cluster.num_gpus=8", "tracking=none", "workload=chat"]
        keys += ["workload.num_requests=300", "workload.qps=6", "workload.gap_s=12"]
        run = built(*keys, f"dispatch.snapshot_interval_s={interval_s}")
        outcome = Outcome()
        replay(run, requests_of(run)[0], outcome)
        assert all(record.status == "ok" for record in outcome.history.records)
        return sum(record.cached_tokens for record in outcome.history.records)

    fresh, old, never = found(0), found(1), found(1000)
    assert fresh == pytest.approx(old, rel=0.1)
    assert never < 0.9 * fresh
