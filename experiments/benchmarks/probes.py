"""Nested layerwise probes against a plain scikit-learn grid over layers, folds and C: the same folds, the same path.

    python experiments/benchmarks/probes.py --quick
    python experiments/benchmarks/probes.py                     # n = 3,000, d = 4,096, 32 layers

Four ways to write the same thing with scikit-learn, each choosing C by inner log loss and refitting:

- pipeline: GridSearchCV over make_pipeline(StandardScaler(), LogisticRegression()), what its user guide shows;
- grid: the training part standardised once, GridSearchCV over LogisticRegression() (what `probe_layers` computes);
- grid, float64: the same on float64 features;
- path: the training part standardised once, LogisticRegressionCV, which starts each C from the one before.

All but "grid, float64" get float32, as ours does. Both sides use one thread and run in turns, so that a slow moment of
the machine hits both; ratios are of processor time, which other programs do not lengthen as they do the clock's. Ours
runs on every layer and fold; scikit-learn on `--measured` whole layers, and its time is multiplied: each layer is the
same work. Permutations, control task, baselines and bootstrap are ours alone and are timed apart.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import interp_vlm as iv
from interp_vlm.probes.folds import Split, split
from interp_vlm.probes.logistic import C_PATH
from interp_vlm.probes.nested import score_fold

FOLDS, INNER = 5, 4
MOST_STEPS = 5000


@dataclass
class Timing:
    """Processor seconds of one way, a value for each measured layer."""

    what: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    largest_auroc_difference: float = 0.0
    same_C: int = 0
    folds: int = 0


def layer(n: int, d: int, labels: np.ndarray, seed: int, auroc: float = 0.8) -> np.ndarray:
    """Activations of a realistic spectrum with a planted direction.

    Variances fall as 1 / i, as those of residual streams do; the label shifts the 21st largest direction so that this
    direction alone tells the classes apart with the given AUROC. Features mix all directions.
    """
    from scipy.special import ndtri

    rng = np.random.default_rng(seed)
    spread = np.arange(1, d + 1) ** -0.5
    hidden = rng.normal(size=(n, d)).astype(np.float32) * spread.astype(np.float32)
    hidden[:, min(20, d - 1)] += np.sqrt(2.0) * ndtri(auroc) * spread[min(20, d - 1)] * labels
    return hidden @ (rng.standard_normal((d, d), dtype=np.float32) / np.float32(np.sqrt(d)))


def pipeline(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, inner: np.ndarray) -> tuple[Any, float]:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_STEPS))
    search = GridSearchCV(
        model, {"logisticregression__C": list(C_PATH)}, cv=PredefinedSplit(inner), scoring="neg_log_loss"
    ).fit(x[train], y[train])
    return search.decision_function(x[test]), search.best_params_["logisticregression__C"]


def grid(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, inner: np.ndarray) -> tuple[Any, float]:
    scaler = StandardScaler().fit(x[train])
    model = LogisticRegression(max_iter=MOST_STEPS)
    search = GridSearchCV(model, {"C": list(C_PATH)}, cv=PredefinedSplit(inner), scoring="neg_log_loss")
    search.fit(scaler.transform(x[train]), y[train])
    return search.decision_function(scaler.transform(x[test])), search.best_params_["C"]


def grid_double(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, inner: np.ndarray
) -> tuple[Any, float]:
    return grid(x.astype(np.float64), y, train, test, inner)


def path(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, inner: np.ndarray) -> tuple[Any, float]:
    scaler = StandardScaler().fit(x[train])
    options: dict[str, Any] = {"l1_ratios": (0.0,), "use_legacy_attributes": False, "max_iter": MOST_STEPS}
    cv: dict[str, Any] = {"Cs": list(C_PATH), "cv": PredefinedSplit(inner), "scoring": "neg_log_loss"}
    model = LogisticRegressionCV(**cv, **options)
    model.fit(scaler.transform(x[train]), y[train])
    return model.decision_function(scaler.transform(x[test])), float(np.asarray(model.C_).item())


def ours(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, inner: np.ndarray) -> tuple[Any, float]:
    values = torch.from_numpy(x)
    found = score_fold(values[train], values[test], y[train, None].astype(float), inner, C_PATH)
    return found.test[:, 0], sorted(C_PATH)[found.chosen[0]]


RIVALS = {"pipeline": pipeline, "grid": grid, "grid, float64": grid_double, "path": path}


def measure(
    n: int, d: int, layers: int, measured: int, rivals: tuple[str, ...] = ("pipeline", "grid"), said: bool = False
) -> dict[str, Any]:
    """Times of both sides, and how far their AUROCs are apart, fold by fold."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    labels, codes = rng.random(n) < 0.6, np.arange(n) // 3
    plan = split(labels, codes, FOLDS, INNER, seed=0)
    warm_up(labels, plan, rivals)
    mine, others = Timing("ours"), [Timing(name) for name in rivals]
    aurocs = []
    for number in range(layers):
        features = layer(n, d, labels, seed=number)
        seconds, own = timed(ours, features, labels, plan)
        mine.seconds.append(seconds)
        aurocs.append(float(np.mean(aurocs_of(own, labels, plan))))
        for rival in others if number < measured else ():
            seconds, theirs = timed(RIVALS[rival.what], features, labels, plan)
            rival.seconds.append(seconds)
            rival.ratios.append(seconds / mine.seconds[-1])
            apart = np.abs(np.subtract(aurocs_of(own, labels, plan), aurocs_of(theirs, labels, plan)))
            alike = [left[1] == right[1] for left, right in zip(own, theirs, strict=True)]
            rival.same_C, rival.folds = rival.same_C + sum(alike), rival.folds + len(alike)
            rival.largest_auroc_difference = max(rival.largest_auroc_difference, float(apart.max()))
        if said:
            print(
                json.dumps({"layer": number, "seconds": [round(way.seconds[-1], 2) for way in (mine, *others)]}),
                flush=True,
            )
    return {
        "n": n, "d": d, "layers": layers, "outer_folds": FOLDS, "inner_folds": INNER, "C": len(C_PATH),
        "measured_layers": measured, "aurocs": [round(value, 4) for value in aurocs],
        "ours_seconds_all": round(sum(mine.seconds), 2),
        "ours_seconds_a_layer": [round(value, 3) for value in mine.seconds],
        "rivals": [
            {**asdict(rival), "seconds_all_extrapolated": round(float(np.mean(rival.seconds)) * layers, 1),
             "ratio": round(float(np.median(rival.ratios)), 2)}
            for rival in others
        ],
        "probe_layers": extras(layer(n, d, labels, seed=0), labels, codes),
    }  # fmt: skip


