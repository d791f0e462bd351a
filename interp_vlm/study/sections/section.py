"""What a section of the report consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Panel", "Section"]


@dataclass(frozen=True)
class Panel:
    """One figure of the report.

    Attributes:
        name: its file name without ending.
        caption: what is drawn and how to read it.
        figure: drawn by matplotlib.
    """

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    """One experiment in the report.

    Attributes:
        title, question: in plain words.
        answer: a sentence or two, made from the numbers.
        points: the numbers of each model, a line each.
        facts: n, the interval, what was compared: short lines.
        method: how it was done, with the source.
        panels: figures.
        table: heads and lines of a compact table.
        summary: the clause that the report's opening paragraph takes over; "" for none.
    """

    title: str
    question: str
    answer: str
    facts: tuple[tuple[str, str], ...]
    method: str
    table: tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]
    points: tuple[str, ...] = ()
    panels: tuple[Panel, ...] = ()
    summary: str = ""
