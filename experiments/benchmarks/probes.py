"""Nested layerwise probes: the shared decomposition against a plain scikit-learn grid, on the same folds.

    python experiments/benchmarks/probes.py --quick
    python experiments/benchmarks/probes.py --n 3000 --d 4096 --measured 1

Both sides choose C by inner log loss for every layer and outer fold and refit; both standardise on the outer training
part. They run in one process, one after the other, on `--measured` layers and outer folds only; the time of all
`--layers` layers and folds is that time multiplied, since every layer and fold is the same work.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.preprocessing import StandardScaler

from interp_vlm.probes.folds import split
from interp_vlm.probes.logistic import C_PATH
from interp_vlm.probes.nested import score_fold

FOLDS, INNER = 5, 4


def layer(n: int, d: int, labels: np.ndarray, strength: float, seed: int) -> np.ndarray:
    """Activations with the falling spectrum of a residual stream, and a signal in one of its directions."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -0.5
    hidden[:, 20] += strength * hidden[:, 20].std() * labels
    return (hidden @ np.linalg.qr(rng.normal(size=(d, d)))[0]).astype(np.float32)


def plain(
    features: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, inner: np.ndarray
) -> np.ndarray:
    """Test scores of scikit-learn's own grid search on the raw, standardised features."""
    scaler = StandardScaler().fit(features[train].astype(np.float64))
    x, other = scaler.transform(features[train]), scaler.transform(features[test])
    model = LogisticRegression(max_iter=5000)
    search = GridSearchCV(model, {"C": list(C_PATH)}, cv=PredefinedSplit(inner), scoring="neg_log_loss")
    return search.fit(x, labels[train]).decision_function(other)


def shared(
    features: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, inner: np.ndarray
) -> np.ndarray:
    values = torch.from_numpy(features)
    return score_fold(values[train], values[test], labels[train, None].astype(float), inner, C_PATH).test[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--measured", type=int, default=1, help="layers that are really run")
    parser.add_argument("--measured-folds", type=int, default=1, help="outer folds of them that are really run")
    parser.add_argument("--quick", action="store_true", help="n = 600, d = 512")
    options = parser.parse_args()
    n, d = (600, 512) if options.quick else (options.n, options.d)
    torch.set_num_threads(1)

    rng = np.random.default_rng(0)
    labels, codes = rng.random(n) < 0.6, np.arange(n) // 3
    plan = split(labels, codes, FOLDS, INNER, seed=0)
    # imports and first calls are paid before the clock starts
    tiny, parts = rng.normal(size=(n, 4)).astype(np.float32), plan.parts(0)
    for how in (shared, plain):
        how(tiny, labels, *parts, plan.inner[0])
    seconds, difference, aurocs = {"plain": 0.0, "shared": 0.0}, 0.0, []
    for number in range(options.measured):
        features = layer(n, d, labels, strength=0.5 + number, seed=number)
        for fold in range(options.measured_folds):
            train, test = plan.parts(fold)
            found = {}
            for name, how in (("shared", shared), ("plain", plain)):
                start = time.perf_counter()
                found[name] = how(features, labels, train, test, plan.inner[fold])
                seconds[name] += time.perf_counter() - start
            plain_auroc, shared_auroc = (
                float(roc_auc_score(labels[test], found[name])) for name in ("plain", "shared")
            )
            difference = max(difference, abs(plain_auroc - shared_auroc))
            aurocs.append(round(shared_auroc, 4))
    whole = options.layers * FOLDS / (options.measured * options.measured_folds)
    result = {
        "n": n,
        "d": d,
        "layers": options.layers,
        "outer_folds": FOLDS,
        "inner_folds": INNER,
        "C": len(C_PATH),
        "measured_layers": options.measured,
        "measured_folds": options.measured_folds,
        "plain_seconds_measured": round(seconds["plain"], 2),
        "shared_seconds_measured": round(seconds["shared"], 2),
        "plain_seconds_all_extrapolated": round(seconds["plain"] * whole),
        "shared_seconds_all_extrapolated": round(seconds["shared"] * whole),
        "ratio": round(seconds["plain"] / seconds["shared"], 1),
        "largest_auroc_difference": difference,
        "aurocs": aurocs,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
