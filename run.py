"""`block-run`, from a checkout: ``python run.py scheduler=block model=llama2-7b``. See block/run/command.py."""

import sys

from block.run.command import command

if __name__ == "__main__":
    sys.exit(command())
