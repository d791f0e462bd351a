"""Classifiers of right and wrong answers from attention alone, fitted and judged on different pictures.

All choices (transformations, sizes, penalties) were made on other scenes than the study's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from interp_vlm.errors import DataError
from interp_vlm.probes.folds import assign
from interp_vlm.readouts.attention_features import pooled
from interp_vlm.stats import Estimate, auroc, auroc_difference, resampling
from interp_vlm.stats.inputs import as_groups

__all__ = ["CLASSIFIERS", "FOLDS", "OutOfFold", "grouped", "judged", "maps", "out_of_fold"]

FOLDS = 5
LEVEL = 0.95
CLASSIFIERS = ("gradient boosting", "random forest", "MLP on all attention maps")


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """Scores of one classifier, each example's from a fit to other pictures.

    Attributes:
        scores: (example,) higher for a right answer, less the share of right answers in the training part, so that
            above 0 means "right" in the sense of balanced accuracy; empty when nothing could be fitted.
        folds: (example,) in which fold each was scored.
        cut: whether the sign of the scores is judged as well as their order.
        how: how it was fitted, in words.
        reason: why there are no scores.
    """

    scores: np.ndarray
    folds: np.ndarray
    cut: bool
    how: str
    reason: str = ""


def out_of_fold(rows: pd.DataFrame, seed: int) -> dict[str, OutOfFold]:
    """The scores of every classifier on every row, by `FOLDS` folds of pictures with classes as even as can be."""
    labels = rows["correct"].to_numpy(dtype=bool)
    codes, _ = as_groups(rows["group"], len(rows))
    try:
        folds, reason = grouped(labels, codes, FOLDS, seed), ""
    except DataError as error:
        folds, reason = np.zeros(0, dtype=np.intp), str(error)
    names = [name for name in rows if str(name).startswith(("mean ", "last ", "change "))]
    features = rows[names].to_numpy(dtype=np.float64)
    inputs = {"MLP on all attention maps": maps(rows)}
    found = {}
    for what in CLASSIFIERS:
        x = inputs.get(what, features)
        scores = np.zeros(0) if reason else _scores(_MAKE[what], x, labels, folds, seed)
        how = f"{_HOW[what]}, {x.shape[1]:,} features; {FOLDS} folds by picture"
        found[what] = OutOfFold(scores, folds, what != "MLP on all attention maps", how, reason)
    return found


def grouped(labels: np.ndarray, codes: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each example: pictures together, the classes as even as can be.

    Raises:
        DataError: a class that is found about fewer pictures than there are folds.
    """
    for value in (True, False):
        holding = len(np.unique(codes[labels == value]))
        if holding < folds:
            raise DataError(
                f"{'right' if value else 'wrong'} answers about {holding} pictures",
                expected=f"at least {folds}, one for each fold",
            )
    return assign(labels, codes, folds, seed)


def maps(rows: pd.DataFrame) -> np.ndarray:
    """(example, layer x head x token) square roots of the attention on the picture, on one grid for all examples.

    Roots keep a few large weights from drowning the rest (the Hellinger distance between distributions is the distance
    between their roots). Pictures of differing grids are pooled to a common one.
    """
    shapes = rows[["layers", "heads", "map_rows", "map_cols"]].drop_duplicates()
    if len(shapes) == 1:
        return np.sqrt(np.stack(rows["map"].to_list()).astype(np.float32))
    found = []
    for flat, layers, heads, height, width in zip(
        rows["map"], rows["layers"], rows["heads"], rows["map_rows"], rows["map_cols"], strict=True
    ):
        centres = (np.argwhere(np.ones((height, width), dtype=bool)) + 0.5) / (height, width)
        found.append(pooled(np.asarray(flat, dtype=np.float32).reshape(layers, heads, -1), centres).ravel())
    return np.sqrt(np.stack(found))


