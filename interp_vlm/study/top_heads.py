"""How much of correctness the attention of the strongest heads explains, with an honest maximum."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from interp_vlm.errors import DataError
from interp_vlm.probes.folds import permuted, unmoved
from interp_vlm.stats import Estimate, resampling
from interp_vlm.stats.inputs import Groups, as_classes, as_groups
from interp_vlm.study.attention_classifiers import grouped

__all__ = ["PERMUTATIONS", "TOP", "squared", "strongest", "top_heads"]

TOP = 5
"""How many of the strongest heads are looked at; of a model with fewer than `FEW` heads, all."""

FEW = 10
PERMUTATIONS = 999
_METHOD = "head chosen on half of the pictures, its correlation squared on the other, both ways"


def strongest(contribution: Float[np.ndarray, "example place"], heads: int) -> list[tuple[int, int]]:
    """(layer, head) of the heads with the largest mean size of their part of the answer's margin, largest first.

    Args:
        contribution: of every head, layer by layer.
        heads: of one layer.
    """
    return [divmod(int(place), heads) for place in _top(contribution)]


def squared(r: Estimate) -> Estimate:
    """A correlation's estimate squared: R2, from 0 wherever the correlation's interval includes 0."""
    ends = sorted((r.low**2, r.high**2))
    low = 0.0 if r.low <= 0.0 <= r.high else ends[0]
    return replace(r, value=r.value**2, low=math.nan if math.isnan(r.low) else low, high=ends[1])


def top_heads(
    mass: Float[np.ndarray, "example place"],
    contribution: Float[np.ndarray, "example place"],
    correct: ArrayLike,
    groups: Groups,
    heads: int,
    seed: int,
) -> Estimate:
    """The largest R2 between correctness and the attention on the picture of one of the strongest heads, cross-fitted.

    The largest of several R2 is large by luck alone. So the pictures are halved: on one half the strongest heads are
    found by their contribution, and of those the head whose attention goes most with correctness, and whether it goes
    up or down; on the other half its correlation with correctness is read, signed so that the same way counts as
    positive. Both ways are averaged and squared; a correlation that turns round on the other half explains nothing. The
    interval draws pictures with the choice held; `p` repeats everything with labels exchanged between pictures.

    Args:
        mass: of every head, layer by layer, the attention on the picture.
        contribution: likewise, its part of the answer's margin.
        correct: (example,) whether the answer is right.
        groups: (example,) pictures.
        heads: of one layer.
        seed: of the halves, the bootstrap and the exchanges.
    """
    labels, (codes, count) = as_classes(correct, "correct", len(mass)), as_groups(groups, len(mass))
    nothing = Estimate(math.nan, math.nan, math.nan, len(mass), count, 0.95, _METHOD, seed)
    try:
        half = grouped(labels, codes, 2, seed)
    except DataError as error:
        return replace(nothing, reason=str(error))
    chosen = [(half == side, _top(contribution[half == side])) for side in (0, 1)]
    value, picks = _crossed(mass, labels[:, None].astype(np.float64), chosen)
    if not math.isfinite(value[0]):
        return replace(nothing, reason="the attention on the picture does not vary")

    def statistic(drawn: np.ndarray) -> np.ndarray:
        sides = []
        for (place, sign), (rows, _) in zip(picks, reversed(chosen), strict=True):
            sides.append(sign * _weighted(drawn[:, codes[rows]], mass[rows, place], labels[rows]))
        return np.mean(sides, axis=0)

    r = resampling.estimate(statistic, len(mass), count, 0.95, resampling.RESAMPLES, seed, width=len(mass))
    rng = np.random.default_rng(seed)
    exchanged = np.stack([permuted(labels, codes, rng) for _ in range(PERMUTATIONS)], axis=1).astype(np.float64)
    luck = _crossed(mass, exchanged, chosen)[0]
    p = (1 + int((luck >= value[0] - 1e-12).sum())) / (1 + PERMUTATIONS)
    named = [f"layer {divmod(place, heads)[0]} head {divmod(place, heads)[1]}" for place, _ in picks]
    still = unmoved(codes)
    notes = (
        f"{len(chosen[0][1])} of {mass.shape[1]} heads by contribution; chosen: {' and '.join(dict.fromkeys(named))}",
        f"{still} pictures keep their labels in every exchange" if still else "",
        r.reason,
    )
    positive = replace(r, value=max(0.0, r.value), low=max(0.0, r.low), high=max(0.0, r.high))
    if math.isnan(r.low):
        positive = replace(positive, low=math.nan, high=math.nan)
    method = f"{_METHOD}; {r.method}; p: {PERMUTATIONS} exchanges of labels between pictures"
    return replace(squared(positive), p=p, method=method, seed=seed, reason="; ".join(filter(None, notes)))


def _top(contribution: np.ndarray) -> np.ndarray:
    """Places of the strongest heads."""
    total = contribution.shape[1]
    size = np.abs(contribution).mean(axis=0)
    return np.argsort(-size, kind="stable")[: total if total < FEW else min(TOP, total)]


def _crossed(
    mass: np.ndarray, labels: Float[np.ndarray, "example label"], chosen: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """Of each column of labels the mean held-out correlation, signed as in the other half; and of the first column the
    head that each half chose, with its sign."""
    sides, picks = [], []
    for (rows, top), (others, _) in zip(chosen, reversed(chosen), strict=True):
        here = _correlations(mass[rows][:, top], labels[rows])
        best = np.nanargmax(np.where(np.isnan(here), -1.0, np.abs(here)), axis=0)
        columns = np.arange(labels.shape[1])
        sign = np.sign(here[best, columns])
        there = _correlations(mass[others][:, top], labels[others])[best, columns]
        sides.append(sign * there)
        picks.append((int(top[best[0]]), float(sign[0])))
    return np.mean(sides, axis=0), picks


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation of every column of x with every column of y; NaN where one does not vary."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.sqrt((x**2).sum(axis=0))[:, None] * np.sqrt((y**2).sum(axis=0))[None]
    return np.divide(x.T @ y, scale, out=np.full(scale.shape, np.nan), where=scale > 1e-12 * len(x))


def _weighted(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation of x and y under each row of weights; NaN where one does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size, sx, sy = weights.sum(axis=1), weights @ x, weights @ y
    sxx, syy, sxy = weights @ (x * x), weights @ (y * y), weights @ (x * y)
    spread = np.maximum(size * sxx - sx**2, 0.0) * np.maximum(size * syy - sy**2, 0.0)
    return resampling.divide(size * sxy - sx * sy, np.sqrt(spread))
