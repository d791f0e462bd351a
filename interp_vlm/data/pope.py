"""POPE annotation files (Li et al. 2023, arXiv 2305.10355): is there such an object in the picture, yes or no."""

from __future__ import annotations

from pathlib import Path

from interp_vlm.data.example import Examples
from interp_vlm.data.files import file_candidate, picture_folder
from interp_vlm.data.images import Candidate, gather
from interp_vlm.data.records import Row, check_columns, check_unique, local_path, read_rows
from interp_vlm.errors import DataError

__all__ = ["POPE_CATEGORIES", "pope"]

COLUMNS = ("question_id", "image", "text", "label")
POPE_CATEGORIES = ("adversarial", "popular", "random")


def pope(
    path: str | Path,
    images: str | Path | None = None,
    *,
    limit: int | None = None,
    on_error: str = "raise",
) -> Examples:
    """Examples of a POPE file: JSON Lines of `question_id`, `image`, `text`, `label`, plain or gzipped.

    The group is the image's name (six questions share one), the kind "existence", `meta["category"]` the sort of
    negatives where the file's name says it (`coco_pope_adversarial.json`).

    Args:
        path: the annotation file.
        images: folder of the pictures; default: a folder called `images` next to the file, else the file's own folder.
        limit: the first so many examples.
        on_error: "raise" an error that lists missing or broken pictures, or "skip" them into `.skipped`.

    Raises:
        DataError: a malformed file (always), or broken pictures (with "raise").
    """
    file = local_path(path)
    rows = read_rows(file)
    check_columns(rows, COLUMNS)
    ids = [row.text("question_id") for row in rows]
    check_unique(rows, ids)
    beside = file.parent / "images"
    folder = picture_folder(images, beside if beside.is_dir() else file.parent)
    category = next((word for word in POPE_CATEGORIES if word in file.name.lower()), None)
    examples = [_example(row, name, folder, category) for row, name in zip(rows, ids, strict=True)]
    return gather(examples, f"{file}", limit=limit, on_error=on_error)


def _example(row: Row, name: str, folder: Path, category: str | None) -> Candidate:
    label = row.text("label").lower()
    if label not in ("yes", "no"):
        raise DataError(f"{row.place}: label is {label!r}", expected="yes or no")
    if category is not None:
        row = Row(row.place, {"category": category, **row.fields})
    picture = row.text("image")
    return file_candidate(
        row, name, picture, folder, COLUMNS, question=row.text("text"), answer=label, kind="existence", group=picture
    )
