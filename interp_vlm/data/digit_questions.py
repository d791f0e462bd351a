"""Questions about digit scenes, with their right answers and the objects that they are about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from interp_vlm.data.digit_canvas import CELL, COLOURS, POPULAR, Placed, Scene

__all__ = ["KINDS", "NEGATIVES", "NUMBERS", "Question", "ask"]

NUMBERS = ("zero", "one", "two", "three", "four")
"""Counts are answered in words, so that they do not collide with digits."""

NEGATIVES = ("random", "popular", "adversarial")
"""How the absent (digit, colour) of an existence question answered "no" was chosen, after POPE (arXiv 2305.10355):
any absent one; an absent one that is popular in the data; one whose digit and colour are both present, but not
together."""


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: a key of `KINDS`.
        text: the question, lower case, words separated by blanks.
        answer: one word.
        asked: indices of the scene's objects that the question is about (for an adversarial negative, those with the
            digit or the colour).
        negative: one of `NEGATIVES` for an existence question answered "no", else None.
    """

    kind: str
    text: str
    answer: str
    asked: tuple[int, ...]
    negative: str | None = None


def _pick(rng: np.random.Generator, options: list):
    return options[int(rng.integers(len(options)))]


def existence(scene: Scene, rng: np.random.Generator, yes: bool, negative: str | None = None) -> Question | None:
    """`is there a red 7 ?`; None when no negative of the asked sort exists."""
    present = {(o.digit, o.colour) for o in scene.objects}
    if yes:
        k = int(rng.integers(len(scene.objects)))
        digit, colour = scene.objects[k].digit, scene.objects[k].colour
        return Question("existence", f"is there a {colour} {digit} ?", "yes", (k,))
    if negative == "adversarial":
        options = [(d, c) for d in sorted({d for d, _ in present}) for c in COLOURS if any(x == c for _, x in present)]
    elif negative == "popular":
        options = list(POPULAR.items())
    else:
        options = [(d, c) for d in range(10) for c in COLOURS]
    options = [pair for pair in options if pair not in present]
    if not options:
        return None
    digit, colour = _pick(rng, options)
    asked = tuple(
        k for k, o in enumerate(scene.objects) if negative == "adversarial" and (o.digit == digit or o.colour == colour)
    )
    return Question("existence", f"is there a {colour} {digit} ?", "no", asked, negative)


def count(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`how many 7 are there ?`: three times in four about a digit that is present."""
    counts = Counter(o.digit for o in scene.objects)
    numbers = sorted(set(counts.values())) if rng.random() < 0.75 else [0]
    number = _pick(rng, numbers)
    digit = _pick(rng, [d for d in range(10) if counts[d] == number])
    asked = tuple(k for k, o in enumerate(scene.objects) if o.digit == digit)
    return Question("count", f"how many {digit} are there ?", NUMBERS[number], asked) if number < len(NUMBERS) else None


def _unique(scene: Scene, by: Callable[[Placed], object]) -> list[int]:
    counts = Counter(by(o) for o in scene.objects)
    return [k for k, o in enumerate(scene.objects) if counts[by(o)] == 1]


def colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`what colour is the 7 ?`, about a digit that occurs once."""
    if not (options := _unique(scene, lambda o: o.digit)):
        return None
    k = _pick(rng, options)
    return Question("colour", f"what colour is the {scene.objects[k].digit} ?", scene.objects[k].colour, (k,))


def digit(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`what digit is red ?`, about a colour that occurs once."""
    if not (options := _unique(scene, lambda o: o.colour)):
        return None
    k = _pick(rng, options)
    return Question("digit", f"what digit is {scene.objects[k].colour} ?", str(scene.objects[k].digit), (k,))


def where(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`where is the 7 ?`: middle when its centre is in the middle column of cells, else left or right."""
    if not (options := _unique(scene, lambda o: o.digit)):
        return None
    k = _pick(rng, options)
    column = scene.objects[k].cell[1]
    side = "middle" if column == 3 else "left" if column < 3 else "right"
    return Question("where", f"where is the {scene.objects[k].digit} ?", side, (k,))


def left_of(scene: Scene, rng: np.random.Generator) -> Question | None:
    """`is the 3 left of the 7 ?`, about two digits that occur once, a cell or more apart in x."""
    options = _unique(scene, lambda o: o.digit)
    pairs = [(i, j) for i in options for j in options if scene.objects[i].x + CELL <= scene.objects[j].x]
    if not pairs:
        return None
    i, j = _pick(rng, pairs)
    answer = "yes" if rng.random() < 0.5 else "no"
    i, j = (i, j) if answer == "yes" else (j, i)
    text = f"is the {scene.objects[i].digit} left of the {scene.objects[j].digit} ?"
    return Question("left_of", text, answer, (i, j))


KINDS: Mapping[str, Callable[..., Question | None]] = MappingProxyType(
    {"existence": existence, "count": count, "colour": colour, "digit": digit, "where": where, "left_of": left_of}
)
"""The question kinds; each function gives None where the scene allows no such question."""


def ask(
    scene: Scene, rng: np.random.Generator, kind: str, *, yes: bool = True, negatives: tuple[float, ...] = (1, 1, 1)
) -> Question | None:
    """One question of a kind about a scene, or None where the scene allows none.

    Args:
        scene: what is asked about.
        rng: source of every random choice.
        kind: a key of `KINDS`.
        yes: for existence, the answer.
        negatives: for existence answered "no", the weights of `NEGATIVES`; a sort that the scene does not allow
            becomes "random".
    """
    if kind != "existence":
        return KINDS[kind](scene, rng)
    if yes:
        return existence(scene, rng, True)
    weights = np.cumsum(negatives)
    negative = NEGATIVES[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    return existence(scene, rng, False, negative) or existence(scene, rng, False, "random")
