"""Reproduce the paper: run what is missing, draw every figure and table, and say what holds.

    python scripts/reproduce.py                  all but the studies, which take long: prefix, prefix_capacity
    python scripts/reproduce.py fig6 table2      some
    python scripts/reproduce.py --list           what there is, what is stored of it, and what the rest will take

Writes to artifacts/figures/: for each figure a PDF and a PNG, for each table Markdown, each beside the CSV of what it
shows; summary.md with the published values, ours and a verdict for each; and artifacts/report/index.html, one page of
it all.

Runs are stored in artifacts/runs/ and searches in artifacts/capacity/, and are found there again unless something that
they follow from has changed (code, GPU, workload, a policy of yours); --fresh makes them anew all the same. A call that
was killed goes on where it was; another one does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from joblib import Parallel, delayed  # noqa: E402
from rich.console import Console  # noqa: E402

from block.core.choices import did_you_mean  # noqa: E402
from block.core.files import check_writable, reason  # noqa: E402
from block.run import campaign  # noqa: E402
from block.run.campaign import Composer, Job  # noqa: E402
from block.run.cli import NO_ROOM  # noqa: E402
from block.run.config_errors import Parser, explain, piped  # noqa: E402
from block.run.console import progress  # noqa: E402
from block.store import searches  # noqa: E402
from block.store.provenance import code_hash  # noqa: E402
from block.store.results import Run, local_time  # noqa: E402
from block.store.wandb import Tracking, log_figures, log_run  # noqa: E402
from paper_figures import points, readme, report, style, verdicts  # noqa: E402
from paper_figures.catalogue import FIGURES, STUDIES  # noqa: E402

FIGURE_FOLDER = Path("artifacts/figures")
FULL = 10_000  # requests of a run, where its figure does not say otherwise
REAL_BACKENDS = ("emulated", "vllm")


def main() -> int:
    """Parse, run, draw."""
    options = _options()
    by_default = [name for name in FIGURES if name not in STUDIES]
    names = options.figures or [name for name in by_default if options.backend == "simulated" or _real(name)]
    figures = {name: importlib.import_module(f"paper_figures.{name}") for name in names}
    if not options.list:
        try:
            check_writable(options.out)
        except OSError as error:
            print(f"error: --out={options.out}: {reason(error)}", file=sys.stderr)
            return 2
    jobs = _jobs(figures, options)
    if options.list:
        _list(figures, jobs, options)
        return 0
    every = campaign.distinct(jobs.values())
    missing = [job for job in every if job.stored is None or options.fresh]
    if len(missing) < len(every):
        print(f"{len(every) - len(missing)} of {len(every)} results: stored {_when(jobs)}; --fresh makes them anew")
    failures = campaign.run_jobs(missing, at_once=-1 if options.backend == "simulated" else 1, fresh=options.fresh)
    if missing:
        campaign.attach_stored(jobs.values())
    stored = points.Stored(
        {key[1]: job.stored for key, job in jobs.items() if isinstance(job.stored, Run)},
        {key[1]: job.stored for key, job in jobs.items() if isinstance(job.stored, searches.Search)},
        options.seeds,
    )
    lacking = _draw(figures, stored, options)
    for text in (*failures, *lacking):
        print(f"error: {text}", file=sys.stderr)
    if options.wandb:
        _to_wandb(figures, stored, options)
    return 1 if failures or lacking else 0


def _options() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "figures", nargs="*", metavar="FIGURE", help=f"some of {', '.join(FIGURES)} (default: all but the studies)"
    )
    parser.add_argument("--list", action="store_true", help="say what there is and what is stored of it")
    parser.add_argument("--fresh", action="store_true", help="run and search again what is stored, too")
    parser.add_argument("--out", type=Path, help=f"folder for the figures (default: {FIGURE_FOLDER})")
    parser.add_argument("--requests", type=int, default=FULL, help="requests a run; fewer are for a quick look")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, 1 to 3; fewer are for a quick look")
    parser.add_argument(
        "--backend",
        default="simulated",
        choices=("simulated", *REAL_BACKENDS),
        help="what serves the requests; real engines schedule by V1, take wall-clock time and give some figures only",
    )
    parser.add_argument(
        "--wandb", action="store_true", help="log the runs and the figures to Weights & Biases, as a group"
    )
    options = parser.parse_args()
    for name in options.figures:
        if name not in FIGURES:
            parser.error(f"{name}: {did_you_mean(name, list(FIGURES))}")
        if options.backend != "simulated" and not _real(name):
            parser.error(
                f"{name}: needs --backend simulated; of real engines there are {', '.join(filter(_real, FIGURES))}"
            )
    if options.requests < 1:
        parser.error(f"--requests={options.requests}: must be at least 1")
    if not 1 <= options.seeds <= 3:
        parser.error(f"--seeds={options.seeds}: must be between 1 and 3")
    options.full = options.backend == "simulated" and options.requests == FULL and options.seeds == 3
    if options.out is None:
        quick = f"{options.backend}-{options.requests}x{options.seeds}"
        options.out = FIGURE_FOLDER if options.full else FIGURE_FOLDER / quick
    return options


def _real(name: str) -> bool:
    module = importlib.import_module(f"paper_figures.{name}")
    return not getattr(module, "SIMULATED_ONLY", False) and not getattr(module, "SEARCHES", ())


# ---------------------------------------------------------------------------------------------------------------- jobs


Jobs = dict[tuple[bool, points.Key], Job]


def _jobs(figures: Mapping[str, Any], options: argparse.Namespace) -> Jobs:
    """The job of each point, by whether it is a search and its key."""
    everything = points.Stored({}, {}, options.seeds)
    wanted = {
        (search, points.key(point)): _sized(point, options.requests)
        for module in figures.values()
        for search, each in ((False, module.RUNS), (True, getattr(module, "SEARCHES", ())))
        for point in everything.wanted(each)
    }
    always = [f"backend={options.backend}", "tracking=none"]
    if options.backend != "simulated":
        always.append("engine.enable_prefix_caching=false")  # as the paper's
    composer = Composer(ROOT / "conf", always)
    made = composer.jobs([(search, point) for (search, _), point in wanted.items()])
    jobs = dict(zip(wanted, made, strict=True))
    campaign.attach_stored(jobs.values())
    return jobs


def _sized(point: points.GridPoint, requests: int) -> points.GridPoint:
    """What a point sets, its number of requests among it: `requests`, or as many of its own as these are of 10,000."""
    own = point.get(points.REQUESTS, FULL)
    values = {key: value for key, value in point.items() if key not in points.LABELS}
    return {**values, points.REQUESTS: max(1, round(own * requests / FULL))}


def _list(figures: Mapping[str, Any], jobs: Jobs, options: argparse.Namespace) -> None:
    for name, module in figures.items():
        mine = [job for job, _ in _of(module, jobs, options)]
        have, distinct = sum(job.stored is not None for job in mine), campaign.distinct(mine)
        seconds = sum(job.seconds for job in distinct if job.stored is None) / (os.cpu_count() or 1)
        told = seconds > 0 and options.backend == "simulated"
        cost = f", about {max(seconds / 60, 1):.0f} min" if told else ""
        print(f"{name:10}{have:4} of {len(mine):3} stored{cost:16}  {module.TITLE} ({module.PAPER})")


def _when(jobs: Jobs) -> str:
    """When the stored results of jobs were made, by day."""
    days = sorted({local_time(str(job.stored.document["created"]))[:10] for job in jobs.values() if job.stored})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _of(module: Any, jobs: Jobs, options: argparse.Namespace) -> Iterator[tuple[Job, points.GridPoint]]:
    everything = points.Stored({}, {}, options.seeds)
    for search, each in ((False, module.RUNS), (True, getattr(module, "SEARCHES", ()))):
        for point in everything.wanted(each):
            yield jobs[search, points.key(point)], point


# ------------------------------------------------------------------------------------------------------------- drawing


def _draw(figures: Mapping[str, Any], stored: points.Stored, options: argparse.Namespace) -> list[str]:
    """Write what has changed: figures, summary, report, pages; returns which figures lack something."""
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    stamps = _read(folder / ".stamps.json")
    label = "" if options.full else _label(options)
    lacking, due = [], []
    for name, module in figures.items():
        try:
            stamp = _stamp(module, stored)
        except points.MissingResults as error:
            lacking.append(f"{name}: {error}")
            continue
        if stamps.get(name) != stamp or not (folder / f"{name}.csv").exists():
            due.append((name, stamp))
    work = (delayed(_picture)(name, stored.part(figures[name]), folder, label) for name, _ in due)
    drawn = Parallel(n_jobs=-1 if len(due) > 1 else 1, return_as="generator")(work)
    for (name, stamp), claims in zip(due, drawn, strict=True):
        if isinstance(claims, str):
            lacking.append(f"{name}: {claims}")
            continue
        gap = _gap(figures[name], stored)
        verdicts.update(folder / "summary.csv", name, figures[name].PAPER, claims, gap)
        stamps[name] = stamp
        (folder / ".stamps.json").write_text(json.dumps(stamps))
        print(next(path for kind in ("png", "md") if (path := folder / f"{name}.{kind}").exists()))
    changed = bool(due)
    if changed or not (folder / "summary.md").exists():
        verdicts.write(folder, label)
    report_folder = Path("artifacts/report") if options.full and folder == FIGURE_FOLDER else folder
    if changed or not (report_folder / "index.html").exists():
        report.write(folder, report_folder / "index.html")
        print(report_folder / "index.html")
    if options.full and folder == FIGURE_FOLDER:
        for page in filter(Path.exists, readme.PAGES):
            readme.update(page, folder)
    return lacking


def _picture(name: str, stored: points.Stored, folder: Path, label: str) -> list[verdicts.Claim] | str:
    """Draw one figure, in a process of its own; returns its claims, or what it lacks."""
    module = importlib.import_module(f"paper_figures.{name}")
    style.use()
    gap = _gap(module, stored)
    label = f"{label}\nGaps: {gap}" if gap else label
    try:
        table = module.table(stored)
        picture = module.draw(table) if hasattr(module, "draw") else None
        style.save(picture, table, folder, name, label)
        if picture is None:
            (folder / f"{name}.md").write_text(f"{label or module.TITLE}:\n\n{module.markdown(table)}")
        return module.claims(table) if hasattr(module, "claims") else []
    except points.MissingResults as error:
        return str(error)
    except Exception as error:  # the others are drawn all the same, and what is wrong here is told at the end
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(where.filename).name}:{where.lineno})"


def _gap(module: Any, stored: points.Stored) -> str:
    """Why capacities that a figure shows are not there; empty if all are."""
    return stored.gaps(getattr(module, "SEARCHES", ()))


def _label(options: argparse.Namespace) -> str:
    kind = {"simulated": "Simulated", "emulated": "Real vLLM engines, emulated GPUs", "vllm": "Real vLLM engines"}
    return f"{kind[options.backend]}: {options.requests:,} requests a run, seeds: {options.seeds}"


def _stamp(module: Any, stored: points.Stored) -> str:
    """Changes with the runs, searches and files that a figure shows, and with the code that draws it."""
    what = [run.id for _, run in stored.run(module.RUNS)]
    what += [
        json.dumps([search.path.name, search.document["hashes"]])
        for _, search in stored.search(getattr(module, "SEARCHES", ()))
    ]
    what.append(code_hash(Path(style.__file__).parent))
    files = [*sorted(Path(style.__file__).parent.glob("*.yaml")), *getattr(module, "FILES", ())]
    what += [path.read_text() for path in files if path.exists()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _to_wandb(figures: Mapping[str, Any], stored: points.Stored, options: argparse.Namespace) -> None:
    """Each run once, tagged with the figures that show it, and one run that holds the figures themselves."""
    tags: dict[str, list[str]] = {}
    by_id: dict[str, Run] = {}
    for name, module in figures.items():
        for _, run in stored.run(module.RUNS):
            tags.setdefault(run.id, []).append(name)
            by_id[run.id] = run
    tracking = Tracking(group="reproduce")
    with progress(Console(stderr=True), "W&B", len(by_id)) as advance:
        for run_id, run in by_id.items():
            log_run(run.path, replace(tracking, tags=(*tags[run_id], options.backend)))
            advance(1)
    folder = log_figures(options.out, tracking)
    print(folder if folder is not None else "W&B: the figures were not logged")


if __name__ == "__main__":
    try:
        sys.exit(piped(main))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(f"error: {explain(error)}; what is stored stays", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: what is stored stays, and the next call goes on from there", file=sys.stderr)
        sys.exit(130)
