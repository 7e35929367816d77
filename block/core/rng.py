"""Named generators of random numbers: one seed for a run, one independent generator for each subsystem.

What one subsystem draws never moves what another one draws: a policy cannot shift the arrivals of a run.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, name: str) -> np.random.Generator:
    """The generator called `name` of the run seeded with `seed`.

    The same pair gives the same numbers in every process and on every platform: the name is hashed with SHA-256, not
    with Python's salted `hash`. Other names or seeds give independent ones. ValueError if the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: must be >= 0")
    key = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(key.tolist())))
