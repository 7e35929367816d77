"""A wrong configuration ends in one line that names the key, the value and the choices; nothing else is printed."""

from __future__ import annotations

import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import CONF, ROOT, choices, command, composed
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml import MarkedYAMLError

from block.run import cli, config
from block.run.config_errors import ConfigError, explain, quoted
from block.run.effects import without_effect
from block.run.execute import execute


def complaint(*overrides: str) -> str:
    """What is said of the overrides, wherever it is found out: composing, building, or making the requests."""
    try:
        settings = composed(*overrides)
        config.build(settings)
        config.node(settings.capacity)
        execute(settings, {})
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        return explain(error)
    pytest.fail(f"{overrides} passed")


def typed(
    script: str, *arguments: str, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]
) -> tuple[Any, str, str]:
    """Exit code, output and errors of a command, in this process."""
    patch.setattr(sys, "argv", [script, *arguments])
    patch.setattr(sys, "path", list(sys.path))
    patch.setenv("HYDRA_FULL_ERROR", "0")  # so that what the command sets ends with the test
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    captured = capture.readouterr()
    return ended.value.code, captured.out, captured.err


def leaves(node: DictConfig, prefix: str = "") -> list[tuple[str, Any]]:
    """Every key of a config and its value."""
    found: list[tuple[str, Any]] = []
    for name in node:
        key = f"{prefix}{name}"
        if isinstance(node[name], DictConfig):
            found += leaves(node[name], f"{key}.")
        elif not str(name).startswith("_"):
            found.append((key, node[name]))
    return found


WORKLOAD = "name, num_requests, qps, arrivals"
ROOT_KEYS = "scheduler, model, cluster, engine, migration, workload, lengths, backend, tracking, provisioner, dispatch"

