import os
import subprocess
import sys

import numpy as np
import pytest

from block.core.rng import generator

DRAW = "from block.core.rng import generator; print(generator(7, 'arrivals').integers(2**62, size=4).tolist())"


def test_the_same_seed_and_name_repeat() -> None:
    assert generator(7, "arrivals").random(5).tolist() == generator(7, "arrivals").random(5).tolist()


def test_a_stream_does_not_depend_on_pythons_hash_seed() -> None:
    drawn = {
        subprocess.run(
            [sys.executable, "-c", DRAW],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert drawn == {f"{generator(7, 'arrivals').integers(2**62, size=4).tolist()}\n"}


@pytest.mark.parametrize(("seed", "name"), [(7, "lengths"), (8, "arrivals"), (7, "arrivals ")])
def test_other_names_and_seeds_are_uncorrelated(seed: int, name: str) -> None:
    n = 20_000
    ours, theirs = generator(7, "arrivals").random(n), generator(seed, name).random(n)
    assert abs(np.corrcoef(ours, theirs)[0, 1]) < 4 / np.sqrt(n)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed=-1: must be >= 0"):
        generator(-1, "arrivals")
