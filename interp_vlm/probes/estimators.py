"""The other two probes, through scikit-learn: L1 logistic regression, and the two-layer MLP of the studied work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from interp_vlm.probes.measures import fold_auroc
from interp_vlm.probes.nested import FoldScores
from interp_vlm.probes.sparse import l1_logistic

__all__ = ["mlp", "score_fold_with"]


def mlp(seed: int = 0) -> Any:
    """Two layers, 256 hidden units, Adam at 1e-4, 50 epochs (the studied work's probe); no weight decay."""
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier((256,), solver="adam", learning_rate_init=1e-4, max_iter=50, alpha=0.0, random_state=seed)


def score_fold_with(
    kind: str,
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
    """`score_fold` for "l1" and "mlp", one fit at a time; the MLP has no C: its inner folds choose the layer alone."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler(with_std=standardise).fit(train.cpu().numpy())
    x, other = (np.asarray(scaler.transform(part.cpu().numpy())) for part in (train, test))
    strengths = sorted(C) if kind == "l1" else [1.0]
    make: Callable[[float], Any] = l1_logistic if kind == "l1" else lambda _: mlp()
    scored, chosen, aurocs = [], [], []
    for target in targets.T > 0.5:
        validated = np.empty((len(x), len(strengths)))
        for column, strength in enumerate(strengths):
            for fold in range(int(inner.max()) + 1):
                kept = inner != fold
                validated[~kept, column] = _logits(make(strength), x[kept], target[kept], x[~kept])
        losses = np.logaddexp(0.0, -(2.0 * target[:, None] - 1.0) * validated).mean(0)
        best = int(np.argmin(losses))
        chosen.append(best)
        aurocs.append(fold_auroc(validated[:, [best]], target, inner)[0])
        scored.append(_logits(make(strengths[best]), x, target, other))
    columns = [] if permutations is None else list(permutations.T > 0.5)
    strength = permutation_C if kind == "l1" else 1.0
    null = [_logits(make(strength), x, column, other) for column in columns]
    return FoldScores(
        np.stack(scored, axis=1),
        np.asarray(chosen),
        np.asarray(aurocs),
        np.stack(null, axis=1) if null else np.empty((len(other), 0)),
    )


def _logits(model: Any, x: np.ndarray, y: np.ndarray, other: np.ndarray) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning

    if y.min() == y.max():  # permuted or control labels on an inner fold: nothing to tell apart
        return np.full(len(other), 20.0 if y[0] else -20.0)
    with warnings.catch_warnings():
        # 50 epochs are the published number, not a failure
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
    if hasattr(model, "decision_function"):
        return model.decision_function(other)
    p = np.clip(model.predict_proba(other)[:, 1], 1e-15, 1.0 - 1e-15)
    return np.log(p) - np.log1p(-p)
