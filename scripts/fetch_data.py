"""Download the public originals of the workloads into $BLOCK_DATA, or ~/.cache/block.

    python scripts/fetch_data.py                    the traces
    python scripts/fetch_data.py burstgpt           one of them
    python scripts/fetch_data.py sharegpt_text      conversations for the length estimator (about 0.7 GB)

Nothing here is needed for `workload.source=sketch`. An interrupted download goes on where it stopped; a file gets its
name only when it is complete and its SHA-256 is right. Exit code 2 and one line if something cannot be fetched.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from block.core.choices import did_you_mean
from block.core.paths import data_folders
from block.run.config_errors import Parser, piped
from block.workload.spec import SKETCHES
from block.workload.traces import TRACES

CHUNK = 1 << 16
TIMEOUT_S = 30


class FetchError(Exception):
    """A file that cannot be fetched; the message is one line for the user."""


@dataclass(frozen=True)
class Remote:
    """A public file: address (None: it has none of its own, `note` says how to get it), place, SHA-256, licence."""

    url: str | None
    path: str
    sha256: str
    licence: str
    note: str = ""


REMOTES: Mapping[str, Remote] = {
    "azure_conv": Remote(
        "https://raw.githubusercontent.com/Azure/AzurePublicDataset/master/data/AzureLLMInferenceTrace_conv.csv",
        TRACES["azure_conv"].path,
        "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        "CC-BY 4.0",
    ),
    "azure_code": Remote(
        "https://raw.githubusercontent.com/Azure/AzurePublicDataset/master/data/AzureLLMInferenceTrace_code.csv",
        TRACES["azure_code"].path,
        "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
        "CC-BY 4.0",
    ),
    "arxiv": Remote(
        "https://raw.githubusercontent.com/microsoft/vidur/main/data/processed_traces/"
        "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
        TRACES["arxiv"].path,
        "9d3580538d915ca75e4aaaa54590b42dbb17abc6d74c8913310cf07c232adcdc",
        "MIT",
    ),
    # The checksum is the one of the file's Git LFS pointer in the BurstGPT repository.
    "burstgpt": Remote(
        "https://github.com/HPMLL/BurstGPT/releases/download/v1.1/BurstGPT_without_fails_1.csv",
        TRACES["burstgpt"].path,
        "a4d068a7113ec0290e74063a1b3447dc6001a30e4298eb313581b71006dda1f4",
        "CC-BY 4.0",
    ),
    "sharegpt": Remote(
        None,
        TRACES["sharegpt"].path,
        "e8eb6769b07f47a44fcb8caecf78dfc247103d65f84c4053bd9ae593caa01c63",
        "MIT",
        "its token lengths come with the paper's artifact, https://github.com/AKafakA/Block (data/trace_data/sharegpt)",
    ),
    "mooncake": Remote(
        None,
        TRACES["mooncake"].path,
        "cbae1655f679723e13e66e016606208ac03590d5b470d82cc4306a249288ea8a",
        "Apache-2.0",
        "it is conversation_trace.jsonl of https://github.com/kvcache-ai/Mooncake (FAST25-release/traces), by gzip",
    ),
    "sharegpt_text": Remote(
        "https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered/resolve/main/"
        "ShareGPT_V3_unfiltered_cleaned_split.json",
        "text/ShareGPT_V3_unfiltered_cleaned_split.json",
        "35f0e213ce091ed9b9af2a1f0755e9d39f9ccec34ab281cd4ca60d70f6479ba4",
        "Apache-2.0",
    ),
}
DEFAULT = ("azure_conv", "azure_code", "arxiv", "burstgpt")


def fetch(name: str, remote: Remote, directory: Path, progress: Progress | None = None) -> bool:
    """Bring `remote` to its place below `directory`; False if it was there already.

    FetchError if it cannot be downloaded, if what arrives has another SHA-256, or if another file is in its place.
    """
    target = directory / remote.path
    if target.exists():
        if sha256(target) != remote.sha256:
            raise FetchError(f"{name}: {target} is not the original (SHA-256 differs); move it away to download it")
        return False
    if remote.url is None:
        raise FetchError(f"{name}: no direct download; {remote.note}; save it as {target}")
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(name, remote.url, part, progress)
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        reason = getattr(error, "reason", None) or error
        raise FetchError(f"{name}: cannot download {remote.url}: {reason}") from error
    if sha256(part) != remote.sha256:
        part.unlink()
        raise FetchError(f"{name}: {remote.url} has another SHA-256 than {remote.sha256}; nothing was kept")
    part.replace(target)
    return True


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(name: str, url: str, part: Path, progress: Progress | None) -> None:
    """Complete `part`, asking only for the bytes that it lacks. ConnectionError if the answer ends early."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "block-serving"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if have and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is missing: the checksum decides
        raise
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0
        length = response.headers["Content-Length"]
        total = have + int(length) if length else None
        task = progress.add_task(name, total=total, completed=have) if progress else None
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                if progress and task is not None:
                    progress.update(task, completed=have)
    if total is not None and have < total:
        raise ConnectionError(f"ended after {have:,} of {total:,} bytes; run again to go on from there")


def main(arguments: list[str] | None = None, remotes: Mapping[str, Remote] = REMOTES) -> int:
    """Command line. Fetches what it can; 2 if anything could not be fetched, with one line for each on stderr."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"default: {' '.join(DEFAULT)}; choices: {', '.join(remotes)}")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in remotes]
    if unknown:
        print(f"error: name={unknown[0]!r}: {did_you_mean(unknown[0], list(remotes))}", file=sys.stderr)
        return 2
    directory = data_folders()[0]
    console = Console(stderr=True)
    failures = []
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        for name in options.names or [name for name in DEFAULT if name in remotes]:
            remote = remotes[name]
            try:
                new = fetch(name, remote, directory, progress)
            except FetchError as error:
                sketched = (SKETCHES / f"{name}.json").exists()
                failures.append(f"{error} (workload.source=sketch needs no file)" if sketched else str(error))
            else:
                state = "fetched" if new else "already there"
                progress.console.print(f"{name}: {state}: {directory / remote.path} ({remote.licence})", soft_wrap=True)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 2 if failures else 0


if __name__ == "__main__":
    sys.exit(piped(main))
