"""One outer fold of nested cross-validation: the inner folds choose C, the whole training part is fitted, the test part
is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_vlm.probes.logistic import Reduced, reduce, solve
from interp_vlm.probes.measures import fold_auroc

__all__ = ["FoldScores", "score_fold"]

# rounds of the race between the values of C: a step promises less than this loss an example (None: as exact as the
# number type allows), and those stay whose loss is at most the best one's times a factor plus a margin
RACE = ((5e-3, 1.5, 0.05), (5e-4, 1.2, 0.01), (None, 1.0, 0.0))


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
    _count, strengths = targets.shape[1], np.asarray(sorted(C))

    def scored(columns: np.ndarray, strength: np.ndarray, start: tuple[Tensor, Tensor] | None = None) -> np.ndarray:
        labels = torch.as_tensor(columns).to(rows)
        solved = solve(reduced, labels, torch.ones_like(labels), torch.as_tensor(strength).to(rows), start)
        return reduced.scores(test, *solved).double().cpu().numpy()

    chosen, validated, near = _choose(reduced, targets, inner, strengths)
    inner_auroc = fold_auroc(validated, targets > 0.5, inner)
    null = np.empty((len(test), 0))
    if permutations is not None and permutations.shape[1]:
        null = scored(permutations, np.full(permutations.shape[1], permutation_C))
    return FoldScores(scored(targets, strengths[chosen], near), chosen, inner_auroc, null)


def _choose(
    reduced: Reduced, targets: np.ndarray, inner: np.ndarray, strengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[Tensor, Tensor]]:
    """The C of each target, the validated logits there, and where the fit on all examples may start.

    All problems are solved roughly, those of a C that may still win ever more exactly: a large C is the slowest to
    solve and most often far from winning.
    """
    n, count, folds = len(targets), targets.shape[1], int(inner.max()) + 1
    # one problem for each (target, C, inner fold), all solved together
    target, strength, fold = (axis.ravel() for axis in np.indices((count, len(strengths), folds)))
    labels = torch.as_tensor(targets[:, target]).to(reduced.rows)
    kept = torch.as_tensor(inner[:, None] != fold).to(reduced.rows)
    C = torch.as_tensor(strengths[strength]).to(reduced.rows)
    a, b = labels.new_empty(reduced.count, len(fold)), labels.new_empty(len(fold))
    validated, losses = np.empty((n, count, len(strengths))), np.full((count, len(strengths)), np.inf)
    racing, start = np.ones_like(losses, dtype=bool), None
    for left, factor, margin in RACE:
        part = torch.as_tensor(np.flatnonzero(racing[target, strength]), device=a.device)
        gap = None if left is None else left * n
        a[:, part], b[part] = solve(reduced, labels[:, part], kept[:, part], C[part], start, gap)
        # every example is validated once for each (target, C): by the problem that left its inner fold out
        logits = (reduced.times(a[:, part]) + b[part]).double().cpu().numpy().reshape(n, -1, folds)
        validated[:, racing] = np.take_along_axis(logits, inner[:, None, None], axis=2)[..., 0]
        signs = 2.0 * targets[:, np.nonzero(racing)[0]] - 1.0
        losses[~racing] = np.inf
        losses[racing] = np.logaddexp(0.0, -signs * validated[:, racing]).mean(0)
        racing = losses <= factor * losses.min(1, keepdims=True) + margin
        part = torch.as_tensor(np.flatnonzero(racing[target, strength]), device=a.device)
        start = a[:, part], b[part]
    chosen = np.argmin(losses, axis=1)
    # each example was in all problems of its target and C but one: their mean is close to the fit on all
    won = np.arange(count), chosen
    slopes = a.reshape(len(a), count, len(strengths), folds)[:, won[0], won[1]].sum(2) / (folds - 1)
    return chosen, validated[:, won[0], won[1]], (slopes, b.reshape(count, len(strengths), folds)[won].mean(1))
