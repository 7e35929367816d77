"""Traces: what a recording of requests is, what the public ones are called on disk, and where they are looked for.

No trace is part of the project. `scripts/fetch_data.py` puts them into $BLOCK_DATA, or ~/.cache/block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from block.core.arrays import Floats, Ints
from block.core.paths import data_folders


@dataclass(frozen=True)
class TraceFile:
    """Where a published trace lies below a data directory, and whether it has times of arrival."""

    path: str
    timed: bool = False


TRACES = {
    "sharegpt": TraceFile("traces/sharegpt_10k_llama2.csv"),
    "arxiv": TraceFile("traces/arxiv_summarization_llama2.csv"),
    "azure_conv": TraceFile("traces/azure_conv_2023.csv", timed=True),
    "azure_code": TraceFile("traces/azure_code_2023.csv", timed=True),
    "burstgpt": TraceFile("traces/burstgpt_without_fails_1.csv", timed=True),
    "mooncake": TraceFile("traces/mooncake_conversation.jsonl.gz", timed=True),
}


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival: lengths int[n] in tokens, times float[n] in seconds and prompts (if
    recorded).

    format: what the file was taken for; rows: what it holds; dropped: how many of these were left out, by the reason.
    rate: requests/s of the recording, with those that were left out as too long; None without times.
    contents: what each prompt consists of (`block.workload.content`), where the recording tells what they share.
    """

    prompt: Ints
    output: Ints
    times: Floats | None
    prompts: Sequence[str] | None = None
    format: str = ""
    rows: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    rate: float | None = None
    contents: Sequence[Ints] | None = None


def find_data(path: str, advice: str) -> Path:
    """The file `path` below the first data directory that has it.

    FileNotFoundError names every place that was searched and ends with `advice`: how to get the file.
    """
    places = [directory / path for directory in data_folders()]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no {Path(path).name}: looked for {' and '.join(map(str, places))}; {advice}")