def timed(
    how: Callable[..., tuple[Any, float]], features: np.ndarray, labels: np.ndarray, plan: Split
) -> tuple[float, list[tuple[Any, float]]]:
    """Processor seconds of all outer folds of a layer, and what each gave."""
    start, found = time.process_time(), []
    for fold in range(FOLDS):
        found.append(how(features, labels, *plan.parts(fold), plan.inner[fold]))
    return time.process_time() - start, found


def aurocs_of(found: list[tuple[Any, float]], labels: np.ndarray, plan: Split) -> list[float]:
    return [float(roc_auc_score(labels[plan.parts(fold)[1]], found[fold][0])) for fold in range(FOLDS)]


def extras(features: np.ndarray, labels: np.ndarray, codes: np.ndarray) -> dict[str, float]:
    """Seconds of `iv.probe_layers` on one layer: what the rest of a report costs."""
    found = {}
    for name, permutations in (("without permutations", 0), ("with 199 permutations", 199)):
        start = time.process_time()
        iv.probe_layers(features[:, None], labels, codes, position="before_answer", permutations=permutations)
        found[name] = round(time.process_time() - start, 2)
    return found


def warm_up(labels: np.ndarray, plan: Split, rivals: tuple[str, ...]) -> None:
    """Imports and first calls are paid before the clock starts."""
    tiny = np.random.default_rng(0).normal(size=(len(labels), 8)).astype(np.float32)
    for how in (ours, *(RIVALS[name] for name in rivals)):
        how(tiny, labels, *plan.parts(0), plan.inner[0])


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """What `make bench` shows: one row for each rival."""
    sizes = (240, 300, 1, 1) if quick else (3000, 4096, 2, 2)
    found = measure(*sizes, rivals=("pipeline", "grid") if quick else tuple(RIVALS))
    return [
        {
            "what": f"layerwise probes, n = {found['n']:,}, d = {found['d']:,}",
            "against": f"scikit-learn, {rival['what']}",
            "value": rival["ratio"],
            "low": min(rival["ratios"]),
            "high": max(rival["ratios"]),
            "unit": "times faster",
            "note": f"least and most of {len(rival['ratios'])} layers; AUROCs within "
            f"{rival['largest_auroc_difference']:.1e}, same C in {rival['same_C']} of {rival['folds']} folds",
        }
        for rival in found["rivals"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--measured", type=int, default=2, help="layers on which scikit-learn is really run")
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), default=["pipeline", "grid"])
    parser.add_argument("--quick", action="store_true", help="n = 600, d = 800, 2 layers")
    options = parser.parse_args()
    sizes = (600, 800, 2, 2) if options.quick else (options.n, options.d, options.layers, options.measured)
    print(json.dumps(measure(*sizes, rivals=tuple(options.rivals), said=not options.quick), indent=1))


if __name__ == "__main__":
    main()
