"""The commands of docs/ run, or, if they need GPUs or servers, are composed, built and found to have no idle key."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import ROOT, choices, composed
from test_readme import bare, run_small

from block.run import config
from block.run.effects import without_effect

OWN = ("sweeps.md", "workloads.md")  # which have tests of their own
DOCS = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in OWN]


def shown(*starts: str) -> list[str]:
    """The commands of docs that begin so, comments and "…" for more keys cut off; a backslash continues one."""
    text = "\n".join(path.read_text() for path in DOCS).replace("\\\n", " ")
    lines = [re.sub(r" {2,}#.*|…$", "", line).strip() for line in text.splitlines()]
    return [line for line in dict.fromkeys(lines) if line.startswith(starts)]


COMMANDS = shown("python run.py", "python scripts/capacity.py")
REAL = [line for line in COMMANDS if re.search(r"\bbackend=(vllm|emulated)", line)]
SERVERS = shown("python -m block.gateway")


def test_there_are_commands_to_try() -> None:
    assert len(COMMANDS) >= 15
    assert len(REAL) >= 4
    assert len(SERVERS) >= 3


BARE = [line for line in COMMANDS if bare(line)]


def test_experiments_that_are_shown_exist() -> None:
    assert {line.partition("experiment=")[2] for line in BARE} <= set(choices("experiment"))


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in REAL + BARE])
def test_a_command_runs(line: str, tmp_path: Path) -> None:
    run_small(line, tmp_path)


@pytest.mark.parametrize("line", REAL + SERVERS)
def test_a_command_for_servers_is_sound(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "artifacts" / "latency" / "mine.json"
    file.parent.mkdir(parents=True)
    shutil.copy(ROOT / "artifacts" / "latency" / "cpu-tiny.json", file)
    monkeypatch.chdir(tmp_path)
    typed = line.replace("[…]", "[http://localhost:8001]").replace("FILE.json", "artifacts/latency/mine.json")
    command, keys = ("server", shlex.split(typed)[3:]) if line in SERVERS else ("serve", shlex.split(typed)[2:])
    settings = composed(*keys)
    config.build(settings)
    assert without_effect(settings, keys, command) == {}
