"""Log stored runs to W&B, each once: ``python scripts/log_runs.py [key=value …]``.

A key is a config group or a dotted config key, as in ``scheduler=block,random workload.qps=30``; several values match
any of them. Runs that were logged already, when they were made or by this script, are left as they are; those that lie
offline go online once there is an API key. If the server cannot be had, nothing more is logged.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from block.run.config_errors import Parser, piped
from block.store.results import DEFAULT_ROOT, runs
from block.store.wandb import MODES, Tracking, log_run, logged
from block.store.wandb_server import Unavailable


def main(arguments: Sequence[str] | None = None) -> int:
    """Log what matches; the exit status is 1 if any of it was not logged."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", nargs="*", type=_condition, metavar="key=value", help="which runs; none: all")
    parser.add_argument("--root", default=DEFAULT_ROOT, help="folder of the runs (%(default)s)")
    parser.add_argument("--mode", default=Tracking.mode, choices=MODES[:-1], help="default: online with an API key")
    parser.add_argument("--project", default=Tracking.project)
    parser.add_argument("--entity")
    parser.add_argument("--group", help="default: the run's experiment")
    options = parser.parse_args(arguments)
    if options.root != DEFAULT_ROOT and not Path(options.root).is_dir():
        parser.error(f"--root={options.root}: no such folder")
    logging.basicConfig(format="%(levelname)s %(message)s")
    tracking = Tracking(mode=options.mode, project=options.project, entity=options.entity, group=options.group)
    try:
        found = runs(root=options.root, **dict(options.where))
    except ValueError as error:  # a key that there is not
        parser.error(str(error))
    todo = [run for run in found if logged(run.path, tracking.resolved_mode) is None]
    done = 0
    try:
        for run in todo:
            if (folder := log_run(run.path, tracking, strict=True)) is not None:
                done += 1
                print(folder)
    except Unavailable as error:
        print(f"error: W&B: {error}; nothing more was logged: try again, or --mode offline", file=sys.stderr)
    print(f"logged {done} of {len(todo)}; {len(found) - len(todo)} were logged before")
    return int(done < len(todo))


def _condition(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    return key, [_value(value) for value in values.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(piped(main))
