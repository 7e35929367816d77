"""Every choice of every group composes, builds and, where it decides what happens, runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import CONF, TINY, built, choices, composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from block.dispatch import policies
from block.lengths import Oracle
from block.lengths.compact import Compact
from block.run.config import RunConfig
from block.run.replay import Outcome, replay, requests_of

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "experiment")
EXPERIMENTS = choices("experiment")
SERVED = [one for one in EXPERIMENTS if one != "length_estimation"]

# What a name stands for: README and the paper promise these, whatever else lies in conf/scheduler.
POLICIES = {
    "random": (policies.Random, Oracle),
    "round_robin": (policies.RoundRobin, Oracle),
    "min_qpm": (policies.MinQPM, Oracle),
    "infaas": (policies.INFaaS, Oracle),
    "llumnix_minus": (policies.LlumnixMinus, Oracle),
    "llumnix": (policies.Llumnix, Oracle),
    "block": (policies.Block, Oracle),
    "block_star": (policies.Block, Compact),
}


def outcome_of(run: RunConfig) -> Outcome:
    outcome = Outcome()
    replay(run, requests_of(run)[0], outcome)
    return outcome


def check_all_ok(run: RunConfig, count: int) -> None:
    """Every request is served once, and its tokens come after its arrival and in order."""
    outcome = outcome_of(run)
    assert outcome.history is not None
    records = outcome.history.records
    assert sorted(record.request.id for record in records) == list(range(count))
    assert {record.status for record in records} == {"ok"}
    for record in records:
        assert record.request.arrival <= record.dispatched <= record.first_token <= record.finished
        assert 0 <= record.instance_id < run.testbed.instances


# ------------------------------------------------------------------------------------------------------ every choice


@pytest.mark.parametrize(("group", "choice"), [(group, choice) for group in GROUPS for choice in choices(group)])
def test_every_choice_builds(group: str, choice: str, tmp_path: Path) -> None:
    extra = ["cluster.gpu=h200", "cluster.num_gpus=8"] if group == "model" else []  # room for the largest
    if choice == "trace":
        (tmp_path / "mine.csv").write_text("prompt_tokens,output_tokens,arrival\n5,6,0\n7,8,1\n")
        extra = [f"workload.trace_path={tmp_path / 'mine.csv'}"]
    run = built(f"{group}={choice}", *extra)
    part = run.policy if group == "scheduler" else getattr(run, group)
    assert type(part).__module__.startswith("block.")
    if group == "model":
        assert part.name == choice
        assert run.testbed.instances == 8 // part.tensor_parallel


def test_every_group_has_a_default() -> None:
    defaults = composed(hydra=True).hydra.runtime.choices
    assert set(GROUPS) == {group for group in defaults if "/" not in group} - {"experiment"}
    assert all(defaults[group] in choices(group) for group in GROUPS)


def test_sweeps_that_begin_in_the_same_second_have_folders_of_their_own() -> None:
    folders = {str(composed(hydra=True).hydra.sweep.dir) for _ in range(3)}
    assert len(folders) == 3


def test_defaults_are_the_paper_s_testbed() -> None:
    run = built()
    assert (run.cluster.gpu, run.cluster.num_gpus, run.testbed.instances) == ("a30", 12, 12)
    assert (run.model.name, run.workload.name, run.workload.num_requests) == ("llama2-7b", "sharegpt", 10_000)
    assert (run.engine.version, run.engine.max_num_seqs, run.engine.max_num_batched_tokens) == ("v0", 48, 512)
    assert isinstance(run.policy, policies.Block)
    assert run.seed == 0


@pytest.mark.parametrize("choice", POLICIES)
def test_a_scheduler_is_what_its_name_says(choice: str) -> None:
    run = built(f"scheduler={choice}")
    assert (type(run.policy), type(run.lengths)) == POLICIES[choice]


def test_only_llumnix_migrates_by_itself() -> None:
    assert [choice for choice in POLICIES if built(f"scheduler={choice}").migration.interval_s > 0] == ["llumnix"]
    assert built("scheduler=llumnix", "migration=none").migration.interval_s == 0
    assert built("scheduler=block", "migration=llumnix").migration == built("scheduler=llumnix").migration


# -------------------------------------------------------------------------------------------------------- tiny runs


@pytest.mark.parametrize("scheduler", choices("scheduler"))
def test_every_scheduler_serves_every_request(scheduler: str) -> None:
    check_all_ok(built(f"scheduler={scheduler}", *TINY), 150)


@pytest.mark.parametrize("workload", [choice for choice in choices("workload") if choice != "trace"])
def test_every_workload_is_served(workload: str) -> None:
    check_all_ok(built(f"workload={workload}", *TINY, "workload.num_requests=40", "workload.qps=1"), 40)


def test_a_trace_is_served_in_its_own_time(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("prompt_tokens,output_tokens,arrival\n50,6,0\n70,8,1\n90,3,4\n")
    keys = ["workload=trace", f"workload.trace_path={tmp_path / 'mine.csv'}", "workload.num_requests=3"]
    run = built(*keys, "workload.qps=1", "cluster.num_gpus=2")
    requests = requests_of(run)[0]
    assert [(request.prompt_tokens, request.output_tokens) for request in requests] == [(50, 6), (70, 8), (90, 3)]
    first, second, third = (request.arrival for request in requests)
    assert third - second == pytest.approx(3 * (second - first))  # gaps of 1 s and 3 s, stretched to the rate
    check_all_ok(run, 3)


@pytest.mark.parametrize(
    "engine",
    [
        ["engine=vllm_v0"],
        ["engine=vllm_v0_unchunked"],
        ["engine=vllm_v1"],
        ["engine=vllm_v1", "engine.async_scheduling=true"],
        ["engine=vllm_v1", "engine.long_prefill_token_threshold=128"],
        ["engine=vllm_v1", "engine.enable_prefix_caching=true"],
        ["engine=vllm_v1", "engine.enable_prefix_caching=true", "engine.num_gpu_blocks=300", "workload=chat"],
        ["engine=vllm_v0", "engine.num_gpu_blocks=300"],  # one long sequence at a time: they preempt one another
    ],
    ids=lambda keys: " ".join(keys),
)
def test_every_engine_serves_every_request(engine: list[str]) -> None:
    check_all_ok(built(*engine, *TINY), 150)


def test_the_second_testbed_holds_two_split_models() -> None:
    run = built("model=llama2-70b", "cluster=a100x8", *TINY[:1], "workload.qps=2", "tracking=none")
    assert run.testbed.instances == 2
    assert "profiles" in run.backend.latency(run.testbed).source["method"]
    check_all_ok(run, 150)


def test_a_cluster_of_several_kinds_is_given_in_a_file_or_on_the_command_line() -> None:
    run = built("cluster=mixed", TINY[0], TINY[1], TINY[3])
    assert run.testbed.instances == 10
    check_all_ok(run, 150)
    run = built("cluster=mixed", "cluster.pools=[{gpu: a30, num_gpus: 2}, {gpu: h100, num_gpus: 1}]")
    assert [kind.gpu for kind in run.testbed.kinds] == ["a30", "h100"]
    assert run.testbed.instances == 3


def test_a_pair_that_nobody_profiled_runs_on_its_data_sheet() -> None:
    run = built("model=llama3-8b", "cluster.gpu=h100", *TINY)
    assert run.backend.latency(run.testbed).source["method"].startswith("roofline")
    check_all_ok(run, 150)


# ------------------------------------------------------------------------------------------------------- experiments


def grid(experiment: str) -> dict[str, list[str]]:
    """What an experiment sweeps over: the values of each key, as Hydra's parser reads them."""
    loaded = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml")
    params = OmegaConf.select(loaded, "hydra.sweeper.params") or {}
    found = {}
    for override in OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()]):
        swept = override.is_sweep_override()
        found[override.get_key_element()] = (
            list(override.sweep_string_iterator()) if swept else [override.get_value_element_as_str()]
        )
    return found


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_value_of_an_experiment_s_grid_builds(experiment: str) -> None:
    assert composed(f"experiment={experiment}", hydra=True).hydra.runtime.choices.experiment == experiment
    for key, values in grid(experiment).items():
        assert len(set(values)) == len(values)
        for value in values:
            built(f"experiment={experiment}", f"{key}={value}")


@pytest.mark.parametrize("experiment", [one for one in SERVED if one != "scale"])  # which has two jobs only
def test_an_experiment_s_jobs_run_in_several_processes(experiment: str) -> None:
    assert composed(f"experiment={experiment}", hydra=True).hydra.runtime.choices["hydra/launcher"] == "joblib"


def test_every_other_experiment_says_what_it_does() -> None:
    assert {one: composed(f"experiment={one}").command for one in EXPERIMENTS} == {
        **dict.fromkeys(SERVED, "serve"),
        "length_estimation": "evaluate_lengths",
    }


def test_the_main_sweep_is_the_paper_s() -> None:
    swept = grid("main_sweep")
    assert set(swept["scheduler"]) == set(POLICIES) - {"llumnix"}
    assert [float(qps) for qps in swept["workload.qps"]] == list(range(20, 37))
