"""Rows of a table file (JSON Lines, JSON, CSV, TSV, Parquet), each knowing its place for messages."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_vlm.errors import DataError

__all__ = ["FORMATS", "Row", "check_columns", "check_unique", "local_path", "read_rows", "table_format"]

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
LONGEST = 100_000
"""Characters of one cell: a longer one is a broken table, and would keep a tokenizer busy for hours."""
UNPACKED, RATIO = 1 << 26, 100
"""A gzip file may always unpack to so many bytes, and beyond them to so many times its size: text stays below that."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        place: file and line, for messages.
        fields: column to value.
    """

    place: str
    fields: Mapping[str, Any]

    def text(self, column: str) -> str:
        """The value as text without surrounding blanks; integers are written out.

        Raises:
            DataError: missing (null, NaN, blank) or another type.
        """
        value = self.fields[column]
        if is_missing(value):
            raise DataError(f"{self.place}: {column} is missing ({value!r})", expected="text", remedy="fill it in")
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(
                f"{self.place}: {column} is {_brief(value)}, a {type(value).__name__}",
                expected="text or a whole number",
            )
        return _sound(str(value).strip(), f"{self.place}: {column}")

    def answers(self) -> tuple[str, ...]:
        """The accepted answers: a list of texts, or of objects with an `answer` as in VQA annotations; () when absent.

        In CSV and TSV the list is written as JSON.
        """
        value = self.fields.get("answers")
        if value is None:
            return ()
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        listed = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
        texts = [item.get("answer") if isinstance(item, Mapping) else item for item in listed]
        texts = [text.strip() if isinstance(text, str) else "" for text in texts]
        if not texts or not all(texts):
            raise DataError(
                f"{self.place}: answers is {_brief(self.fields['answers'])}",
                expected='a list of texts, such as ["cat", "a cat"]',
            )
        return tuple(_sound(text, f"{self.place}: an answer") for text in texts)


def is_missing(value: Any) -> bool:
    """Null, NaN, blank, or the text "nan" that careless writers leave."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan"))


def _sound(text: str, place: str) -> str:
    """The text itself, where a tokenizer can take it.

    Raises:
        DataError: very long, or with half of a surrogate pair, which no encoding has.
    """
    if len(text) > LONGEST:
        raise DataError(f"{place} has {len(text)} characters", expected=f"{LONGEST} at most", remedy="mend the table")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{place} is {_brief(text)}, no Unicode text", expected="whole characters")
    return text


def local_path(path: str | Path) -> Path:
    """A path as the caller wrote it, with `~` as the home directory.

    Raises:
        DataError: a home directory that nobody has, or a name that no file system takes.
    """
    try:
        found = Path(path).expanduser()
        found.exists()
    except (OSError, RuntimeError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{path} is no path ({why})", expected="a file or folder", remedy="check the path") from error
    return found


def table_format(path: Path) -> str:
    """The format that a file's name says, "" for none; a final .gz does not count."""
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in FORMATS if name.endswith(ending)), "")


def read_rows(path: Path) -> list[Row]:
    """All rows of a table.

    Raises:
        DataError: no such file, unknown format, empty, not UTF-8, broken gzip, not JSON on some line, ragged CSV.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {found}", expected="a file", remedy="check the path")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", expected="one example on each line")
    match table_format(path):
        case ".parquet":
            rows = _parquet(path)
        case ".csv":
            rows = _separated(path, ",")
        case ".tsv":
            rows = _separated(path, "\t")
        case ".jsonl" | ".json":
            rows = _json(path)
        case _:
            raise DataError(f"{path} has an unknown format", expected=f"a name ending in {', '.join(FORMATS)} (or .gz)")
    if not rows:
        raise DataError(f"{path} holds no rows", expected="at least one example")
    return rows


def check_columns(rows: Sequence[Row], required: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Every row has the required columns, an optional one is in all rows or in none, and each holds one type.

    Raises:
        DataError: names the first row that differs.
    """
    first = rows[0]
    present = [column for column in optional if column in first.fields]
    for column in (*required, *present):
        types: dict[str, str] = {}
        for row in rows:
            if column not in row.fields:
                raise DataError(
                    f"{row.place} has no column {column!r} (it has {', '.join(map(str, row.fields)) or 'none'})",
                    expected=f"the columns {', '.join(required)}",
                    remedy="rename or add the column",
                )
            if not is_missing(row.fields[column]):
                types.setdefault(type(row.fields[column]).__name__, row.place)
        if len(types) > 1:
            (one, here), (other, there) = list(types.items())[:2]
            raise DataError(
                f"column {column!r} mixes types: {one} at {here}, {other} at {there}",
                expected="one type",
                remedy="write every value as text",
            )
    for row in rows:
        if late := [column for column in optional if column in row.fields and column not in present]:
            raise DataError(
                f"{first.place} has no column {late[0]!r}, which {row.place} has", expected="it in every row or in none"
            )


