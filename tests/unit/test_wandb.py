"""The W&B mirror: what it is given, with a recording stand-in for the wandb module; one real run of it, offline; and
servers of all moods, `wandb_server`.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from stored import CONFIG, record, store, warnings
from wandb_server import serving

from block.store import wandb_server
from block.store.results import runs
from block.store.wandb import Tracking, log_figures, log_run, logged
from block.store.writer import RunWriter

LOG_RUNS = Path(__file__).parents[2] / "scripts" / "log_runs.py"


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No credentials, no W&B settings, and a home of its own."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(home / "cache"))
    monkeypatch.delenv("BLOCK_WANDB_NOTE", raising=False)
    monkeypatch.setattr(wandb_server, "_trouble", None)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")
    monkeypatch.delenv("WANDB_ERROR_REPORTING")  # what is set meanwhile ends with the test
    return home


class Recorder(SimpleNamespace):
    """Stands in for the module `wandb` and for the run that it starts."""

    def __init__(self) -> None:
        super().__init__(
            logs=[], summary={}, inits=[], ended=0, plot=SimpleNamespace(line=lambda table, *_, **__: table)
        )

    def Settings(self, **settings):  # noqa: N802
        return settings

    def Table(self, columns, data=(), dtype=None):  # noqa: N802
        return SimpleNamespace(columns=columns, data=list(data))

    def init(self, **arguments):
        self.inits.append(arguments)
        self.dir = str(arguments["dir"] / "wandb" / "run-x" / "files")
        return self

    def define_metric(self, *_, **__):
        pass

    def log(self, row):
        self.logs.append(row)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ended += 1


@pytest.fixture
def wandb(monkeypatch):
    module = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


# ------------------------------------------------------------------------------------------------------------- mode


def test_without_a_key_auto_is_offline():
    assert Tracking().resolved_mode == "offline"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_with_a_key_auto_is_online(monkeypatch, name):
    monkeypatch.setenv(name, "x" * 40)
    assert Tracking().resolved_mode == "online"
    assert Tracking(mode="offline").resolved_mode == "offline"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert Tracking().resolved_mode == "offline"


def test_a_netrc_entry_of_the_server_is_a_key(monkeypatch, nobody):
    (nobody / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert Tracking().resolved_mode == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert Tracking().resolved_mode == "offline"
    (nobody / "netrc").write_text("machine wandb.example.org login user password secret\n")
    assert Tracking().resolved_mode == "online"
    (nobody / "netrc").write_text("no netrc at all")
    assert Tracking().resolved_mode == "offline"


def test_bad_settings_name_the_choices():
    with pytest.raises(
        ValueError, match=r"tracking.mode='on': did you mean online\? choose from auto, online, offline, disabled"
    ):
        Tracking(mode="on")
    with pytest.raises(ValueError, match=r"tracking.table_rows=-1: must be 0 or more"):
        Tracking(table_rows=-1)


# ---------------------------------------------------------------------------------------------------------- logging


def test_disabled_touches_nothing(tmp_path, wandb):
    path = store(tmp_path / "runs")
    assert log_run(path, Tracking(mode="disabled")) is None
    assert wandb.inits == []
    assert not (path / "wandb").exists()


def test_a_run_is_logged_once(tmp_path, wandb):
    path = store(tmp_path / "runs", scheduler="block", experiment="main_sweep")
    assert logged(path) is None
    folder = log_run(path, Tracking(tags=["a"]))
    assert folder == logged(path) == path / "wandb" / "run-x"
    assert log_run(path, Tracking()) == folder
    (started,) = wandb.inits
    assert started["mode"] == "offline"
    assert started["id"] == path.name
    assert (started["group"], started["tags"]) == ("main_sweep", ("a",))
    assert started["config"]["workload"] == {"qps": 30, "shape": None}
    assert started["config"]["choices"] == {"scheduler": "block", "experiment": "main_sweep"}
    assert wandb.summary["e2e_mean_s"] == 3.0
    assert wandb.summary["sent"] == 3
    assert "dispatch_overhead_p99_s" not in wandb.summary  # not measured
    assert wandb.ended == 1


def test_the_request_table_is_whole_or_thinned(tmp_path, wandb):
    def rows(limit):
        log_run(store(tmp_path / "runs"), Tracking(table_rows=limit))
        return [log["requests"].data for log in wandb.logs if "requests" in log][-1:]

    assert rows(0) == []
    (table,) = rows(3)
    assert table[0] == [0, 0, 0.0, 0.0, 1.0, 2.0, 100, 11, 12, 0.5, 3.0, "ok", 0, 0, "", -1]
    assert table[2] == [2, -1, 2.0, 2.0, None, None, 100, 11, 12, None, None, "failed", 1, 0, "", -1]
    (table,) = rows(2)
    assert [row[0] for row in table] == [0, 2]


def test_charts_show_latency_and_load_over_time(tmp_path, wandb):
    # A request a second for 200 s, whose E2E is 1 s in the first half and 3 s in the second; 2 instances.
    records = [record(i, float(i), i + 0.5, i + (1.0 if i < 100 else 3.0)) for i in range(201)]
    load = {
        "time": [t for t in range(201) for _ in "ab"],
        "instance_id": [0, 1] * 201,
        "request_id": [0] * 402,
        "running": [n for t in range(201) for n in (t // 2, 7)],
    }
    with RunWriter(CONFIG, root=tmp_path) as writer:
        writer.store(records, [], load)
    log_run(writer.path, Tracking())
    rows = [log for log in wandb.logs if "time_s" in log]
    assert set(rows[0]) == {"time_s", "ttft_mean_s", "e2e_mean_s", "running/instance_0", "running/instance_1"}
    # 100 intervals of 2 s.
    assert [row["time_s"] for row in rows] == [2.0 * (i + 1) for i in range(100)]
    assert [row["e2e_mean_s"] for row in rows] == [1.0] * 50 + [3.0] * 50
    assert {row["ttft_mean_s"] for row in rows} == {0.5}
    # The last interval also holds the instant at which it ends.
    assert [row["running/instance_0"] for row in rows] == [*range(99), pytest.approx((99 + 99 + 100) / 3)]
    assert {row["running/instance_1"] for row in rows} == {7.0}
    (cdf,) = [log["e2e_cdf"] for log in wandb.logs if "e2e_cdf" in log]
    shares = dict(reversed(row) for row in cdf.data)
    assert (shares[0.0], shares[0.25], shares[0.75], shares[1.0]) == (1.0, 1.0, 3.0, 3.0)


def test_a_run_with_nothing_in_it_is_logged(tmp_path, wandb):
    with RunWriter({}, root=tmp_path) as writer:
        writer.store([], [], {})
    assert log_run(writer.path, Tracking()) is not None
    assert wandb.logs == []


def test_a_failed_run_is_logged_without_tables(tmp_path, wandb):
    with pytest.raises(ValueError, match="boom"), RunWriter({}, root=tmp_path) as writer:
        raise ValueError("boom")
    assert log_run(writer.path, Tracking()) is not None
    assert (wandb.logs, wandb.summary) == ([], {"status": "failed"})


def test_what_w_and_b_raises_is_one_warning(tmp_path, wandb, caplog):
    def init(**_):
        raise TimeoutError("no answer")

    wandb.init = init
    path = store(tmp_path / "runs")
    assert log_run(path, Tracking()) is None
    (warning,) = warnings(caplog)
    assert warning.getMessage() == f"W&B: {path} is stored but was not logged: TimeoutError: no answer"
    assert [run.path for run in runs(root=tmp_path / "runs")] == [path]
    assert logged(path) is None
    del wandb.init  # the next attempt works
    assert log_run(path, Tracking()) is not None


def test_what_is_no_run_is_not_logged(tmp_path, wandb, caplog):
    assert log_run(tmp_path / "absent", Tracking()) is None
    assert "skipped" in caplog.text
    assert wandb.inits == []


def test_a_marker_that_cannot_be_read_counts_as_absent(tmp_path):
    path = store(tmp_path / "runs")
    (path / "wandb").mkdir()
    (path / "wandb" / "logged.json").write_text("[]")
    assert logged(path) is None


@pytest.mark.slow
def test_the_real_wandb_offline(tmp_path, nobody, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.chdir(tmp_path)
    path = store(Path("runs"), scheduler="block")
    folder = log_run(path, Tracking())
    assert folder is not None
    assert folder.parent == path / "wandb"
    assert folder.name.startswith("offline-run-")
    (mirror,) = folder.glob("*.wandb")
    assert b"e2e_p99_s" in mirror.read_bytes()
    (table,) = folder.glob("files/media/table/requests_*.table.json")
    stored = json.loads(table.read_text())
    assert stored["columns"][0] == "request_id"
    assert [row[stored["columns"].index("finished")] for row in stored["data"]] == [2.0, 5.0, None]
    assert len(list(folder.glob("files/media/table/*_cdf*"))) == 2
    # All of it lies within the run's folder.
    assert not list(nobody.rglob("*.table.json")) + list(nobody.rglob("staging"))


# -------------------------------------------------------------------------------------------------------- the server

KEY = "0123456789" * 4


@contextmanager
def server(mood, monkeypatch):
    """W&B's server in a mood, and a key for it; its address."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serving("ok" if mood == "unreachable" else mood) as one:
        url = one.url
        if mood == "unreachable":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                url = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        yield url


