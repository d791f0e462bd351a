"""Examples from a table of (image, question, answer) beside a folder of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from interp_vlm.data.example import Example, Examples
from interp_vlm.data.images import Candidate, gather, open_image
from interp_vlm.data.records import FORMATS, Row, check_columns, check_unique, local_path, read_rows, table_format
from interp_vlm.errors import DataError

__all__ = ["files"]

REQUIRED = ("image", "question", "answer")
OPTIONAL = ("id", "kind", "group")


def files(
    path: str | Path,
    images: str | Path | None = None,
    *,
    limit: int | None = None,
    on_error: str = "raise",
) -> Examples:
    """Examples from a table (JSON Lines, JSON, CSV, TSV, Parquet; text formats also gzipped).

    Columns: `image` (a file name; absolute paths and `..` are followed as written), `question`, `answer`, and where
    wanted `id`, `kind`, `group` (default: the image's name) and `answers` (a list; VQA's ten). Further columns go to
    `meta`. Every picture is checked before anything is returned, and decoded again at each reading of `example.image`.

    Args:
        path: the table, or a folder that holds one; among several, the one called metadata.
        images: folder of the pictures; default: the table's own folder.
        limit: the first so many examples.
        on_error: "raise" an error that lists missing or broken pictures, or "skip" them into `.skipped`.

    Raises:
        DataError: a malformed table (always), or broken pictures (with "raise").
    """
    table = find_table(local_path(path))
    rows = read_rows(table)
    check_columns(rows, REQUIRED, OPTIONAL)
    ids = [row.text("id") if "id" in row.fields else str(i) for i, row in enumerate(rows, start=1)]
    check_unique(rows, ids)
    folder = picture_folder(images, table.parent)
    examples = (_example(row, name, folder) for row, name in zip(rows, ids, strict=True))
    return gather(list(examples), f"{table}", limit=limit, on_error=on_error)


def find_table(path: Path) -> Path:
    """The table that a path means: itself, or the only one in a folder, or the one called metadata.*."""
    if not path.is_dir():
        return path
    tables = sorted(file for file in path.iterdir() if file.is_file() and table_format(file))
    named = [file for file in tables if file.name.lower().startswith("metadata.")]
    for candidates in (tables, named):
        if len(candidates) == 1:
            return candidates[0]
    found = ", ".join(file.name for file in tables[:10]) or "none"
    raise DataError(
        f"folder {path} holds no single table ({found})",
        expected=f"one file ending in {', '.join(FORMATS)}, or one called metadata.*",
        remedy="give the table's own path",
    )


def picture_folder(images: str | Path | None, default: Path) -> Path:
    """The folder asked for, which must exist, or the default."""
    folder = default if images is None else local_path(images)
    if not folder.is_dir():
        raise DataError(
            f"image folder {folder} {'is a file' if folder.exists() else 'does not exist'}",
            expected="a folder of pictures",
        )
    return folder


def file_candidate(row: Row, name: str, picture: str, folder: Path, known: Sequence[str], **fields: Any) -> Candidate:
    """An example about a picture file; columns that are not `known` go to its `meta`."""
    path = folder / picture
    meta = {column: value for column, value in row.fields.items() if column not in known}
    return Candidate(Example(id=name, image=partial(open_image, path), meta=meta, **fields), picture, path)


def _example(row: Row, name: str, folder: Path) -> Candidate:
    if isinstance(row.fields["image"], bytes | dict):
        raise DataError(
            f"{row.place}: image holds an encoded picture",
            expected="a file name",
            remedy="read tables with embedded pictures by hub(), or hf: on the command line",
        )
    picture = row.text("image")
    return file_candidate(
        row,
        name,
        picture,
        folder,
        (*REQUIRED, *OPTIONAL, "answers"),
        question=row.text("question"),
        answer=row.text("answer"),
        answers=row.answers(),
        kind=row.text("kind") if "kind" in row.fields else "question",
        group=row.text("group") if "group" in row.fields else picture,
    )
