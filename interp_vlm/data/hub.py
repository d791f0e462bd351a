"""Examples from Hugging Face data sets: by id, or from a folder or file on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_vlm.data.example import Example, Examples
from interp_vlm.data.images import Candidate, check_options, digest, gather, open_image
from interp_vlm.data.pope import POPE_CATEGORIES
from interp_vlm.data.records import Row, check_columns, check_unique, local_path, table_format
from interp_vlm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["hub"]

REQUIRED = ("question", "answer")
IDS = ("id", "question_id")
GROUPS = ("group", "image_source", "image_id")
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def hub(
    id_or_path: str | Path,
    split: str | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    on_error: str = "raise",
) -> Examples:
    """Examples of a data set with the columns `image`, `question`, `answer`, as `lmms-lab/POPE` has.

    Read where present: `id` (else `question_id`, else the row's number), `kind`, `answers`, and the picture's identity
    `group`, `image_source` or `image_id` (else a digest of its bytes). With POPE's `category` the kind is "existence".
    Further columns go to `meta`. Pictures stay on disk and are decoded at each reading of `example.image`.

    Args:
        id_or_path: an id on the hub, a folder written by `save_to_disk`, a Parquet file, or any folder that
            `datasets.load_dataset` understands.
        split: which split; default: the only one, or "test".
        name: the configuration, where there are several.
        revision: branch, tag or commit on the hub.
        limit: the first so many examples.
        on_error: "raise" an error that lists broken pictures, or "skip" them into `.skipped`.

    Raises:
        DataError: a data set that cannot be loaded or lacks a column, or broken pictures (with "raise").
    """
    import datasets

    check_options(limit, on_error)
    dataset = _load(str(id_or_path), split, name, revision)
    columns = ("image", *REQUIRED)
    if absent := [column for column in columns if column not in dataset.column_names]:
        raise DataError(
            f"data set {id_or_path} has no column {absent[0]!r} (it has {', '.join(dataset.column_names)})",
            expected=f"the columns {', '.join(columns)}",
            remedy="rename them with datasets.Dataset.rename_column and save_to_disk",
        )
    try:
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    except Exception as error:  # the library raises Arrow, value and type errors alike
        kind = dataset.features["image"]
        raise DataError(f"column 'image' of {id_or_path} is {kind}", expected="pictures") from error
    fields = dataset.remove_columns("image")
    rows = [Row(f"{id_or_path}, row {i}", row) for i, row in enumerate(fields, start=1)]  # type: ignore[arg-type]
    if not rows:
        raise DataError(f"data set {id_or_path} holds no rows", expected="at least one example")
    check_columns(rows, REQUIRED, (*IDS, "kind", "group"))
    key = next((column for column in IDS if column in rows[0].fields), None)
    ids = [row.text(key) if key else str(i) for i, row in enumerate(rows, start=1)]
    check_unique(rows, ids)
    return gather(_candidates(dataset, rows, ids), f"{id_or_path}", limit=limit, on_error=on_error)


def _candidates(dataset: Dataset, rows: Sequence[Row], ids: Sequence[str]) -> Iterator[Candidate]:
    for index, (row, key) in enumerate(zip(rows, ids, strict=True)):
        source, name = _stored(dataset, index)
        group = next((row.text(column) for column in GROUPS if column in row.fields), None)
        kind = "existence" if str(row.fields.get("category")) in POPE_CATEGORIES else "question"
        known = ("id", "question", "answer", "answers", "kind", "group")
        example = Example(
            id=key,
            image=partial(_decode, dataset, index),
            question=row.text("question"),
            answer=row.text("answer"),
            kind=row.text("kind") if "kind" in row.fields else kind,
            group=group or (digest(source) if isinstance(source, bytes) else str(source)),
            answers=row.answers(),
            meta={column: value for column, value in row.fields.items() if column not in known},
        )
        yield Candidate(example, name, source)


def _stored(dataset: Dataset, index: int) -> tuple[Path | bytes, str]:
    """The encoded picture of a row, or its file, and a name for it."""
    stored = dataset[index]["image"] or {}
    place = f"row {index + 1}"
    if stored.get("bytes") is not None or not stored.get("path"):
        return stored.get("bytes") or b"", stored.get("path") or place
    return Path(stored["path"]), stored["path"]


def _decode(dataset: Dataset, index: int) -> Any:
    return open_image(*_stored(dataset, index))


def _load(source: str, split: str | None, name: str | None, revision: str | None) -> Dataset:
    """The split asked for, from whichever form the source has."""
    import datasets

    path = local_path(source)
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise DataError(f"{source} does not exist", expected="a file, a folder, or an id on the hub")
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it would say before it fails is said by the error below
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(path)
        elif path.is_file():
            builder = BUILDERS.get(table_format(path), "")
            if not builder:
                raise DataError(f"{path} has an unknown format", expected=f"a name ending in {', '.join(BUILDERS)}")
            data = datasets.load_dataset(builder, data_files=str(path))
        else:
            where = str(path) if path.exists() else source
            chosen = _choose(source, datasets.get_dataset_split_names(where, name, revision=revision), split)
            data = datasets.load_dataset(where, name, split=chosen, revision=revision)
    except DataError:
        raise
    except Exception as error:  # network, format and builder errors have no common base
        problem = " ".join(str(error).split())[:200]
        raise DataError(
            f"data set {source} cannot be loaded ({type(error).__name__}: {problem})",
            expected="an id on the hub or a data set on disk",
            remedy="without a network, download it elsewhere, save_to_disk, and give that folder",
        ) from error
    finally:
        logger.setLevel(level)
    if isinstance(data, datasets.DatasetDict):
        return data[_choose(source, [str(key) for key in data], split)]
    if isinstance(data, datasets.Dataset):
        return data
    raise DataError(f"data set {source} is a {type(data).__name__}", expected="a data set with rows")


def _choose(source: str, splits: Sequence[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    chosen = split or "test"
    if chosen not in splits:
        raise DataError(
            f"data set {source} has no split {chosen!r}" if split else f"data set {source} has several splits",
            expected=f"one of {', '.join(splits)}",
            remedy="name one with split=",
        )
    return chosen
