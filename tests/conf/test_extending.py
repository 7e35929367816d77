"""The examples of docs/extending.md work: those of the user's files beside the package, those of the tree in a copy."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from test_readme import lines, worked

from block.store.results import runs

DOC = (ROOT / "docs" / "extending.md").read_text()
OUTSIDE, TREE = DOC.split("\n## In the tree\n")
EXAMPLES = dict(re.findall(r"^### (Your own .+?)\n(.*?)(?=^###|\Z)", OUTSIDE, flags=re.MULTILINE | re.DOTALL))
STEPS = re.compile(r"^(?:`([^`\n]+)`\n\n)?```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def test_a_trace_of_one_s_own_runs(tmp_path: Path) -> None:
    (run,) = worked(EXAMPLES["Your own trace"], tmp_path)
    requests = run.requests()
    assert requests["prompt_tokens"].tolist()[:4] == [512, 64, 1800, 512]
    assert requests["output_tokens"].tolist()[:4] == [120, 300, 25, 120]


def test_a_model_of_one_s_own_runs(tmp_path: Path) -> None:
    (run,) = worked(EXAMPLES["Your own model"], tmp_path)
    assert run.choices["model"] == run.config["model"]["name"] == "phi3-mini"
    assert run.config["model"]["head_dim"] == 96


def test_a_gpu_of_one_s_own_runs(tmp_path: Path) -> None:
    (run,) = worked(EXAMPLES["Your own GPU"], tmp_path)
    assert run.config["cluster"]["gpu"] == "mine/rtx4090.yaml"
    assert set(run.instances()["instance_id"]) == {0, 1, 2, 3}


def test_every_own_example_is_tried() -> None:
    assert list(EXAMPLES) == [f"Your own {what}" for what in ("trace", "model", "GPU")]


# -------------------------------------------------------------------------------------------------------- in the tree


def edited(text: str, diff: str) -> str:
    """`text` with a diff of the page, applied as it stands; its context stands once in the text."""
    context = "".join(f"{line[1:]}\n" for line in diff.splitlines() if not line.startswith("+"))
    assert text.count(context) == 1, f"stands {text.count(context)} times: {context}"
    return text.replace(context, "".join(f"{line[1:]}\n" for line in diff.splitlines()))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what runs of the repository, with all files and edits of the page."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("block", "conf", "scripts", "paper_figures", "artifacts/latency", "artifacts/workloads"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    place = copy
    for path, language, content in STEPS.findall(TREE):
        if language == "diff":
            place = copy / path if path else place  # more of the same file
            place.write_text(edited(place.read_text(), content))
        elif path:
            (copy / path).write_text(content)
    rows = "".join(f"{i % 90 + 1},{i % 9 + 1},{i}\n" for i in range(2000))
    (copy / "my.csv").write_text(f"prompt_tokens,output_tokens,arrival\n{rows}")
    return copy


@pytest.mark.slow
def test_what_is_added_to_the_tree_runs(tree: Path) -> None:
    """Plain Python, as compiling an edited package would take half a minute; few requests, with short responses."""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(tree), "WANDB_MODE": "offline"}
    commands = lines("python ", TREE)
    assert len(commands) == 7
    for line in commands:
        typed = shlex.split(line)[1:]
        if typed[0] == "run.py":
            typed += ["workload.num_requests=20", "tracking=none"]
        if typed[0] == "run.py" and not any(key.startswith("workload=") for key in typed):
            typed += ["workload=synthetic", "workload.prompt_mean=60", "workload.output_mean=12"]
        if typed[0] == "scripts/reproduce.py":
            typed += ["--requests=20", "--seeds=1"]
        done = subprocess.run([sys.executable, *typed], cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    found = {key: [str(run.choices.get(key)) for run in runs(root=tree / "artifacts" / "runs")] for key in CHOSEN}
    for key, choice in CHOSEN.items():
        assert choice in found[key]
    assert "rtx-3090" in [run.config["cluster"]["gpu"] for run in runs(root=tree / "artifacts" / "runs")]
    assert len(list(tree.glob("artifacts/figures/*/waiting.png"))) == 1


CHOSEN = {"scheduler": "fewest_waiting", "workload": "support_chat", "model": "qwen2-1.5b", "backend": "paced"}
