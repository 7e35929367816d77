"""Complete the runs on real servers that were killed, with the requests that they had finished."""

import sys
from pathlib import Path

from block.core.files import reason
from block.run.config_errors import Parser, piped
from block.store.results import DEFAULT_ROOT
from block.store.writer import recover


def main() -> int:
    """Recover what can be, and say so."""
    parser = Parser(description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=DEFAULT_ROOT, help="folder of the runs (%(default)s)")
    root = parser.parse_args().root
    if not root.is_dir():
        print(f"error: {root}: no such folder", file=sys.stderr)
        return 2
    for folder in sorted(root.iterdir()):
        try:
            run = recover(folder)
        except OSError as error:
            print(f"error: {folder}: {reason(error)}", file=sys.stderr)
            return 1
        if run is not None and run.counts is not None:
            print(f"{run.path}: {run.counts['ok']} requests had finished")
    return 0


if __name__ == "__main__":
    sys.exit(piped(main))
