"""A key that was given and can have no effect is refused; one that has an effect never is."""

from __future__ import annotations

import itertools
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from commands import TINY, command, composed
from omegaconf import DictConfig
from rich.console import Console

from block.run import config, hydra_schema
from block.run.config_errors import ConfigError
from block.run.console import announce
from block.run.effects import READ, RULES, refuse_in_all, without_effect

PROMPTS = ["workload=trace", "workload.trace_path=gpteacher", "workload.arrivals=poisson"]
CACHING = ("engine=vllm_v1",)
UNCACHED = ("engine=vllm_v1", "engine.enable_prefix_caching=false")
PARALLEL = "model.tensor_parallel=2"
URLS = "backend.urls=[http://h:1]"

# command; overrides, of which the last is without effect; what the reason says
IDLE: list[tuple[str, list[str], str]] = [
    ("serve", ["scheduler=random", "dispatch.ledger=false"], "only counts"),
    ("serve", ["scheduler=least_requests", "dispatch.snapshot_interval_s=1"], "only counts"),
    ("serve", ["scheduler=p2c", "dispatch={snapshot_interval_s: 1}"], "only counts"),
    ("serve", ["scheduler=infaas", "dispatch.ledger=false"], "in transit"),
    ("serve", ["scheduler=llumnix_minus", "dispatch.correction_steps=9"], "no forecasts"),
    ("serve", ["scheduler=least_tokens", "dispatch.forecast_noise=0.1"], "no forecasts"),
    ("serve", ["scheduler=round_robin", "backend.predictor_gpu=t4"], "no forecasts"),
    ("serve", ["scheduler=least_tokens", "lengths=compact", "lengths.outrun_share=0.7"], "no forecasts"),
    ("serve", ["scheduler=random", "lengths=noisy"], "does not look at lengths"),
    ("serve", ["scheduler=llumnix", "lengths=noisy"], "does not look at lengths"),
    ("serve", ["scheduler=infaas", "lengths=compact"], "does not look at lengths"),
    ("serve", ["scheduler=block_star", "scheduler=random", "lengths=injected"], "does not look at lengths"),
    ("serve", ["lengths=roberta", "lengths.encoder=mine"], "train_lengths.py"),
    ("serve", ["lengths=roberta", "lengths.device=cpu"], "no prompts"),
    ("serve", ["lengths=roberta", "lengths.batch_size=2"], "no prompts"),
    ("serve", ["lengths=roberta", "lengths.max_prompt_tokens=9"], "no prompts"),
    ("serve", ["lengths=constant", "lengths.spread=2"], "claims"),
    ("serve", ["migration.bandwidth=9"], "migration=llumnix"),
    ("serve", ["migration.out_below=1"], "migration=llumnix"),
    ("serve", ["migration.in_above=9"], "migration=llumnix"),
    ("serve", ["migration.last_stage_blocks=9"], "migration=llumnix"),
    ("serve", ["migration.max_stages=9"], "migration=llumnix"),
    ("serve", ["migration.downtime_s=9"], "migration=llumnix"),
    ("serve", ["scheduler=llumnix", "migration.interval_s=0", "migration.max_stages=9"], "nothing migrates"),
    ("serve", ["tracking=none", "tracking.project=mine"], "W&B"),
    ("serve", ["tracking=none", "tracking.entity=me"], "W&B"),
    ("serve", ["tracking=none", "tracking.group=g"], "W&B"),
    ("serve", ["tracking=none", "tracking.tags=[a]"], "W&B"),
    ("serve", ["tracking.mode=disabled", "tracking.table_rows=3"], "W&B"),
    ("serve", ["provisioner=relief", "provisioner.drain_ttft_s=2"], "drain_after_s"),
    ("serve", ["provisioner=preempt", "provisioner.drain_ttft_s=2"], "drain_after_s"),
    ("serve", ["backend=vllm", URLS, "engine.max_num_seqs=24"], "settings of their own"),
    ("serve", ["backend=vllm", URLS, "engine.num_gpu_blocks=2400"], "settings of their own"),
    ("serve", ["backend=vllm", URLS, "cluster.num_gpus=3"], "settings of their own"),
    ("serve", ["backend=vllm", URLS, "backend.arguments=[--x]"], "settings of their own"),
    ("serve", ["backend=vllm", URLS, "backend.ready_timeout_s=9"], "settings of their own"),
    ("serve", ["backend=vllm", URLS, "backend.launcher=ray"], "settings of their own"),
    ("serve", ["backend=vllm", URLS, "backend.placement=pack"], "settings of their own"),
    ("serve", ["backend=emulated", "backend.placement=pack"], "take backend.launcher=ray"),
    ("serve", ["backend=vllm", URLS, "model.hf_id=x"], "no server is started"),
    ("serve", ["backend=vllm", URLS, "scheduler=random", "cluster.gpu=h100"], "not its own"),
    (
        "serve",
        ["backend=vllm", URLS, "backend.latency_model=artifacts/latency/cpu-tiny.json", "cluster.gpu=h100"],
        "not its own",
    ),
    ("serve", ["backend=vllm_cpu", "cluster.gpu=h100"], "not its own"),
    (
        "serve",
        ["backend=vllm", "backend.latency_model=artifacts/latency/cpu-tiny.json", "backend.step_time_factor=2"],
        "one of the two",
    ),
    (
        "serve",
        ["backend=vllm", "backend.latency_model=artifacts/latency/cpu-tiny.json", "backend.step_overhead_s=2"],
        "one of the two",
    ),
    ("serve", ["backend=vllm", "scheduler=random", "backend.step_time_factor=2"], "only forecasts"),
    (
        "serve",
        ["backend=vllm_cpu", "scheduler=random", "backend.latency_model=artifacts/latency/a30-llama2-7b.json"],
        "only forecasts",
    ),
    ("serve", ["engine.num_gpu_blocks=900", "engine.gpu_memory_utilization=0.8"], "one of the two"),
    ("serve", ["backend=vllm_cpu", "engine.gpu_memory_utilization=0.8"], "one of the two"),
    ("serve", ["engine.scheduler_reserve_full_isl=false"], "vllm_v1"),
    ("serve", ["backend=emulated", "engine.scheduler_reserve_full_isl=false"], "as they do by default"),
    ("serve", ["model.hf_id=mine/x"], "no server is started"),
    ("serve", ["cluster=mixed", "cluster.pools=[{gpu: h100, num_gpus: 4, tensor_parallel: 2}]", PARALLEL], "own"),
    ("serve", ["cluster.num_gpus=2", "backend.slowdown=[1,1,2]"], "more factors"),
    ("serve", ["scheduler=block_cache", "scheduler.kappa=1"], "engine=vllm_v1"),
    ("gateway", ["scheduler=round_robin", "gateway.tokenizer=x"], "looks at no prompts"),
    ("serve", ["scheduler=block", *UNCACHED, "dispatch.prefixes=sent"], "engine=vllm_v1"),
    ("serve", ["scheduler=round_robin", *CACHING, "dispatch.prefixes=sent"], "a policy that does"),
    ("gateway", ["scheduler=cache_aware", "dispatch.prefixes=sent"], "does not ask what is cached"),
    # what other commands read
    ("serve", ["capacity.seeds=2"], "scripts/capacity.py"),
    ("serve", ["capacity.slo_s=[3]"], "scripts/capacity.py"),
    ("serve", ["capacity={low: 3}"], "scripts/capacity.py"),
    ("serve", ["capacity.fresh=true"], "scripts/capacity.py"),
    ("serve", ["gateway.port=80"], "block.gateway"),
    ("serve", ["gateway.urls=[http://h:1]"], "block.gateway"),
    ("serve", ["estimation.data=sharegpt_text"], "train_lengths.py"),
    ("serve", ["estimation.scores=x.json"], "evaluate_lengths"),
    ("serve", ["objective=e2e_mean_s"], "sweeper"),
    ("evaluate_lengths", ["scheduler=random"], "run.py"),
    ("evaluate_lengths", ["workload.qps=3"], "run.py"),
    ("evaluate_lengths", ["workload=azure_conv"], "run.py"),
    ("evaluate_lengths", ["model=qwen2-7b"], "run.py"),
    ("evaluate_lengths", ["runs_dir=x"], "run.py"),
    ("evaluate_lengths", ["seed=3"], "run.py"),
    ("evaluate_lengths", ["lengths=compact"], "train_lengths.py"),
    ("evaluate_lengths", ["estimation.data=x.json"], "train_lengths.py"),
    ("evaluate_lengths", ["estimation.epochs=2"], "train_lengths.py"),
    ("evaluate_lengths", ["tracking.project=x"], "run.py"),
    ("capacity", ["workload.qps=6"], "capacity.low"),
    ("capacity", ["replay_share=0.5"], "run.py"),
    ("capacity", ["sample_every_s=5"], "run.py"),
    ("capacity", ["runs_dir=x"], "run.py"),
    ("capacity", ["command=evaluate_lengths"], "run.py"),
    ("capacity", ["tracking.project=x"], "not mirrored"),
    ("capacity", ["objective=e2e_mean_s"], "sweeper"),
    ("capacity", ["gateway.port=80"], "block.gateway"),
    ("capacity", ["estimation.epochs=2"], "train_lengths.py"),
    ("capacity", ["scheduler=random", "dispatch.ledger=false"], "only counts"),
    ("gateway", ["workload.qps=3"], "run.py"),
    ("gateway", ["workload=azure_conv"], "run.py"),
    ("gateway", ["engine.max_num_seqs=24"], "run.py"),
    ("gateway", ["engine=vllm_v1"], "run.py"),
    ("gateway", ["migration=llumnix"], "run.py"),
    ("gateway", ["provisioner=relief"], "run.py"),
    ("gateway", ["tracking=none", "runs_dir=x"], "run.py"),
    ("gateway", ["replay_share=0.1"], "run.py"),
    ("gateway", ["capacity.seeds=1"], "capacity.py"),
    ("gateway", ["scheduler=least_requests", "model=qwen2-7b"], "only forecasts"),
    ("gateway", ["scheduler=least_requests", "cluster.gpu=h100"], "only forecasts"),
    ("gateway", ["scheduler=round_robin", "backend.step_time_factor=2"], "only forecasts"),
    ("gateway", ["scheduler=random", "dispatch.ledger=false"], "only counts"),
    ("gateway", ["scheduler=random", "lengths=compact"], "does not look at lengths"),
    ("gateway", ["scheduler=block", "lengths=noisy"], "reads no prompts"),
    ("gateway", ["backend=vllm", URLS], "gateway.urls"),
    ("gateway", ["cluster.num_gpus=2"], "gateway.urls"),
    ("gateway", ["backend.dispatch_delay_s=1"], "gateway.urls"),
    ("gateway", ["backend.step_noise=0"], "gateway.urls"),
    ("gateway", ["scheduler=block", "backend=vllm", "backend.shared_memory=false"], "wherever it can"),
    ("gateway", ["backend=vllm", "backend.launcher=ray"], "gateway.urls"),
    ("gateway", ["backend=vllm", "backend.placement=pack"], "gateway.urls"),
    ("train_lengths", ["scheduler=random"], "run.py"),
    ("train_lengths", ["lengths=compact", "lengths.outrun_share=0.4"], "for runs"),
    ("train_lengths", ["estimation.data_sets=[x.json]"], "evaluate_lengths"),
    ("train_lengths", ["estimation.scores=x.json"], "evaluate_lengths"),
]  # fmt: skip

