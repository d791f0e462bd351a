"""JSON Lines in, JSON Lines out: one question a line, scored as it comes, in constant memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_vlm.data.records import Row
from interp_vlm.errors import DataError, InterpVLMError

if TYPE_CHECKING:
    from interp_vlm.probes.monitor import ReliabilityMonitor
    from interp_vlm.vlm import VLM

__all__ = ["ON_ERROR", "score_lines"]

ON_ERROR = ("record", "raise")


def score_lines(
    monitor: ReliabilityMonitor, vlm: VLM, lines: Iterable[bytes], images: Path, *, on_error: str = "record"
) -> Iterator[bytes]:
    """One line out for each line in, in order.

    A line in is an object with `image` (a file name in `images`, or an absolute path), `question`, and `id` where
    wanted. A line out has `line` (its number), the `id`, and `answer`, `confidence`, `score`, `reliable` (null without
    a threshold), or `error` in their place.

    Args:
        monitor: bound to the model.
        vlm: the model.
        lines: encoded as UTF-8; read one at a time.
        images: folder of the pictures.
        on_error: "record" the error of a line in its place, or "raise" it.

    Raises:
        ModelError: another model than the monitor's.
        DataError: a line that cannot be scored, with "raise"; it names the line.
    """
    if on_error not in ON_ERROR:
        raise DataError(f"on_error is {on_error!r}", expected=" or ".join(map(repr, ON_ERROR)))
    monitor.bind(vlm)
    for number, line in enumerate(lines, start=1):
        out: dict[str, Any] = {"line": number}
        try:
            asked = _object(line, number)
            if "id" in asked.fields:
                out["id"] = asked.fields["id"]
            found = monitor.score(vlm, images / _text(asked, "image"), _text(asked, "question"))[0]
            out |= {
                "answer": str(found.answer), "confidence": round(found.confidence, 6), "score": round(found.score, 6),
                "reliable": found.reliable,
            }  # fmt: skip
        except InterpVLMError as error:
            if on_error == "raise":
                said = str(error)
                raise DataError(said if said.startswith("line ") else f"line {number}: {said}") from error
            out["error"] = " ".join(str(error).split())
        # escaped to ASCII: a lone surrogate in an id has no other way back out
        yield json.dumps(out).encode() + b"\n"


def _object(line: bytes, number: int) -> Row:
    try:
        found = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        what = "is blank" if not line.strip() else f"is not JSON ({type(error).__name__})"
        raise DataError(
            f"line {number} {what}", expected='an object such as {"image": ..., "question": ...}'
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"line {number} is a {type(found).__name__}", expected="a JSON object")
    return Row(f"line {number}", found)


def _text(row: Row, column: str) -> str:
    if column not in row.fields:
        raise DataError(f"{row.place} has no {column!r}", expected="image and question")
    return row.text(column)
