"""Files of records: CSV, JSON, JSON lines and parquet, packed by gzip or not, as columns that know their lines.

What a file is, is seen in the file and not in its name.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import compute, parquet
from pyarrow import csv as arrow_csv


class Table:
    """Rows of a file by column; what is wrong is told by the line that it stands in."""

    def __init__(self, path: Path, names: Sequence[str], rows: int) -> None:
        self.path = path
        self.names = list(names)
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def has(self, column: str) -> bool:
        """Whether there is such a column."""
        return column in self.names

    def values(self, column: str) -> Any:
        """The values of a column: an arrow array, or a list."""
        raise NotImplementedError

    def line(self, row: int) -> str:
        """Where a row stands in the file, for messages: "row 3"."""
        return f"row {row + 1}"


class _Arrow(Table):
    """A CSV or a parquet file."""

    def __init__(self, path: Path, table: pa.Table, text: str | None = None) -> None:
        super().__init__(path, table.column_names, table.num_rows)
        self._table = table
        self._text = text  # of a CSV, to find lines in

    def has(self, column: str) -> bool:
        return self._path(column) is not None

    def values(self, column: str) -> Any:
        first, *rest = self._path(column) or [column]
        array = self._table[first]
        return compute.struct_field(array, rest) if rest else array

    def objects(self) -> list[Any]:
        """The rows, each as an object."""
        return list(self._table.to_pylist())

    def _path(self, column: str) -> list[str] | None:
        """The nested fields that a dotted path names; None if there are no such."""
        if column in self.names:
            return [column]
        first, *rest = column.split(".")
        if first not in self.names:
            return None
        kind = self._table.schema.field(first).type
        for part in rest:
            if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
                return None
            kind = kind.field(part).type
        return [first, *rest]

    def line(self, row: int) -> str:
        if self._text is None:
            return super().line(row)
        reader = csv.reader(io.StringIO(self._text), delimiter=_delimiter(self._text))
        filled = 0
        for fields in reader:
            filled += bool(fields)
            if filled == row + 2:  # the header is the first
                return f"line {reader.line_num}"
        return super().line(row)


class _Records(Table):
    """A JSON file: objects, each with the line that it stands in, if it is of JSON lines."""

    def __init__(self, path: Path, records: Sequence[Mapping[str, Any]], lines: Sequence[int] | None) -> None:
        names = dict.fromkeys(str(name) for record in records for name in record)
        super().__init__(path, list(names), len(records))
        self._records = records
        self._lines = lines

    def has(self, column: str) -> bool:
        return any(_at(record, column) is not None for record in self._records)

    def values(self, column: str) -> Any:
        return [_at(record, column) for record in self._records]

    def line(self, row: int) -> str:
        return super().line(row) if self._lines is None else f"line {self._lines[row]}"


def _at(record: Mapping[str, Any], column: str) -> Any:
    """The value of a name or dotted path in an object; None if it has none."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def open_table(path: Path) -> Table:
    """The records of a file, by column. OSError if it cannot be read; ValueError, in one line with file and line, if it
    is none of these, or holds no record.
    """
    content = _content(path)
    found = _parquet(path, content) if _is_parquet(content) else _text_table(path, _text(path, content))
    if not len(found):
        raise ValueError(f"{path}: holds no request")
    return found


def open_objects(path: Path) -> list[Any]:
    """The records of a JSON, JSON lines or parquet file, each as it is, not only objects. Errors: of `open_table`."""
    content = _content(path)
    if _is_parquet(content):
        return _parquet(path, content).objects()
    text = _text(path, content)
    if not _is_json(text):
        raise ValueError(f"{path}: is no JSON, JSON lines or parquet file")
    return _json(path, text)[0]


def _content(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give one file")
    content = path.read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be unpacked: {error}") from error


def _text(path: Path, content: bytes) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path}: is no text; give CSV, JSON, JSON lines or parquet")
    return text


def _is_parquet(content: bytes) -> bool:
    return content[:4] == b"PAR1"


def _is_json(text: str) -> bool:
    return text.lstrip()[:1] in ("{", "[")


def _parquet(path: Path, content: bytes) -> _Arrow:
    try:
        return _Arrow(path, parquet.read_table(io.BytesIO(content)))
    except pa.ArrowException as error:
        raise ValueError(f"{path}: is no parquet file: {_first_line(error)}") from error


def _text_table(path: Path, text: str) -> Table:
    if not _is_json(text):
        return _csv(path, text)
    records, lines = _json(path, text)
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            if lines is None:
                raise ValueError(f"{path}: must hold a list of objects, one for each request")
            raise ValueError(f'{path}: line {lines[number]} is no object, such as {{"input_length": 12}}')
    return _Records(path, records, lines)


_HOLDERS = ("requests", "data", "rows")  # names by which an object holds the list of all records


def _json(path: Path, text: str) -> tuple[list[Any], list[int] | None]:
    """Records of JSON lines, with the line of each; or of a list, or of an object that holds one."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] == "[":
            raise ValueError(f"{path}: is no JSON: {error.msg} in line {error.lineno}") from error
        return _json_lines(path, text)
    if isinstance(whole, dict) and whole:
        held = next((whole[name] for name in _HOLDERS if isinstance(whole.get(name), list)), None)
        return ([whole], [1]) if held is None else (held, None)
    if not isinstance(whole, list) or not whole:
        raise ValueError(f"{path}: must hold a list of objects, one for each request")
    return whole, None


def _json_lines(path: Path, text: str) -> tuple[list[Any], list[int]]:
    records, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):  # and at nothing else that Unicode takes for the end of a line
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is no JSON: {error.msg} at character {error.colno}") from error
        lines.append(number)
    return records, lines


def _delimiter(text: str) -> str:
    """What separates the fields of a CSV, by its header."""
    header = text.split("\n", 1)[0]
    return max(",\t;|", key=header.count)


def _csv(path: Path, text: str) -> Table:
    if not text.strip():
        raise ValueError(f"{path}: is empty")
    delimiter = _delimiter(text)
    header = next(csv.reader(io.StringIO(text), delimiter=delimiter))
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: line 1 has the column {twice[0]!r} twice")
    own = pa.BufferOutputStream()  # Arrow reads ahead in a thread, which must need no Python when this process ends
    own.write(text.encode())
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(own.getvalue()),
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values='"' in text),
            convert_options=arrow_csv.ConvertOptions(null_values=[""], true_values=[], false_values=[]),
        )
    except pa.ArrowException as error:
        raise ValueError(f"{path}: {_ragged(text, delimiter) or _first_line(error)}") from error
    return _Arrow(path, table, text=text)


def _ragged(text: str, delimiter: str) -> str | None:
    """The first line of a CSV that has more or fewer fields than its header."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    wanted = len(next(reader))
    for fields in reader:
        if fields and len(fields) != wanted:
            return f"line {reader.line_num} has {len(fields)} fields, the header {wanted}"
    return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
