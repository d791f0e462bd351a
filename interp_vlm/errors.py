"""The typed errors of the library: one base class and a handful of kinds.

Every message names the input, what was found, what was expected, and the remedy, in one line of readable length.
"""

import re

__all__ = [
    "DataError",
    "InterpVLMError",
    "InterventionError",
    "ModelError",
    "SelectionError",
    "StudyError",
]


LONGEST = 1500  # characters of one part: names in bad input may be megabytes long


class InterpVLMError(Exception):
    """Base of every error raised on purpose by this library.

    Line breaks and control characters, which names and messages of other libraries may hold, are taken out or escaped,
    and the middle of a very long part is left out.

    Args:
        problem: what was found, naming the input.
        expected: what would have been right.
        remedy: what the caller can do now.

    Example:
        >>> print(InterpVLMError("layer 9 does not exist", expected="0 to 3", remedy="choose a smaller layer"))
        layer 9 does not exist; expected 0 to 3; choose a smaller layer
    """

    def __init__(self, problem: str, *, expected: str = "", remedy: str = "") -> None:
        self.problem, self.expected, self.remedy = _line(problem), _line(expected), _line(remedy)
        parts = [self.problem, f"expected {self.expected}" if expected else "", self.remedy]
        super().__init__("; ".join(part for part in parts if part))


def _line(text: str) -> str:
    """Text that can be printed in one line anywhere."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"
    if text.isprintable():
        return text
    text = re.sub(r"\s*[\n\r\v\f\x85\u2028\u2029]\s*|\t", " ", text).strip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ModelError(InterpVLMError):
    """A model, processor or family that the library cannot work with."""


class DataError(InterpVLMError):
    """Examples, images or files that cannot be read as asked."""


class SelectionError(InterpVLMError):
    """A selector, role or position that names nothing, or something absent."""


class InterventionError(InterpVLMError):
    """An intervention that is malformed, out of range, or cannot have an effect."""


class StudyError(InterpVLMError):
    """A study, run folder or results table that is inconsistent or incomplete."""
