"""What an ablation changed: rows of a table from the answers with and without it, question by question."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import betaincinv

from interp_vlm.stats import Estimate, equivalence, mcnemar, mean, paired_test, smallest_effect, smallest_margin
from interp_vlm.study.tables import corrected, row

__all__ = ["CHANGE", "EQUIVALENCE", "MARGIN", "SMALLEST", "by_quantity", "change_rows", "unchanged"]

MARGIN = 0.05
"""Change of accuracy that would not matter: fixed before any result was seen."""
CHANGE = "change of accuracy"
EQUIVALENCE = "equivalence within 5 points"
SMALLEST = "smallest detectable effect"
NEEDED = 6  # changes, all one way, that an exact McNemar test at 5 % needs


def change_rows(
    after: pd.Series, before: pd.Series, flipped: pd.Series, groups: pd.Series, seed: int, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Accuracy, its change, its equivalence, the smallest detectable effect and the answers that flip.

    Args:
        after: whether each question is answered rightly with the ablation; a share where several draws were made.
        before: the same without it, in the same order.
        flipped: whether the answer is another one, or a share.
        groups: pictures.
        seed: of every resampling.
        facts: the experiment's own columns.
    """
    change = (after.astype(float) - before.astype(float)).to_numpy()
    against = {"baseline": 0.0, "compared": "no ablation"}
    tested = unchanged(paired_test(after.astype(float), before.astype(float), groups, seed=seed), change)
    yield row(mean(after.astype(float), groups, seed=seed), "accuracy", "%", scale=100, **facts)
    yield row(tested, CHANGE, "points", scale=100, **facts, **against)
    if after.isin([0, 1]).all():
        exact = mcnemar(after.astype(bool), before.astype(bool))
        found = row(exact, f"{CHANGE}, exact McNemar", "points", scale=100, **facts, **against)
        yield {
            **found,
            "note": "; ".join(filter(None, ("questions count as independent, pictures ignored", exact.reason))),
        }
    yield row(
        mean(flipped.astype(float), groups, seed=seed), "answers that flip", "%", scale=100, **facts, baseline=0.0
    )
    yield from _equivalence(change, groups, facts, against)


def _equivalence(
    change: np.ndarray, groups: pd.Series, facts: dict[str, Any], against: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    same = unchanged(equivalence(change, MARGIN, groups), change)
    least, margin = smallest_effect(change, groups), smallest_margin(change, groups)
    if not change.any() and len(change) >= NEEDED:
        same = replace(same, p=(1.0 - MARGIN) ** len(change))
        # n - 5 and 6: the share of changes at which six or more of n come with 80 %
        share = float(betaincinv(NEEDED, len(change) - NEEDED + 1, 0.80))
        how = f"share of changes at which an exact McNemar test finds its {NEEDED} with power 0.8"
        least = replace(least, value=share, method=how, reason="no answer's correctness changed")
    said = [
        f"{what} {100 * estimate.value:.1f} points"
        for what, estimate in ((SMALLEST, least), ("smallest margin that could be shown", margin))
        if math.isfinite(estimate.value)
    ]
    found = row(same, EQUIVALENCE, "points", scale=100, **facts, **against)
    yield {**found, "compared": "5 points either way", "note": "; ".join(filter(None, [*said, same.reason]))}
    yield row(least, SMALLEST, "points", scale=100, **facts)


def unchanged(estimate: Estimate, change: np.ndarray) -> Estimate:
    """The estimate with an exact bound where no answer's correctness changed, so that there is no scatter to go by.

    The bound is that of a share of 0 (Clopper and Pearson), a question a trial: without a change nothing shows how
    changes would cluster in pictures.
    """
    if change.any() or not len(change):
        return estimate
    reach = 1.0 - ((1.0 - estimate.level) / 2.0) ** (1.0 / len(change))
    how = "exact binomial bound, questions as trials"
    return replace(estimate, low=-reach, high=reach, method=how, reason="no answer's correctness changed")


def by_quantity(frame: pd.DataFrame) -> pd.DataFrame:
    """P-values corrected by Holm over all tests that ask the same: the rows of each quantity are a family."""
    parts = [corrected(part.copy()) for _, part in frame.groupby("quantity", sort=False)]
    return pd.concat(parts).sort_index() if parts else frame
