"""Selective prediction: how often the answers are wrong that remain when the least sure ones are withheld."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from interp_vlm.errors import DataError
from interp_vlm.stats.estimate import Estimate
from interp_vlm.stats.inputs import Groups, as_classes, as_column, as_groups
from interp_vlm.stats.resampling import RESAMPLES, Statistic, divide, estimates

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["COVERAGES", "RiskCoverage", "risk_coverage"]

COVERAGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """How the error rate falls as fewer, surer answers are given.

    Attributes:
        coverage: shares of the answers that are given, the surest first.
        risk: share of wrong answers among them.
        area: area under the curve (AURC): the mean risk over the coverages 1/n, 2/n, ... 1; 0 is perfect, and a score
            that says nothing reaches the error rate of all answers.
        error: share of wrong answers among all.
    """

    coverage: tuple[float, ...]
    risk: tuple[Estimate, ...]
    area: Estimate
    error: Estimate

    def frame(self) -> pd.DataFrame:
        """A tidy table: one row a coverage."""
        import pandas as pd

        columns = ("coverage", "risk", "low", "high")
        rows = [(c, e.value, e.low, e.high) for c, e in zip(self.coverage, self.risk, strict=True)]
        return pd.DataFrame(rows, columns=pd.Index(columns))

    def plot(self, ax: Any = None) -> Figure:
        """Risk against coverage, with its intervals and the error rate of all answers."""
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(4.8, 3.4), layout="constrained") if ax is None else ax.figure
        axes = figure.add_subplot() if ax is None else ax
        table = self.frame().sort_values("coverage")
        axes.plot(table["coverage"], table["risk"], marker="o", markersize=4)
        axes.fill_between(table["coverage"], table["low"], table["high"], alpha=0.2, linewidth=0)
        axes.axhline(self.error.value, color="0.6", linestyle="--", linewidth=0.8)
        axes.set(xlabel="coverage (share of answers given)", ylabel="risk (share of them wrong)", xlim=(0, 1.02))
        axes.set_ylim(bottom=0)
        if ax is None:
            pyplot.close(figure)
        return figure

    def __repr__(self) -> str:
        return f"RiskCoverage(area {self.area}, error of all {self.error}, n={self.area.n})"


def risk_coverage(
    score: ArrayLike,
    correct: ArrayLike,
    groups: Groups = None,
    *,
    coverages: Sequence[float] = COVERAGES,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RiskCoverage:
    """Error rates of the surest answers, and the area under their curve.

    Answers with the same score come in every order, and the expectation over these orders counts: where a coverage
    ends among them, they are wrong at their own rate. Of an answer that a coverage cuts, the share inside counts.

    Args:
        score: (n,) numbers, higher for surer.
        correct: (n,) booleans.
        groups: (n,) labels.
        coverages: shares of the answers, more than 0 and at most 1.
        level: coverage of the intervals.
        resamples: draws of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: a coverage out of range, and malformed data.

    Source: El-Yaniv and Wiener 2010, JMLR 11 (risk and coverage); Geifman and El-Yaniv 2017, arXiv 1705.08500
    (selection by a score); the area: Geifman, Uziel and El-Yaniv 2019 (ICLR), arXiv 1805.08206.

    Example:
        >>> found = risk_coverage([0.9, 0.8, 0.6, 0.2], [True, True, False, True], coverages=[0.5, 1.0])
        >>> [estimate.value for estimate in found.risk]
        [0.0, 0.25]
    """
    scores = as_column(score, "score")
    right = as_classes(correct, "correct", len(scores))
    codes, count = as_groups(groups, len(scores))
    shares = [float(share) for share in coverages]
    if wrong := [share for share in shares if not 0.0 < share <= 1.0]:
        raise DataError(f"a coverage is {wrong[0]:g}", expected="shares of the answers, more than 0 and at most 1")
    statistic = _statistic(scores, right, codes, np.array([*shares, 1.0]))
    *risk, error, area = estimates(statistic, len(scores), count, level, resamples, seed, width=4 * len(scores))
    return RiskCoverage(tuple(shares), tuple(risk), area, error)


def _statistic(scores: np.ndarray, right: np.ndarray, codes: np.ndarray, shares: np.ndarray) -> Statistic:
    """Risk at each share, then the area, as a function of how often each group was drawn."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=np.nan))  # the last of each run of equal scores
    owner, wrong = codes[order], ~right[order]

    def statistic(drawn: np.ndarray) -> np.ndarray:
        taken = drawn[:, owner]
        given, errors = (_cumulated(column)[:, np.append(0, ends + 1)] for column in (taken, taken * wrong))
        total = given[:, -1:]
        if not total.shape[1] or not len(ends):
            return np.full((len(drawn), len(shares) + 1), np.nan)
        wanted = shares * total
        risks = np.stack([np.interp(w, g, e) for w, g, e in zip(wanted, given, errors, strict=True)])
        return np.column_stack([divide(risks, wanted), _area(given, errors)])

    return statistic


def _area(given: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Mean over k of the expected errors among the k surest, over k; within a run of ties they rise evenly."""
    harmonic = np.append(0.0, np.cumsum(1.0 / np.arange(1, int(given[:, -1].max()) + 1)))
    start, end = given[:, :-1], given[:, 1:]
    rate = np.nan_to_num(divide(np.diff(errors, axis=1), end - start))
    steps = harmonic[end.astype(np.intp)] - harmonic[start.astype(np.intp)]
    sums = (errors[:, :-1] - rate * start) * steps + rate * (end - start)
    return divide(sums.sum(axis=1), given[:, -1])


def _cumulated(columns: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((len(columns), 1)), np.cumsum(columns, axis=1)], axis=1)
