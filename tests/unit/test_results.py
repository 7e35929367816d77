"""Stored runs: what goes in comes out, and whatever dies half-way is not a run."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored import CONFIG, DECISIONS, INSTANCES, RECORDS, store, warnings

from block.core.files import NotStored, check_writable, write_json, write_whole
from block.run.hydra_schema import Root
from block.store import provenance
from block.store import writer as writing
from block.store.results import KEYS, frame, read_run, runs
from block.store.writer import RunWriter, recover

# ------------------------------------------------------------------------------------------------------- round trip


def test_run_json_holds_what_the_run_was(tmp_path):
    path = store(tmp_path, scheduler="block", **{"hydra/launcher": "joblib"})
    document = json.loads((path / "run.json").read_text())
    assert document["status"] == "ok"
    assert document["schema_version"] == 1
    assert document["id"] == path.name
    assert document["config"] == {"seed": 1, "workload": {"qps": 30, "shape": None}, "threshold": ".inf"}
    assert document["choices"] == {"scheduler": "block"}
    assert document["counts"] == {"sent": 3, "ok": 2, "failed": 1, "fallback": 1, "preempted": 2, "failed_over": 0}
    # E2E 2 s and 4 s; TTFT 1 s and 2 s; the forecast of 3 s was off by half of the actual 2 s.
    expected = {"e2e_mean_s": 3.0, "ttft_p50_s": 1.5, "e2e_error_p50": 0.5, "preemptions": 2, "forecast_p50_us": 20.0}
    assert {key: document["summary"][key] for key in expected} == expected
    assert document["summary"]["wall_time_s"] == 0.25
    assert document["summary"]["dispatch_overhead_p99_s"] is None
    assert document["packages"]["numpy"] == np.__version__
    assert document["hardware"]["cores"] >= 1


def test_preemptions_that_nobody_told_are_null_and_so_is_their_sum(tmp_path):
    """Of a request that failed it does not matter that they are not known."""
    failed = replace(RECORDS[2], preemptions=None)
    unknown = replace(RECORDS[0], preemptions=None)
    for records, summed, preempted in (([*RECORDS[:2], failed], 2, 1), ([unknown, *RECORDS[1:]], None, None)):
        with RunWriter({}, root=tmp_path) as writer:
            writer.store(records, [], {}, snapshots=[{"by": "push", "age_p50_s": None}])
        run = read_run(writer.path)
        assert [None if np.isnan(one) else one for one in run.requests().preemptions] == [
            one.preemptions for one in records
        ]
        assert (run.summary["preemptions"], run.counts["preempted"]) == (summed, preempted)
        assert run.document["snapshots"] == [{"by": "push", "age_p50_s": None}]
        table = pq.read_table(writer.path / "requests.parquet")
        assert table.schema.field("preemptions").type == pa.int64()
        assert table.column("preemptions").null_count == 1


def test_tables_come_back_as_written(tmp_path):
    run = read_run(store(tmp_path))
    requests = run.requests()
    assert list(requests) == [
        "request_id",
        "instance_id",
        "arrival",
        "dispatched",
        "first_token",
        "finished",
        "prompt_tokens",
        "output_tokens",
        "predicted_output_tokens",
        "forecast_ttft",
        "forecast_e2e",
        "status",
        "preemptions",
        "retries",
        "error",
        "cached_tokens",
    ]
    assert requests["status"].tolist() == ["ok", "ok", "failed"]
    assert requests["finished"].tolist()[:2] == [2.0, 5.0]
    assert math.isnan(requests["finished"][2])
    assert requests["forecast_e2e"].isna().tolist() == [False, True, True]
    assert requests["predicted_output_tokens"].tolist() == [12, 12, 12]
    assert requests["instance_id"].tolist() == [0, 1, -1]
    decisions = run.decisions()
    assert [list(row) for row in decisions["candidates"]] == [[0, 1], [0, 1], []]
    assert [list(row) for row in decisions["scores"]] == [[1.5, 2.5], [4.0, 3.0], []]
    assert decisions["chosen"].tolist() == [0, 1, 1]
    assert decisions["time"].tolist() == [0.0, 1.0, 2.0]
    assert decisions["request_id"].tolist() == [0, 1, 2]
    assert decisions["fallback"].isna().tolist() == [True, True, False]
    assert decisions["fallback"][2] == "no forecast"
    instances = run.instances()
    assert instances["running"].tolist() == [1, 0, 2, 3]
    assert instances["active"].tolist() == [True, False, True, True]


def test_a_time_that_never_came_is_null(tmp_path):
    table = pq.read_table(store(tmp_path) / "requests.parquet")
    assert table["first_token"].null_count == 1
    assert table["arrival"].null_count == 0


def test_same_inputs_same_bytes(tmp_path):
    first, second = store(tmp_path), store(tmp_path)
    for name in ("requests.parquet", "decisions.parquet", "instances.parquet"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_an_empty_run_is_a_run(tmp_path):
    with RunWriter({}, root=tmp_path) as writer:
        writer.store([], [], {})
    run = read_run(writer.path)
    assert run.counts == {"sent": 0, "ok": 0, "failed": 0, "fallback": 0, "preempted": 0, "failed_over": 0}
    assert run.summary["e2e_p99_s"] is None
    assert len(run.requests()) == len(run.decisions()) == 0


def test_config_values_that_json_lacks(tmp_path):
    class Colour(Enum):
        RED = 1

    config = {"path": Path("a/b"), "n": np.int64(3), "xs": (1, 2.5), "colour": Colour.RED, "none": float("nan")}
    run = read_run(store(tmp_path, {**config, "low": -math.inf}))
    assert run.config == {
        "path": "a/b",
        "n": 3,
        "xs": [1, 2.5],
        "colour": "RED",
        "none": ".nan",
        "low": "-.inf",
    }


def test_uneven_columns_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="column 'b' has 2 rows, the others 1"), RunWriter({}, root=tmp_path) as writer:
        writer.store([], [], {"a": [1], "b": [1, 2]})
    with pytest.raises(ValueError, match="one dimension"), RunWriter({}, root=tmp_path) as writer:
        writer.store([], [], {"a": np.zeros((2, 2))})


# ---------------------------------------------------------------------------------------------------------- finding


def test_runs_match_choices_config_and_status(tmp_path):
    a = store(tmp_path, {"workload": {"qps": 20}}, scheduler="block", experiment="main_sweep")
    b = store(tmp_path, {"workload": {"qps": 30}}, scheduler="block", experiment="main_sweep")
    c = store(tmp_path, {"workload": {"qps": 30}}, scheduler="random")
    with pytest.raises(OSError, match="boom"), RunWriter({}, {"scheduler": "block"}, root=tmp_path) as d:
        raise OSError("boom")

    def found(**where):
        return {run.path for run in runs(root=tmp_path, **where)}

    assert found() == {a, b, c}
    assert [run.path for run in runs(root=tmp_path)] == [a, b, c]  # oldest first
    assert found(scheduler="block") == {a, b}
    assert found(scheduler=["block", "random"], **{"workload.qps": 30}) == {b, c}
    assert found(**{"workload.qps": 30.0}, experiment="main_sweep") == {b}
    assert found(workload={"qps": 20}) == {a}
    assert found(scheduler="nobody") == found(experiment=None) == set()
    assert found(status="failed") == {d.path}
    assert found(status=None, scheduler="block") == {a, b, d.path}
    assert found(status=("ok", "failed")) == {a, b, c, d.path}
    assert found(config_hash=read_run(a).document["config_hash"]) == {a}
    assert runs(root=tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("schedular", "did you mean scheduler? "),
        ("qps", "did you mean workload.qps? "),
        ("num_request", "did you mean workload.num_requests? "),
        ("workload.qbs", "did you mean workload.qps? "),
        ("workload.qps.deeper", "did you mean workload.qps? "),
        ("nonsense", "choose a config group or a key that python run.py --cfg job shows, such as workload.qps"),
    ],
)
def test_a_key_that_no_run_has_is_told_with_the_nearest(tmp_path, key, near):
    store(tmp_path, {"workload": {"qps": 20, "num_requests": 10, "trace_path": None}}, scheduler="block")
    store(tmp_path, {"workload": {"qps": 30}}, scheduler="random")
    found = runs(root=tmp_path)
    for ask in (
        lambda: runs(root=tmp_path, **{key: 1}),
        lambda: frame(found, "scheduler", key),
        lambda: found[0].get(key),
    ):
        with pytest.raises(ValueError, match="no such key") as told:
            ask()
        assert str(told.value).startswith(f"{key}: no such key; {near}")
    assert found[0].get(key, 5) == 5


def test_a_key_that_some_run_has_is_one_of_all(tmp_path):
    store(tmp_path, {"workload": {"qps": 20, "path": None}}, scheduler="block")
    store(tmp_path, {"workload": {}}, scheduler="random")
    found = runs(root=tmp_path)
    assert frame(found, "workload.qps", "workload.path")["workload.qps"].isna().tolist() == [False, True]
    assert len(runs(root=tmp_path, **{"workload.path": None})) == 1
    assert found[1].get("experiment") is None
    with pytest.raises(ValueError, match=r"^workload\.qps: no such key"):
        found[1].get("workload.qps")


def test_with_nothing_stored_a_key_that_no_config_begins_with_is_told(tmp_path):
    assert runs(root=tmp_path, scheduler="block", **{"workload.qps": 3}, config_hash="x") == []
    with pytest.raises(ValueError, match=r"^schedular: no such key; did you mean scheduler\?"):
        runs(root=tmp_path, schedular="block")
    with pytest.raises(ValueError, match=r"^qps: no such key; .*such as workload\.qps$"):
        runs(root=tmp_path, qps=3)


def test_the_keys_that_there_always_are_are_those_of_a_config_and_of_run_json(tmp_path):
    config = {field.name for field in fields(Root)}
    assert set(KEYS) == config | {"experiment"} | set(read_run(store(tmp_path)).document)


def test_frame_has_a_row_per_run(tmp_path):
    store(tmp_path, {"workload": {"qps": 20}}, scheduler="block")
    store(tmp_path, {}, scheduler="random")
    table = frame(runs(root=tmp_path), "scheduler", "workload.qps")
    assert table["scheduler"].tolist() == ["block", "random"]
    assert table["workload.qps"][0] == 20
    assert table["workload.qps"].isna().tolist() == [False, True]
    assert table["e2e_mean_s"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"schema_version": 1, "sta',
        "[]",
        "{}",
        "\udcff",
        '{"schema_version": 99, "created": "", "status": "ok", "config": {}, "choices": {}, "summary": {}}',
        '{"schema_version": 1, "created": "", "status": "ok", "config": 7, "choices": {}, "summary": {}}',
    ],
    ids=["empty", "truncated", "list", "no keys", "not utf-8", "newer schema", "wrong type"],
)
def test_a_corrupt_run_is_skipped_with_a_warning(tmp_path, caplog, text):
    good = store(tmp_path)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    assert [run.path for run in runs(root=tmp_path, status=None)] == [good]
    assert [str(bad / "run.json") in record.getMessage() for record in warnings(caplog)] == [True]


# --------------------------------------------------------------------------------------------------- failing halfway


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("boom"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(3), "interrupted")],
)
def test_an_exception_is_stored_and_goes_on(tmp_path, error, status):
    with pytest.raises(type(error)), RunWriter(CONFIG, root=tmp_path) as writer:
        raise error
    run = read_run(writer.path)
    assert run.status == status
    assert run.summary == {}
    assert run.document["error"].startswith(type(error).__name__)
    assert "raise error" in (writer.path / "run.log").read_text()
    assert runs(root=tmp_path) == []


def test_what_a_failed_run_stored_stays_readable(tmp_path):
    writer = RunWriter(CONFIG, root=tmp_path)
    with pytest.raises(ValueError, match="late"), writer:  # noqa: PT012 - leaving the context is what is tested
        writer.store(RECORDS, DECISIONS, INSTANCES)
        raise ValueError("late")
    run = read_run(writer.path)
    assert (run.status, run.counts["sent"], len(run.requests())) == ("failed", 3, 3)


def test_contradicting_records_fail_the_run_but_keep_its_table(tmp_path):
    records = [*RECORDS[:2], replace(RECORDS[2], status="ok")]
    with pytest.raises(ValueError, match="status 'ok' but no first_token"), RunWriter({}, root=tmp_path) as writer:
        writer.store(records, DECISIONS, INSTANCES)
    run = read_run(writer.path)
    assert (run.status, len(run.requests())) == ("failed", 3)


def test_forgetting_to_store_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="without store"), RunWriter({}, root=tmp_path):
        pass
    assert runs(root=tmp_path) == []


def test_the_log_goes_to_the_run_while_it_runs(tmp_path):
    before = list(logging.getLogger().handlers)
    with RunWriter({}, root=tmp_path) as writer:
        logging.getLogger("block.somewhere").warning("slow: %d", 7)
        logging.getLogger("block.somewhere").info("and so on")
        writer.store([], [], {})
        assert writer.summary == {**writer.summary, "preemptions": 0}
        assert writer.counts["sent"] == 0
    logging.getLogger("block.somewhere").warning("too late")
    text = (writer.path / "run.log").read_text()
    assert "WARNING block.somewhere: slow: 7" in text
    assert "INFO block.somewhere: and so on" in text
    assert "stored 0 sent, 0 ok" in text
    assert "too late" not in text
    assert logging.getLogger("block").level == logging.NOTSET
    assert logging.getLogger().handlers == before


# A run in a process of its own, which stops at the stage named by its first argument.
CHILD = """
import os, sys, time
from block.store.writer import RunWriter
from pathlib import Path
from stored import *

