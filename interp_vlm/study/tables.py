"""Tidy tables: one row per number, with what is needed to read it without the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from interp_vlm.stats import Estimate, holm

__all__ = ["COLUMNS", "corrected", "row", "tidy", "where"]

COLUMNS = (
    *("quantity", "unit", "value", "low", "high", "level", "n", "groups", "baseline", "compared", "p", "p_holm"),
    *("method", "seed", "note"),
)
"""Columns of every table after its own: the number, its interval, what it counts, what it was compared with and how."""


def row(estimate: Estimate, quantity: str, unit: str, *, scale: float = 1.0, **facts: Any) -> dict[str, Any]:
    """One number of a table.

    Args:
        estimate: the number with its interval.
        quantity: what it is, in words.
        unit: its unit, "" for a pure number.
        scale: 100 turns shares into percent.
        facts: the experiment's own columns, and `baseline` and `compared` where there is something to compare with.
    """
    return {
        **facts,
        "quantity": quantity,
        "unit": unit,
        "value": estimate.value * scale,
        "low": estimate.low * scale,
        "high": estimate.high * scale,
        "level": estimate.level,
        "n": estimate.n,
        "groups": estimate.groups,
        "p": estimate.p,
        "method": estimate.method,
        "seed": estimate.seed,
        "note": estimate.reason,
    }


def tidy(rows: Iterable[dict[str, Any]], own: Sequence[str]) -> pd.DataFrame:
    """Rows as a table: the experiment's own columns first, then the common ones, with fixed types."""
    frame = pd.DataFrame(list(rows), columns=[*own, *COLUMNS])
    texts = [name for name in own if name not in ("layer",)] + ["quantity", "unit", "compared", "method", "note"]
    frame[texts] = frame[texts].astype("string").fillna("")
    numbers = ["value", "low", "high", "level", "baseline", "p", "p_holm"]
    frame[numbers] = frame[numbers].astype("float64")
    whole = [name for name in ("layer",) if name in own] + ["n", "groups", "seed"]
    frame[whole] = frame[whole].astype("Int64")
    return frame


def corrected(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with p-values corrected by Holm over all tests in it."""
    tested = frame["p"].notna()
    if tested.any():
        frame.loc[tested, "p_holm"] = holm(frame.loc[tested, "p"].to_numpy())
    return frame


def where(frame: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The rows in which every named column has the wanted value, in their order."""
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return frame
