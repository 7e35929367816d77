"""A sketch of sharing keeps who goes on from whom: caches of any size find in its samples what they do in the trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from commands import load_script

from block.core.rng import generator
from block.workload.sharing_sketch import SharingSketch, common_blocks, hit_rate, load_sketch, shared
from block.workload.spec import SKETCHES, Workload, make
from block.workload.traces import Trace

MOONCAKE = SKETCHES / "mooncake.json"


def content(*numbers: int, last: int = 8) -> np.ndarray:
    """Blocks of 8 tokens, the last one with so many."""
    made = np.array([[number, 8] for number in numbers])
    made[-1, 1] = last
    return made


def chats(count: int, seed: int = 0) -> Trace:
    """Chats behind one block that all have, each turn some 50 requests after the one before it."""
    rng = np.random.default_rng(seed)
    contents: list[np.ndarray] = []
    next_number = 1
    for i in range(count):
        age = int(rng.integers(1, 100))
        begin = contents[i - age][:, 0].tolist() if i >= age and rng.random() < 0.7 else [0]
        added = int(rng.integers(2, 9))
        contents.append(content(*begin, *range(next_number, next_number + added), last=int(rng.integers(1, 9))))
        next_number += added
    prompt = np.array([int(one[:, 1].sum()) for one in contents])
    return Trace(prompt, prompt // 3 + 1, np.arange(count) * 1.0, None, contents=contents)


def test_the_tracked_sketch_of_mooncake_shares_what_the_trace_does() -> None:
    """Within two points of the hit rate, in a cache without end and in smaller ones; and lengths are the trace's."""
    sketch = load_sketch(MOONCAKE)
    assert isinstance(sketch, SharingSketch)
    source = sketch.source
    drawn = sketch.sample(source["requests"], generator(0, "test"))
    assert drawn.contents is not None
    found = load_script("fit_workload").hit_rates(drawn.contents)
    assert found["1"] > 0.3
    for share, (trace, _) in source["hit_rates"].items():
        assert found[share] == pytest.approx(trace, abs=0.02)
    assert drawn.prompt.mean() == pytest.approx(source["mean_prompt_tokens"], rel=0.02)
    assert drawn.output.mean() == pytest.approx(source["mean_output_tokens"], rel=0.01)
    assert (drawn.prompt == [one[:, 1].sum() for one in drawn.contents]).all()


def test_a_sketch_of_chats_shares_what_they_do() -> None:
    trace = chats(4000)
    sketch = SharingSketch.fit(trace)
    assert (sketch.block, sketch.common) == (8, 1)
    assert sketch.going_on == pytest.approx(0.7, abs=0.03)
    drawn = sketch.sample(4000, generator(1, "test"))
    assert trace.contents is not None
    assert drawn.contents is not None
    for blocks in (100, 300, 1000, None):
        assert hit_rate(drawn.contents, blocks) == pytest.approx(hit_rate(trace.contents, blocks), abs=0.03)
    assert drawn.prompt.mean() == pytest.approx(trace.prompt.mean(), rel=0.1)
    assert np.corrcoef(drawn.prompt, drawn.output)[0, 1] > 0.8


def test_who_shares_with_whom() -> None:
    contents = [content(0, 1, 2), content(0, 3), content(0, 1, 4), content(0, 1, 4, 5), content(0)]
    assert common_blocks(contents) == 2  # most begin with 0 and 1
    assert common_blocks([*contents, content(0, 9), content(0, 8)]) == 1
    earlier, blocks = shared(contents, 1)
    assert earlier.tolist() == [-1, -1, 0, 2, -1]
    assert blocks.tolist() == [0, 0, 2, 3, 0]
    assert common_blocks([content(1), content(2)]) == 0


def test_a_cache_finds_what_it_still_has() -> None:
    contents = [content(0, 1), content(2, 3), content(0, 1, 4, last=4)]
    assert hit_rate(contents, None) == 16 / 52
    assert hit_rate(contents, 2) == 0.0
    assert hit_rate([content(0, 1), content(2), content(0, 1)], 2) == 8 / 40  # of one prompt the last goes first


def test_what_is_saved_is_read_again_and_samples_are_those_of_their_seed(tmp_path: Path) -> None:
    sketch = SharingSketch.fit(chats(1000))
    sketch.save(tmp_path / "a.json")
    again = load_sketch(tmp_path / "a.json")
    assert isinstance(again, SharingSketch)
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert again.profile == sketch.profile
    first, second, other = (again.sample(300, generator(seed, "test")) for seed in (0, 0, 1))
    assert (first.prompt == second.prompt).all()
    assert (first.prompt != other.prompt).any()


def test_prompts_that_share_nothing_have_no_such_sketch() -> None:
    prompt = np.full(200, 16)
    contents = [content(2 * i, 2 * i + 1) for i in range(200)]
    with pytest.raises(ValueError, match="0 requests go on from others: a sketch of sharing needs 96"):
        SharingSketch.fit(Trace(prompt, prompt, None, None, contents=contents))


@pytest.mark.parametrize("too_long", ["drop", "cut"])
def test_a_workload_of_a_sketch_has_as_many_requests_as_are_asked_for(too_long: str) -> None:
    wanted = Workload(name="mooncake", num_requests=500, qps=5.0, max_total_tokens=16_384, too_long=too_long)
    requests, facts = make(wanted, seed=3)
    assert len(requests) == facts.requests == 500
    assert max(one.prompt_tokens + one.output_tokens for one in requests) <= 16_384
    assert (facts.cut > 0) == (too_long == "cut")
    assert all(one.content is not None and one.content[:-1, 1].sum() == one.prompt_tokens for one in requests)
    assert make(wanted, seed=3)[0] == requests
    timed = Workload(name="mooncake", num_requests=500, qps=None, arrivals="trace", max_total_tokens=131_072)
    assert make(timed, seed=3)[1].native_qps == pytest.approx(3.34, abs=0.1)
