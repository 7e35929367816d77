"""Pairs of a prompt and the length of its response: read from files of many kinds, counted, split once and for all.

The split hangs on a hash of the prompt's words alone, so that it is the same on every machine and for every order of
the rows; a prompt that occurs again, but for case and punctuation, is left out, so that none is on both sides.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from block.core.arrays import Ints
from block.workload.records import open_objects
from block.workload.traces import find_data

SETS: Mapping[str, tuple[str, ...]] = {
    "gpteacher": ("text/codegen-instruct.json", "text/roleplay-simple-deduped-roleplay-instruct.json"),
    "sharegpt_text": ("text/ShareGPT_V3_unfiltered_cleaned_split.json",),
}
"""Files of the known data sets below a data directory."""

TEST_SHARE = 0.2
"""Of all prompts, held out: 10,000 of the paper's 50,000."""
TUNE_SHARE = 0.1
"""Of all prompts, kept from the training ones to stop by and to choose between models."""

COUNTED = "runs of at most 8 ASCII letters, line breaks, and every other character that is no space"
"""The count that stands in for a tokenizer. On GPTeacher its sums are 1–3 % below those of Mistral 7B's SentencePiece
(32,000 pieces), and single responses differ by 6–7 %."""

_PIECES = re.compile(r"[A-Za-z]{1,8}|[^A-Za-z\s]|\n")
_WORDS = re.compile(r"\W+")

# Names of the two sides of a pair, in the order in which they are looked for; "input" goes behind an instruction.
_PROMPTS = ("instruction", "prompt", "question", "query")
_RESPONSES = ("response", "output", "completion", "answer")
_TURNS = ("conversations", "messages", "conversation")


class NoPairs(ValueError):
    """No record of a file is a pair of a prompt and a response."""


class Pairs(NamedTuple):
    """n prompts, the tokens of their responses int[n] (at least 1), and the file that each is from, int[n]."""

    prompts: list[str]
    tokens: Ints
    files: Ints

    def where(self, chosen: Any) -> Pairs:
        """Those that `chosen`, of booleans or numbers, picks."""
        index = np.arange(len(self.prompts))[chosen]
        return Pairs([self.prompts[i] for i in index], self.tokens[index], self.files[index])


class Split(NamedTuple):
    """The pairs to train on, to tune by and to test on, the names of their files, how responses were counted, the
    records that the files hold, and the different pairs among these.
    """

    train: Pairs
    tune: Pairs
    test: Pairs
    files: tuple[str, ...]
    counted: str
    rows: int
    pairs: int


def load(data: str, tokenizer: str | None = None, train: int = 40_000, test: int = 10_000) -> Split:
    """The split into sides of at most `train` and `test` pairs: those with the smallest hashes.

    data: a name of SETS, or a FILE.json, .jsonl or .parquet. tokenizer: name or folder of a Hugging Face tokenizer to
    count by; None counts without one (`COUNTED`). FileNotFoundError or ValueError, in one line, if it is not to be had.
    Of a conversation, the first question and its answer are taken; pairs without words on either side are left out.
    """
    paths = _paths(data)
    count, counted = counter(tokenizer)
    found: dict[str, tuple[float, str, str, int]] = {}
    records = 0
    for number, path in enumerate(paths):
        held, count_of_records = _read(path)
        records += count_of_records
        for prompt, response in held:
            key = _WORDS.sub(" ", prompt.lower()).strip()
            if key and key not in found and response.strip():
                place = int(hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:8], 16) / 2**32
                found[key] = (place, prompt, response, number)
    rows = sorted(found.values())
    if not rows:
        raise ValueError(f"{paths[0]}: holds no pair of a prompt and a response")
    places = np.array([row[0] for row in rows])
    sides = np.searchsorted([TEST_SHARE, TEST_SHARE + TUNE_SHARE], places, side="right")
    kept = [
        np.flatnonzero(sides == side)[:most]
        for side, most in enumerate((test, round(train * TUNE_SHARE / (1 - TEST_SHARE)), train))
    ]
    kept[2] = kept[2][: max(train - len(kept[1]), 0)]  # those to tune by are of the training ones
    parts = []
    for index in kept:
        chosen = [rows[i] for i in index]
        tokens = np.maximum(count([row[2] for row in chosen]), 1)
        parts.append(Pairs([row[1] for row in chosen], tokens, np.array([row[3] for row in chosen], dtype=np.int64)))
    return Split(parts[2], parts[1], parts[0], tuple(path.stem for path in paths), counted, records, len(rows))


