"""What every statistic demands of its input: finite columns of one length, two classes, known groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from interp_vlm.errors import DataError

__all__ = ["as_classes", "as_column", "as_groups", "check_level", "check_resamples"]

Groups = ArrayLike | Sequence[Any] | None


def as_column(values: ArrayLike, name: str, n: int | None = None, ndim: int = 1) -> Float[np.ndarray, "..."]:
    """Finite float64 values with `ndim` axes, `n` of them along the first.

    Raises:
        DataError: not numbers, the wrong shape, or NaN or infinite values.
    """
    try:
        column = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} is not numeric ({error})", expected="numbers") from error
    if column.ndim != ndim:
        raise DataError(f"{name} has shape {column.shape}", expected=f"{ndim} axes")
    if n is not None and len(column) != n:
        raise DataError(f"{name} has {len(column)} values", expected=f"{n}, one for each observation")
    if bad := int((~np.isfinite(column)).sum()):
        raise DataError(
            f"{name} holds {bad} NaN or infinite values of {column.size}",
            expected="finite numbers",
            remedy="leave those observations out on purpose, and report how many",
        )
    return column


def as_classes(label: ArrayLike, name: str, n: int | None = None) -> Bool[np.ndarray, "n"]:
    """Two classes as booleans, from booleans or 0 and 1.

    Raises:
        DataError: any other value.
    """
    column = as_column(label, name, n)
    if strange := sorted(set(np.unique(column)) - {0.0, 1.0}):
        raise DataError(f"{name} holds {strange[0]:g}", expected="booleans, or 0 and 1")
    return column.astype(bool)


def as_groups(groups: Groups, n: int, name: str = "groups") -> tuple[Int[np.ndarray, "n"], int]:
    """Group number of each observation, and how many groups there are; without `groups` each is its own.

    Numbers follow the sorted labels, so that the order of the rows does not change which groups a seed draws.

    Raises:
        DataError: the wrong length, a missing label, or labels of mixed types.
    """
    if groups is None:
        return np.arange(n), n
    labels: list[Any] = np.asarray(groups).tolist() if hasattr(groups, "__array__") else list(groups)  # type: ignore[arg-type]
    if len(labels) != n:
        raise DataError(f"{name} has {len(labels)} values", expected=f"{n}, one for each observation")
    missing = sum(label is None or label == "" or label != label for label in labels)
    if missing:
        raise DataError(f"{name} holds {missing} missing labels", expected="a label for each observation")
    try:
        ordered = sorted(set(labels))
    except TypeError as error:
        raise DataError(f"{name} holds labels of mixed types ({error})", expected="all text or all numbers") from error
    number = {label: i for i, label in enumerate(ordered)}
    return np.array([number[label] for label in labels], dtype=np.intp), len(ordered)


def check_level(level: float) -> None:
    """Refuse a coverage that is not strictly between 0 and 1."""
    if not 0.0 < level < 1.0:
        raise DataError(f"level is {level!r}", expected="a share strictly between 0 and 1, such as 0.95")


def check_resamples(resamples: int) -> None:
    """Refuse fewer than 1,000 draws: the tails of the distribution would be noise."""
    if resamples < 1000:
        raise DataError(f"{resamples} resamples", expected="at least 1000", remedy="use the default")
