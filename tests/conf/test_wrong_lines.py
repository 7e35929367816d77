"""Command lines as a careless user types them: each is answered in one line that names what is wrong, with exit code 2.

A line is typed as in a shell. The answer must hold the key of the last argument, or what stands behind the arrow.
"""

from __future__ import annotations

import runpy
import shlex
import sys
from pathlib import Path

import pytest
from commands import ROOT

LINES: dict[str, str] = {
    "run.py": r"""
        qps=3 → did you mean workload.qps?
        --freshh
        --config-dir
        --config-dir nowhere
        --config-dir nowhere scheduler=block → --config-dir=
        -cn
        -cn nope
        --config-name=nope scheduler=block → --config-name=nope
        --config-path nowhere → --config-path
        -cp nowhere → --config-path
        --cfg
        --cfg nope
        --info nope
        --package
        --resolve
        -x
        --multirun=3
        -m seed=range(0,0) → no values to sweep over
        -m seed=choice()
        -m scheduler=glob(zzz*)
        -m seed=range(0,3,0)
        -m seed=range(3,0)
        -m seed=range(a,b)
        -m seed=1, workload.num_requests=10 → seed=1,
        -m seed=,1
        -m workload.qps=interval(1,2)
        -m hydra/launcher=slurm seed=1,2 → hydra/launcher=slurm
        -m hydra.launcher.n_jobs=x hydra/launcher=joblib seed=1,2 → hydra.launcher.n_jobs=x: wants an integer
        -m hydra/sweeper=optuna seed=1,2 → hydra/sweeper=optuna
        -m hydra.sweep.dir=/proc/x seed=1,2 → hydra.sweep.dir=/proc/x
        -m hydra.sweep.dir=/dev/null/x seed=1,2 → hydra.sweep.dir=/dev/null/x
        hydra.run.dir=/proc/x scheduler=random → error: /proc/x
        hydra.mode=NOPE
        hydra.mode=MULTIRUN seed=range(0,0)
        hydra.nope=1
        hydra/nope=1
        hydra.job_logging=3
        hydra/job_logging=nope
        hydra.searchpath=[nowhere]
        hydra.searchpath=[file://nowhere]
        hydra.searchpath=nowhere
        hydra.callbacks.x._target_=nope.Nope
        scheduler=llumnix_minus scheduler.block_size=0
        scheduler=llumnix scheduler.block_size=0
        cluster.num_gpus=9999999
        cluster.num_gpus=99999999999999999999
        engine.max_num_seqs=99999999999999999999
        scheduler=block lengths=constant lengths.tokens=99999999999999999999
        dispatch.dispatchers=10001
        workload.qps=1e-308
        workload=synthetic workload.prompt_cv=1e308
        backend=simulated backend.step_overhead_s=1e308
        migration=llumnix migration.interval_s=1e-308
        scheduler=null
        model=3
        =3
        ==
        =
        seed
        seed = 3 → =: not of the form
        seed= 3
        seed 3 → seed: not of the form
        --seed 3 → --seed
        --seed=3
        -seed=3
        seed=3 seed=4x
        seed:3
        scheduler:block
        scheduler/block
        workload.qps:3
        '{"seed":3}'
        seed=1.5
        seed=true
        workload.qps=3,5
        workload.qps=0
        workload.qps=inf
        workload.qps=-inf
        workload.qps=1e999
        workload.qps=3qps
        workload.qps=30/s
        workload.qps=3.0.0
        workload.num_requests=1e4
        workload.num_requests=10k
        workload.num_requests=-5
        workload.num_requests=null
        seed=99999999999999999999999 scheduler=nope
        seed=-0x1
        runs_dir=/proc/x workload.num_requests=10 scheduler=random tracking=none → runs_dir=/proc/x
        runs_dir=/dev/null/x workload.num_requests=10 scheduler=random tracking=none → runs_dir=/dev/null/x
        runs_dir='' scheduler=nope
        runs_dir=null
        command=
        command=null
        command=[serve]
        objective=foo
        objective=[e2e_mean_s,foo]
        objective=3
        objective={a:1}
        dispatch=null
        dispatch=3
        dispatch=block
        dispatch={ledgr:true}
        scheduler={k:0}
        scheduler.k=0
        scheduler.k=[1]
        ++scheduler.kk=3
        +qps=3
        ~qps
        ~workload.qps
        ~scheduler.k
        ~scheduler
        ~
        +
        +=
        ++scheduler=block
        +experiment=main_sweep
        scheduler@foo=block
        scheduler@scheduler=block
        workload@workload=nope
        experiment=
        experiment=main_sweep,scale
        experiment=main
        scheduler=block.yaml → without .yaml
        scheduler=conf/scheduler/block
        scheduler=../scheduler/blok
        scheduler=Block
        scheduler=BLOCK → did you mean block?
        scheduler=block*
        scheduler=block-star
        model=Llama-2-7b
        model=meta-llama/Llama-2-7b-hf
        model=llama9-8b
        cluster=8xA100
        cluster.gpu=A100
        cluster.gpu=null
        cluster.gpu=''
        cluster.gpu=.yaml
        cluster.num_gpus=1.0
        cluster.num_gpus=-1
        gpu=h100 → did you mean cluster.gpu?
        gpus=4
        num_gpus=4
        k=3
        requests=100
        name=x → did you mean model.name or workload.name?
        batch_size=3
        max_num_seqs=3
        port=80
        slo_s=[3]
        workload.gpu=3
        scheduler.num_requests=3
        workload/qps=3 → workload.qps=3
        workload.trace_path=a=b.csv
        workload.trace_path=é.csv
        "workload.trace_path=it's.csv"
        'workload.trace_path=a"b.csv'
        workload.trace_path=~/x.csv → type 'workload.trace_path="~/x.csv"'
        'workload.trace_path=a(1).csv'
        'workload.trace_path=a{1}.csv'
        'workload.trace_path=a[1].csv'
        'workload.trace_path=[a.csv'
        'workload.trace_path=${x}'
        'workload.trace_path=${oc.env:NOPE_X}'
        'workload.trace_path=${nope:1}'
        'workload.trace_path=${'
        'workload.trace_path=a#b'
        'workload.trace_path=a;b'
        'workload.trace_path=a&b'
        'workload.trace_path=a!b'
        'workload.trace_path=a,b.csv'
        'workload.trace_path="a'
        'runs_dir=${runs_dir}' → Recursive interpolation
        'runs_dir=${seed'
        'seed=${workload.name}'
        'seed=${seed}'
        'workload.qps=${seed}'
        scheduler._target_=os.system
        scheduler._target_=block
        scheduler._target_=block.dispatch.policies
        scheduler._target_=.x
        scheduler._target_=x.
        scheduler._target_=null
        scheduler._target_=3
        scheduler._target_=[a]
        workload._target_=block.dispatch.policies.Block → workload.name: no such key
        scheduler._target_=block.hardware.catalogue.Model → scheduler.k: no such key
        +scheduler._args_=[1]
        +scheduler._partial_=true
        +scheduler._recursive_=nope
        +foo._target_=os.system → foo: no such key
        backend=vllm backend.latency_model=missing.json → backend.latency_model=missing.json: No such file
        backend=vllm backend.urls=[h:1]
        backend=vllm backend.urls=http://h:1
        backend=nope
        backend.urls=[http://h:1]
        cluster=mixed cluster.pools=3
        cluster=mixed cluster.pools=[3]
        cluster=mixed 'cluster.pools=[{gpu: a30}]'
        cluster=mixed 'cluster.pools=[{gpu: a30, num_gpus: 0}]' → num_gpus=0
        cluster=mixed 'cluster.pools=[{gpu: a30, num_gpus: x}]'
        cluster=mixed 'cluster.pools=[{gpu: a30, num_gpus: 1, tensor_parallel: 3}]' → tensor_parallel=3
        cluster=mixed 'cluster.pools=[{gpu: a30, num_gpus: 1, tensor_parallel: 0}]'
        cluster=mixed 'cluster.pools=[{gpu: a30, num_gpus: 1, tensor_parallel: 2}]' → tensor_parallel=2
        tracking.tags=a
        tracking.table_rows=-1
        tracking=off
        tracking.mode=on
        experiment=length_estimation estimation.data_sets=[nope] → nope: no such file
        experiment=length_estimation estimation.estimators=[nope]
        experiment=length_estimation estimation.data_sets=gpteacher
        experiment=length_estimation estimation.scores=/proc/x/y.json
        experiment=length_estimation estimation.test=0
        experiment=length_estimation +colour=blue
        experiment=length_estimation scheduler=random
        -m scheduler=block.yaml,random
    """,
    "scripts/capacity.py": r"""
        capacity.high=nan
        capacity.seeds=1001
        capacity.slo_s=[0]
        capacity.slo_s=3
        capacity.slo_s=3,10
        capacity.seeds=0
        capacity.seeds=x
        capacity.metric=p99
        capacity.low=0
        capacity.low=50
        capacity.tolerance=0
        --freshh
        --seeds 3 → --seeds
        slo=3
        seeds=3 → did you mean seed or capacity.seeds?
        workload.qps=3
        -m seed=range(0,0) → no values to sweep over
        scheduler=random lengths=noisy
    """,
    "scripts/train_lengths.py": r"""
        lengths=oracle
        lengths=nope
        lengths=compact estimation.data=gone.json
        lengths=compact scheduler=random
        lengths=compact +colour=blue
        lengths=compact estimation.train=0
        lengths=roberta estimation.learning_rate=0
        --data x → --data
    """,
    "block.gateway": r"""
        gateway.urls=[]
        gateway.urls=http://h:1
        gateway.urls=[h:1]
        gateway.urls=[http://h:1,http://h:1]
        gateway.urls=[http://h:1] gateway.port=99999
        gateway.urls=[http://h:1] gateway.port=http
        gateway.urls=[http://h:1] scheduler=nope
        gateway.urls=[http://h:1] workload.qps=3
        gateway.urls=[http://h:1] dispatch.dispatchers=2
        urls=[http://h:1] → did you mean gateway.urls?
        --port 80 → --port
        --port=80
        gateway.urls=[http://h:1] gateway.hosst=x
    """,
    "scripts/reproduce.py": r"""
        fig99 → fig99: did you mean fig9? choose from headline, fig5, fig6
        --seeds 0
        --seeds 4 → --seeds=4: must be between 1 and 3
        --requests 0 → --requests=0: must be at least 1
        --requests x
        --requests
        --backend nope → invalid choice: 'nope'
        --backend emulated table2 → table2: needs --backend simulated
        --backend emulated fig6
        --outt x → --outt
        --out /proc/x
        --out /dev/null/x fig5 → --out=/dev/null/x
        seed=3
    """,
    "scripts/log_runs.py": r"""
        scheduler
        =block
        schedular=block
        --mode nope
        --root nowhere
        --nope
    """,
    "scripts/recover_runs.py": r"""
        nowhere
        --nope
        a b
    """,
    "scripts/profile_instance.py": r"""
        http://h:1 → --out
        http://h:1 --out nowhere/x.json
        http://h:1 --out x.json --seconds 0
        http://h:1 --out x.json --seconds x
    """,
    "scripts/fetch_data.py": r"""
        nope
        --nope
    """,
    "scripts/fit_latency.py": r"""
        --pair nope
        --data nowhere
        --nope
    """,
    "scripts/fit_workload.py": r"""
        --csv
        --nope
    """,
}
CASES = [
    (script, *(part.strip() for part in f"{line}→".split("→")[:2]))
    for script, text in LINES.items()
    for line in text.splitlines()
    if line.strip()
]


def last_key(arguments: list[str]) -> str:
    """The key of the last argument."""
    return (arguments or [""])[-1].partition("=")[0].lstrip("+~-")


def run(script: str) -> None:
    """A script by its path, or a package."""
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__")


@pytest.mark.parametrize(("script", "line", "names"), CASES, ids=[f"{script} {line}" for script, line, _ in CASES])
def test_a_wrong_line_is_answered_in_one_line(
    script: str,
    line: str,
    names: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = shlex.split(line)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # so that what the command sets ends with the test
    with pytest.raises(SystemExit) as ended:
        run(script)
    captured = capsys.readouterr()
    (told,) = captured.err.splitlines()
    assert told.startswith("error: ")
    assert (names or last_key(arguments)) in told
    assert (captured.out, ended.value.code) == ("", 2)
    assert list(tmp_path.iterdir()) == []


def test_at_least_200_different_lines_are_tried() -> None:
    assert len(set(CASES)) == len(CASES) >= 200