# overrides; how the line begins (key and value); what else it says (choices or range, and the way out)
WRONG: list[tuple[list[str], str, list[str]]] = [
    # a misspelt key
    (["schedular=block"], "schedular: no such key", ["did you mean scheduler?", f"choose from {ROOT_KEYS}"]),
    (["workloda.qps=3"], "workloda.qps: no such key", ["did you mean workload?", f"choose from {ROOT_KEYS}"]),
    (["workload.qsp=3"], "workload.qsp: no such key", ["did you mean qps?", f"choose from {WORKLOAD}"]),
    (["scheduler.kk=3"], "scheduler.kk: no such key", ["did you mean k?", "choose from k"]),
    (["scheduler=random", "scheduler.k=2"], "scheduler.k: no such key", []),
    (["lengths.spread=0.2"], "lengths.spread: no such key", []),
    (["lengths=compakt"], "lengths=compakt: ", ["did you mean compact?", ", ".join(choices("lengths"))]),
    (["lengths=compact", "lengths.path=gone.npz"], "lengths.path=gone.npz: no such file", ["train_lengths.py"]),
    (["lengths=roberta", "lengths.path=gone"], "lengths.path=gone: no trained model there", ["lengths=compact"]),
    (["lengths=roberta", "lengths.device=tpu"], "lengths.device=tpu: ", ["choose from auto, cpu, cuda"]),
    (["dispatch.ledgr=false"], "dispatch.ledgr: no such key", ["did you mean ledger?"]),
    (["capacity.sedes=2"], "capacity.sedes: no such key", ["did you mean seeds?", "choose from metric, slo_s, seeds"]),
    (["+colour=blue"], "colour: no such key", [f"choose from {ROOT_KEYS}"]),
    (["+workload.qsp=3"], "workload.qsp: no such key", ["did you mean qps?", f"choose from {WORKLOAD}"]),
    (["provisioner.threshold_s=70"], "provisioner.threshold_s: no such key", []),
    # a misspelt choice
    (["provisioner=relieve"], "provisioner=relieve: ", ["did you mean relief?", "preempt, relief, static"]),
    (["scheduler=blok"], "scheduler=blok: ", ["did you mean block?", ", ".join(choices("scheduler"))]),
    (["model=llama-7b"], "model=llama-7b: ", ["did you mean llama2-7b?", ", ".join(choices("model"))]),
    (["cluster=a100"], "cluster=a100: ", [f"choose from {', '.join(choices('cluster'))}"]),
    (["workload=alpaca"], "workload=alpaca: ", [f"choose from {', '.join(choices('workload'))}"]),
    (["experiment=main_swep"], "experiment=main_swep: ", ["did you mean main_sweep?", *choices("experiment")]),
    (["hydra/launcher=jobli"], "hydra/launcher=jobli: ", ["did you mean joblib?"]),
    (["cluster.gpu=gone.yaml"], "cluster.gpu=gone.yaml: no such file", []),
    (["cluster.gpu=h1000"], "cluster.gpu=h1000: ", ["choose from t4, v100, a10", "h100"]),
    (["engine.version=v2"], "engine.version=v2: ", ["choose v0 or v1"]),
    (["tracking.mode=wandb"], "tracking.mode='wandb': ", ["choose from auto, online, offline, disabled"]),
    (["workload.arrivals=uniform"], "workload.arrivals='uniform': ", ["poisson, gamma, constant, trace"]),
    (["workload.name=alpaca"], "workload.name='alpaca': ", ["choose from arxiv, azure_code", "sharegpt"]),
    # no choice at all
    (["~scheduler"], "scheduler=null: ", ["choose from random, round_robin", "block", "conf/scheduler"]),
    (["~workload"], "workload=null: ", ["conf/workload"]),
    (["dispatch=1"], "dispatch=1: ", ["dispatch.ledger"]),
    # a class that is not there, or cannot be a choice
    (["scheduler._target_=Mine"], "scheduler._target_=Mine: ", ["module.Class"]),
    (["scheduler._target_=nonesuch.Mine"], "scheduler._target_=nonesuch.Mine: ", ["No module named 'nonesuch'"]),
    (
        ["scheduler._target_=block.dispatch.policies.Mine"],
        "scheduler._target_=block.dispatch.policies.Mine: ",
        ["no attribute 'Mine'"],
    ),
    (["scheduler._target_=pathlib.Path"], "scheduler._target_=pathlib.Path: ", ["must be a dataclass", "scheduler"]),
    # not of the form
    (["workload.qps"], "workload.qps: ", ["not of the form key=value"]),
    (["workload.qps=="], "workload.qps==: ", ["quotes", """'workload.qps="="'"""]),
    (["scheduler=block,random"], "scheduler=block,random: ", ["-m"]),
    (["workload.qps=range(20,37)"], "workload.qps=range(20,37): ", ["-m"]),
    # the wrong type
    (["workload.qps=fast"], "workload.qps=fast: wants a number", []),
    (["workload.qps=[20,30]"], "workload.qps=[20,30]: wants a number", []),
    (["workload.qps={a:1}"], "workload.qps={a:1}: wants a number", []),
    (["workload.qps='3 4'"], "workload.qps='3 4': wants a number", []),
    (["workload.qps=integer"], "workload.qps=integer: wants a number", []),
    (["engine.max_num_seqs=1.5"], "engine.max_num_seqs=1.5: wants an integer", []),
    (["dispatch.ledger=maybe"], "dispatch.ledger=maybe: wants true or false", []),
    (["model.name=[a]"], "model.name=[a]: wants a string", []),
    (["seed=null"], "seed=null: wants an integer", []),
    (["capacity.slo_s=3"], "capacity.slo_s=3: wants a list, such as [1,2]", []),
    (["capacity.slo_s=[fast]"], "capacity.slo_s=[fast]: wants a number", []),
    # out of range
    (["seed=-1"], "seed=-1: ", ["must be 0 or more"]),
    (["sample_every_s=0"], "sample_every_s=0.0: ", ["must be greater than 0"]),
    (["workload.qps=-1"], "workload.qps=-1.0: ", ["must be a finite number > 0"]),
    (["workload.qps=nan"], "workload.qps=nan: ", ["must be a finite number > 0"]),
    (["workload.num_requests=0"], "workload.num_requests=0: ", ["must be an integer >= 1"]),
    (["scheduler.k=0"], "scheduler.k=0: ", ["at least 1"]),
    (["lengths=noisy", "lengths.spread=-1"], "lengths.spread=-1.0: ", ["must be 0 or more"]),
    (["migration.bandwidth=0"], "migration.bandwidth=0.0: ", ["greater than 0"]),
    (["backend=emulated", "scheduler=llumnix"], "migration.interval_s=0.05: ", ["only backend=simulated migrates"]),
    (
        ["engine=vllm_v1", "engine.async_scheduling=true", "migration=llumnix"],
        "engine.async_scheduling=True: ",
        ["migration=none"],
    ),
    (
        ["engine=vllm_v1", "engine.enable_prefix_caching=true", "migration=llumnix"],
        "engine.enable_prefix_caching=True: ",
        ["migration=none"],
    ),
    (["engine.enable_prefix_caching=true"], "engine.enable_prefix_caching=True: ", ["engine.version=v1"]),
    (["backend.step_noise=2"], "backend.step_noise=2.0: ", ["must be between 0 and 1"]),
    (["cluster.num_gpus=0"], "cluster.num_gpus=0: ", ["must be at least 1"]),
    (["engine.block_size=15"], "engine.block_size=15: ", ["power of two"]),
    (["model.tensor_parallel=3"], "model.tensor_parallel=3: ", ["choose from 1, 2, 4, 8, 16, 32"]),
    (["backend.predictor_gpu=h1000"], "backend.predictor_gpu=h1000: ", ["choose from t4"]),
    (["backend.slowdown=[0]"], "backend.slowdown=[0.0]: ", ["greater than 0"]),
    (["backend.launcher=ray"], "backend.launcher: no such key", []),
    (["backend=emulated", "backend.launcher=rey"], "backend.launcher=rey: ", ["did you mean ray?", "local, ray"]),
    (
        ["backend=vllm", "backend.launcher=ray", "backend.placement=STRICT_SPREAD"],
        "backend.placement=STRICT_SPREAD: ",
        ["did you mean strict_spread?", "choose from spread, strict_spread, pack"],
    ),
    (["dispatch.correction_steps=-1"], "dispatch.correction_steps=-1: ", ["0 or more"]),
    (["dispatch.dispatchers=0"], "dispatch.dispatchers=0: ", ["at least 1"]),
    (["replay_share=2"], "replay_share=2.0: ", ["between 0 and 1"]),
    (["replay_share=0.5", "backend=emulated"], "replay_share=0.5: ", ["only simulated"]),
    (["dispatch.forecast_noise=-1"], "dispatch.forecast_noise=-1.0: ", ["0 or more"]),
    (["lengths=injected", "lengths.sigma=-1"], "lengths.sigma=-1.0: ", ["0 or more"]),
    (["workload.closed_loop=true"], "workload.closed_loop=True: ", ["sketch has no sessions", "workload=chat"]),
    (["dispatch.prefixes=guessed"], "dispatch.prefixes=guessed: ", ["told or sent"]),
    (["dispatch.snapshot_interval_s=-1"], "dispatch.snapshot_interval_s=-1.0: ", ["0 or more"]),
    (["capacity.seeds=0"], "capacity.seeds=0: ", ["must be at least 1"]),
    (["capacity.slo_s=[]"], "capacity.slo_s=[]: ", ["such as [3,10]"]),
    (["capacity.low=40"], "capacity.high=36.0: ", ["must be greater than capacity.low=40.0"]),
    (["capacity.metric=speed"], "capacity.metric=speed: ", ["ttft_p99_s"]),
    (["provisioner=preempt", "provisioner.initial=0"], "provisioner.initial=0: ", ["at least 1"]),
    (["provisioner=relief", "provisioner.threshold_s=0"], "provisioner.threshold_s=0.0: ", ["greater than 0"]),
    (["provisioner=relief", "provisioner.startup_s=-1"], "provisioner.startup_s=-1.0: ", ["0 or more"]),
    # what does not go together
    (["provisioner=preempt", "scheduler=llumnix_minus"], "provisioner=preempt: ", ["such as scheduler=block"]),
    (
        ["provisioner=relief", "scheduler=random", "provisioner.drain_after_s=9"],
        "provisioner=relief: ",
        ["such as scheduler=block"],
    ),
    (["provisioner=relief", "replay_share=0.1"], "replay_share=0.1: ", ["provisioner=static"]),
    (["provisioner=relief", "dispatch.dispatchers=2"], "dispatch.dispatchers=2: ", ["provisioner=static"]),
    (["provisioner=relief", "migration.interval_s=1"], "migration.interval_s=1.0: ", ["provisioner=static"]),
    (["provisioner=preempt", "cluster.num_gpus=5"], "provisioner.initial=6: ", ["holds 5 instances"]),
    (["model=llama2-70b"], "model=llama2-70b does not fit on gpu=a30: ", ["model.tensor_parallel=4", "h100"]),
    (
        ["model=llama2-70b", "cluster.gpu=h100", "cluster.num_gpus=2"],
        "cluster.num_gpus=2: ",
        ["model.tensor_parallel=4"],
    ),
    (["engine.async_scheduling=true"], "engine.async_scheduling=True: ", ["engine.version=v1"]),
    (["engine.num_gpu_blocks=10"], "engine.num_gpu_blocks=10: ", ["engine.max_model_len=4096"]),
    (["workload.max_total_tokens=5000"], "workload.max_total_tokens=5000: ", ["engine.max_model_len=4096"]),
    (["workload.burst_shape=0.5"], "workload.burst_shape=0.5: ", ["arrivals=gamma"]),
    (["cluster=mixed", "backend=emulated"], "cluster.pools: ", ["only the simulated testbed", "backend=simulated"]),
    (["cluster=mixed", "cluster.pools=[]"], "cluster.pools=[]: ", ["gpu: a30"]),
    (["cluster=mixed", "cluster.pools=[{gpu: a31, num_gpus: 1}]"], "cluster.gpu=a31: ", ["choose from"]),
    (["cluster=mixed", "cluster.pools=[{gpu: a30, gpus: 1}]"], "cluster.pools", ["gpus"]),
    (["cluster=mixed", "cluster.num_gpus=3"], "cluster.num_gpus: no such key", ["choose from pools"]),
    # files
    (["workload=trace"], "workload.trace_path=null: ", ["give FILE.csv", "workload.name from sharegpt"]),
    (["workload=trace", "workload.trace_path=gone.csv"], "workload.trace_path=gone.csv: ", ["no such file"]),
    (["runs_dir=/dev/null/runs"], "runs_dir=/dev/null/runs: ", ["Not a directory"]),
]


