"""Numbers in words: the sentences of the report are made here, never written by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

__all__ = ["bracket", "counted", "excludes", "listed", "one", "p_text", "sizes", "span", "text"]

NOTHING = "–"


def text(value: float, digits: int = 1) -> str:
    """A number with a true minus sign, or a dash where there is none."""
    if value is None or math.isnan(value):
        return NOTHING
    shown = f"{value:.{digits}f}"
    return (shown.lstrip("-") if float(shown) == 0 else shown).replace("-", "−")


def bracket(row: pd.Series, digits: int = 1) -> str:
    """The interval of a table's row as [low, high], or "" where there is none."""
    if math.isnan(row["low"]):
        return ""
    return f"[{text(row['low'], digits)}, {text(row['high'], digits)}]"


def span(row: pd.Series, digits: int = 1, unit: str = "") -> str:
    """Value and interval of a table's row."""
    return " ".join(filter(None, (text(row["value"], digits) + unit, bracket(row, digits))))


def p_text(p: float) -> str:
    """A p-value as it is usually written."""
    if p is None or math.isnan(p):
        return NOTHING
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def listed(parts: Iterable[str]) -> str:
    """Parts joined as in a sentence.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    *most, final = list(parts)
    return f"{', '.join(most)} and {final}" if most else final


def excludes(row: pd.Series, null: float) -> bool:
    """Whether the row's interval leaves the null out: the report's word "evidence" rests on this alone."""
    return not math.isnan(row["low"]) and not row["low"] <= null <= row["high"]


def one(table: pd.DataFrame, **wanted: Any) -> pd.Series | None:
    """The row in which every named column has the wanted value, or None."""
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table.iloc[0] if len(table) else None


def counted(n: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "picture"), counted(1440, "picture")
        ('1 picture', '1,440 pictures')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def sizes(table: pd.DataFrame, noun: str = "question", group: str = "picture") -> str:
    """How many observations, and how many groups, the numbers of a table rest on."""
    rows = table.drop_duplicates(["n", "groups"])
    ns, groups = sorted(set(rows["n"])), sorted(set(rows["groups"]))
    if len(ns) == 1:
        return f"{counted(int(ns[0]), noun)} about {counted(int(groups[0]), group)}"
    return f"{ns[0]:,} to {counted(int(ns[-1]), noun)} about {groups[0]:,} to {counted(int(groups[-1]), group)}"


def interval_fact(table: pd.DataFrame) -> str:
    """How the intervals of a table were computed."""
    level = table["level"].dropna()
    return f"{100 * float(level.iloc[0]):g} %, bootstrap over pictures" if len(level) else "none"


def grid(
    rows: Sequence[tuple[str, ...]], models: Sequence[str], cell: Any, heads: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """A compact table with a column for each model.

    Args:
        rows: the leading cells of each line.
        models: column heads after those in `heads`.
        cell: cell(lead, model) gives the text.
        heads: heads of the leading cells.
    """
    return (*heads, *models), tuple((*lead, *(cell(lead, model) for model in models)) for lead in rows)