WORKING: list[tuple[str, list[str]]] = [
    ("serve", ["scheduler=least_tokens", "lengths=noisy", "dispatch.ledger=false", "dispatch.snapshot_interval_s=1"]),
    ("serve", ["scheduler=infaas", "dispatch.snapshot_interval_s=1"]),
    ("serve", ["scheduler=llmd", *CACHING, "dispatch.prefixes=sent"]),
    ("serve", ["scheduler=block_cache", "scheduler.kappa=1", *CACHING, "backend=emulated", "dispatch.prefixes=sent"]),
    ("serve", ["scheduler=block_cache", "engine=vllm_v1", "engine.enable_prefix_caching=true", "scheduler.gamma=1"]),
    ("serve", ["scheduler=block", "dispatch.correction_steps=9", "dispatch.forecast_noise=0.1", "lengths=injected"]),
    ("serve", ["scheduler=random", "lengths=oracle", "migration=none", "provisioner=static", "dispatch.ledger=true"]),
    ("serve", ["scheduler=random", "dispatch.dispatchers=2", "replay_share=0.1", "sample_every_s=3", "runs_dir=x"]),
    ("serve", ["scheduler=block", "migration=llumnix", "migration.bandwidth=9"]),
    ("serve", ["migration.interval_s=1", "migration.max_stages=2"]),
    ("serve", ["tracking.project=mine", "tracking.tags=[a]"]),
    ("serve", ["tracking=none", "tracking.mode=offline", "tracking.project=mine"]),
    ("serve", ["provisioner=relief", "provisioner.drain_after_s=9", "provisioner.drain_ttft_s=2"]),
    ("serve", ["backend=vllm", "backend.arguments=[--x]", "model.hf_id=x", "engine.max_num_seqs=9"]),
    ("serve", ["backend=vllm", URLS, "backend.step_time_factor=2", "cluster.gpu=h100", "model=qwen2-7b"]),
    ("serve", ["backend=vllm_cpu", "backend.at_once=1", "engine.num_gpu_blocks=512"]),
    ("serve", ["backend=vllm", URLS, "backend.shared_memory=false"]),
    ("serve", ["backend=emulated", "backend.time_dilation=3", "backend.step_overhead_s=0", "cluster.gpu=h100"]),
    ("serve", ["engine=vllm_v1", "engine.scheduler_reserve_full_isl=false", "engine.gpu_memory_utilization=0.8"]),
    ("serve", ["backend.slowdown=[1,2]", "cluster.num_gpus=2", "backend.predictor_gpu=t4"]),
    ("serve", ["scheduler=round_robin", "backend.slowdown=[2]", "backend.step_noise=0", "backend.dispatch_delay_s=0"]),
    ("serve", ["lengths=constant", "lengths.tokens=3"]),
    ("serve", ["lengths=roberta", "lengths.path=x", *PROMPTS, "lengths.device=cpu", "lengths.outrun_share=0.1"]),
    ("serve", ["experiment=robustness", "hydra.sweep.dir=x", "command=serve", "capacity.seeds=3", "gateway.port=8080"]),
    ("evaluate_lengths", ["command=evaluate_lengths", "estimation.test=9", "estimation.scores=x", "tracking=none"]),
    ("capacity", ["capacity.seeds=1", "capacity.slo_s=[3]", "tracking=none", "seed=3", "workload.qps=30"]),
    ("gateway", ["scheduler=block", "model=qwen2-7b", "cluster.gpu=h100", "backend.step_time_factor=2", "seed=1"]),
    ("gateway", ["scheduler=block", "lengths=compact", "lengths.outrun_share=0.5", "dispatch.correction_steps=3"]),
    ("gateway", ["backend=vllm", "backend.latency_model=artifacts/latency/cpu-tiny.json", "seed=3", "tracking=none"]),
    ("gateway", ["scheduler=block_cache", "scheduler.others=1", "dispatch.prefixes=sent", "gateway.tokenizer=x"]),
    ("gateway", ["scheduler=cache_aware", "gateway.tokenizer=x", "gateway.tokenize_timeout_s=1"]),
    ("train_lengths", ["lengths=roberta", "lengths.encoder=x", "estimation.epochs=1", "seed=2", "tracking=none"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "overrides", "why"), IDLE, ids=[f"{one[0]} {' '.join(one[1])}" for one in IDLE])
def test_a_key_without_effect_is_named_with_the_reason(name: str, overrides: list[str], why: str) -> None:
    found = without_effect(composed(*overrides), overrides, name)
    (line,) = found.values()
    key, _, value = overrides[-1].partition("=")
    assert line.startswith(f"{overrides[-1] if '{' not in value[:1] else key}")
    assert ": has no effect: " in line
    assert why in line
    assert "\n" not in line


@pytest.mark.parametrize(("name", "overrides"), WORKING, ids=[f"{one[0]} {' '.join(one[1])}" for one in WORKING])
def test_keys_with_an_effect_pass(name: str, overrides: list[str]) -> None:
    assert without_effect(composed(*overrides), overrides, name) == {}


# -------------------------------------------------------------------------------------------------------- every key

# Keys of runs that have an effect whatever the others are, or are looked after where they belong (workload).
ALWAYS = {
    *("scheduler.aim", "engine.enable_prefix_caching"),
    *("scheduler.cache_threshold", "scheduler.balance_abs_threshold", "scheduler.balance_rel_threshold"),
    *("scheduler.prefix", "scheduler.kv", "scheduler.queue", "scheduler.overlap_weight", "scheduler.temperature"),
    *("scheduler.imbalance", "scheduler.load_factor", "scheduler.window", "scheduler.decode_cost"),
    *("scheduler.tokens", "scheduler.points"),
    *("scheduler.k", "scheduler.block_size", "cluster.pools", "backend.urls", "backend.at_once", "backend.auto"),
    *("backend.step_noise", "backend.dispatch_delay_s", "backend.time_dilation", "backend.stream_interval"),
    "backend.shared_memory",
    *("model.name", "model.layers", "model.hidden_size", "model.intermediate_size", "model.heads", "model.kv_heads"),
    *("model.kv_dtype_bytes", "model.experts", "model.experts_per_token", "model.expert_size", "model.shared_size"),
    *("model.dense_layers", "model.kv_lora_rank", "model.q_lora_rank", "model.qk_rope_head_dim"),
    *(
        "model.qk_nope_head_dim",
        "model.v_head_dim",
    ),  # of one kind of model: together or not at all (block.hardware.catalogue)
    *("engine.version", "engine.max_num_seqs", "engine.max_num_batched_tokens", "engine.max_model_len"),
    *("engine.block_size", "engine.watermark", "engine.num_gpu_blocks", "engine.async_scheduling"),
    *("engine.long_prefill_token_threshold", "engine.enable_chunked_prefill"),
    *("model.head_dim", "model.vocab_size", "model.gated_mlp", "model.tied_embeddings", "model.dtype_bytes"),
    *("lengths.path", "dispatch.dispatchers", "tracking.mode", "command"),
    *("provisioner.threshold_s", "provisioner.initial", "provisioner.startup_s", "provisioner.cooldown_s"),
    *("provisioner.drain_after_s", "seed", "sample_every_s", "replay_share", "runs_dir"),
}


def leaves(node: DictConfig, prefix: str = "") -> set[str]:
    """The keys of a config that hold values."""
    found = set()
    for name in map(str, node):
        value = node._get_node(name)
        if isinstance(value, DictConfig) and f"{prefix}{name}" != "backend.auto":
            found |= leaves(value, f"{prefix}{name}.")
        elif name[0] != "_":
            found.add(f"{prefix}{name}")
    return found


def test_of_every_key_of_every_choice_it_is_said_when_it_has_an_effect() -> None:
    """A new key must be put into READ and, here or in RULES, be thought through."""
    classes = [(path.partition("/")[0], cls) for path, cls in hydra_schema.schemas().items()]
    keys = leaves(composed()) | {f"{group}.{field.name}" for group, cls in classes for field in fields(cls)}
    keys = {key for key in keys if not key.startswith("workload.")}
    every = [pattern for rule in RULES for pattern in rule.keys]
    patterns = [one for rule in RULES if "serve" in rule.of for one in rule.keys if one != "engine.*"]
    ruled = {key for key in keys if any(fnmatchcase(key, pattern) for pattern in patterns)}
    read = {key for key in keys if any(f"{key}.".startswith(f"{one}.") for one in READ["serve"])}
    assert read == (ruled & read) | ALWAYS
    assert keys - read == {key for key in keys if key.partition(".")[0] in ("capacity", "gateway", "estimation")} | {
        "objective"
    }
    others = {one for name, all_read in READ.items() if name != "serve" for one in all_read}
    assert all(any(f"{key}.".startswith(f"{one}.") for one in others) for key in keys - read - {"objective"})
    assert all(any(fnmatchcase(key, pattern) or key.startswith(f"{pattern}.") for key in keys) for pattern in every)


# ------------------------------------------------------------------------------------------------------------- sweeps


def refused(*overrides: str, command: str = "serve") -> str | None:
    """What is said of a sweep over all combinations of values given as "key=a|b"."""
    split = [
        [f"{key}={value}" for value in values.split("|")] for key, _, values in (o.partition("=") for o in overrides)
    ]
    jobs = ((composed(*job), list(job)) for job in itertools.product(*split))
    try:
        refuse_in_all(jobs, command)
    except ConfigError as error:
        return str(error)
    return None


def test_a_sweep_may_have_keys_that_only_some_of_its_jobs_use() -> None:
    assert refused("scheduler=random|block", "lengths=noisy", "dispatch.ledger=true|false") is None
    assert refused("scheduler=random|infaas|least_tokens", "lengths=noisy", "dispatch.snapshot_interval_s=1") is None
    assert refused("cluster.num_gpus=0|2", "backend.slowdown=[1,1]") is None  # the first cannot be built


def test_a_sweep_in_which_no_job_uses_a_key_is_refused() -> None:
    told = refused("scheduler=random|round_robin", "seed=1|2", "lengths=noisy")
    assert told is not None
    assert told.startswith("lengths=noisy: has no effect: ")
    assert told.endswith("(in none of the jobs)")
    assert str(refused("scheduler=random|infaas", "dispatch.ledger=false")).startswith("dispatch.ledger=false: has no")
    assert str(refused("capacity.seeds=1|2")).startswith("capacity.seeds=1: has no effect: not read by run.py")
    assert str(refused("tracking.project=x", command="capacity")).startswith("tracking.project=x: has no effect")


def test_the_commands_refuse_a_key_without_effect(tmp_path: Path) -> None:
    """A run, a sweep and a search, as they are typed."""
    for script, *arguments in (
        ("run.py", "scheduler=random", "lengths=noisy"),
        ("run.py", "-m", "scheduler=random,min_qpm", "seed=range(3)", "lengths=noisy"),
        ("run.py", "experiment=robustness", "scheduler=random", "backend.slowdown=[1]", "lengths=noisy"),
        ("scripts/capacity.py", "scheduler=random", "lengths=noisy"),
        ("scripts/capacity.py", "-m", "scheduler=random,min_qpm", "lengths=noisy"),
    ):
        done = command(script, *arguments, folder=tmp_path)
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: lengths=noisy: has no effect: ")
        assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    keys = [*TINY, "workload.num_requests=20", "scheduler=random,least_tokens", "lengths=noisy"]
    assert command("run.py", "-m", *keys, folder=tmp_path).returncode == 0


def test_gpus_that_are_left_over_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for gpus, told in ((7, "3 of 7 GPUs are idle, which model.tensor_parallel=4 does not divide"), (8, "")):
        run = config.build(composed("model=llama2-70b", "cluster=a100x8", f"cluster.num_gpus={gpus}"))
        announce(run.testbed, run.backend, Console(stderr=True))
        said = capsys.readouterr().err
        assert told in said
        assert ("idle" in said) == bool(told)
