"""The one shape of a statistical result: a value, its interval, and how both were obtained."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Estimate"]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, and everything needed to repeat it.

    Degenerate data (one class, no variance, one group) are a result, not an error: what cannot be computed is NaN and
    `reason` says why. Malformed data (unequal lengths, NaN values) are a `DataError`.

    Attributes:
        value: the estimate, in the unit of the data.
        low: lower end of the interval, NaN when there is none.
        high: upper end of the interval, NaN when there is none.
        n: number of observations.
        groups: number of groups (pictures); equal to `n` when none were given.
        level: coverage of the interval, for example 0.95.
        method: how the interval (and `p`) were computed.
        seed: seed of the resampling, None when nothing was drawn.
        p: p-value of a test, None for a pure estimate.
        reason: why a number is missing or the data are degenerate; empty otherwise.

    Example:
        >>> Estimate(0.9, 0.86, 0.93, n=600, groups=100, level=0.95, method="group bootstrap", seed=0)
        0.9 [0.86, 0.93] (95% interval, n=600 in 100 groups, group bootstrap, seed 0)
    """

    value: float
    low: float
    high: float
    n: int
    groups: int
    level: float
    method: str
    seed: int | None = None
    p: float | None = None
    reason: str = ""

    def __repr__(self) -> str:
        return f"{self} ({'; '.join(part for part in (self._how(), self.reason) if part)})"

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}" + ("" if self.p is None else f" p={self.p:.2g}")

    def _how(self) -> str:
        interval = "no interval" if math.isnan(self.low) else f"{self.level * 100:.4g}% interval"
        size = f"n={self.n}" + (f" in {self.groups} groups" if self.groups != self.n else "")
        seed = "" if self.seed is None else f"seed {self.seed}"
        return ", ".join(part for part in (interval, size, self.method, seed) if part)
