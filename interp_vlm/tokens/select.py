"""The vocabulary of selectors: roles, boxes, words, and choices by score or by chance.

Example:
    >>> from interp_vlm.tokens import select
    >>> select.image & select.box(0, 0, 20, 20) | select.last
    image & box(0, 0, 20, 20) | last
"""

from __future__ import annotations

import builtins
import math
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from interp_vlm.errors import SelectionError
from interp_vlm.tokens.selector import Evidence, Selector
from interp_vlm.tokens.token_map import ROLES, TokenMap

__all__ = [
    "Selector", "all", "bos", "bottom", "box", "image", "last", "of", "positions", "question", "random", "sinks",
    "template", "text", "top", "words",
]  # fmt: skip

EVIDENCE = ("attention", "sinks")
ATTENTION_AT = r"attention@-?\d+"  # the attention of one layer
# Letters of scripts that set words apart; Thai, CJK, kana, Hangul and the like do not, so there any match counts.
LETTER = r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ud7af\uf900-\ufaff]"


@dataclass(frozen=True, repr=False)
class _Role(Selector):
    name: str

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        return tokens.role(self.name)

    def __repr__(self) -> str:
        return self.name


image: Selector = _Role("image")
"""The image tokens of every picture."""
question: Selector = _Role("question")
"""The tokens of the bare question."""
last: Selector = _Role("last")
"""The last prompt token, where the answer is read."""
text: Selector = _Role("text")
"""Everything that is neither picture nor padding."""
template: Selector = _Role("template")
"""What the prompt template adds to the question."""
bos: Selector = _Role("bos")
"""The beginning-of-sequence tokens."""
all: Selector = _Role("all")
"""Every position that is not padding."""


