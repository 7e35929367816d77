"""The table of what a server has cached: it says what a dictionary would, whatever has come and gone."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
from testbed import contents

from block.core.hashing import hash_tokens, root
from block.engine.prefix_table import PrefixTable, held, note, table_size


def empty(blocks: int) -> PrefixTable:
    return PrefixTable(*np.zeros((2, table_size(blocks)), dtype=np.int64))


@pytest.mark.parametrize("seed", range(40))
def test_it_has_what_was_noted(seed: int) -> None:
    random = Random(seed)
    blocks = random.choice([1, 2, 7, 60])
    table = empty(blocks)
    spread = random.choice([1, table_size(blocks), 1 << 40])  # neighbours, and all on one place
    expected: dict[int, tuple[int, int]] = {}
    for _ in range(300):
        changes = []
        for _ in range(random.randint(0, 5)):
            known = random.choice(sorted(expected)) if expected and random.random() < 0.7 else None
            there = sum(copies for copies, _ in expected.values())
            if known is None and there < blocks:
                known = random.randint(1, 3 * blocks) * spread
                change = 1, random.randint(0, 1)
            elif known is not None:
                copies, used = expected[known]
                change = random.choice([(-1, -1 if used == copies else 0), (0, 1 if used < copies else -1)])
            else:
                continue
            copies, used = expected.get(known, (0, 0))
            expected[known] = copies + change[0], used + change[1]
            if expected[known][0] == 0:
                del expected[known]
            changes.append((known, *change))
        note(table, np.array(changes, dtype=np.int64).reshape(-1, 3))
        assert contents(table) == expected


@pytest.mark.parametrize("seed", range(20))
def test_of_a_prompt_the_beginning_is_found(seed: int) -> None:
    random = Random(seed)
    hashes = np.array([random.getrandbits(62) + 1 for _ in range(random.randint(1, 90))], dtype=np.int64)
    cached = random.randint(0, len(hashes))
    used = random.randint(0, cached)
    table = empty(len(hashes))
    note(
        table,
        np.array(
            [(one, 1, place < used) for place, one in enumerate(hashes[:cached].tolist())], dtype=np.int64
        ).reshape(-1, 3),
    )
    assert held(table, hashes, len(hashes)) == (cached, used)
    assert held(table, hashes, 10**6) == (cached, used)
    most = random.randint(0, len(hashes))
    assert held(table, hashes, most) == (min(cached, most), min(used, most))


def test_it_takes_sixteen_bytes_a_place_and_two_to_four_places_a_block() -> None:
    for blocks in (1, 2, 3, 1000, 1024, 1025, 30_000):
        assert 2 * blocks <= table_size(blocks) < 4 * blocks or blocks == 1
        assert bin(table_size(blocks)).count("1") == 1
    assert 16 * table_size(32_768) / 32_768 == 32


# ------------------------------------------------------------------------------------------------------------- hashes


def test_a_hash_says_all_that_stands_before() -> None:
    tokens = np.random.default_rng(0).integers(0, 32_000, 1600)
    whole = hash_tokens(tokens, 16)
    assert len(whole) == len(set(whole.tolist())) == 100
    assert (whole > 0).all()
    assert hash_tokens(tokens[:331], 16).tolist() == whole[:20].tolist()
    assert hash_tokens(tokens[320:], 16, int(whole[19])).tolist() == whole[20:].tolist()
    changed = tokens.copy()
    changed[170] += 1
    alike = hash_tokens(changed, 16) == whole
    assert alike[:10].all()
    assert not alike[10:].any()
    assert not (hash_tokens(tokens, 16, root("salt a")) == whole).any()


def test_extra_keys_are_told_from_each_other() -> None:
    assert root() == 0
    roots = Counter([root("a"), root("b"), root("a", "b"), root("b", "a"), root("ab")])
    assert max(roots.values()) == 1
    assert all(0 < one < 1 << 63 for one in roots)
    assert root("a", "b") == root("a", "b")
