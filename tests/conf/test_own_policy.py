"""A policy of one's own on the command line: what it gets wrong is one line, and what it was is what is stored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import SMALL, TINY, command

from block.store.results import runs

FAULTY = """
import sys
from dataclasses import dataclass
from typing import ClassVar

from block.dispatch.policies import Needs, least


@dataclass(frozen=True)
class Late:
    needs: ClassVar[Needs] = Needs.COUNTS

    def candidates(self, instances, request_index, rng):
        return [request_index % instances if request_index < 90 else instances]

    def choose(self, request, views, rng):
        return least(views, [0.0], rng)


@dataclass(frozen=True)
class Needless:
    pass


@dataclass(frozen=True)
class Nan(Late):
    def choose(self, request, views, rng):
        return least(views, [float("nan") if request.id == 70 else 0.0], rng)


@dataclass(frozen=True)
class Wrong(Late):
    k: int = 1

    def __post_init__(self):
        self.k / 0


@dataclass(frozen=True)
class Guess:
    outrun_share: ClassVar[float] = 0.0

    def estimate(self, output_tokens, rng):
        return output_tokens[None]["mean"]


@dataclass(frozen=True)
class Salted(Late):
    salt: int = 0
    least: float = 0.0

    def candidates(self, instances, request_index, rng):
        return [(request_index + self.salt) % instances]


@dataclass(frozen=True)
class Exits(Late):
    def choose(self, request, views, rng):
        return sys.exit() if request.id == 70 else least(views, [0.0], rng)
"""
LATE = (
    "scheduler._target_=mine.faulty.Late: candidates, for request 90 of 3 instances, returned [3]: "
    "3 is not between 0 and 2 (mine/faulty.py:13)"
)
SEARCH = [
    "capacity.slo_s=[1]",
    "capacity.low=4",
    "capacity.high=12",
    "capacity.tolerance=2",
    "capacity.seeds=1",
    *SMALL,
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `mine/faulty.py`, and two that cannot be imported."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "faulty.py").write_text(FAULTY)
    (tmp_path / "mine" / "broken.py").write_text("import x y\n")
    (tmp_path / "mine" / "lacking.py").write_text("import none\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("faulty.Late", LATE),
        ("faulty.Nan", "scheduler._target_=mine.faulty.Nan: choose, for request 70, gave instance 1 the score NaN"),
        ("faulty.Needless", "scheduler._target_=mine.faulty.Needless: has no method candidates (mine/faulty.py:20)"),
        (
            "faulty.Wrong",
            "scheduler._target_=mine.faulty.Wrong: ZeroDivisionError: division by zero (mine/faulty.py:36)",
        ),
        ("faulty.Exits", "scheduler._target_=mine.faulty.Exits: choose raised SystemExit (mine/faulty.py:59)"),
        (
            "lacking.Late",
            "scheduler._target_=mine.lacking.Late: ModuleNotFoundError: No module named 'none' (mine/lacking.py:1)",
        ),
        ("broken.Late", "scheduler._target_=mine.broken.Late: SyntaxError: invalid syntax"),
    ],
)
def test_a_mistake_of_a_policy_is_told_in_one_line(name: str, told: str, folder: Path) -> None:
    done = command("run.py", *TINY, "scheduler=random", f"scheduler._target_=mine.{name}", folder=folder)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {told}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("script", "keys"), [("run.py", TINY), ("scripts/capacity.py", SEARCH)])
def test_an_error_of_another_class_of_one_s_own_is_told_in_one_line(script: str, keys: list[str], folder: Path) -> None:
    done = command(script, *keys, "lengths=oracle", "lengths._target_=mine.faulty.Guess", folder=folder)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: IndexError: only integers, slices")
    assert done.stderr.splitlines()[-1].endswith(" (mine/faulty.py:44)")
    assert "Traceback" not in done.stderr


def test_a_search_tells_of_a_trace_that_is_not_sound(folder: Path) -> None:
    (folder / "trace.csv").write_text("a,b\n1,2\n")
    done = command("scripts/capacity.py", *SEARCH, "workload=trace", "workload.trace_path=trace.csv", folder=folder)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert "workload.prompt_column" in done.stderr


def test_a_mistake_of_a_policy_fails_its_job_of_a_sweep_and_no_other(folder: Path) -> None:
    targets = "scheduler._target_=mine.faulty.Late,block.dispatch.policies.Random"
    done = command("run.py", "-m", *TINY, "scheduler=random", targets, "hydra/launcher=joblib", folder=folder)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(LATE)
    by_status = {run.status: run for run in runs(root=folder / "artifacts" / "runs", status=None)}
    assert by_status["ok"].choices["scheduler"] == "random"
    assert by_status["failed"].choices["scheduler"] == "mine.faulty.Late"
    assert by_status["failed"].document["error"] == f"UserFault: {LATE}"
    assert len(by_status["failed"].decisions()) == 90


def test_a_mistake_of_a_policy_ends_a_search_in_one_line(folder: Path) -> None:
    target = "scheduler._target_=mine.faulty.Late"
    done = command("scripts/capacity.py", *SEARCH, "scheduler=random", target, folder=folder)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"error: {LATE}")
    assert "Traceback" not in done.stderr


def test_a_search_is_made_anew_if_asked_for_or_if_the_policy_has_changed(folder: Path) -> None:
    shutil.copy(folder / "mine" / "faulty.py", folder / "mine" / "early.py")

    def searched(*flags: str) -> tuple[str, bool]:
        arguments = [*SEARCH, "scheduler=random", "scheduler._target_=mine.early.Late", *flags]
        done = command("scripts/capacity.py", *arguments, folder=folder)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        return lines[0], all(" stored 2" in line for line in lines[1:])

    policy = folder / "mine" / "early.py"
    policy.write_text(FAULTY.replace("if request_index < 90 else instances", ""))
    first = searched()
    assert first[0].startswith("mine.early.Late on llama2-7b: ")
    assert not first[1]
    assert searched() == (first[0], True)
    assert searched("--fresh") == first
    policy.write_text(FAULTY.replace("request_index % instances if request_index < 90 else instances", "0"))
    changed = searched()
    assert changed[0] != first[0]
    assert not changed[1]


def test_numbers_of_a_policy_s_own_may_be_of_any_size(folder: Path) -> None:
    """The package refuses such numbers for its own keys only."""
    typed = ["scheduler=random", "scheduler._target_=mine.faulty.Salted", "+scheduler.salt=12345678901234567890"]
    done = command("run.py", *typed, "+scheduler.least=1e-300", *SMALL, folder=folder)
    assert done.returncode == 0, done.stderr
