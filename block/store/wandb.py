"""Weights & Biases as a mirror of stored runs: it shows what `block.store.results` holds, and is never read.

Without an API key (WANDB_API_KEY or netrc) nothing is asked and no network is touched: the files lie in
``<run>/wandb/offline-run-…``, for ``wandb sync``, `log_run` at another time, or for good. With one, the server is asked
for a sign of life before W&B is, which would wait for half a minute; a run that cannot be logged online is logged
offline, and so are all later ones of the process or sweep (`share_trouble`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from block.core.choices import did_you_mean
from block.core.files import write_json
from block.store.results import Run, read_run
from block.store.summary import e2e, only_ok, ttft
from block.store.wandb_server import Unavailable, check_reachable, go_offline, has_key, is_server_trouble, told

if TYPE_CHECKING:
    import pandas as pd

MODES = ("auto", "online", "offline", "disabled")
POINTS = 100  # of a chart's line
UPLOAD_S = 30.0  # for W&B to begin a run, and to send the rest of it at its end
_PROVENANCE = ("choices", "config_hash", "hashes", "git", "hardware", "packages")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracking:
    """What goes to W&B, and how. `mode` "auto" is online when an API key is set, offline otherwise.

    `group` defaults to the run's experiment. The request table is thinned evenly to `table_rows` rows; 0 leaves it out.
    """

    mode: str = "auto"
    project: str = "block"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    table_rows: int = 10_000

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"tracking.mode={self.mode!r}: {did_you_mean(self.mode, MODES)}")
        if self.table_rows < 0:
            raise ValueError(f"tracking.table_rows={self.table_rows}: must be 0 or more")
        object.__setattr__(self, "tags", tuple(self.tags))  # Hydra passes a list

    @property
    def resolved_mode(self) -> str:
        """`mode` with "auto" decided: WANDB_MODE if it is set to a mode, else by whether there is an API key."""
        if self.mode != "auto":
            return self.mode
        wanted = os.environ.get("WANDB_MODE", "auto")
        return wanted if wanted in MODES[1:] else "online" if has_key() else "offline"


def logged(path: str | Path, mode: str = "offline") -> Path | None:
    """The W&B folder of the stored run `path`; None if it was never logged to the end, or not `mode`.

    A run that lies offline is not logged "online" until ``wandb sync`` has seen it.
    """
    try:
        told = json.loads(_marker(Path(path)).read_bytes())
        folder = Path(path) / str(told["folder"])
        synced = told.get("mode") == "online" or any(folder.glob("*.wandb.synced"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if synced or mode != "online" else None


def log_run(path: str | Path, tracking: Tracking, *, strict: bool = False) -> Path | None:
    """Log the stored run `path` once, and return its W&B folder; None if tracking is disabled or W&B failed.

    A run that is logged already is left as it is; one that lies offline is logged anew once that can be done online.
    Whatever W&B raises becomes one warning: the run itself is safe on disk, and what cannot go online is logged
    offline. strict: it is not logged then, and Unavailable is raised.
    """
    mode = tracking.resolved_mode
    if mode == "disabled":
        return None
    before = logged(path)
    if before is not None and logged(path, mode) is not None:
        return before
    if (run := read_run(path)) is None:
        return None
    try:
        if mode == "online":
            try:
                check_reachable()
                return _mirrored(run, tracking, mode)
            except Exception as error:
                if not is_server_trouble(error):
                    raise
                if strict:
                    raise Unavailable(told(error)) from error
                go_offline(error)
                if before is not None:
                    return before
        return _mirrored(run, tracking, "offline")
    except Unavailable:
        raise
    except Exception as error:  # no failure of a mirror may cost a run
        log.warning("W&B: %s is stored but was not logged: %s: %s", run.path, type(error).__name__, error)
        return None


def _mirrored(run: Run, tracking: Tracking, mode: str) -> Path:
    """Log the run and remember that; what lay offline before is then of no use."""
    old = logged(run.path)
    folder = _log(run, tracking, mode)
    name = folder.relative_to(run.path.resolve())
    write_json(_marker(run.path), {"folder": str(name), "mode": mode})
    if old is not None and old.resolve() != folder:
        shutil.rmtree(old, ignore_errors=True)
    return run.path / name


@contextmanager
def curves(
    tracking: Tracking, folder: Path, config: Mapping[str, Any]
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A W&B run of its own for a training: gives what logs values at a step. Its files lie in `folder`.

    Nothing is logged where tracking is disabled; that W&B cannot be had is one warning, and no reason not to train.
    """
    mirror: Any = None
    if tracking.resolved_mode != "disabled":
        folder.mkdir(parents=True, exist_ok=True)
        try:
            wandb: Any = import_module("wandb")
            mirror = wandb.init(
                project=tracking.project,
                entity=tracking.entity,
                group=tracking.group or "length_estimation",
                tags=tracking.tags,
                dir=folder,
                mode=_mode(tracking),
                config=dict(config),
                settings=_settings(wandb),
            )
        except Exception as error:  # W&B has no common base class
            log.warning("W&B: training goes on without curves: %s: %s", type(error).__name__, error)
    try:
        yield (lambda step, values: mirror.log(values, step=step)) if mirror is not None else lambda step, values: None
    finally:
        if mirror is not None:
            mirror.finish()


def _mode(tracking: Tracking) -> str:
    """The mode that can be had: offline, and that is said, if online cannot."""
    if tracking.resolved_mode != "online":
        return tracking.resolved_mode
    try:
        check_reachable()
    except Unavailable as error:
        go_offline(error)
        return "offline"
    return "online"