def halt(*_):
    print("here", flush=True)
    time.sleep(60)

stage, root = sys.argv[1:]
with RunWriter(CONFIG, {"scheduler": "block"}, root=Path(root)) as writer:
    if stage == "running":
        halt()
    writer.store(RECORDS, DECISIONS, INSTANCES)
    if stage == "stored":
        halt()
    os.fsync = halt  # run.json is written to its temporary file, and not yet renamed
"""


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize("stage", ["running", "stored", "renaming"])
def test_kill_9_leaves_earlier_runs_and_no_half_run(tmp_path, stage):
    earlier = store(tmp_path)
    with child(CHILD, stage, str(tmp_path)) as process:
        assert process.stdout.readline() == "here\n", process.stderr.read()
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 2  # it had begun
    (found,) = runs(root=tmp_path, status=None)
    assert found.path == earlier
    assert len(found.requests()) == 3


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The temporary folder of this process."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def full_at(monkeypatch, root, name="write_table"):
    """Let the disk of `root` be full for `name` of the writer."""
    write = getattr(writing, name)

    def limited(path, what):
        if path.is_relative_to(root):
            path.write_text("half of it")
            path.unlink()
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, what)

    monkeypatch.setattr(writing, name, limited)


@pytest.mark.parametrize("name", ["write_table", "write_json"])
def test_what_a_full_disk_does_not_take_goes_into_the_temporary_folder(tmp_path, monkeypatch, temporary, name):
    root = tmp_path / "runs"
    whole = read_run(store(root))
    full_at(monkeypatch, root, name)
    with pytest.raises(NotStored) as told, RunWriter(CONFIG, {"scheduler": "block"}, root=root) as writer:
        writer.store(RECORDS, DECISIONS, INSTANCES, forecast_us=[10.0, 30.0], wall_time_s=0.25)
    place = temporary / f"block-{writer.id}"
    assert str(told.value) == f"runs_dir={root}: No space left on device; the run is in {place} instead"
    assert [run.path for run in runs(root=root, status=None)] == [whole.path]
    assert list(root.iterdir()) == [whole.path]
    (kept,) = runs(root=temporary)
    assert kept.path == writer.path == writer.run.path == place
    assert kept.summary == whole.summary == writer.run.summary
    assert kept.requests().equals(whole.requests())
    assert {path.name for path in kept.path.iterdir()} == {path.name for path in whole.path.iterdir()}
    assert "stored 3 sent" in (kept.path / "run.log").read_text()


def test_a_folder_that_was_deleted_meanwhile_is_no_loss(tmp_path, temporary):
    writer = RunWriter(CONFIG, root=tmp_path / "runs")
    with pytest.raises(NotStored, match="No such file or directory; the run is in") as told, writer:  # noqa: PT012
        shutil.rmtree(tmp_path / "runs")
        writer.store(RECORDS, DECISIONS, INSTANCES)
    (kept,) = runs(root=temporary)
    assert str(kept.path) in str(told.value)
    assert len(kept.requests()) == 3


def test_what_no_disk_takes_is_told_and_at_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    full_at(monkeypatch, tmp_path)
    with pytest.raises(NotStored) as told, RunWriter(CONFIG, root=tmp_path) as writer:
        writer.store(RECORDS, DECISIONS, INSTANCES)
    assert str(told.value).startswith(
        f"runs_dir={tmp_path}: No space left on device; nor is the run stored elsewhere: "
    )
    assert writer.run.summary["e2e_mean_s"] == 3.0
    (failed,) = runs(root=tmp_path, status=None)
    assert failed.status == "failed"
    assert "NotStored" in failed.document["error"]


def test_a_run_that_fails_on_a_full_disk_fails_as_it_did(tmp_path, monkeypatch, temporary, caplog):
    full_at(monkeypatch, tmp_path / "runs")
    with pytest.raises(ValueError, match="late"), RunWriter(CONFIG, root=tmp_path / "runs") as writer:  # noqa: PT012
        writer.store(RECORDS, DECISIONS, INSTANCES)
        raise ValueError("late")
    (kept,) = runs(root=temporary, status=None)
    assert (kept.status, len(kept.requests())) == ("failed", 3)
    assert str(kept.path) in warnings(caplog)[-1].getMessage()


def test_notes_that_the_disk_does_not_take_cost_the_notes_only(tmp_path, monkeypatch, caplog):
    full_at(monkeypatch, tmp_path, "write_json")
    with RunWriter(CONFIG, root=tmp_path) as writer:
        for one in RECORDS:
            writer.note(one)
        monkeypatch.undo()
        writer.store(RECORDS, DECISIONS, INSTANCES)
    assert len(read_run(writer.path).requests()) == 3
    assert [record.getMessage().partition(": ")[2] for record in warnings(caplog)] == [
        "No space left on device; if this run is killed, what it has finished is lost"
    ]


def test_what_is_noted_of_a_request_is_not_what_its_texts_are(tmp_path):
    content, hashes = np.array([[1, 30], [2, 8]]), np.array([77, 88])
    record = replace(RECORDS[0], request=replace(RECORDS[0].request, content=content, block_hashes=hashes))
    with RunWriter(CONFIG, root=tmp_path / "runs") as writer:
        writer.note(record)
        shutil.copytree(writer.path, tmp_path / "killed")
        writer.store([], [], {})
    recovered = recover(tmp_path / "killed").requests()
    assert recovered["request_id"].tolist() == [record.request.id]
    assert recovered["prompt_tokens"].tolist() == [record.request.prompt_tokens]


def test_what_a_killed_run_had_finished_waits_for_a_disk_that_takes_it(tmp_path, monkeypatch):
    with RunWriter(CONFIG, root=tmp_path / "runs") as writer:
        for one in RECORDS:
            writer.note(one)
        shutil.copytree(writer.path, tmp_path / "killed")  # as it would be left
        writer.store([], [], {})
    full_at(monkeypatch, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        recover(tmp_path / "killed")
    assert runs(root=tmp_path, status=None) == []
    monkeypatch.undo()
    assert recover(tmp_path / "killed").counts["ok"] == 2
    assert [run.status for run in runs(root=tmp_path, status=None)] == ["interrupted"]


def test_a_place_is_probed_and_left_as_it_was(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists"):
        check_writable(tmp_path / "file")
    with pytest.raises(OSError, match="Not a directory"):
        check_writable(tmp_path / "file" / "deeper")


FULL = """
import resource, sys
from block.store.writer import RunWriter
from pathlib import Path
from stored import *

