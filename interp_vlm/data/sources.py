"""One line of text that names a data source, as `--data` takes it: digits, pope:PATH, file:PATH, hf:ID."""

from __future__ import annotations

from urllib.parse import parse_qsl

from interp_vlm.data.example import Examples
from interp_vlm.data.files import files
from interp_vlm.data.hub import hub
from interp_vlm.data.images import check_options
from interp_vlm.data.pope import pope
from interp_vlm.errors import DataError

__all__ = ["SCHEMES", "load"]

SCHEMES = {
    "digits": ("difficulty",),
    "pope": ("images",),
    "file": ("images",),
    "hf": ("name", "revision"),
}
"""Scheme to the options that it takes after a question mark."""


def load(
    spec: str,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    on_error: str = "raise",
) -> Examples:
    """Examples of the source that `spec` names.

    | spec | source |
    |---|---|
    | `digits`, `digits?difficulty=hard` | embedded digit scenes |
    | `pope:coco_pope_adversarial.json?images=val2014` | a POPE file; pictures in `images` next to it unless said |
    | `file:questions.csv?images=FOLDER`, `file:FOLDER` | a table of image, question, answer |
    | `hf:lmms-lab/POPE`, `hf:lmms-lab/POPE?name=Full`, `hf:FOLDER` | a Hugging Face data set |

    Args:
        spec: scheme, colon, place, and options after a question mark, joined by `&`.
        split: of `digits` (default "test") and `hf` (default: the only one, or "test"); files have none.
        limit: how many examples at most; default: 600 digit scenes, else all.
        seed: of the digit scenes; files are read in their own order.
        on_error: "raise" an error that lists missing or broken pictures, or "skip" them into `.skipped`.

    Raises:
        DataError: an unknown scheme or option, or what the source's own reader finds.

    Example:
        >>> try:
        ...     load("coco:val")
        ... except DataError as error:
        ...     print(error.expected)
        digits, pope:PATH, file:PATH or hf:ID
    """
    check_options(limit, on_error)
    scheme, place, options = _parse(spec)
    if split is not None and scheme in ("pope", "file"):
        raise DataError(f"{spec} has no splits, but split={split!r} was asked for", remedy="leave the split out")
    match scheme:
        case "digits":
            from interp_vlm.data.digits import digit_scenes

            return Examples(digit_scenes(split=split or "test", n=limit or 600, seed=seed, **options))  # type: ignore[arg-type]
        case "pope":
            return pope(place, limit=limit, on_error=on_error, **options)
        case "file":
            return files(place, limit=limit, on_error=on_error, **options)
        case _:
            return hub(place, split=split, limit=limit, on_error=on_error, **options)


def _parse(spec: str) -> tuple[str, str, dict[str, str]]:
    """Scheme, place and options of a spec."""
    body, _, query = spec.partition("?")
    scheme, _, place = body.partition(":")
    if scheme not in SCHEMES or bool(place) == (scheme == "digits"):
        raise DataError(f"{spec!r} names no data source", expected="digits, pope:PATH, file:PATH or hf:ID")
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    if query and (not pairs or len(options) < len(pairs) or any(not value for value in options.values())):
        raise DataError(f"{spec!r} has malformed options", expected="name=value, joined by &")
    if unknown := [option for option in options if option not in SCHEMES[scheme]]:
        raise DataError(f"{spec!r} has the option {unknown[0]!r}", expected=f"only {', '.join(SCHEMES[scheme])}")
    return scheme, place, options
