"""Digit scenes: real handwritten digits in colours on a noisy canvas, with questions whose answers are known.

Everything follows from (split, seed, difficulty, index): example i does not depend on how many are asked for.
Several questions share a picture, so the picture (`Example.group`) is the unit of every split and every interval.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from interp_vlm.data.digit_canvas import CANVAS, COLOURS, DIFFICULTIES, Placed, Scene, draw_scene, render, replace_glyph
from interp_vlm.data.digit_glyphs import SPLITS
from interp_vlm.data.digit_questions import KINDS, Question, ask
from interp_vlm.data.example import Example
from interp_vlm.errors import DataError

__all__ = ["CANVAS", "COLOURS", "DIFFICULTIES", "KINDS", "SPLITS", "Pair", "digit_pairs", "digit_scenes"]

_SHARES: Mapping[str, float] = {
    "existence": 0.4,
    "count": 0.2,
    "colour": 0.15,
    "digit": 0.15,
    "where": 0.1,
    "left_of": 0.1,
}
_MOST: Mapping[str, int] = {"existence": 6, "count": 3, "colour": 2, "digit": 2, "where": 2, "left_of": 2}
_DEFAULT_KINDS = ("existence", "count", "colour", "digit", "where")
_PAIR_KINDS = ("existence", "colour", "digit")
_RENDER_AT_ONCE = 32


@dataclass(frozen=True, eq=False)
class Pair:
    """One question about two scenes that differ in a single object, so that the right answers differ.

    Attributes:
        clean: the example before the change.
        corrupt: the example after it; noise, clutter and every other object are the same.
        changed: `object` (its index), `field` ("digit" or "colour"), `clean` and `corrupt` (its values), `box`
            (pixels outside which the two pictures are equal, as x0, y0, x1, y1).
    """

    clean: Example
    corrupt: Example
    changed: Mapping[str, Any]


def _check(split: str, n: int, seed: int, difficulty: str) -> None:
    if split not in SPLITS:
        raise DataError(f"split {split!r} does not exist", expected=", ".join(SPLITS), remedy="choose one of them")
    if difficulty not in DIFFICULTIES:
        raise DataError(
            f"difficulty {difficulty!r} does not exist", expected=", ".join(DIFFICULTIES), remedy="choose one of them"
        )
    if n < 1 or seed < 0:
        raise DataError(
            f"n = {n} and seed = {seed}", expected="n of at least 1 and a seed of at least 0", remedy="change them"
        )


def _stream(split: str, seed: int, difficulty: str, purpose: str, index: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(f"{purpose}/{split}/{difficulty}".encode()), seed, index])


def digit_scenes(
    split: str = "test",
    n: int = 600,
    seed: int = 0,
    difficulty: str = "standard",
    kinds: Sequence[str] | None = None,
    questions_per_image: int = 6,
) -> list[Example]:
    """Questions about digit scenes, several on each picture.

    Half of the existence questions are answered yes; the others name a (digit, colour) that is absent, chosen as in
    POPE (`meta["negative"]`: "random", "popular" or "adversarial", in equal parts).

    Args:
        split: "train", "validation" or "test"; no handwritten glyph serves two of them.
        n: number of questions.
        seed: another seed gives other scenes.
        difficulty: a key of `DIFFICULTIES`: "standard" or "hard".
        kinds: question kinds; default existence, count, colour, digit and where. "left_of" exists as well, but of the
            embedded models only `testbed:llava` learned it.
        questions_per_image: at most so many questions on each picture; at most 6 are existence, 3 count and 2 of any
            other kind.

    Returns:
        Examples whose `meta` holds `objects` (digit, colour, pixel box, glyph), `asked` (indices of the objects
        asked about), `negative`, `split` and `difficulty`.

    Raises:
        DataError: for an unknown split, difficulty or kind, or a senseless number.

    Example:
        >>> examples = digit_scenes(n=6)
        >>> len(examples), len({example.group for example in examples}), examples[0].image.size
        (6, 1, (56, 56))
    """
    _check(split, n, seed, difficulty)
    kinds = _DEFAULT_KINDS if kinds is None else tuple(dict.fromkeys(kinds))
    if not kinds or (unknown := [kind for kind in kinds if kind not in KINDS]):
        named = ", ".join(map(repr, unknown)) if kinds else "none"
        raise DataError(f"question kinds: {named}", expected=f"some of {', '.join(KINDS)}", remedy="change `kinds`")
    if questions_per_image < 1:
        raise DataError(f"questions_per_image = {questions_per_image}", expected="at least 1", remedy="ask for more")
    per_image = min(questions_per_image, sum(_MOST[kind] for kind in kinds))
    images = -(-n // per_image)
    drawn = [
        _asked(_stream(split, seed, difficulty, "scenes", k), split, difficulty, kinds, per_image, k)
        for k in range(images)
    ]
    group = f"digits-{split}-{difficulty}-{seed}"
    examples: list[Example] = []
    for k, ((scene, asked), image) in enumerate(zip(drawn, _pictures([scene for scene, _ in drawn]), strict=True)):
        facts = {"objects": _objects(scene), "split": split, "difficulty": difficulty}
        examples += [_example(f"{group}-{k:05d}", f"-{j}", image, question, facts) for j, question in enumerate(asked)]
    return examples[:n]


def _asked(
    rng: np.random.Generator, split: str, difficulty: str, kinds: Sequence[str], n: int, index: int
) -> tuple[Scene, list[Question]]:
    """A scene with `n` different questions; scenes that do not allow the chosen kinds are drawn anew."""
    for _ in range(1000):
        scene = draw_scene(rng, split, DIFFICULTIES[difficulty])
        asked: dict[str, Question] = {}
        for kind, yes in _plan(rng, kinds, n, index):
            for _ in range(12):
                question = ask(scene, rng, kind, yes=yes)
                if question is not None and question.text not in asked:
                    asked[question.text] = question
                    break
        if len(asked) == n:
            return scene, list(asked.values())
    raise DataError(  # pragma: no cover - the limits in _MOST leave room
        f"no scene allows {n} questions of kinds {', '.join(kinds)}",
        expected="fewer",
        remedy="lower `questions_per_image`",
    )


def _plan(rng: np.random.Generator, kinds: Sequence[str], n: int, index: int) -> list[tuple[str, bool]]:
    """Kinds of a picture's questions in random order; existence questions in pairs of yes and no."""
    others = [kind for kind in kinds if kind != "existence"]
    existence = n if not others else 0
    if others and "existence" in kinds:
        share = n * _SHARES["existence"] / sum(_SHARES[kind] for kind in kinds)
        existence = min(n, _MOST["existence"], 2 * int(share / 2 + rng.random()))
        existence = max(existence, n - sum(_MOST[kind] for kind in others))
    first = bool(index % 2) if not others else bool(rng.random() < 0.5)
    plan = [("existence", first ^ bool(k % 2)) for k in range(existence)]
    room = {kind: _MOST[kind] for kind in others}
    while len(plan) < n:
        open_kinds = [kind for kind in others if room[kind]]
        shares = np.cumsum([_SHARES[kind] for kind in open_kinds])
        kind = open_kinds[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
        room[kind] -= 1
        plan.append((kind, True))
    return [plan[k] for k in rng.permutation(n)]


def _objects(scene: Scene) -> list[dict[str, Any]]:
    return [{"digit": o.digit, "colour": o.colour, "box": o.box, "glyph": o.glyph} for o in scene.objects]


def _pictures(scenes: Sequence[Scene]) -> Iterator[Image.Image]:
    for start in range(0, len(scenes), _RENDER_AT_ONCE):
        for pixels in render(scenes[start : start + _RENDER_AT_ONCE]):
            yield Image.fromarray(pixels)


def _example(group: str, suffix: str, image: Image.Image, question: Question, facts: Mapping[str, Any]) -> Example:
    meta = {**facts, "asked": question.asked, "negative": question.negative}
    return Example(group + suffix, image, question.text, question.answer, question.kind, group, meta=meta)


def digit_pairs(split: str = "test", n: int = 200, seed: int = 0, difficulty: str = "standard") -> list[Pair]:
    """Pairs of scenes that differ in one object (its digit or its colour), with a question whose answer that changes.

    A third each ask about existence (half of them yes in the clean scene), a colour and a digit. Made for activation
    patching: noise, clutter, place, size and slant are the same on both sides.

    Args:
        split: "train", "validation" or "test".
        n: number of pairs.
        seed: another seed gives other scenes.
        difficulty: a key of `DIFFICULTIES`.

    Raises:
        DataError: for an unknown split or difficulty, or a senseless number.

    Example:
        >>> pair = digit_pairs(n=1)[0]
        >>> pair.clean.question == pair.corrupt.question, pair.clean.answer != pair.corrupt.answer
        (True, True)
    """
    _check(split, n, seed, difficulty)
    drawn = [_changed(_stream(split, seed, difficulty, "pairs", k), split, difficulty, k) for k in range(n)]
    images = list(_pictures([scene for sides, _ in drawn for scene, _ in sides]))
    pairs = []
    for k, (sides, changed) in enumerate(drawn):
        group = f"digits-{split}-{difficulty}-{seed}-pair-{k:05d}"
        clean, corrupt = (
            _example(
                group,
                f"-{side}",
                image,
                question,
                {"objects": _objects(scene), "split": split, "difficulty": difficulty},
            )
            for side, image, (scene, question) in zip(
                ("clean", "corrupt"), images[2 * k : 2 * k + 2], sides, strict=True
            )
        )
        pairs.append(Pair(clean, corrupt, changed))
    return pairs


def _changed(
    rng: np.random.Generator, split: str, difficulty: str, index: int
) -> tuple[list[tuple[Scene, Question]], dict[str, Any]]:
    """A scene and its changed copy, each with the question and its right answer there."""
    kind = _PAIR_KINDS[index % 3]
    question = None
    while question is None:
        scene = draw_scene(rng, split, DIFFICULTIES[difficulty])
        question = ask(scene, rng, kind)
    k = question.asked[0]
    old = scene.objects[k]
    what = kind if kind != "existence" else ("digit", "colour")[int(rng.integers(2))]
    present = {(o.digit, o.colour) for o in scene.objects}
    options = [
        (d, c)
        for d in range(10)
        for c in COLOURS
        if (d, c) not in present and (d == old.digit) == (what == "colour") and (c == old.colour) == (what == "digit")
    ]
    digit, colour = options[int(rng.integers(len(options)))]
    new = replace(old, digit=digit, colour=colour, glyph=replace_glyph(rng, split, old, digit))
    other = replace(scene, objects=(*scene.objects[:k], new, *scene.objects[k + 1 :]))
    sides = [(scene, question), (other, _answered(question, other, old, new))]
    values = [getattr(old, what), getattr(new, what)]
    if kind == "existence" and index // 3 % 2:
        sides.reverse()
        values.reverse()
    boxes = np.array([old.box, new.box])
    box = tuple(int(edge) for edge in (*boxes[:, :2].min(0), *boxes[:, 2:].max(0)))
    return sides, {"object": k, "field": what, "clean": values[0], "corrupt": values[1], "box": box}


def _answered(question: Question, scene: Scene, old: Placed, new: Placed) -> Question:
    """The same question where `new` has taken the place of `old`, with its right answer there."""
    if question.kind != "existence":
        return replace(question, answer=str(getattr(new, question.kind)))
    together = any(o.digit == old.digit for o in scene.objects) and any(o.colour == old.colour for o in scene.objects)
    return replace(question, answer="no", negative="adversarial" if together else "random")