limit, root = sys.argv[1:]
records = [record(i, i / 7, i / 7 + 0.1, i / 3 + 9, preemptions=i * i) for i in range(5000)]
writer = RunWriter(CONFIG, root=Path(root))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
with writer:
    writer.store(records, [], {})
"""


@pytest.mark.parametrize(("limit", "statuses"), [(20_000, ["failed", "ok"]), (200, ["ok"])])
def test_a_full_disk_fails_the_run_and_no_other(tmp_path, limit, statuses):
    earlier = store(tmp_path)
    with child(FULL, str(limit), str(tmp_path)) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "OSError" in errors
    assert [run.path for run in runs(root=tmp_path)] == [earlier]
    # Where even run.json did not fit the folder is no run, and no temporary file stays.
    assert sorted(run.status for run in runs(root=tmp_path, status=None)) == statuses
    assert not list(tmp_path.glob("*/.*"))


def test_a_full_disk_at_the_very_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(tmp_path / "run.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    writer = RunWriter({}, root=tmp_path)
    with pytest.raises(OSError, match="disk full"), writer:  # noqa: PT012 - leaving the context is what fails
        writer.store([], [], {})
        monkeypatch.setattr(os, "fsync", fail)
    assert runs(root=tmp_path, status=None) == []


def fail(_descriptor):
    raise OSError("disk full")


def test_write_json_replaces_whole_files_only(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("write", [lambda path: write_json(path, {"a": 1}), lambda path: write_whole(path, Path.touch)])
def test_no_file_is_put_in_the_place_of_a_device(tmp_path, write):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "pipe")
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1


def test_storing_a_run_does_not_import_pandas(tmp_path):
    code = """