@pytest.mark.parametrize(("overrides", "begins", "says"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_one_line_names_key_value_and_choices(overrides: list[str], begins: str, says: list[str]) -> None:
    line = complaint(*overrides)
    assert line.startswith(begins)
    assert "\n" not in line
    for part in says:
        assert part in line


def test_a_trace_without_the_columns_is_told_which_it_has(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("input,output\n1,2\n")
    line = complaint("workload=trace", f"workload.trace_path={tmp_path / 'other.csv'}")
    assert "has the columns input, output" in line
    assert "workload.prompt_column" in line


# what a model file of the user's holds; what is said
LLAMA = {"name": "mine", "hf_id": "mine", "layers": 2, "hidden_size": 64, "intermediate_size": 64, "heads": 2}
LLAMA |= {"kv_heads": 2, "head_dim": 32, "vocab_size": 1000}
BAD_FILES: list[tuple[dict[str, Any], str]] = [
    ({"layers": "many"}, "model.layers=many: wants an integer, in model/mine.yaml"),
    ({"layers": [1]}, "model.layers=[1]: wants an integer, in model/mine.yaml"),
    ({"gated_mlp": "maybe"}, "model.gated_mlp=maybe: wants true or false, in model/mine.yaml"),
    ({"layrs": 2}, "model.layrs: no such key in model/mine.yaml; did you mean layers? choose from name, hf_id, layers"),
    ({"layers": "???"}, "model.layers: needs a value"),
    ({"kv_heads": 3}, "model.kv_heads=3: choose a divisor of heads=2"),
    ({"defaults": []}, "model: its file lacks the line `defaults: [/schema/model@_here_, _self_]`"),
]


def own_model(folder: Path, text: str) -> str:
    """What is said of a file of the user's."""
    (folder / "model").mkdir()
    (folder / "model" / "mine.yaml").write_text(text)
    try:
        config.build(composed(f"hydra.searchpath=[file://{folder}]", "model=mine"))
    except (ConfigError, HydraException, OmegaConfBaseException, MarkedYAMLError) as error:
        return explain(error)
    return ""


@pytest.mark.parametrize(("change", "says"), BAD_FILES, ids=[says for _, says in BAD_FILES])
def test_one_line_tells_what_is_wrong_in_a_file_of_the_user_s(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = {"defaults": ["/schema/model@_here_", "_self_"], **LLAMA, **change}
    line = own_model(tmp_path, OmegaConf.to_yaml(file))
    assert line.startswith(says)
    assert "\n" not in line


def test_one_line_tells_where_a_file_of_the_user_s_is_no_yaml(tmp_path: Path) -> None:
    line = own_model(tmp_path, "layers: [1\n")
    assert line.startswith(f"{tmp_path}/model/mine.yaml, line 2: ")
    assert "\n" not in line


# what a file of the user's holds, byte by byte; what is said of it
BAD_TEXTS: list[tuple[bytes, str]] = [
    (b"defaults:\n\t- /schema/model@_here_\n", "model/mine.yaml, line 2: found character"),
    (b"defaults: [/schema/model@_here_, _self_]\nlayers: 2\nlayers: 3\n", "line 3: found duplicate key layers"),
    (b"name: \xff\xfe\n", "model/mine.yaml: is not UTF-8"),
    ("name: a\n".encode("utf-16"), "model/mine.yaml: is not UTF-8"),
    (b"", "model: its file lacks the line `defaults:"),
    (b"hello\n", "model: its file lacks the line `defaults:"),
    (b"- a\n- b\n", "model=['a', 'b']: choose a file of conf/model"),
    (b"defaults: x\nname: a\n", "'model/mine', defaults must be a list"),
    (b"defaults: {a: b}\n", "'model/mine', defaults must be a list"),
    (b"defaults: [/schema/modell@_here_, _self_]\n", "In 'model/mine': Could not load 'schema/modell'"),
    (b"defaults: [nope, _self_]\n", "In 'model/mine': Could not load 'model/nope'"),
    (b"defaults: [/schema/model, _self_]\n", "model: its file lacks the line `defaults:"),
    (b"defaults: [/schema/cluster@_here_, _self_]\nname: a\n", "model.name: no such key in model/mine.yaml"),
    (b"defaults: [/schema/model@_here_, _self_]\nname: a\n", "hf_id: needs a value"),
    (b"defaults: [/schema/model@_here_, _self_]\nname: ${nope}\n", "model.name: ${nope} is the value of a key nope"),
    (b"defaults: [/schema/model@_here_, _self_]\nname: {a: b}\n", "model.name: wants a string, in model/mine.yaml"),
    (b"defaults: [/schema/model@_here_, _self_]\nname: null\n", "model.name=None: wants a string"),
    (b"defaults: [/schema/model@_here_, _self_]\n3: 4\n", "model.3: no such key in model/mine.yaml"),
    (b"defaults: [/schema/model@_here_, _self_, override /engine: x]\n", "In 'model/mine': Could not override"),
    (b"name: 'a\n", "line 2: found unexpected end of stream"),
    (b"name: a: b\n", "line 1: mapping values are not allowed here"),
    (b"name: *x\n", "line 1: found undefined alias"),
    (b"name: a\n---\nname: b\n", "line 2: but found another document"),
    (b"name: !!python/object/apply:os.system ['true']\n", "line 1: could not determine a constructor"),
    (b"_target_: nope.Nope\n", "model._target_=nope.Nope: No module named 'nope'"),
    (b"_target_: 3\n", "model._target_=3: not of the form module.Class"),
]


@pytest.mark.parametrize(("content", "says"), BAD_TEXTS, ids=[f"{i} {says}" for i, (_, says) in enumerate(BAD_TEXTS)])
def test_a_command_tells_in_one_line_what_is_wrong_in_a_file_of_the_user_s(
    content: bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_bytes(content)
    code, out, err = typed("run.py", "--config-dir", str(tmp_path), "model=mine", patch=monkeypatch, capture=capsys)
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert (code, out) == (2, "")


def test_every_number_and_switch_has_a_type() -> None:
    """OmegaConf asks for it at each assignment, as Hydra's of an override is one."""
    settings = composed()
    numbers = [key for key, value in leaves(settings) if isinstance(value, int | float)]
    assert len(numbers) > 40
    for key in numbers:
        with pytest.raises(ValidationError, match="nonsense"):
            OmegaConf.update(settings, key, "nonsense")


@pytest.mark.parametrize("group", sorted(path.name for path in CONF.iterdir() if path.is_dir()))
def test_every_group_lists_its_choices(group: str) -> None:
    assert complaint(f"{group}=nonesuch").endswith(f"choose from {', '.join(choices(group))}")


# ---------------------------------------------------------------------------------------------------- the real commands

COMMANDS = [
    ("run.py", ["workload.qsp=30"], "error: workload.qsp: no such key"),
    ("run.py", ["workload.qps=-1"], "error: workload.qps=-1.0: must be"),
    ("run.py", ["scheduler=null"], "error: scheduler=null: choose from random"),
    ("run.py", ["workload=trace", "workload.trace_path=gone.csv"], "error: workload.trace_path=gone.csv: no such"),
    ("run.py", ["seed=1", "-m", "workload.qsp=30"], "error: workload.qsp: no such key"),
    ("run.py", ["scheduler=roundrobin"], "error: scheduler=roundrobin: did you mean round_robin?"),
    ("run.py", ["command=sevre"], "error: command=sevre: did you mean serve? choose from serve, evaluate_lengths"),
    (
        "run.py",
        ["experiment=length_estimation", "estimation.data_sets=[gone.json]"],
        "error: estimation.data=gone.json",
    ),
    ("scripts/capacity.py", ["capacity.seeds=0"], "error: capacity.seeds=0: must be"),
    (
        "scripts/capacity.py",
        ["capacity.metric=e2e_p42_s"],
        "error: capacity.metric=e2e_p42_s: did you mean e2e_p99_s? choose from",
    ),
]


@pytest.mark.parametrize(("script", "overrides", "begins"), COMMANDS)
def test_a_command_says_it_on_stderr_and_exits_with_2(
    script: str,
    overrides: list[str],
    begins: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = typed(script, *overrides, patch=monkeypatch, capture=capsys)
    (line,) = err.splitlines()
    assert line.startswith(begins)
    assert (code, out) == (2, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("script", "overrides", "begins"), [COMMANDS[1], COMMANDS[-2]])
def test_a_process_says_it_on_stderr_and_exits_with_2(
    script: str, overrides: list[str], begins: str, tmp_path: Path
) -> None:
    done = command(script, *overrides, folder=tmp_path)
    (line,) = done.stderr.splitlines()
    assert line.startswith(begins)
    assert (done.stdout, done.returncode) == ("", 2)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is wrong with the configuration is boiled down; ValueErrors from elsewhere are not."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["run.py"])

    def main() -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run_main(main)
    with pytest.raises(ZeroDivisionError):
        cli.run_main(lambda: 1 // 0)


def test_options_may_stand_among_the_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["run.py", "b=2", "-m", "~c", "--config-dir", "mine", "a=1", "+d=3"])
    assert cli.run_main(lambda: None) == 0
    assert sys.argv == ["run.py", "-m", "--config-dir", "mine", "b=2", "~c", "a=1", "+d=3"]


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["run.py"])

    def main() -> None:
        raise KeyboardInterrupt

    assert cli.run_main(main) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert cli.run_main(lambda: None) == 0


# ---------------------------------------------------------------------------------------------------- odd, but right

VALUES = [
    *("my trace=1.csv", "é.csv", "it's.csv", 'a"b.csv', "~/x.csv", "a(1).csv", "a{1}.csv", "a[1].csv", "[a.csv", "a#b"),
    *("a;b", "a&b", "a!b", "${x}", "${", "a\\", 'a\\"b', "a,b.csv", "C:\\x y\\z.csv", "a`b", "<a>", "日本.csv", "'"),
    *('"', "a\\'b", "$HOME", "a^b", "a=b=c", " a", "x:y z", "*?", "a|b", "%"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_what_is_said_to_type_gives_the_text(value: str) -> None:
    """Through the shell's grammar and Hydra's own; of what needs no quotes, nothing is said."""
    try:
        assert composed(f"workload.trace_path={value}").workload.trace_path == value.strip()
    except (HydraException, OmegaConfBaseException) as error:
        said = explain(error)
        (override,) = shlex.split(str(quoted("workload.trace_path", value)))
        if "${x}" not in value:
            assert said.split(" is " if "several" in said else "type ")[-1].rstrip(")") == shlex.quote(override)
        assert composed(override).workload.trace_path == value


def test_functions_of_the_grammar_say_what_they_want() -> None:
    assert complaint("seed=int(x)").startswith("seed=int(x): invalid literal for int()")
    assert complaint("seed=choise(1)").startswith("seed=choise(1): no such function; did you mean choice?")


RIGHT = [
    ["scheduler=[block]"],
    ["++scheduler.k=3"],
    ["+scheduler.k=3"],
    ["scheduler={k:3}"],
    ["workload.qps='3'"],
    ["workload.qps=3e1"],
    ["workload.num_requests=1_000"],
    ["seed=0", "seed=1"],
    ['workload.name="sharegpt"'],
    ["engine.num_gpu_blocks=NULL"],
    ["runs_dir=a b/c"],
    ["tracking.tags=[]"],
    ["tracking.tags=[a,'b c']"],
    ["dispatch.ledger=True"],
    ["backend.slowdown=[1.5]"],
]


@pytest.mark.parametrize("overrides", RIGHT, ids=" ".join)
def test_what_is_odd_but_right_is_taken(overrides: list[str]) -> None:
    assert without_effect(composed(*overrides), overrides, "serve") == {}
    config.build(composed(*overrides))


# ------------------------------------------------------------------------------------------------------- closed pipes


@pytest.mark.parametrize(
    "line",
    ["run.py --cfg job", "run.py --info all", "run.py qps=3 2>&1", "scripts/log_runs.py --help"],
)  # fmt: skip
def test_an_output_that_nobody_reads_leaves_no_traceback(line: str, tmp_path: Path) -> None:
    script, arguments = line.split(" ", 1)
    typed = f"{sys.executable} {ROOT / script} {arguments} | true"
    done = subprocess.run(typed, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stderr, done.stdout) == ("", "")
