"""README's examples run: commands with small settings, Python blocks as they stand; its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from commands import CONF, ROOT, command
from omegaconf import OmegaConf

README = (ROOT / "README.md").read_text()
COMMANDS = ("python run.py", "python scripts/capacity.py")
MAKEFILE = (ROOT / "Makefile").read_text()


def blocks(language: str) -> list[str]:
    """The contents of README's fences of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def lines(start: str) -> list[str]:
    """README's lines that are commands of that kind, comments cut off; a backslash continues one."""
    code = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in code.splitlines() if line.startswith(start)]


def small(line: str) -> list[str]:
    """What makes a command fast: few requests, and one job of an experiment's sweep."""
    keys = ["workload.num_requests=200", "tracking=none", "runs_dir=runs"]
    if line.startswith("python scripts/capacity.py"):
        low_rates = ["capacity.low=4", "capacity.high=12", "capacity.tolerance=2", "cluster.num_gpus=3"]
        keys += ["capacity.seeds=1", "capacity.slo_s=[1]", *low_rates]
    for experiment in re.findall(r"\bexperiment=(\S+)", line):
        params = OmegaConf.select(OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml"), "hydra.sweeper.params")
        keys += [f"{key}={first(str(values))}" for key, values in (params or {}).items()]
    return keys


def first(values: str) -> str:
    """The first value of a sweep: "a" of "a,b" and of "choice(a,b)", "20" of "range(20,37)"."""
    return re.sub(r"^\w+\((.*)\)$", r"\1", values).split(",")[0].strip()


@pytest.mark.parametrize("line", [line for kind in COMMANDS for line in lines(kind)])
def test_a_command_runs(line: str, tmp_path: Path) -> None:
    for name in re.findall(r"trace_path=(\S+)", line):
        rows = "".join(f"{50 + i % 30},{10 + i % 7},{i}\n" for i in range(60))
        (tmp_path / name).write_text("prompt_tokens,output_tokens,arrival\n" + rows)
    script, *arguments = shlex.split(line)[1:]
    done = command(script, *arguments, *small(line), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    stored = list((tmp_path / "runs").glob("*/run.json")) + list((tmp_path / "artifacts" / "capacity").glob("*.json"))
    assert stored or "--cfg" in arguments


def test_there_are_commands() -> None:
    assert lines("python run.py")


def test_the_python_blocks_run_after_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = command("run.py", "workload.num_requests=50", "tracking=none", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert capsys.readouterr().out


def test_every_make_target_exists() -> None:
    wanted = set(re.findall(r"^\s*make ([\w-]+)", README, flags=re.MULTILINE))
    assert wanted <= set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE))
    assert wanted


def test_every_path_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", README) if "://" not in link]
    code = re.findall(r"`((?:block|conf|docs|scripts|tests|benchmarks|paper_figures)/[\w./-]*)`", README)
    assert [path for path in links + code if not (ROOT / path).exists()] == []
    assert links + code


def test_every_script_named_in_prose_exists() -> None:
    named = re.findall(r"`python (\S+\.py)[^`]*`", README)
    assert [script for script in named if not (ROOT / script).exists()] == []