REASONS = {
    "unreachable": "cannot be reached: [Errno 111] Connection refused",
    "401": "does not accept the API key: correct WANDB_API_KEY (or netrc)",
    "500": "answers 500 Internal Server Error",
    "hang": "does not answer within 0.5 s",
}


@pytest.mark.parametrize("mood", REASONS)
def test_what_cannot_go_online_is_logged_offline_and_said_once(mood, tmp_path, wandb, caplog, monkeypatch):
    monkeypatch.setattr(wandb_server, "PATIENCE_S", 0.5)
    paths = [store(tmp_path / "runs") for _ in range(3)]
    with server(mood, monkeypatch) as url:
        for path in paths:
            assert log_run(path, Tracking()) == path / "wandb" / "run-x"
    assert [started["mode"] for started in wandb.inits] == ["offline"] * 3
    (warning,) = warnings(caplog)
    told = f"W&B: {url} {REASONS[mood]}; runs are logged offline, in their folders. Later: python scripts/log_runs.py"
    assert warning.getMessage() == told
    assert logged(paths[0]) is not None
    assert logged(paths[0], "online") is None


def test_what_w_and_b_itself_cannot_do_online_is_logged_offline(tmp_path, wandb, caplog, monkeypatch):
    class CommError(Exception):
        __module__ = "wandb.errors.errors"

    start, modes = wandb.init, []

    def init(**arguments):
        modes.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise CommError("too slow")
        return start(**arguments)

    wandb.init = init
    with server("ok", monkeypatch):
        for _ in range(2):
            assert log_run(store(tmp_path / "runs"), Tracking()) is not None
    assert modes == ["online", "offline", "offline"]
    (warning,) = warnings(caplog)
    assert warning.getMessage().startswith("W&B: CommError: too slow; runs are logged offline")