import sys
from pathlib import Path
from stored import store
store(Path(sys.argv[1]))
assert not {"pandas", "wandb", "matplotlib"} & set(sys.modules)
"""
    with child(code, str(tmp_path)) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


# ------------------------------------------------------------------------------------------------------- provenance


def test_config_hash_is_of_the_values():
    expected = hashlib.sha256(b'{"a":1,"b":{"c":[1,2],"d":null}}').hexdigest()[:16]
    assert provenance.config_hash({"b": {"d": None, "c": [1, 2]}, "a": 1}) == expected
    assert provenance.config_hash({"b": {"d": None, "c": [1, 2]}, "a": 2}) != expected


def test_the_hash_of_a_file_is_its_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert provenance.file_hash(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_git_knows_its_checkout_and_no_other(tmp_path, monkeypatch):
    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", *settings, "-C", tmp_path / "repo", *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    inner = tmp_path / "repo" / "inner"
    inner.mkdir(parents=True)
    git("init", "-q")
    assert provenance.git.__wrapped__(tmp_path / "repo") is None  # no commit yet
    (inner / "file").write_text("1")
    git("add", "-A")
    git("commit", "-qm", "one")
    clean = {"commit": git("rev-parse", "HEAD"), "dirty": False, "uncommitted": []}
    assert provenance.git.__wrapped__(tmp_path / "repo") == clean
    (inner / "other").write_text("1")  # not among the code
    assert provenance.git.__wrapped__(tmp_path / "repo") == clean
    (tmp_path / "repo" / "block").mkdir()
    (tmp_path / "repo" / "block" / "mine.py").write_text("")
    new = provenance.git.__wrapped__(tmp_path / "repo")
    assert new == {**clean, "dirty": True, "uncommitted": ["block/mine.py"]}
    (inner / "file").write_text("2")
    changed = provenance.git.__wrapped__(tmp_path / "repo")
    assert changed == {**clean, "dirty": True, "uncommitted": ["inner/file", "block/mine.py"]}
    monkeypatch.chdir(inner)
    (inner / "kept").write_text("1")
    (inner / "ignored").write_text("1")
    (inner / ".gitignore").write_text("ignored")
    git("add", "inner/kept")
    git("commit", "-qm", "two")
    (tmp_path / "loose.py").write_text("")
    paths = [inner / name for name in ("kept", "file", "other", "ignored")]
    told = provenance.uncommitted([*paths, tmp_path / "loose.py"])
    assert told == [str(tmp_path / "loose.py"), "file", "ignored", "other"]
    monkeypatch.setattr(provenance, "git", lambda: clean)
    assert provenance.origin([inner / "kept"]) == clean
    assert provenance.origin([inner / "file"]) == {**clean, "dirty": True, "uncommitted": ["file"]}
    monkeypatch.setattr(provenance, "git", lambda: None)
    assert provenance.origin([inner / "kept"]) is None
    assert provenance.origin([inner / "file"]) == {"commit": None, "dirty": True, "uncommitted": ["file"]}
    monkeypatch.undo()
    assert provenance.git.__wrapped__(inner) is None
    assert provenance.git.__wrapped__(tmp_path) is None


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git.__wrapped__() is None


def test_a_file_that_two_write_at_once_is_one_of_theirs(tmp_path):
    """Each finds the other's file in the way: between writing its own and putting it there."""
    path = tmp_path / "both.txt"

    def interrupted(place):
        place.write_text("outer")
        write_whole(path, lambda other: other.write_text("inner"))

    write_whole(path, interrupted)
    assert path.read_text() == "outer"
    assert [one.name for one in tmp_path.iterdir()] == ["both.txt"]
