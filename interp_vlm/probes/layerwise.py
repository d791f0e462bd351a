"""Layerwise probes: how well each layer's activations tell right answers from wrong ones on unseen pictures."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from interp_vlm.errors import DataError
from interp_vlm.probes import measures
from interp_vlm.probes.baselines import Columns, control_labels, side_baselines
from interp_vlm.probes.estimators import score_fold_with
from interp_vlm.probes.folds import Split, permuted, split, unmoved
from interp_vlm.probes.inputs import Activations, read, read_columns
from interp_vlm.probes.logistic import C_PATH
from interp_vlm.probes.nested import score_fold
from interp_vlm.probes.report import Baseline, ProbeReport
from interp_vlm.stats import Estimate
from interp_vlm.stats.inputs import as_classes, as_groups, check_level, check_resamples

__all__ = ["PROBES", "probe_layers"]

PROBES = ("l2", "l1", "mlp")

TRUE, SHUFFLED, CONTROL = 0, 1, 2  # the targets of every fold


def probe_layers(
    activations: Any,
    labels: ArrayLike | None = None,
    groups: ArrayLike | Sequence[Any] | None = None,
    *,
    position: str | None = None,
    position_index: int | None = None,
    site: str | None = None,
    layers: Sequence[int] | None = None,
    confidence: ArrayLike | None = None,
    answers: Sequence[str] | None = None,
    questions: Sequence[str] | None = None,
    answer_lengths: ArrayLike | None = None,
    types: Sequence[Hashable] | None = None,
    probe: str = "l2",
    C: Sequence[float] = C_PATH,
    folds: int = 5,
    inner_folds: int = 4,
    standardise: bool = True,
    permutations: int | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> ProbeReport:
    """Probe every layer with logistic regression (or an MLP) under nested cross-validation grouped by picture.

    Outer folds report; inner folds of each training part choose C by log loss and, for the headline, the layer by
    AUROC. Features are standardised on each outer training part, as scikit-learn's
    `make_pipeline(StandardScaler(), LogisticRegressionCV(...))` does. Intervals draw groups and keep the fits.

    The p-value of each layer is that of the largest AUROC over layers (Westfall and Young 1993) when labels are
    exchanged between whole groups and every layer is fitted again, at the middle C of the path.

    Where there is nothing to learn, cross-validated AUROCs scatter around 0.5 or, with very few features, below it:
    what the training part shows by chance, the test part shows the other way round.

    Args:
        activations: (n, layer, d) array or tensor, a `Cache` with one position of each example, or an `iv.store`, of
            which one layer at a time is in memory. float64 is worked on as such, anything shorter in float32.
        labels: (n,) booleans, True where the answer is right. A store knows them, and the groups, confidence, answers
            and questions, which are taken from its index where they are not given.
        groups: (n,) pictures; without them every example is its own group.
        position: "before_answer" or "after_answer": whether the activations were read before or after the first answer
            token. Needed for arrays; caches and stores hold the prompt.
        position_index: which of several positions of each example in a store; negative ones count from its last.
        site: which site of the cache or store; for an array its name in the report.
        layers: layers of the cache or store to probe, or the numbers of the array's layers.
        confidence: (n,) the output's confidence, a score that needs no fit.
        answers: (n,) predicted answers.
        questions: (n,) questions.
        answer_lengths: (n,) lengths of the answers, in tokens or words.
        types: (n,) what the control task gives random labels to; by default the questions, else the answers.
        probe: "l2" (fast, exact), "l1", or "mlp": the studied work's two layers, 256 units, Adam 1e-4, 50 epochs.
        C: inverse strengths of the penalty to choose from, as in scikit-learn; not used by the MLP.
        folds: outer folds.
        inner_folds: inner folds.
        standardise: divide features by their standard deviation over the training part.
        permutations: refits with permuted labels, by default 199 for "l2" and none for the slower probes.
        level: coverage of the intervals.
        resamples: draws of the bootstrap.
        seed: of folds, permutations, control labels and bootstrap.

    Raises:
        DataError: one class only, fewer groups than folds, NaN activations, columns of another length, absent layers.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> right = rng.random(200) < 0.5
        >>> hidden = rng.normal(size=(200, 3, 8))
        >>> hidden[:, 1, 0] += 3.0 * right
        >>> report = probe_layers(hidden, right, np.arange(200) // 2, position="before_answer", permutations=0)
        >>> report.peak.value
        1.0
    """
    check_level(level)
    check_resamples(resamples)
    if probe not in PROBES:
        raise DataError(f"probe is {probe!r}", expected="one of " + ", ".join(map(repr, PROBES)))
    permutations = (199 if probe == "l2" else 0) if permutations is None else permutations
    if not len(C) or min(C) <= 0.0:
        raise DataError(f"C is {list(C)}", expected="positive numbers, such as [0.01, 0.1, 1.0]")
    found = read(activations, site, layers, position, position_index)
    n = len(found)
    known = read_columns(
        activations, labels=labels, groups=groups, confidence=confidence, answers=answers, questions=questions
    )
    right = as_classes(known["labels"], "labels", n)
    codes, _ = as_groups(known["groups"], n)
    side = Columns.checked(n, known["confidence"], known["answers"], known["questions"], answer_lengths, types)
    plan = split(right, codes, folds, inner_folds, seed)

    rng = np.random.default_rng(seed)
    shuffled = permuted(right, codes, rng)
    control = control_labels(side, rng)
    # the true labels are fitted at the fixed C too, as the first column: the test compares like with like
    fixed = np.stack([right, *(permuted(right, codes, rng) for _ in range(permutations))], axis=1)
    targets = np.stack([right, shuffled, right if control is None else control], axis=1).astype(np.float64)
    curve = _fit(found, plan, targets if control is not None else targets[:, :CONTROL], fixed, C, standardise, probe)

    how: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    measured = [measures.auroc(row, right, plan.outer, codes, **how) for row in curve.scores[TRUE]]
    if permutations:
        measured = _with_p(measured, curve)
    headline, chosen = _headline(curve, TRUE, plan)
    draws = measures.auroc_draws(curve.scores[TRUE], right, plan.outer, codes, resamples=resamples, seed=seed)
    values = np.array([estimate.value for estimate in measured])
    peak, onset = _places(values, draws, found.layers, measured[0])

    baselines = side_baselines(side, right, codes, plan, C, how)
    baselines.append(
        _refit(curve, SHUFFLED, shuffled, "shuffled labels", "the probe on permuted labels", plan, codes, how)
    )
    if control is not None:
        what = f"the probe on random labels of {side.type_count} {side.type_name}"
        baselines.append(_refit(curve, CONTROL, control, "control task", what, plan, codes, how))
    return ProbeReport(
        layers=found.layers,
        auroc=tuple(measured),
        average_precision=tuple(
            measures.average_precision(row, right, plan.outer, codes, **how) for row in curve.scores[TRUE]
        ),
        brier=tuple(measures.brier(row, right, codes, **how) for row in curve.scores[TRUE]),
        headline=measures.auroc(headline, right, plan.outer, codes, **how),
        headline_scores=headline,
        chosen_layers=tuple(found.layers[index] for index in chosen),
        peak=peak,
        onset=onset,
        baselines=tuple(baselines),
        scores=curve.scores[TRUE],
        labels=right,
        groups=codes,
        folds=plan.outer,
        C=np.full(curve.chosen[TRUE].shape, math.nan) if probe == "mlp" else np.asarray(sorted(C))[curve.chosen[TRUE]],
        probe=probe,
        site=found.site,
        position=found.position,
        model=found.model,
        control_values=None if control is None else measures.fold_auroc(curve.scores[CONTROL].T, control, plan.outer),
        notes=_notes(found, codes, permutations, control is None),
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _Curve:
    """Out-of-fold results of every layer.

    Attributes:
        scores: logits.
        chosen: index of the C chosen in each outer fold.
        inner: AUROC on the inner folds at that C.
        null: AUROC of each layer under each permutation, at the fixed C.
        observed: AUROC of each layer under the true labels, at the fixed C.
    """

    scores: Float[np.ndarray, "target layer example"]
    chosen: np.ndarray
    inner: Float[np.ndarray, "target layer fold"]
    null: Float[np.ndarray, "layer permutation"]
    observed: Float[np.ndarray, " layer"]


def _fit(
    found: Activations,
    plan: Split,
    targets: np.ndarray,
    fixed: np.ndarray,
    C: Sequence[float],
    standardise: bool,
    probe: str,
) -> _Curve:
    n, count = targets.shape
    folds = len(plan.inner)
    score = score_fold if probe == "l2" else partial(score_fold_with, probe)
    scores = np.empty((count, len(found.layers), n))
    chosen = np.empty((count, len(found.layers), folds), dtype=np.intp)
    inner = np.empty((count, len(found.layers), folds))
    measured = np.empty((len(found.layers), fixed.shape[1]))
    for index, number in enumerate(found.layers):
        values = found.layer(number)
        permuted_scores = np.empty(fixed.shape)
        for fold in range(folds):
            train, test = plan.parts(fold)
            result = score(
                values[train],
                values[test],
                targets[train],
                plan.inner[fold],
                C,
                standardise=standardise,
                permutations=fixed[train].astype(np.float64),
                permutation_C=sorted(C)[len(C) // 2],
            )
            scores[:, index, test] = result.test.T
            chosen[:, index, fold], inner[:, index, fold] = result.chosen, result.inner_auroc
            permuted_scores[test] = result.permuted
        measured[index] = measures.fold_auroc(permuted_scores, fixed, plan.outer)
        del values  # before the next layer comes
    return _Curve(scores, chosen, inner, measured[:, 1:], measured[:, 0])


def _with_p(measured: list[Estimate], curve: _Curve) -> list[Estimate]:
    """The layers' estimates with p-values adjusted by the largest AUROC over layers."""
    largest = np.append(np.nanmax(curve.null, axis=0), np.nanmax(curve.observed))
    p = np.mean(largest[None, :] >= curve.observed[:, None], axis=1)
    return [
        replace(
            estimate, p=float(value), method=f"{estimate.method}; max over layers, {curve.null.shape[1]} permutations"
        )
        for estimate, value in zip(measured, p, strict=True)
    ]


def _headline(curve: _Curve, target: int, plan: Split) -> tuple[np.ndarray, list[int]]:
    """Scores of each outer fold from the layer that its inner folds prefer (the first in a tie)."""
    inner = np.nan_to_num(curve.inner[target], nan=0.5)
    chosen = [int(np.argmax(inner[:, fold])) for fold in range(inner.shape[1])]
    return curve.scores[target][np.asarray(chosen)[plan.outer], np.arange(len(plan.outer))], chosen


def _refit(
    curve: _Curve, target: int, labels: np.ndarray, name: str, how: str, plan: Split, codes: np.ndarray, options: dict
) -> Baseline:
    """The whole nested procedure, choice of the layer included, on other labels."""
    scores, _ = _headline(curve, target, plan)
    return Baseline(name, measures.auroc(scores, labels, plan.outer, codes, **options), how, scores)


def _places(
    values: np.ndarray, draws: np.ndarray, layers: tuple[int, ...], like: Estimate
) -> tuple[Estimate, Estimate]:
    """Peak and onset layer, with percentile intervals over resampled curves."""
    kept = draws[np.isfinite(draws).all(axis=1)]
    numbers = np.asarray(layers, dtype=np.float64)
    tail = (1.0 - like.level) / 2.0

    def place(point: float, found: np.ndarray, reason: str) -> Estimate:
        known = found[np.isfinite(found)]
        low = high = math.nan
        if math.isfinite(point) and len(known) >= 0.95 * len(draws):
            low, high = np.quantile(numbers[known.astype(int)], [tail, 1.0 - tail], method="inverted_cdf")
            reason = ""
        value = numbers[int(point)] if math.isfinite(point) else math.nan
        method = "bootstrap over groups (percentile of layers)"
        return Estimate(
            float(value), float(low), float(high), like.n, like.groups, like.level, method, like.seed, None, reason
        )

    peak = place(float(np.argmax(values)), np.argmax(kept, axis=1).astype(float), "undefined in too many resamples")
    return peak, place(float(measures.onset(values)), measures.onset(kept), "the curve is not above chance")


def _notes(found: Activations, codes: np.ndarray, permutations: int, no_control: bool) -> tuple[str, ...]:
    notes = []
    if found.position == "after_answer":
        notes.append("read after the first answer token: this probe has seen the answer")
    if len(np.unique(codes)) == len(codes):
        notes.append("every example is its own group: a picture with several questions would leak between folds")
    if permutations and (alone := unmoved(codes)):
        notes.append(f"{alone} groups have a size of their own and keep their labels in every permutation")
    if no_control:
        notes.append("no control task: it needs questions, answers or types that occur more than once")
    return tuple(notes)
