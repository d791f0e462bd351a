"""One outer fold of nested cross-validation: the inner folds choose C, the whole training part is fitted, the test part
is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_vlm.probes.logistic import reduce, solve
from interp_vlm.probes.measures import fold_auroc

__all__ = ["FoldScores", "score_fold"]


@dataclass(frozen=True, eq=False)
class FoldScores:
    """What one outer fold gives.

    Attributes:
        test: logits of the test examples.
        chosen: index of the C chosen for each target.
        inner_auroc: AUROC of each target on the inner folds at its chosen C.
        permuted: test logits under permuted labels at the fixed C, one column a permutation.
    """

    test: Float[np.ndarray, "example target"]
    chosen: Int[np.ndarray, " target"]
    inner_auroc: Float[np.ndarray, " target"]
    permuted: Float[np.ndarray, "example permutation"]


def score_fold(
    train: Float[Tensor, "example feature"],
    test: Float[Tensor, "other feature"],
    targets: Float[np.ndarray, "example target"],
    inner: Int[np.ndarray, " example"],
    C: Sequence[float],
    *,
    standardise: bool = True,
    permutations: Float[np.ndarray, "example permutation"] | None = None,
    permutation_C: float = 1.0,
) -> FoldScores:
    """Score the test part of a fold for several targets that share their features.

    C is the one with the smallest log loss over the inner folds (the more regularised in a tie): a proper score keeps
    the probabilities calibrated and, unlike the AUROC, has no plateaus.

    Args:
        train: features of the training part.
        test: features of the test part.
        targets: labels of the training part, 0 and 1, one column a target.
        inner: inner fold of each training example.
        C: inverse strengths of the penalty to choose from.
        standardise: see `reduce`; training part alone.
        permutations: further targets, fitted at `permutation_C` without a choice.
    """
    reduced = reduce(train, standardise=standardise)
    rows = reduced.rows
    count, folds, strengths = targets.shape[1], int(inner.max()) + 1, sorted(C)

    def fit(
        columns: np.ndarray, weights: Tensor, strength: np.ndarray, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return solve(reduced, torch.as_tensor(columns).to(rows), weights, torch.as_tensor(strength).to(rows), start)

    def scored(columns: np.ndarray, strength: np.ndarray, start: Tensor | None = None) -> np.ndarray:
        solved = fit(columns, rows.new_ones(columns.shape), strength, start)
        return reduced.scores(test, *solved).double().cpu().numpy()

    # one problem for each (target, C, inner fold), all solved together
    target, strength, fold = (axis.ravel() for axis in np.indices((count, len(strengths), folds)))
    kept = torch.as_tensor(inner[:, None] != fold).to(rows)
    a, b = fit(targets[:, target], kept, np.asarray(strengths)[strength])
    # every example is validated once for each (target, C): by the problem that left its inner fold out
    logits = (reduced.times(a) + b).double().cpu().numpy().reshape(len(rows), count, len(strengths), folds)
    validated = np.take_along_axis(logits, inner[:, None, None, None], axis=3)[..., 0]
    losses = np.logaddexp(0.0, -(2.0 * targets[:, :, None] - 1.0) * validated).mean(0)
    chosen = np.argmin(losses, axis=1)
    inner_auroc = fold_auroc(validated[:, np.arange(count), chosen], targets > 0.5, inner)
    null = np.empty((len(test), 0))
    if permutations is not None and permutations.shape[1]:
        null = scored(permutations, np.full(permutations.shape[1], permutation_C))
    # each example was in all problems of its target and C but one: their mean is close to the fit on all
    near = a.reshape(len(a), count, len(strengths), folds).sum(3)[:, np.arange(count), chosen] / (folds - 1)
    return FoldScores(scored(targets, np.asarray(strengths)[chosen], near), chosen, inner_auroc, null)