def _settings(wandb: Any) -> Any:
    """Quiet, and of bounded patience as far as this version of W&B can be told so."""
    bounds = {"init_timeout": UPLOAD_S, "finish_timeout": UPLOAD_S, "finish_timeout_raises": True}
    known = getattr(wandb.Settings, "model_fields", {})
    bounded = {name: value for name, value in bounds.items() if name in known}
    return wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True, **bounded)


def _marker(path: Path) -> Path:
    return path / "wandb" / "logged.json"


def log_figures(folder: Path, tracking: Tracking) -> Path | None:
    """Log the pictures, tables and summary in `folder` as one W&B run with an artifact; returns its W&B folder, or
    None if tracking is disabled or W&B failed.
    """
    if tracking.resolved_mode == "disabled":
        return None
    try:
        wandb: Any = import_module("wandb")
        with _data_dir(folder / "wandb" / "data"):
            mirror = wandb.init(
                name="figures",
                job_type="figures",
                project=tracking.project,
                entity=tracking.entity,
                group=tracking.group,
                tags=tracking.tags,
                dir=folder,
                mode=_mode(tracking),
                settings=_settings(wandb),
            )
            with mirror:
                artifact = wandb.Artifact("figures", type="figures")
                for path in sorted(folder.glob("*.*")):
                    if path.suffix in (".png", ".pdf", ".csv", ".md"):
                        artifact.add_file(str(path))
                mirror.log_artifact(artifact)
                mirror.log({path.stem: wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))})
            return Path(mirror.dir).resolve().parent
    except Exception as error:  # as in log_run
        log.warning("W&B: the figures were not logged: %s: %s", type(error).__name__, error)
        return None


def _log(run: Run, tracking: Tracking, mode: str) -> Path:
    wandb: Any = import_module("wandb")  # half a second, and as much for its service: only tracked runs pay

    home = run.path.resolve()
    (home / "wandb").mkdir(exist_ok=True)  # W&B falls back to a temporary folder where this one is missing
    with _data_dir(home / "wandb" / "data"):
        mirror = wandb.init(
            id=run.id,
            name=run.id,
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group or run.get("experiment"),
            tags=tracking.tags,
            dir=home,
            mode=mode,
            config={**run.config, **{key: run.document.get(key) for key in _PROVENANCE}},
            settings=_settings(wandb),
        )
        with mirror:
            if run.status == "ok":
                _log_tables(wandb, mirror, run, tracking.table_rows)
            numbers = {**run.summary, **(run.counts or {}), "status": run.status}
            mirror.summary.update({key: value for key, value in numbers.items() if value is not None})
        return Path(mirror.dir).resolve().parent


def _log_tables(wandb: Any, mirror: Any, run: Run, table_rows: int) -> None:
    requests = run.requests()
    ok = only_ok({str(name): column.to_numpy() for name, column in requests.items()})
    mirror.define_metric("time_s")
    mirror.define_metric("*", step_metric="time_s")
    for row in _over_time(ok, run.instances()):
        mirror.log(row)
    for name, values in (("ttft", ttft(ok)), ("e2e", e2e(ok))):
        if values.size:
            share = np.linspace(0, 1, POINTS + 1)
            points = wandb.Table(
                columns=[f"{name}_s", "share"], data=np.stack([np.quantile(values, share), share], axis=1).tolist()
            )
            mirror.log({f"{name}_cdf": wandb.plot.line(points, f"{name}_s", "share", title=f"CDF of {name} (s)")})
    if table_rows and len(requests):
        mirror.log({"requests": _table(wandb, requests, table_rows)})


def _table(wandb: Any, frame: pd.DataFrame, limit: int) -> Any:
    if len(frame) > limit:
        frame = frame.iloc[np.linspace(0, len(frame) - 1, limit).astype(int)]
    frame = frame.round(6)
    columns = [[None if value != value else value for value in frame[name].tolist()] for name in frame]
    table = wandb.Table(columns=list(frame), dtype=[str if name == "status" else float for name in frame])
    # Table(data=…) infers the type of every cell anew, a second for 10,000 rows; the types are given above.
    table.data.extend(map(list, zip(*columns, strict=True)))
    return table


def _over_time(ok: dict[str, NDArray[Any]], instances: pd.DataFrame) -> Iterator[dict[str, float]]:
    """A row per interval: mean latency of the requests that arrived in it, mean state of each instance during it."""
    lines: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
        "ttft_mean_s": (ok["arrival"], ttft(ok)),
        "e2e_mean_s": (ok["arrival"], e2e(ok)),
    }
    if {"time", "instance_id"} <= set(instances.columns):
        for instance, rows in instances.groupby("instance_id"):
            for name in rows.select_dtypes("number").columns.difference(["time", "instance_id", "request_id"]):
                lines[f"{name}/instance_{instance}"] = (rows["time"].to_numpy(), rows[name].to_numpy(dtype=float))
    end = max((times.max() for times, _ in lines.values() if times.size), default=0.0)
    edges = np.linspace(0, max(end, 1e-9), POINTS + 1)
    means = {name: _binned_mean(times, values, edges) for name, (times, values) in lines.items()}
    for i in range(POINTS):
        row = {name: float(mean[i]) for name, mean in means.items() if not np.isnan(mean[i])}
        if row:
            yield {"time_s": float(edges[i + 1]), **row}


def _binned_mean(times: NDArray[Any], values: NDArray[Any], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of the values in each interval between `edges`; NaN where there is none."""
    total, _ = np.histogram(times, edges, weights=values)
    count, _ = np.histogram(times, edges)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


@contextmanager
def _data_dir(path: Path) -> Iterator[None]:
    """Have W&B stage its files in `path`: by default they pile up in the home directory, one copy per offline run."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(path)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]