def check_unique(rows: Sequence[Row], ids: Sequence[str]) -> None:
    """Refuse two rows of one id."""
    places: dict[str, str] = {}
    for row, name in zip(rows, ids, strict=True):
        if name in places:
            raise DataError(
                f"{row.place} repeats the id {name!r} of {places[name]}",
                expected="an id of its own for each example",
                remedy="number the examples, or leave the id column out",
            )
        places[name] = row.place


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", expected="a readable file") from error
    try:
        if path.suffix.lower() == ".gz":
            data = _unpacked(data, path)
        return data.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error})", remedy="fetch or compress it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})", expected="UTF-8") from error


def _unpacked(data: bytes, path: Path) -> bytes:
    """What a gzip file holds; one that unpacks to far more than any text is refused before it fills the memory."""
    most = max(UNPACKED, RATIO * len(data))
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        unpacked = file.read(most + 1)
    if len(unpacked) > most:
        raise DataError(
            f"{path} unpacks to more than {RATIO} times its {len(data)} bytes, a possible decompression bomb",
            expected="a table",
            remedy="unpack it yourself if you trust it",
        )
    return unpacked


def _json(path: Path) -> list[Row]:
    """One object a line, as POPE's .json files are too; or one array of objects."""
    text = _text(path)
    if text.lstrip().startswith("["):
        items = [(f"item {i}", item) for i, item in enumerate(_parse(text, f"{path}"), start=1)]
    else:
        lines = ((i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip())
        items = [(f"line {i}", _parse(line, f"{path}, line {i}")) for i, line in lines]
    for place, item in items:
        if not isinstance(item, dict):
            raise DataError(f"{path}, {place} is {_brief(item)}", expected='a JSON object such as {"image": ...}')
    return [Row(f"{path}, {place}", item) for place, item in items]


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else f"{error}"
        raise DataError(
            f"{place} is not JSON ({why}): {_brief(text[:200].strip())}", expected="one JSON object on each line"
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose names stands there once: of two answers Python would drop one without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"an object names {_brief(twice)} twice")
    return found


def _separated(path: Path, separator: str) -> list[Row]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=separator, strict=True)
    rows: list[Row] = []
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DataError(f"{path}, line 1 names a column twice ({', '.join(header)})", expected="distinct columns")
        for cells in reader:
            if not cells:
                continue
            place = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise DataError(
                    f"{place} has {len(cells)} cells",
                    expected=f"{len(header)}, as the header has",
                    remedy="quote cells",
                )
            rows.append(Row(place, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num} is not a table row ({error})", remedy="check its quotes"
        ) from error
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
        names = table.column_names
        if len(set(names)) < len(names):
            raise DataError(f"{path} names a column twice ({', '.join(names)})", expected="distinct columns")
        rows = table.to_pylist()
    except DataError:
        raise
    except Exception as error:  # Arrow's own errors, and Python's for values that it has no type for
        raise DataError(
            f"{path} is not a Parquet file ({str(error) or type(error).__name__})", expected="Parquet"
        ) from error
    return [Row(f"{path}, row {i}", fields) for i, fields in enumerate(rows, start=1)]


def _brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
