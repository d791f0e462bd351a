"""One question about one picture: the unit that every data source yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

__all__ = ["Example"]


@dataclass(frozen=True, eq=False)
class Example:
    """A picture, a question about it, and the right answer.

    Attributes:
        id: unique within its data set, stable between runs.
        image: the picture, as decoded (any mode; the encoder converts it).
        question: the bare question; the family's prompt template is added by `vlm.encode`.
        answer: the right answer as text (the first of `answers`).
        kind: question kind, for example "existence"; results are reported within kinds.
        group: the picture's identity; the unit of every split and every resampling.
        answers: every accepted answer (VQA files carry ten); defaults to `(answer,)`.
        meta: what the source knows besides (objects and boxes of a scene, POPE's category).
    """

    id: str
    image: Image
    question: str
    answer: str
    kind: str = "question"
    group: str = ""
    answers: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.answers:
            object.__setattr__(self, "answers", (self.answer,))
        if not self.group:
            object.__setattr__(self, "group", self.id)

    def __repr__(self) -> str:
        return f"Example({self.id!r}, {self.kind}: {self.question!r} -> {self.answer!r})"
