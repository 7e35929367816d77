"""Measure the latency model of a running server under a designed load, in about two minutes.

    python -m block.vllm_plugin.serve --model … --port 8000
    python scripts/profile_instance.py http://127.0.0.1:8000 --out artifacts/latency/mine.json

The server must have nothing else to do meanwhile. Use the result by backend.latency_model=artifacts/latency/mine.json.
"""

import argparse
import asyncio
import sys
from pathlib import Path

import aiohttp
from rich.console import Console

from block.backends import live_profile as live
from block.backends.instance import VLLMInstance
from block.cluster.instance import InstanceFailed
from block.core.clock import Clock
from block.core.files import check_writable, reason, write_or_divert, write_whole
from block.run.config_errors import Parser, piped
from block.run.console import progress


def main() -> int:
    """Drive, fit, report, write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to drive the server (default: 120)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="token ids to use in prompts are below this")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    arguments = parser.parse_args()
    if not arguments.out.parent.is_dir():
        parser.error(f"--out={arguments.out}: no such folder {arguments.out.parent}")
    if arguments.out.exists() and not arguments.force:
        parser.error(f"--out={arguments.out}: is there already; give another, or --force to write over it")
    try:
        check_writable(arguments.out.parent)
    except OSError as error:
        parser.error(f"--out={arguments.out}: {reason(error)}")
    if arguments.seconds <= 0:
        parser.error(f"--seconds={arguments.seconds}: must be greater than 0")
    try:
        found = asyncio.run(_measure(arguments))
    except (InstanceFailed, live.TooFewSteps) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    path, trouble = write_or_divert(
        f"--out={arguments.out}", arguments.out, lambda path: write_whole(path, found.model.save)
    )
    print(f"{found.steps:,} steps timed, {found.error.rows:,} of them held out; errors on those:")
    print(f"median {found.error.median:.1%}, P95 {found.error.p95:.1%}, of their sum {found.total_error:+.1%}")
    print(path)
    if trouble is not None:
        print(f"error: {trouble}", file=sys.stderr)
    return int(trouble is not None)


async def _measure(arguments: argparse.Namespace) -> live.StepFit:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        instance = VLLMInstance(0, arguments.url, session, Clock(), arguments.vocabulary)
        settings = await instance.attach()
        try:
            with progress(Console(stderr=True), "seconds", round(arguments.seconds)) as advance:
                told = 0

                def tell(share: float) -> None:
                    nonlocal told
                    advance(round(share * arguments.seconds) - told)
                    told = round(share * arguments.seconds)

                steps = await live.drive(instance, settings, arguments.seconds, tell)
        finally:
            await instance.detach()
        source = {"method": "steps of a live engine under a designed load", "engine": f"vLLM {instance.vllm_version}"}
        return live.fit_steps(steps, settings, {**source, **settings._asdict()})


if __name__ == "__main__":
    sys.exit(piped(main))