def test_processes_that_share_their_trouble_say_it_once(tmp_path, wandb, caplog, monkeypatch):
    monkeypatch.setenv("BLOCK_WANDB_NOTE", "")
    wandb_server.share_trouble(tmp_path / "note")
    with server("500", monkeypatch):
        log_run(store(tmp_path / "runs"), Tracking())
        for _ in range(2):
            monkeypatch.setattr(wandb_server, "_trouble", None)  # as another process begins
            log_run(store(tmp_path / "runs"), Tracking())
    assert [started["mode"] for started in wandb.inits] == ["offline"] * 3
    assert len(warnings(caplog)) == 1


def test_a_run_that_lies_offline_goes_online_once_it_can(tmp_path, wandb, monkeypatch):
    path = store(tmp_path / "runs")
    assert log_run(path, Tracking()) is not None
    with server("ok", monkeypatch):
        assert logged(path, "online") is None
        for _ in range(2):
            assert log_run(path, Tracking()) is not None
        assert logged(path, "online") is not None
    assert [started["mode"] for started in wandb.inits] == ["offline", "online"]
    synced = log_run(store(tmp_path / "more"), Tracking(mode="offline"))
    synced.mkdir(parents=True)
    (synced / "run-x.wandb.synced").touch()  # as `wandb sync` leaves it
    assert logged(synced.parents[1], "online") == synced


def script(*arguments):
    """The script with the real wandb, in a process of its own, which takes wandb's along at its end."""
    command = [sys.executable, str(LOG_RUNS), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)