@dataclass(frozen=True, repr=False)
class box(Selector):
    """Image tokens whose patch overlaps a rectangle of ORIGINAL pixels, `buffer` patches more on every side.

    Args:
        x0: left, in pixels of the picture as the user sees it.
        y0: top.
        x1: right.
        y1: bottom.
        buffer: patches taken around the rectangle's patches.
        image: number of the picture.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    buffer: int = 0
    image: int = 0

    def __post_init__(self) -> None:
        corners = (self.x0, self.y0, self.x1, self.y1)
        if not builtins.all(isinstance(c, Real) and math.isfinite(c) for c in corners):
            raise SelectionError(f"{self!r} has a corner that is no number", expected="finite pixels")
        if not (self.x0 < self.x1 and self.y0 < self.y1):
            raise SelectionError(f"{self!r} has no area", expected="x0 < x1 and y0 < y1 (left, top, right, bottom)")
        for name in ("buffer", "image"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
                raise SelectionError(f"{self!r}: {name} is {value!r}", expected="a whole number from 0")

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        places = tokens.picture_tokens(self.image)
        found = tokens.grids[self.image].tokens_in(self.x0, self.y0, self.x1, self.y1, self.buffer)
        return places[torch.from_numpy(found)]

    def __repr__(self) -> str:
        corners = f"{self.x0!r}, {self.y0!r}, {self.x1!r}, {self.y1!r}"
        more = "".join(f", {name}={getattr(self, name)!r}" for name in ("buffer", "image") if getattr(self, name))
        return f"box({corners}{more})"


@dataclass(frozen=True, repr=False, init=False)
class words(Selector):
    """Tokens of whole words (or phrases) of the question, whatever their letter case.

    `words("red")` does not match "covered". In scripts without blanks between words any occurrence counts.
    """

    texts: tuple[str, ...]

    def __init__(self, *texts: str) -> None:
        if not texts or not builtins.all(isinstance(t, str) and t.strip() for t in texts):
            raise SelectionError(f"words{texts!r} names nothing", expected="one or more words of the question")
        object.__setattr__(self, "texts", texts)

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        spans = []
        for wanted in self.texts:
            pattern = r"\s+".join(re.escape(word) for word in wanted.split())
            before = rf"(?<!{LETTER})" if re.match(LETTER, wanted.strip()) else ""
            after = rf"(?!{LETTER})" if re.match(LETTER, wanted.strip()[-1]) else ""
            found = re.finditer(f"{before}{pattern}{after}", tokens.question_text, re.IGNORECASE)
            spans.extend(match.span() for match in found)
        return tokens.tokens_of(spans)

    def __repr__(self) -> str:
        return f"words({', '.join(map(repr, self.texts))})"


@dataclass(frozen=True, repr=False, init=False)
class positions(Selector):
    """Absolute positions of the padded row; negative ones count from the end of the row without its padding."""

    indices: tuple[int, ...]

    def __init__(self, indices: int | Iterable[int] | np.ndarray | Tensor) -> None:
        object.__setattr__(self, "indices", _whole_numbers(indices))

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        real = tokens.all
        chosen = set()
        for index in self.indices:
            if not -len(real) <= index < len(tokens.ids):
                raise SelectionError(
                    f"position {index} does not exist", expected=f"{-len(real)} to {len(tokens.ids) - 1}"
                )
            absolute = int(real[index]) if index < 0 else index
            if not tokens.attention_mask[absolute]:
                first, final = int(real[0]), int(real[-1])
                raise SelectionError(f"position {index} is padding", expected=f"{first} to {final}, or negative")
            chosen.add(absolute)
        return torch.tensor(sorted(chosen), dtype=torch.long)

    def __repr__(self) -> str:
        return f"positions({list(self.indices)})"


@dataclass(frozen=True, repr=False)
class _Share(Selector):
    """Common part of the selectors that take a fraction (float, rounded up) or a count (int) of others."""

    share: float | int

    def _checked(self) -> None:
        share: Any = self.share
        if isinstance(share, bool) or not isinstance(share, Real) or not _sensible(share):
            raise SelectionError(f"a share of {share!r}", expected="a fraction in (0, 1] or a count (int) from 1")

    def _count(self, available: int) -> int:
        if isinstance(self.share, Integral):
            if self.share > available:
                raise SelectionError(f"{self!r} finds {available} positions", expected=f"at least {self.share}")
            return int(self.share)
        # 0.07 * 100 is 7.000000000000001 and must not become 8.
        return math.ceil(round(self.share * available, 9))


@dataclass(frozen=True, repr=False)
class _Ranked(_Share):
    by: str = "attention"
    among: Selector | str = image

    def __post_init__(self) -> None:
        self._checked()
        object.__setattr__(self, "among", of(self.among))
        if self.by not in EVIDENCE and not re.fullmatch(ATTENTION_AT, str(self.by)):
            raise SelectionError(
                f"by={self.by!r}", expected=f"one of {', '.join(EVIDENCE)}, attention@LAYER (a number; -1: the last)"
            )

    @property
    def needs(self) -> frozenset[str]:
        return of(self.among).needs | {self.by}

    def _ranked(self, tokens: TokenMap, evidence: Evidence | None, descending: bool) -> Tensor:
        places = of(self.among).positions(tokens, evidence)
        scores = _scores(self, self.by, tokens, evidence)[places]
        order = torch.sort(scores, descending=descending, stable=True).indices
        return places[order[: self._count(len(places))]].sort().values

    def __repr__(self) -> str:
        among = "" if self.among == image else f", among={self.among!r}"
        return f"{type(self).__name__}({self.share!r}, by={self.by!r}{among})"


class top(_Ranked):
    """The highest scored positions: a fraction (0.30, rounded up) or a count (10) of `among`; ties go to the first.

    `by="attention"` is the attention that the last token pays, the mean over layers and heads; `by="attention@-1"` that
    of one layer (negative numbers count from the end); `by="sinks"` the sink score of the residual stream.
    """

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        return self._ranked(tokens, evidence, descending=True)


class bottom(_Ranked):
    """The lowest scored positions: a fraction (rounded up) or a count of `among`; ties go to the first."""

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        return self._ranked(tokens, evidence, descending=False)


@dataclass(frozen=True, repr=False)
class random(_Share):
    """Positions by chance: a fraction (rounded up) or a count of `among`.

    The draw depends on the seed and on the example itself, never on the batch it stands in or its padding.
    """

    seed: int = 0
    among: Selector | str = image

    def __post_init__(self) -> None:
        self._checked()
        object.__setattr__(self, "among", of(self.among))
        if not isinstance(self.seed, Integral) or isinstance(self.seed, bool) or self.seed < 0:
            raise SelectionError(f"seed={self.seed!r}", expected="a whole number from 0")

    @property
    def needs(self) -> frozenset[str]:
        return of(self.among).needs

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        places = of(self.among).positions(tokens, evidence)
        generator = np.random.default_rng([int(self.seed), zlib.crc32(tokens.key.encode())])
        drawn = generator.choice(len(places), size=self._count(len(places)), replace=False, shuffle=False)
        return places[torch.from_numpy(np.sort(drawn))]

    def __repr__(self) -> str:
        among = "" if self.among == image else f", among={self.among!r}"
        return f"random({self.share!r}, seed={self.seed!r}{among})"


@dataclass(frozen=True, repr=False)
class sinks(Selector):
    """Attention sinks: positions whose largest normalised activation max_d |RMSNorm(h)_d| over the sink dimensions
    exceeds `threshold` (20: Kang et al., "See What You Are Told: Visual Attention Sink")."""

    threshold: float = 20.0
    among: Selector | str = image

    def __post_init__(self) -> None:
        try:
            positive = isinstance(self.threshold, Real) and float(self.threshold) > 0
        except OverflowError:  # a whole number beyond every float
            positive = False
        if not positive:
            raise SelectionError(f"sinks(threshold={self.threshold!r})", expected="a positive number")
        object.__setattr__(self, "among", of(self.among))

    @property
    def needs(self) -> frozenset[str]:
        return of(self.among).needs | {"sinks"}

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        places = of(self.among).positions(tokens, evidence)
        return places[_scores(self, "sinks", tokens, evidence)[places] > float(self.threshold)]

    def __repr__(self) -> str:
        parts = [] if self.threshold == 20.0 else [f"threshold={self.threshold!r}"]
        parts += [] if self.among == image else [f"among={self.among!r}"]
        return f"sinks({', '.join(parts)})"


def of(x: str | int | Iterable[int] | np.ndarray | Tensor | Selector) -> Selector:
    """A selector from a role's name, one position, several positions, or a selector.

    Example:
        >>> of("image"), of(-1), of(range(3))
        (image, positions([-1]), positions([0, 1, 2]))
    """
    if isinstance(x, Selector):
        return x
    if isinstance(x, str):
        if x not in ROLES:
            raise SelectionError(f"role {x!r} does not exist", expected=f"one of {', '.join(ROLES)}")
        return _Role(x)
    return positions(x)


def _sensible(share: Any) -> bool:
    return bool(share >= 1 if isinstance(share, int | np.integer) else 0 < share <= 1)


def _whole_numbers(indices: Any) -> tuple[int, ...]:
    if isinstance(indices, Tensor | np.ndarray):
        indices = indices.tolist()
    listed = [indices] if isinstance(indices, Integral) else indices
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise SelectionError(f"{indices!r} names no positions", expected="an int or ints, a role, or a selector")
    listed = tuple(listed)
    if not builtins.all(isinstance(i, Integral) and not isinstance(i, bool) for i in listed):
        raise SelectionError(f"positions {listed!r}", expected="whole numbers")
    return tuple(int(i) for i in listed)


def _scores(selector: Selector, name: str, tokens: TokenMap, evidence: Evidence | None) -> Tensor:
    """The evidence a selector asked for, checked."""
    if evidence is None or name not in evidence:
        raise SelectionError(
            f"{selector!r} needs {name!r} scores", expected=f"evidence[{name!r}]",
            remedy="let the model measure them (pass the selector to an intervention), or give evidence yourself",
        )  # fmt: skip
    scores = torch.as_tensor(evidence[name]).detach().cpu()
    if scores.shape != tokens.ids.shape:
        raise SelectionError(
            f"{name!r} scores of shape {tuple(scores.shape)}", expected=f"({len(tokens.ids)},), one per position"
        )
    if scores[tokens.attention_mask].isnan().any():
        raise SelectionError(f"{name!r} scores contain NaN", expected="numbers at every position")
    return scores
