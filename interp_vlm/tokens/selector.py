"""The algebra of selectors: frozen values that name token positions and combine with & | - ~."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from interp_vlm.tokens.token_map import TokenMap

__all__ = ["Complement", "Difference", "Evidence", "Intersection", "Selector", "Union"]

Evidence = Mapping[str, Tensor]


class Selector(ABC):
    """Names positions of any token map; `a & b`, `a | b`, `a - b` and `~a` (within `all`) are selectors again.

    Selectors are values: equal when written alike, hashable, and their repr is the Python text that makes them.
    """

    _binds: ClassVar[int] = 9  # how tightly the repr's outermost operator binds, as Python's operators do

    @property
    def needs(self) -> frozenset[str]:
        """The evidence (scores per position, measured on the clean run) without which it cannot choose."""
        return frozenset()

    @abstractmethod
    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        """The chosen positions of one example: absolute in its padded row, sorted, unique, possibly none.

        Args:
            tokens: the example.
            evidence: scores per position of this example's padded row, by name, for the names in `needs`.

        Raises:
            SelectionError: the selector makes no sense for this example, or evidence is missing.
        """

    def __and__(self, other: Selector) -> Selector:
        return Intersection(self, other) if isinstance(other, Selector) else NotImplemented

    def __or__(self, other: Selector) -> Selector:
        return Union(self, other) if isinstance(other, Selector) else NotImplemented

    def __sub__(self, other: Selector) -> Selector:
        return Difference(self, other) if isinstance(other, Selector) else NotImplemented

    def __invert__(self) -> Selector:
        return Complement(self)

    def _text(self, around: int) -> str:
        """The repr, in parentheses where an operator that binds as tightly as `around` would tear it apart."""
        return f"({self!r})" if self._binds < around else repr(self)


@dataclass(frozen=True, repr=False)
class _Pair(Selector):
    left: Selector
    right: Selector

    _sign: ClassVar[str] = ""

    @property
    def needs(self) -> frozenset[str]:
        return self.left.needs | self.right.needs

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        chosen = []
        for side in (self.left, self.right):
            marks = torch.zeros(len(tokens.ids), dtype=torch.bool)
            marks[side.positions(tokens, evidence)] = True
            chosen.append(marks)
        return self._combine(*chosen).nonzero().flatten()

    @staticmethod
    @abstractmethod
    def _combine(left: Tensor, right: Tensor) -> Tensor: ...

    def __repr__(self) -> str:
        return f"{self.left._text(self._binds)} {self._sign} {self.right._text(self._binds + 1)}"


class Intersection(_Pair):
    """Positions in both."""

    _binds, _sign = 2, "&"

    @staticmethod
    def _combine(left: Tensor, right: Tensor) -> Tensor:
        return left & right


class Union(_Pair):
    """Positions in either."""

    _binds, _sign = 1, "|"

    @staticmethod
    def _combine(left: Tensor, right: Tensor) -> Tensor:
        return left | right


class Difference(_Pair):
    """Positions in the first and not in the second."""

    _binds, _sign = 3, "-"

    @staticmethod
    def _combine(left: Tensor, right: Tensor) -> Tensor:
        return left & ~right


@dataclass(frozen=True, repr=False)
class Complement(Selector):
    """Every position that is not padding and not in the other."""

    of: Selector

    _binds: ClassVar[int] = 4

    @property
    def needs(self) -> frozenset[str]:
        return self.of.needs

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        rest = tokens.attention_mask.clone()
        rest[self.of.positions(tokens, evidence)] = False
        return rest.nonzero().flatten()

    def __repr__(self) -> str:
        return f"~{self.of._text(self._binds)}"
