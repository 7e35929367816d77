"""README's examples run: commands with small settings, Python blocks as they stand; its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from commands import CONF, ROOT, command
from omegaconf import OmegaConf

from block.store.results import Run, runs
from paper_figures.catalogue import FIGURES

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def section(title: str) -> str:
    """README's section of that title, its subsections too."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


GENERAL = README.replace(section("Your own policy"), "")  # without the worked example, whose commands need its files


def blocks(language: str, text: str = README) -> list[str]:
    """The contents of README's fences of that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def lines(start: str, text: str = README) -> list[str]:
    """README's lines that are commands of that kind, comments cut off; a backslash continues one."""
    code = "\n".join(blocks("bash", text)).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in code.splitlines() if line.startswith(start)]


def small(line: str) -> list[str]:
    """What makes a command fast: few requests, and one job of a sweep."""
    keys = ["workload.num_requests=200", "tracking=none"]
    if line.startswith("python run.py"):
        keys.append("runs_dir=runs")
    if line.startswith("python scripts/capacity.py"):
        low_rates = ["capacity.low=4", "capacity.high=12", "capacity.tolerance=2"]
        few = [] if "cluster=mixed" in line else ["cluster.num_gpus=3"]
        keys += ["capacity.seeds=1", "capacity.slo_s=[1]", *low_rates, *few]
    for experiment in re.findall(r"\bexperiment=(\S+)", line):
        params = OmegaConf.select(OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml"), "hydra.sweeper.params")
        keys += [f"{key}={first(str(values))}" for key, values in (params or {}).items() if f" {key}=" not in line]
    return keys


def bare(line: str) -> bool:
    """Whether it is an experiment as it stands, which test_cli runs for each."""
    return re.fullmatch(r"python run\.py experiment=\w+", line) is not None


def first(values: str) -> str:
    """The first value of a sweep: "a" of "a,b" and of "choice(a,b)", "20" of "range(20,37)"."""
    return re.sub(r"^\w+\((.*)\)$", r"\1", values).split(",")[0].strip()


def run_small(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command with small settings, in `folder`."""
    script, *arguments = shlex.split(line)[1:]
    done = command(script, *arguments, *small(line), folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return done


COMMANDS = lines("python run.py", GENERAL) + lines("python scripts/capacity.py", GENERAL)


@pytest.mark.parametrize("line", [line for line in COMMANDS if not bare(line)])
def test_a_command_runs(line: str, tmp_path: Path) -> None:
    run_small(line, tmp_path)
    assert list((tmp_path / "runs").glob("*/run.json")) + list((tmp_path / "artifacts" / "capacity").glob("*.json"))


def test_a_sweep_is_logged_afterwards(tmp_path: Path) -> None:
    """The two commands of README, one after the other."""
    (log,) = lines("python scripts/log_runs.py")
    sweep = next(line for line in lines("python run.py") if "-m" in line and "tracking=none" in line)
    run_small(sweep, tmp_path)
    assert not list(tmp_path.glob("runs/*/wandb"))
    script, *arguments = shlex.split(log)[1:]
    for logged in ("logged 2 of 2; 0 were logged before", "logged 0 of 0; 2 were logged before"):
        done = command(script, *arguments, "--root", "runs", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == logged
    assert len(list(tmp_path.glob("runs/*/wandb/offline-run-*"))) == 2


# ------------------------------------------------------------------------------------- figures and tables → commands

# What the two versions of the paper have.
V2 = ["Fig 5", "Fig 6", "Fig 7", "Fig 8", "Table 1", "Table 2", "CDFs"]
CAMERA_READY = [f"Fig {number}" for number in range(5, 14)] + ["Table 1", "Table 2", "Table 3"]
ROWS = re.findall(
    r"^\| (.+?) \| (.+?) \| (.+?) \| (.+) \|$", RESULTS.split("\n## Figures and tables\n")[1], flags=re.MULTILINE
)[1:]


def test_every_figure_and_table_has_a_row_and_every_row_its_figure() -> None:
    for column, wanted in enumerate((V2, CAMERA_READY)):
        assert set(wanted) <= {name for row in ROWS for name in row[column].split(", ")}
    named = [name for row in ROWS for code in re.findall(r"`([^`]+)`", row[-1]) for name in code.split()]
    assert sorted(named) == sorted(FIGURES)


# ---------------------------------------------------------------------------------------------------- a worked example


def worked(text: str, folder: Path) -> list[Run]:
    """The runs of an example's commands in `folder`, which begins empty and gets the example's files."""
    files = re.findall(r"^`([^`\n]+)`\n\n```\w+\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert files
    for path, content in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    for line in lines("python ", text):
        run_small(line, folder)
    found = runs(root=folder / "runs")
    assert len(found) == len(lines("python ", text)) > 0
    assert all(run.counts is not None and run.counts["ok"] == 200 for run in found)
    return found


def test_one_s_own_policy(tmp_path: Path) -> None:
    by_file, by_target = sorted(worked(section("Your own policy"), tmp_path), key=lambda run: run.choices["scheduler"])
    assert (by_file.choices["scheduler"], by_target.choices["scheduler"]) == ("freest", "mine.freest.Freest")
    assert by_file.document["git"]["uncommitted"][-2:] == ["mine/freest.py", "mine/scheduler/freest.yaml"]
    assert by_target.document["git"]["uncommitted"][-1] == "mine/freest.py"
    for run in (by_file, by_target):
        assert run.document["git"]["dirty"]
        assert "mine.freest" in run.document["hashes"]
        assert run.config["scheduler"] == {"_target_": "mine.freest.Freest", "k": 4}
        assert {len(candidates) for candidates in run.decisions()["candidates"]} == {4}


# ------------------------------------------------------------------------------------------------------- what it names


def test_the_map_names_every_package() -> None:
    (tree,) = re.findall(r"^```\n(run\.py .*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    named = [line.split()[0] for line in tree.splitlines()]
    packages = {path.parent.name for path in (ROOT / "block").glob("*/__init__.py")}
    assert {name for name, line in zip(named, tree.splitlines(), strict=True) if line[0] == " "} == packages
    assert [name for name in set(named) - packages if not (ROOT / name).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_readme_has_commands() -> None:
    assert lines("python run.py")


def test_the_python_blocks_run_after_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = command("run.py", "workload.num_requests=50", "tracking=none", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    assert blocks("python", GENERAL)
    for block in blocks("python", GENERAL):
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
