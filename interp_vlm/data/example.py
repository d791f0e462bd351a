"""One question about one picture, the unit that every data source yields, and the list that they come in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from PIL.Image import Image

__all__ = ["Example", "Examples", "Skipped"]


class _Picture:
    """Reads the `image` of an example: the picture held, or what the function held decodes."""

    def __get__(self, example: Example, owner: type) -> Image:
        held: Image | Callable[[], Image] = vars(example)["image"]
        return held if isinstance(held, Image) else held()

    def __set__(self, example: Example, held: Image | Callable[[], Image]) -> None:
        vars(example)["image"] = held


@dataclass(frozen=True, eq=False)
class Example:
    """A picture, a question about it, and the right answer.

    Attributes:
        id: unique within its data set, stable between runs.
        image: the picture, as decoded (any mode; the encoder converts it). It may be given as a function of no
            arguments that decodes it: that is called at each reading and nothing is kept, so that thousands of
            pictures need no memory.
        question: the bare question; the family's prompt template is added by `vlm.encode`.
        answer: the right answer as text (the first of `answers`).
        kind: question kind, for example "existence"; results are reported within kinds.
        group: the picture's identity; the unit of every split and every resampling.
        answers: every accepted answer (VQA files carry ten); defaults to `(answer,)`.
        meta: what the source knows besides (objects and boxes of a scene, POPE's category).
    """

    id: str
    if TYPE_CHECKING:
        image: _Picture
    else:
        image: Image | Callable[[], Image]
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


# set after the class is made: inside it, the dataclass would take the descriptor for a default value
type.__setattr__(Example, "image", _Picture())


@dataclass(frozen=True)
class Skipped:
    """An example left out because its picture cannot be read.

    Attributes:
        id: the example's id.
        path: the picture, as its source names it.
        reason: what is wrong with it.
    """

    id: str
    path: str
    reason: str


class Examples(list[Example]):
    """A list of examples that also knows which ones were left out.

    Example:
        >>> Examples([], skipped=[Skipped("7", "dog.jpg", "missing")])
        Examples(0 questions about 0 pictures, 1 skipped)
    """

    def __init__(self, examples: Iterable[Example] = (), skipped: Iterable[Skipped] = ()) -> None:
        super().__init__(examples)
        self.skipped: tuple[Skipped, ...] = tuple(skipped)

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Example: ...
    @overload
    def __getitem__(self, index: slice, /) -> Examples: ...
    def __getitem__(self, index: SupportsIndex | slice, /) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(super().__getitem__(index), self.skipped)
        return super().__getitem__(index)

    def __repr__(self) -> str:
        pictures = len({example.group for example in self})
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"Examples({len(self)} questions about {pictures} pictures{skipped})"
