"""Trace files: every known format gives its lengths and times, and a wrong file is told in one line that says where."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from block.workload.prompts import pieces
from block.workload.trace_formats import FORMATS, MOST_TOKENS, Columns, UnknownFormat, read
from block.workload.traces import Trace

DOCS = Path(__file__).resolve().parents[2] / "docs" / "workloads.md"


def lines(*records: Any) -> str:
    return "\n".join(json.dumps(record) for record in records) + "\n"


def written(folder: Path, content: str | bytes, name: str = "trace") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def traced(path: Path, timed: bool = True, **columns: str) -> Trace:
    return read(path, Columns(**columns), timed=timed)


# format; what a file of it holds; prompts, responses, seconds (None: it has no times)
KNOWN: list[tuple[str, str, list[int], list[int], list[float] | None]] = [
    ("block", "prompt_tokens,output_tokens,arrival\n512,120,0.5\n64,300,0.9\n", [512, 64], [120, 300], [0, 0.4]),
    (
        "azure",  # 2023
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
        [374, 396],
        [44, 109],
        [0, 4.314579],
    ),
    (
        "azure",  # 2024
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:00.017335+00:00,2399,6\n",
        [2162, 2399],
        [5, 6],
        [0, 0.007405],
    ),
    (
        "burstgpt",
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,230,1317,API log\n",
        [472, 1087],
        [18, 230],
        [0, 40],
    ),
    (
        "burstgpt",  # with sessions
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5.5,abc,1.2,ChatGPT,472,18,490,Conversation log\n7,,0.3,GPT-4,10,23,33,API log\n",
        [472, 10],
        [18, 23],
        [0, 1.5],
    ),
    (
        "bailian",
        lines(
            {"chat_id": 159, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 521, "output_length": 132,
             "type": "text", "turn": 1, "hash_ids": [1089, 1090]},
            {"chat_id": 160, "parent_chat_id": 159, "timestamp": 62.5, "input_length": 700, "output_length": 80,
             "type": "text", "turn": 2, "hash_ids": [1089, 1090, 7]},
        ),
        [521, 700],
        [132, 80],
        [0, 1.386],
    ),
    (
        "mooncake",
        lines(
            {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]},
            {"timestamp": 3000, "input_length": 655, "output_length": 52, "hash_ids": [0, 2]},
        ),
        [6758, 655],
        [500, 52],
        [0, 3],
    ),
    (
        "sessions",  # each turn's own words, 1.5 s after the turn before; the prompt is all that was said
        lines(
            {"session_id": "a", "timestamp": 1000, "input_length": 100, "output_length": 40},
            {"session_id": "b", "timestamp": 1100, "input_length": 7, "output_length": 8},
            {"session_id": "a", "delay": 1500, "input_length": 10, "output_length": 20},
            {"session_id": "a", "delay": 500, "input_length": 5, "output_length": 5},
        ),
        [100, 7, 150, 175],
        [40, 8, 20, 5],
        [0, 0.1, 1.5, 2.0],
    ),
    (
        "sessions",  # with hashes, which are of whole prompts
        lines(
            {"session_id": "a", "input_length": 512, "output_length": 40, "hash_ids": [1]},
            {"session_id": "a", "delay": 250, "input_length": 1024, "output_length": 20, "hash_ids": [1, 2]},
        ),
        [512, 1024],
        [40, 20],
        [0, 0.25],
    ),
    (
        "vidur",
        "arrived_at,num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n0.0,374,44,418,8.5\n4.3,396,109,505,3.6\n",
        [374, 396],
        [44, 109],
        [0, 4.3],
    ),
    ("vidur", "num_prefill_tokens,num_decode_tokens,pd_ratio\n3742,284,0.07\n", [3742], [284], None),
    (
        "splitwise",
        "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
        "0,2,0,0.0,1,374,44\n1,2,0,4.3,1,396,109\n",
        [374, 396],
        [44, 109],
        [0, 4.3],
    ),
    ("llmservingsim", "input_toks\toutput_toks\tarrival_time_ns\n16\t8\t0\n32\t9\t5000\n", [16, 32], [8, 9], [0, 5e-6]),
    (
        "llmservingsim",
        lines(
            {"input_toks": 16, "output_toks": 8, "arrival_time_ns": 0, "input_tok_ids": [1, 2]},
            {"input_toks": 32, "output_toks": 9, "arrival_time_ns": 5000, "input_tok_ids": [1, 2]},
        ),
        [16, 32],
        [8, 9],
        [0, 5e-6],
    ),
    (
        "inference_perf",
        json.dumps(
            [
                {"start_time": 10.0, "end_time": 11.0, "info": {"input_tokens": 30, "output_tokens": 9}},
                {"start_time": 10.5, "end_time": 11.0, "info": {"input_tokens": 31, "output_tokens": 8}},
            ]
        ),
        [30, 31],
        [9, 8],
        [0, 0.5],
    ),
    ("guidellm", "prompt,prompt_tokens_count,output_tokens_count\na,128,64\nb,129,65\n", [128, 129], [64, 65], None),
    (
        "vllm_custom",
        lines({"prompt": "What is the capital of France?", "output_tokens": 20}, {"prompt": "x", "output_tokens": 7}),
        [pieces("What is the capital of France?"), 1],
        [20, 7],
        None,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "prompt", "output", "times"), KNOWN)
def test_a_format_is_recognised_and_read(
    name: str, content: str, prompt: list[int], output: list[int], times: list[float] | None, tmp_path: Path
) -> None:
    trace = traced(written(tmp_path, content), timed=times is not None)
    assert trace.format == name
    assert (trace.prompt.tolist(), trace.output.tolist()) == (prompt, output)
    assert (trace.rows, trace.dropped) == (len(prompt), {})
    if times is None:
        assert trace.times is None
        with pytest.raises(ValueError, match=r"workload.time_column"):
            traced(written(tmp_path, content))
    else:
        assert trace.times is not None
        assert trace.times.tolist() == pytest.approx(times, abs=1e-6)


def test_every_format_is_tried_and_in_the_docs() -> None:
    assert {name for name, *_ in KNOWN} == set(FORMATS)
    section = DOCS.read_text().partition("## Formats of trace files")[2]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    for name, form in FORMATS.items():
        row = next(line for line in rows if line.startswith(f"| `{name}` "))
        for column in filter(None, (form.prompt, form.output, form.time)):
            assert f"`{column}`" in row, (name, column)


def test_the_published_mooncake_trace_is_read_whole() -> None:
    if "BLOCK_DATA" not in os.environ:
        pytest.skip("BLOCK_DATA is not set: the public traces are not here")
    trace = traced(Path(os.environ["BLOCK_DATA"]) / "traces" / "mooncake_conversation.jsonl.gz")
    assert (trace.format, trace.rows, len(trace.prompt)) == ("mooncake", 12_031, 12_031)
    assert trace.prompt.mean() == pytest.approx(12_035, abs=1)
    assert trace.times is not None
    assert trace.times[-1] == pytest.approx(3_537, abs=10)  # about an hour


def test_columns_are_named_by_paths_in_json_and_parquet(tmp_path: Path) -> None:
    records = [{"usage": {"in": 5, "out": 6}, "at": "2024-01-01T00:00:00Z"},
               {"usage": {"in": 7, "out": 8}, "at": "2024-01-01T00:00:02Z"}]  # fmt: skip
    named = {"prompt": "usage.in", "output": "usage.out", "time": "at"}
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "trace.parquet")
    for path in (written(tmp_path, lines(*records)), tmp_path / "trace.parquet"):
        trace = traced(path, **named)
        assert (trace.format, trace.prompt.tolist(), trace.output.tolist()) == ("own", [5, 7], [6, 8])
        assert trace.times is not None
        assert trace.times.tolist() == [0, 2]


def test_a_single_column_can_be_named(tmp_path: Path) -> None:
    trace = traced(written(tmp_path, "prompt_tokens,answer,arrival\n5,6,0\n7,8,2\n"), output="answer")
    assert (trace.format, trace.output.tolist(), trace.times.tolist()) == ("block", [6, 8], [0, 2])  # type: ignore[union-attr]


def test_times_of_ones_own_have_a_unit(tmp_path: Path) -> None:
    path = written(tmp_path, "p,o,t\n1,2,1000\n3,4,3500\n")
    named = {"prompt": "p", "output": "o", "time": "t"}
    assert traced(path, **named).times.tolist() == [0, 2500]  # type: ignore[union-attr]
    assert traced(path, unit="ms", **named).times.tolist() == [0, 2.5]  # type: ignore[union-attr]


def test_the_unit_of_a_format_stays_when_lengths_are_named(tmp_path: Path) -> None:
    path = written(
        tmp_path, lines(*({"timestamp": t, "input_length": 5, "output_length": 6, "x": 9} for t in (0, 500)))
    )
    trace = traced(path, prompt="x")
    assert (trace.prompt.tolist(), trace.times.tolist()) == ([9, 9], [0, 0.5])  # type: ignore[union-attr]


def test_conversations_are_counted_where_a_response_has_a_count(tmp_path: Path) -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]
    trace = traced(written(tmp_path, lines({"messages": said, "n": 3})), timed=False, prompt="messages", output="n")
    assert trace.prompt.tolist() == [pieces("Be brief.\nHello there")]
    assert trace.prompts == ["Be brief.\nHello there"]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_fields_are_separated_as_the_header_is(delimiter: str, tmp_path: Path) -> None:
    text = "prompt_tokens,output_tokens,note\n5,6,a\n7,8,b\n".replace(",", delimiter)
    assert traced(written(tmp_path, text), timed=False).prompt.tolist() == [5, 7]


def test_marks_and_line_separators_of_unicode_break_no_json_lines(tmp_path: Path) -> None:
    record = '{"input_length": 5, "output_length": 6, "timestamp": %d, "text": "one\u2028two\u0085three"}'
    content = "\ufeff" + record % 0 + "\r\n\n" + record % 2000
    trace = traced(written(tmp_path, content))
    assert (trace.rows, trace.times.tolist()) == (2, [0, 2])  # type: ignore[union-attr]


def test_packed_files_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, gzip.compress(b"prompt_tokens,output_tokens\n5,6\n"), "trace.csv.gz")
    assert traced(path, timed=False).output.tolist() == [6]


def test_rows_without_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path, "prompt_tokens,output_tokens\n5,6\n0,7\n-3,0\n5,0\n4,4\n")
    trace = traced(path, timed=False)
    assert (trace.prompt.tolist(), trace.rows) == ([5, 4], 5)
    assert trace.dropped == {"prompt_tokens below 1": 2, "output_tokens below 1": 1}


def test_rows_are_ordered_by_time_only_if_times_are_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, "prompt_tokens,output_tokens,arrival\n1,1,9\n2,2,8\n")
    assert traced(path).prompt.tolist() == [2, 1]
    assert traced(path, timed=False).prompt.tolist() == [1, 2]


CSV = "prompt_tokens,output_tokens,arrival\n"
GOOD = {"prompt_tokens": 1, "output_tokens": 2}
# what the file holds; what of it is named; what is said of it
WRONG: list[tuple[str | bytes, dict[str, str], list[str]]] = [
    ("", {}, ["is empty"]),
    ("\n\n", {}, ["is empty"]),
    (b"", {}, ["is empty"]),
    (CSV, {}, ["holds no request"]),
    ("[]", {}, ["must hold a list of objects"]),
    ("[1, 2]", {}, ["must hold a list of objects"]),
    ('{"a": 1}', {}, ["has the columns a", "workload.prompt_column"]),
    ("a,b\n1,2\n", {}, ["has the columns a, b", "workload.prompt_column", "workload.output_column", "mooncake"]),
    ("a,b\n1,2\n", {"prompt": "a"}, ["has the columns a, b"]),
    ("prompt_tokens,b\n1,2\n", {}, ["lack 'output_tokens' of the format block", "workload.output_column"]),
    ("a,GeneratedTokens\n1,2\n", {}, ["lack 'ContextTokens' of the format azure", "workload.prompt_column"]),
    (CSV + "1,2,3\n", {"prompt": "promt_tokens"}, ["no column 'promt_tokens'", "did you mean prompt_tokens?"]),
    (CSV + "1,2,3\n", {"prompt": "nonesuch"}, ["no column 'nonesuch'", "workload.prompt_column"]),
    (CSV + "1,2,3\n", {"output": "x"}, ["no column 'x'", "workload.output_column", "choose from prompt_tokens"]),
    (CSV + "1,2,3\n4,5,6\n", {"time": "x"}, ["no column 'x'", "workload.time_column"]),
    (CSV + "1,2,3\n4,5,6\n", {"format": "mooncake"}, ["no column 'input_length'", "workload.prompt_column"]),
    (CSV + "1,2,3\ninf,5,6\n", {}, ["line 3", "'prompt_tokens'", "workload.prompt_column", "inf", "whole number"]),
    (CSV + "1,2,3\n4,nan,6\n", {}, ["line 3", "'output_tokens'", "workload.output_column", "nan"]),
    (CSV + "1,2,3\n1e30,5,6\n", {}, ["line 3", "1e+30", f"at most {MOST_TOKENS:,}"]),
    (CSV + "1,2,3\n99999999999999999999999,5,6\n", {}, ["line 3", "at most"]),
    (CSV + "1,2,3\n9223372036854775807,5,6\n", {}, ["line 3", "9223372036854775807", "at most"]),
    (CSV + "1,2,3\n12.5,5,6\n", {}, ["line 3", "12.5", "whole number"]),
    (CSV + "1,2,3\n,5,6\n", {}, ["line 3", "nothing"]),
    (CSV + "1,2,3\nmany,5,6\n", {}, ["line 3", "'many'", "whole number"]),
    (CSV + "1,2,3\ntrue,5,6\n", {}, ["line 3", "'true'"]),
    (CSV + "1,2,3\n\n4,many,6\n", {}, ["line 4", "'many'"]),
    (CSV + "1,2,3\n4,5,soon\n", {}, ["line 3", "'soon'", "workload.time_column", "a number or a timestamp"]),
    (CSV + "1,2,3\n4,5,\n", {}, ["line 3", "workload.time_column"]),
    (CSV + "1,2,3\n4,5,inf\n", {}, ["line 3", "inf"]),
    (CSV + "1,2,3\n4,5,3\n", {}, ["two different arrival times", "workload.arrivals=poisson"]),
    (CSV + "0,2,3\n4,0,5\n", {}, ["no row has both"]),
    (CSV + "1,2\n", {}, ["line 2 has 2 fields, the header 3"]),
    (CSV + "1,2,3\n4,5,6\n7,8,9,10\n", {}, ["line 4 has 4 fields, the header 3"]),
    ("a,b,a\n1,2,3\n", {"prompt": "a", "output": "b"}, ["line 1 has the column 'a' twice"]),
    ((CSV + "1,2,3\n").encode() + b"# caf\xe9,1,2\n", {}, ["line 3 is not UTF-8 (byte 0xe9)"]),
    (CSV.encode("utf-16"), {}, ["line 1 is not UTF-8"]),
    (b"\x00\x01\x02\x03", {}, ["is no text"]),
    (b"PAR1 and no more", {}, ["is no parquet file"]),
    (b"\x1f\x8b and no more", {}, ["cannot be unpacked"]),
    ('{"input_length": 1, "output_length": 2}\n{"input_length": 1,\n', {}, ["line 2 is no JSON"]),
    ('{"input_length": 1}\n[1, 2]\n', {}, ["line 2 is no object"]),
    ("[{\"a\": 1},\n{\"a\": }]", {}, ["is no JSON", "line 2"]),
    (lines(GOOD, {"prompt_tokens": 1}), {}, ["line 2", "'output_tokens'", "nothing"]),
    (lines(GOOD, {"prompt_tokens": [1], "output_tokens": 2}), {}, ["line 2", "[1]"]),
    (lines({"prompt_tokens": 1, "output_tokens": float("inf")}), {}, ["line 1", "inf"]),
    (lines({"prompt_tokens": 1, "output_tokens": True}), {}, ["line 1", "True"]),
    (lines({"u": {"p": 1, "o": 2}}, {"u": {"p": 1}}), {"prompt": "u.p", "output": "u.o"}, ["line 2", "'u.o'"]),
    (lines({"prompt": "hello", "output_tokens": "many"}), {}, ["line 1", "'many'", "workload.output_column"]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "named", "told"), WRONG)
def test_a_wrong_file_is_told_in_one_line(
    content: str | bytes, named: dict[str, str], told: list[str], tmp_path: Path
) -> None:
    path = written(tmp_path, content)
    timed = isinstance(content, str) and content.startswith(CSV)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        traced(path, timed=timed, **named)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    for part in told:
        assert part in message


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        traced(tmp_path)


def test_unknown_columns_can_be_told_from_wrong_ones(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormat):
        traced(written(tmp_path, "a,b\n1,2\n"))


def test_a_format_and_a_unit_are_of_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"workload.format=moonkake: did you mean mooncake\?"):
        Columns(format="moonkake")
    with pytest.raises(ValueError, match=r"workload.time_unit=min: choose from s, ms, us, ns"):
        Columns(unit="min")
