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

__all__ = ["FORMATS", "Row", "check_columns", "check_unique", "read_rows", "table_format"]

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


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
        return str(value).strip()

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
            except json.JSONDecodeError:
                value = None
        listed = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
        texts = [item.get("answer") if isinstance(item, Mapping) else item for item in listed]
        texts = [text.strip() if isinstance(text, str) else "" for text in texts]
        if not texts or not all(texts):
            raise DataError(
                f"{self.place}: answers is {_brief(self.fields['answers'])}",
                expected='a list of texts, such as ["cat", "a cat"]',
            )
        return tuple(texts)


def is_missing(value: Any) -> bool:
    """Null, NaN, blank, or the text "nan" that careless writers leave."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan"))


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
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error})", remedy="fetch or compress it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})", expected="UTF-8") from error


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
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place} is not JSON ({error.msg} at column {error.colno}): {_brief(text.strip())}",
            expected="one JSON object on each line",
        ) from error


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
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file ({str(error).splitlines()[0]})", expected="Parquet") from error
    return [Row(f"{path}, row {i}", fields) for i, fields in enumerate(table.to_pylist(), start=1)]


def _brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
