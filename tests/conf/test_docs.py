"""The commands of docs/ run. Those of docs/ and README that need GPUs or servers are composed, built and found to have
no idle key; those that need data or a network name scripts, options and figures that there are.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from commands import ROOT, choices, composed
from test_readme import COMMANDS as OF_README
from test_readme import GENERAL, bare, run_small

from block.run import config
from block.run.effects import without_effect
from paper_figures.catalogue import FIGURES

OWN = ("sweeps.md", "workloads.md", "extending.md")  # which have tests of their own
PAGES = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in OWN]
PAGES += [GENERAL, (ROOT / "CONTRIBUTING.md").read_text()]


def shown(*starts: str) -> list[str]:
    """The commands of docs that begin so, comments and "…" for more keys cut off; a backslash continues one."""
    text = "\n".join(PAGES).replace("\\\n", " ")
    lines = [re.sub(r" +# .*|…$", "", line).strip() for line in text.splitlines()]
    return [line for line in dict.fromkeys(lines) if line.startswith(starts)]


COMMANDS = shown("python run.py", "python scripts/capacity.py")
REAL = [line for line in COMMANDS if re.search(r"\bbackend=(vllm|emulated)", line)]
REAL += [line.partition(" -- ")[2] for line in shown("srun ray")]
SERVERS = shown("python -m block.gateway")


def test_there_are_commands_to_try() -> None:
    assert len(COMMANDS) >= 15
    assert len(REAL) >= 4
    assert len(SERVERS) >= 3


BARE = [line for line in COMMANDS if bare(line)]


def test_experiments_that_are_shown_exist() -> None:
    assert {line.partition("experiment=")[2] for line in BARE} <= set(choices("experiment"))


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in REAL + BARE + OF_README])
def test_a_command_runs(line: str, tmp_path: Path) -> None:
    run_small(line, tmp_path)


@pytest.mark.parametrize("line", shown("python scripts/", "python benchmarks/"))
def test_a_script_has_what_its_command_names(line: str) -> None:
    script, *arguments = line.removeprefix("python ").split()
    text = (ROOT / script).read_text()
    for argument in arguments:
        assert not argument.startswith("--") or f'"{argument.partition("=")[0]}"' in text
    if script == "scripts/reproduce.py":
        assert {name for name in arguments if re.fullmatch(r"[a-z]\w+", name)} <= set(FIGURES)


@pytest.mark.parametrize("line", REAL + SERVERS)
def test_a_command_for_servers_is_sound(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "artifacts" / "latency" / "mine.json"
    file.parent.mkdir(parents=True)
    shutil.copy(ROOT / "artifacts" / "latency" / "cpu-tiny.json", file)
    monkeypatch.chdir(tmp_path)
    typed = line.replace("[…]", "[http://localhost:8001]").replace("FILE.json", "artifacts/latency/mine.json")
    command, keys = ("gateway", shlex.split(typed)[3:]) if line in SERVERS else ("serve", shlex.split(typed)[2:])
    settings = composed(*keys)
    config.build(settings)
    assert without_effect(settings, keys, command) == {}


@pytest.mark.parametrize("line", shown("ray start", "srun ray"))
def test_a_command_of_ray_has_what_is_given(line: str) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    name, *given = shlex.split(line.removeprefix("srun ").partition(" -- ")[0])[1:]
    command = scripts.cli.commands[name]
    assert {one.partition("=")[0] for one in given if one.startswith("--")} <= {
        option for parameter in command.params for option in parameter.opts
    }


# ------------------------------------------------------------------------------------------------------ what they name

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
WALKS = re.findall(r"^\*\*(One .+?)\*\*\n(.*?)(?=^\*\*|^##|\Z)", ARCHITECTURE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("name", "walk"), WALKS)
def test_a_walk_opens_four_files_at_most_and_names_what_is_there(name: str, walk: str) -> None:
    rows = re.findall(r"^\| [^|`]+ \| (`.+`) \| `([\w./]+)` \|$", walk, flags=re.MULTILINE)
    assert rows
    assert len({path for _, path in rows}) <= 4
    for names, path in rows:
        text = (ROOT / path).read_text()
        for part in re.findall(r"\w+", names):
            assert re.search(rf"\b(class|def) {part}\b|^{part}\b", text, flags=re.MULTILINE), f"{part} is not in {path}"


def test_there_are_three_walks() -> None:
    assert [name for name, _ in WALKS] == ["One request in simulation", "One request on vLLM", "One new policy"]


def test_paths_and_modules_that_pages_name_exist() -> None:
    new = re.findall(r"^`([\w./-]+)`$", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)
    attributes = re.findall(r'"block\.([\w.]+)"', (ROOT / "block" / "gateway" / "tracing.py").read_text())  # of spans
    lacking = []
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        text = page.read_text()
        for path in re.findall(r"`((?:block|conf|docs|scripts|tests|benchmarks|paper_figures)/[\w./-]*)`", text):
            if not (ROOT / path).exists() and path not in new and "NAME" not in path:
                lacking.append(f"{page.name}: {path}")
        for dotted in re.findall(r"`block\.([\w.]+)`", text):
            places = [ROOT / "block" / "/".join(dotted.split(".")[:depth]) for depth in (1, 2, 3)]
            if (
                not any(place.with_suffix(".py").exists() for place in places)
                and not places[0].is_dir()
                and dotted not in attributes
            ):
                lacking.append(f"{page.name}: block.{dotted}")
    assert lacking == []


def test_packages_are_listed_in_the_order_in_which_they_may_import() -> None:
    listed = re.findall(r"^\| `(block\.\w+)` \|", ARCHITECTURE, flags=re.MULTILINE)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (one["layers"] for one in contracts if one["type"] == "layers")
    level = {name: place for place, layer in enumerate(layers[::-1]) for name in re.findall(r"[\w.]+", layer)}
    assert sorted(listed) == sorted(level)
    assert [level[name] for name in listed] == sorted(level.values())