def is_pairs(data: str) -> bool:
    """Whether `load` takes it, by its name."""
    return data in SETS or Path(data).suffix in (".json", ".jsonl", ".parquet")


def pieces(text: str) -> int:
    """Tokens of a text, counted without a tokenizer (`COUNTED`)."""
    return len(_PIECES.findall(text))


def counter(tokenizer: str | None) -> tuple[Callable[[Sequence[str]], Ints], str]:
    """What counts the tokens of texts, and what it is, in words. ValueError if the tokenizer is not to be had."""
    if tokenizer is None:
        return lambda texts: np.array([pieces(text) for text in texts], dtype=np.int64), COUNTED
    loaded = load_tokenizer(tokenizer, "estimation.tokenizer")

    def count(texts: Sequence[str]) -> Ints:
        ids = loaded(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return np.array([len(one) for one in ids], dtype=np.int64)

    return count, f"tokenizer {tokenizer}"


def load_tokenizer(name: str, key: str) -> Any:
    """A tokenizer of transformers, by the name of its model or a folder; `key` is where the user says so. ValueError if
    it is not to be had.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(f"{key}: needs pip install -e '.[lengths]'; null does without one") from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each time that it knocks at the Hub
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={name}: neither a folder with a tokenizer nor to be had from the Hub; "
            "give a folder, or null to do without one"
        ) from error


def _paths(data: str) -> list[Path]:
    if data in SETS:
        advice = (
            "`python scripts/fetch_data.py sharegpt_text` gets it"
            if data == "sharegpt_text"
            else "it is of GPTeacher, github.com/teknium1/GPTeacher"
        )
        return [find_data(path, f"{advice}, or give estimation.data=FILE") for path in SETS[data]]
    path = Path(data).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"estimation.data={data}: no such file; choose from {', '.join(SETS)}, or give a file")
    return [path]


def _read(path: Path) -> tuple[list[tuple[str, str]], int]:
    """The pairs of a file, and the number of its records."""
    records = open_objects(path)
    pairs = [pair for record in records if isinstance(record, dict) and (pair := _pair(record)) is not None]
    if not pairs:
        raise NoPairs(
            f"{path}: no record has a prompt ({', '.join(_PROMPTS)}) and a response ({', '.join(_RESPONSES)}), "
            f"or turns ({', '.join(_TURNS)})"
        )
    return pairs, len(records)


def _pair(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The prompt and the response of a record, or of the first two turns of a conversation; None without both."""
    for key in _TURNS:
        turns = record.get(key)
        if isinstance(turns, list):
            said = [turn for turn in turns if isinstance(turn, dict) and _who(turn) != "system"]
            if len(said) < 2 or _who(said[0]) not in ("human", "user") or _who(said[1]) in ("human", "user"):
                return None
            question, answer = (turn.get("value", turn.get("content")) for turn in said[:2])
            return (question, answer) if isinstance(question, str) and isinstance(answer, str) else None
    prompt = next((record[key] for key in _PROMPTS if isinstance(record.get(key), str)), None)
    response = next((record[key] for key in _RESPONSES if isinstance(record.get(key), str)), None)
    if prompt is None or response is None:
        return None
    more = record.get("input")
    return (f"{prompt}\n{more}" if isinstance(more, str) and more else prompt), response


def _who(turn: Mapping[str, Any]) -> Any:
    return turn.get("from", turn.get("role"))
