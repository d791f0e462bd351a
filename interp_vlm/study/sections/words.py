"""Numbers in words: the sentences of the report are made from tables here, never written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from interp_vlm.study.tables import where

__all__ = [
    "bracket", "counted", "each", "excludes", "grid", "interval_fact", "listed", "one", "p_text", "percent",
    "sinks_fact", "sizes", "span", "text",
]  # fmt: skip

GLUE = "\u00a0"  # a blank at which no line breaks


def text(value: float, digits: int = 1) -> str:
    """A number with a true minus sign, or a dash where there is none.

    Example:
        >>> text(-0.04), text(-2.25, 2)
        ('0.0', '−2.25')
    """
    if value is None or math.isnan(value):
        return "–"
    shown = f"{value:.{digits}f}"
    return (shown.lstrip("-") if float(shown) == 0 else shown).replace("-", "−")


def percent(value: float, digits: int = 0) -> str:
    """A number with its percent sign, kept on one line."""
    return f"{text(value, digits)}{GLUE}%"


def bracket(row: pd.Series, digits: int = 1) -> str:
    """The interval of a table's row as [low, high], or "" where there is none."""
    if math.isnan(row["low"]):
        return ""
    return f"[{text(row['low'], digits)},{GLUE}{text(row['high'], digits)}]"


def span(row: pd.Series, digits: int = 1, unit: str = "") -> str:
    """Value, unit and interval of a table's row."""
    value = f"{text(row['value'], digits)}{GLUE}{unit}" if unit else text(row["value"], digits)
    return " ".join(filter(None, (value, bracket(row, digits))))


def p_text(p: float) -> str:
    """A p-value as it is usually written."""
    if p is None or math.isnan(p):
        return "–"
    return f"p{GLUE}<{GLUE}0.001" if p < 0.001 else f"p{GLUE}={GLUE}{p:.3f}" if p < 0.1 else f"p{GLUE}={GLUE}{p:.2f}"


def listed(parts: Iterable[str]) -> str:
    """Parts joined as in a sentence.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    *most, final = list(parts)
    return f"{', '.join(most)} and {final}" if most else final


def each(rows: Iterable[pd.Series], value: Callable[[pd.Series], str]) -> str:
    """A value for each model, as in "62 % (llava) and 63 % (paligemma)"."""
    return listed(f"{value(row)} ({row['model']})" for row in rows)


def excludes(row: pd.Series, null: float) -> bool:
    """Whether the row's interval leaves the null out: the report's word "evidence" rests on this alone."""
    return not math.isnan(row["low"]) and not row["low"] <= null <= row["high"]


def one(table: pd.DataFrame, **wanted: Any) -> pd.Series | None:
    """The row in which every named column has the wanted value, or None."""
    found = where(table, **wanted)
    return found.iloc[0] if len(found) else None


def counted(n: int, noun: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "picture"), counted(1440, "picture")
        ('1 picture', '1,440 pictures')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def sizes(rows: pd.DataFrame) -> str:
    """How many questions and pictures the numbers of a table rest on (the same for every row)."""
    first = rows.iloc[0]
    return f"{counted(int(first['n']), 'question')} about {counted(int(first['groups']), 'picture')}"


def interval_fact(table: pd.DataFrame) -> str:
    """How the intervals of a table were computed."""
    level = table["level"].dropna()
    return f"{percent(100 * float(level.iloc[0]))}, bootstrap over pictures (BCa)" if len(level) else "none"


def sinks_fact(table: pd.DataFrame) -> str:
    """Whether there are attention sinks on the pictures at all."""
    counts = table[table["quantity"] == "attention sinks on the picture"]
    if float(counts["value"].max()) > 0.0:
        return f"{each((row for _, row in counts.iterrows()), lambda row: text(row['value']))} tokens a picture"
    return (
        "none: no image token scores above 20 (a model narrower than 400 cannot), so leaving sinks out changes nothing"
    )


def grid(
    leads: Sequence[tuple[str, ...]],
    models: Sequence[str],
    cell: Callable[[tuple[str, ...], str], str],
    heads: tuple[str, ...],
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """A compact table with a column for each model.

    Args:
        leads: the leading cells of each line.
        models: heads of the columns after the leading ones.
        cell: the text for a line and a model.
        heads: heads of the leading cells.
    """
    return (*heads, *models), tuple((*lead, *(cell(lead, model) for model in models)) for lead in leads)
