"""The typed errors of the library: one base class and a handful of kinds.

Every message names the input, what was found, what was expected, and the remedy.
"""

__all__ = [
    "DataError",
    "InterpVLMError",
    "InterventionError",
    "ModelError",
    "SelectionError",
    "StudyError",
]


class InterpVLMError(Exception):
    """Base of every error raised on purpose by this library.

    Args:
        problem: what was found, naming the input.
        expected: what would have been right.
        remedy: what the caller can do now.

    Example:
        >>> print(InterpVLMError("layer 9 does not exist", expected="0 to 3", remedy="choose a smaller layer"))
        layer 9 does not exist; expected 0 to 3; choose a smaller layer
    """

    def __init__(self, problem: str, *, expected: str = "", remedy: str = "") -> None:
        self.problem, self.expected, self.remedy = problem, expected, remedy
        parts = [problem, f"expected {expected}" if expected else "", remedy]
        super().__init__("; ".join(part for part in parts if part))


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
