"""Picture files: opening them, telling what is wrong with one, and leaving the broken ones out."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from interp_vlm.data.example import Example, Examples, Skipped
from interp_vlm.errors import DataError

__all__ = ["Candidate", "digest", "gather", "image_fault", "open_image"]

LISTED = 10  # broken pictures named in an error


@dataclass(frozen=True)
class Candidate:
    """An example whose picture has not been looked at yet.

    Attributes:
        example: the example; its `image` decodes `source`.
        name: the picture as its source names it, for messages.
        source: the picture's file, or its encoded bytes.
    """

    example: Example
    name: str
    source: Path | bytes


def open_image(source: Path | bytes, name: str = "") -> Image.Image:
    """The decoded picture, its file closed.

    Raises:
        DataError: it is missing, empty, truncated, no picture, or larger than Pillow's decompression-bomb limit.
    """
    try:
        with _opened(source) as image:
            image.load()
            return image
    except _FAULTS as error:
        named = source if isinstance(source, Path) else name or "in memory"
        raise DataError(
            f"picture {named} cannot be read: {_reason(source, error)}",
            expected="a picture that Pillow can decode",
            remedy="mend the file",
        ) from error


def image_fault(source: Path | bytes) -> str | None:
    """What is wrong with a picture, or None; the whole file is decoded, a JPEG at an eighth of its size."""
    try:
        with _opened(source) as image:
            image.draft("L", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except _FAULTS as error:
        return _reason(source, error)
    return None


def digest(encoded: bytes) -> str:
    """Short name of a picture's bytes, for pictures that have no other identity."""
    return blake2b(encoded, digest_size=8).hexdigest()


def gather(candidates: Iterable[Candidate], origin: str, *, limit: int | None, on_error: str) -> Examples:
    """The examples whose pictures can be read.

    Args:
        candidates: looked at in order, each distinct picture once.
        origin: what names the pictures, for messages.
        limit: how many examples to return at most; with "skip", broken ones do not count.
        on_error: "raise" an error that lists the broken pictures, or "skip" and count them.

    Raises:
        DataError: a broken picture and "raise", or no readable picture at all.
    """
    check_options(limit, on_error)
    faults: dict[Path | str, str | None] = {}
    kept: list[Example] = []
    skipped: list[Skipped] = []
    for candidate in candidates:
        if limit is not None and len(kept) + (len(skipped) if on_error == "raise" else 0) >= limit:
            break
        key = candidate.source if isinstance(candidate.source, Path) else digest(candidate.source)
        if key not in faults:
            faults[key] = image_fault(candidate.source)
        reason = faults[key]
        if reason is None:
            kept.append(candidate.example)
        else:
            skipped.append(Skipped(candidate.example.id, candidate.name, reason))
    if skipped and (on_error == "raise" or not kept):
        raise _broken(skipped, len(faults), origin, on_error)
    return Examples(kept, skipped)


def check_options(limit: int | None, on_error: str) -> None:
    """Refuse a limit below 1 and an unknown way to treat broken pictures."""
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}", expected="a positive number of examples, or None for all")
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error is {on_error!r}", expected='"raise" or "skip"')


def _broken(skipped: list[Skipped], pictures: int, origin: str, on_error: str) -> DataError:
    named = list(dict.fromkeys(f"{one.path} ({one.reason})" for one in skipped))
    more = f" and {len(named) - LISTED} more" if len(named) > LISTED else ""
    return DataError(
        f"{len(named)} of {pictures} pictures of {origin} cannot be read: {', '.join(named[:LISTED])}{more}",
        expected="pictures that Pillow can decode",
        remedy="mend them or give the right image folder"
        + ("" if on_error == "skip" else ', or pass on_error="skip" to leave them out and count them'),
    )


_FAULTS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow raises for broken files: SyntaxError for bad PNG chunks, ValueError for impossible sizes."""


@contextmanager
def _opened(source: Path | bytes):
    """Open a picture; a possible decompression bomb is an error, odd metadata beside good pixels is passed over."""
    if isinstance(source, bytes) and not source:
        raise OSError("no bytes")
    if isinstance(source, Path) and source.exists() and not source.is_file() and not source.is_dir():
        raise OSError("not a regular file")  # opening a pipe would wait for its writer for ever
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # opened here, as Pillow leaves a file open whose first bytes it cannot read
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file, Image.open(file) as image:
            yield image


def _reason(source: Path | bytes, error: Exception) -> str:
    if isinstance(source, Path):
        try:
            if not source.exists():
                return "missing"
            if source.is_dir():
                return "a folder"
            if source.is_file() and source.stat().st_size == 0:
                return "empty file"
        except OSError as refused:
            return refused.strerror or type(refused).__name__
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels, a possible decompression bomb"
    return " ".join(str(error).split()) or type(error).__name__