@pytest.mark.slow
def test_a_run_is_really_logged_online(tmp_path, monkeypatch):
    path = store(tmp_path / "runs", scheduler="block")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with serving("ok") as one:
        monkeypatch.setenv("WANDB_BASE_URL", one.url)
        done = script("--root", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "logged 1 of 1; 0 were logged before"
    assert logged(path, "online") is not None
    assert one.complete == {path.name}
    assert one.config[path.name]["workload"]["value"] == {"qps": 30, "shape": None}
    assert one.config[path.name]["choices"]["value"] == {"scheduler": "block"}
    assert one.summary[path.name]["e2e_mean_s"] == 3.0
    assert one.summary[path.name]["sent"] == 3
    assert one.rows[path.name] > 3
    (table,) = [body for name, body in one.files.items() if "media/table/requests_" in name]
    assert json.loads(table)["columns"][0] == "request_id"


@pytest.mark.slow
def test_a_server_that_hangs_is_asked_one_thing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    small = ["scheduler=random", "workload.num_requests=20"]
    with serving("hang") as one:
        monkeypatch.setenv("WANDB_BASE_URL", one.url)
        command = [sys.executable, str(LOG_RUNS.parents[1] / "run.py"), *small]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert f"W&B: {one.url} does not answer within 4 s; runs are logged offline" in done.stderr
    assert "/wandb/offline-run-" in done.stdout
    assert one.asked == ["/graphql"]


@pytest.mark.slow
def test_a_sweep_without_its_server_says_so_once_and_logs_offline(tmp_path, monkeypatch):
    run = LOG_RUNS.parents[1] / "run.py"
    small = ["scheduler=random", "workload.num_requests=20", "workload.qps=4,5,6", "hydra/launcher=joblib"]
    with server("unreachable", monkeypatch) as url:
        command = [sys.executable, str(run), "-m", *small, "hydra.launcher.n_jobs=2"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    told = f"W&B: {url} cannot be reached: [Errno 111] Connection refused; runs are logged offline, in their folders."
    assert done.stderr == f"{told} Later: python scripts/log_runs.py\n"
    assert len(done.stdout.splitlines()) == 3
    paths = [run.path for run in runs(root=tmp_path / "artifacts" / "runs")]
    assert [logged(path).name.startswith("offline-run-") for path in paths] == [True] * 3
    with serving("ok") as one:
        monkeypatch.setenv("WANDB_BASE_URL", one.url)
        assert script("--root", tmp_path / "artifacts" / "runs").returncode == 0
    assert one.complete == {path.name for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("mood", ["unreachable", "401"])
def test_the_script_logs_nothing_where_the_server_cannot_be_had(mood, tmp_path, monkeypatch):
    path = store(tmp_path / "runs")
    with server(mood, monkeypatch) as url:
        done = script("--root", tmp_path / "runs")
        assert done.returncode == 1
        assert done.stdout == "logged 0 of 1; 0 were logged before\n"
        told = f"error: W&B: {url} {REASONS[mood]}; nothing more was logged: try again, or --mode offline\n"
        assert done.stderr == told
        assert logged(path) is None
        assert script("--root", tmp_path / "runs", "--mode", "offline").returncode == 0
    assert logged(path) is not None


# -------------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def main():
    return runpy.run_path(str(LOG_RUNS))["main"]


def test_logs_what_matches_once(tmp_path, wandb, main, capsys):
    root = str(tmp_path / "runs")
    first = store(tmp_path / "runs", {"workload": {"qps": 20}}, scheduler="block")
    store(tmp_path / "runs", {"workload": {"qps": 30}}, scheduler="block")
    third = store(tmp_path / "runs", {"workload": {"qps": 20}}, scheduler="random")
    assert main(["--root", root, "scheduler=block,random", "workload.qps=20"]) == 0
    assert [started["id"] for started in wandb.inits] == [first.name, third.name]
    assert capsys.readouterr().out.splitlines()[-1] == "logged 2 of 2; 0 were logged before"
    assert main(["--root", root, "--group", "mine"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "logged 1 of 1; 2 were logged before"
    assert wandb.inits[-1]["group"] == "mine"


def test_a_refusal_of_w_and_b_is_the_exit_status(tmp_path, wandb, main, capsys):
    store(tmp_path / "runs")
    wandb.init = None
    assert main(["--root", str(tmp_path / "runs")]) == 1
    assert capsys.readouterr().out == "logged 0 of 1; 0 were logged before\n"


@pytest.mark.parametrize("argument", ["scheduler", "=block"])
def test_a_condition_needs_a_key_and_a_value(main, capsys, argument):
    with pytest.raises(SystemExit):
        main([argument])
    assert f"{argument!r} is not of the form key=value" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- figures


@pytest.fixture
def figures(tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("fig6.png", "fig6.csv", "fig6.pdf", "summary.md", ".stamps.json"):
        (folder / name).write_bytes(b"x")
    return folder


def test_figures_are_one_run_of_the_group_with_an_artifact(wandb, figures):
    files = []
    wandb.Artifact = lambda name, type: SimpleNamespace(name=name, add_file=lambda path: files.append(Path(path).name))
    wandb.Image = lambda path: Path(path).name
    wandb.log_artifact = lambda artifact: files.append(artifact.name)
    folder = log_figures(figures, Tracking(group="reproduce", tags=("simulated",)))
    assert folder == figures / "wandb" / "run-x"
    (arguments,) = wandb.inits
    assert (arguments["group"], arguments["job_type"], arguments["tags"]) == ("reproduce", "figures", ("simulated",))
    assert files == ["fig6.csv", "fig6.pdf", "fig6.png", "summary.md", "figures"]
    assert wandb.logs == [{"fig6": "fig6.png"}]
    assert wandb.ended == 1


def test_figures_that_wandb_refuses_are_a_warning(wandb, figures, caplog):
    def refuse(**_):
        raise OSError("no space")

    wandb.init = refuse
    assert log_figures(figures, Tracking()) is None
    assert "the figures were not logged: OSError: no space" in caplog.text
    assert log_figures(figures, Tracking(mode="disabled")) is None
