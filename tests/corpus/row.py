"""A row of the corpus: a bad input, the door through which it goes, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interp_vlm.errors import DataError, InterpVLMError

__all__ = ["Bad"]


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        id: what is bad, in a few words with dashes.
        make: puts it into an empty folder and returns what goes through the door.
        says: a pattern of the one line of the error; it names what was found.
        raises: the type of the error.
        recovers: instead of an error, a documented recovery: a check of what comes out.
    """

    id: str
    make: Callable[[Path], Any]
    says: str = ""
    raises: type[InterpVLMError] = DataError
    recovers: Callable[[Any], object] | None = None

    def __repr__(self) -> str:
        return self.id