def judged(part: pd.DataFrame, inside: np.ndarray, seed: int) -> Callable[[OutOfFold, str], Estimate]:
    """A function that judges out-of-fold scores within `part`, the rows of the table that are `inside` the scope."""
    labels, confidence = part["correct"].to_numpy(dtype=bool), part["confidence"].to_numpy(dtype=np.float64)
    codes, count = as_groups(part["group"], len(part))

    def judge(found: OutOfFold, quantity: str) -> Estimate:
        if found.reason or labels.min() == labels.max():
            reason = found.reason or f"one class: every label is {bool(labels[0])}"
            return Estimate(math.nan, math.nan, math.nan, len(part), count, LEVEL, found.how, seed, None, reason)
        scores, folds = found.scores[inside], found.folds[inside]
        if quantity == "balanced accuracy":
            statistic = _balanced(scores > 0.0, labels, codes)
            judged = resampling.estimate(statistic, len(part), count, LEVEL, resampling.RESAMPLES, seed, len(part))
            return replace(judged, method=f"{found.how}; {judged.method}")
        judged = (
            auroc(scores, labels, codes, strata=folds, seed=seed)
            if quantity == "AUROC"
            else auroc_difference(scores, confidence, labels, codes, strata=folds, seed=seed)
        )
        return replace(judged, method=f"{found.how}, pairs within a fold; {judged.method}")

    return judge


def _balanced(said: np.ndarray, labels: np.ndarray, codes: np.ndarray) -> resampling.Statistic:
    """Mean of the shares of right and of wrong answers that are recognised, by how often each picture is drawn."""

    def share(rows: np.ndarray, hit: np.ndarray) -> resampling.Statistic:
        def of(drawn: np.ndarray) -> np.ndarray:
            weights = drawn[:, codes[rows]]
            return resampling.divide(weights @ hit[rows], weights.sum(axis=1))

        return of

    right = share(np.flatnonzero(labels), said.astype(np.float64))
    wrong = share(np.flatnonzero(~labels), (~said).astype(np.float64))
    return lambda drawn: (right(drawn) + wrong(drawn)) / 2.0


def _scores(make: Callable[[int], Any], x: np.ndarray, labels: np.ndarray, folds: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning

    scores = np.empty(len(labels))
    for fold in np.unique(folds):
        test = folds == fold
        with warnings.catch_warnings():
            # The perceptron stops after 20 epochs on purpose: that is what holds it back from learning by heart.
            warnings.simplefilter("ignore", ConvergenceWarning)
            # Fewer examples than a batch holds are one batch.
            warnings.filterwarnings("ignore", message="Got `batch_size`")
            fitted = make(seed).fit(x[~test], labels[~test])
        scores[test] = fitted.predict_proba(x[test])[:, 1] - labels[~test].mean()
    return scores


def _boosting(seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    options: dict[str, Any] = {"max_iter": 100, "learning_rate": 0.05, "max_leaf_nodes": 8, "l2_regularization": 1.0}
    options["early_stopping"] = False
    return HistGradientBoostingClassifier(**options, random_state=seed)


def _forest(seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(200, min_samples_leaf=20, random_state=seed)


def _mlp(seed: int) -> Any:
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    options: dict[str, Any] = {"hidden_layer_sizes": (128, 64), "alpha": 1.0, "batch_size": 64, "max_iter": 20}
    return make_pipeline(StandardScaler(), MLPClassifier(**options, random_state=seed))


_MAKE: dict[str, Callable[[int], Any]] = {
    "gradient boosting": _boosting,
    "random forest": _forest,
    "MLP on all attention maps": _mlp,
}
_HOW = {
    "gradient boosting": "histogram gradient boosting (scikit-learn), cut at the training share of right answers",
    "random forest": "random forest (scikit-learn), cut at the training share of right answers",
    "MLP on all attention maps": "perceptron of three layers (128, 64 and 1; 20 epochs)",
}
