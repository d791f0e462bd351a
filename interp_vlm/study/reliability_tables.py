"""From the signals of every answer to the table of how well each tells right from wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from interp_vlm.errors import DataError
from interp_vlm.probes import ProbeReport, probe_layers
from interp_vlm.probes.estimators import mlp, score_fold_with
from interp_vlm.probes.folds import split
from interp_vlm.stats import Estimate, auroc, auroc_difference, mean, point_biserial, risk_coverage
from interp_vlm.stats.resampling import METHOD
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import corrected, row, tidy

__all__ = ["ALL_AGREE", "CURVES", "SIGNALS", "SITE", "sampling", "summarise"]

SITE = "resid_post"

SIGNALS = {
    "confidence": "confidence in the answer",
    "logit_certainty": "certainty of the output (minus its entropy)",
    "margin": "margin over the next best answer",
    "agreement": "agreement of sampled answers",
    "probe": "probe of hidden states",
    "probe_after_answer": "probe that has seen the answer",
    "probe_l1": "sparse probe (L1)",
    "probe_mlp": "probe with two layers (MLP)",
    "attention_entropy": "concentration of attention (minus Hₛ / ln n)",
    "attention_clusters": "few clusters of attention (minus Cₖ)",
    "attention_peak": "largest attention on a patch",
    "answer_only": "which answer it is, alone",
    "question_only": "the question's words, alone",
    "answer_length": "the answer's length, alone",
    "shuffled_labels": "probe of shuffled labels",
    "control_task": "probe of random labels of questions",
}
"""What is asked to tell right answers from wrong ones, in words."""

CURVES = ("confidence", "agreement", "probe", "attention_peak")
"""The signals by which answers are withheld."""

ALL_AGREE = "share where all samples agree"

_PLAIN = ("confidence", "logit_certainty", "margin", "attention_entropy", "attention_clusters", "attention_peak")
_CORRELATED = ("confidence", "logit_certainty", "attention_entropy", "attention_clusters")
_EVERYWHERE = ("probe", "probe_after_answer", "answer_only", "question_only", "answer_length")
_ONCE = ("probe_l1", "probe_mlp")  # over all questions alone

_RESAMPLES = 1000  # a few hundred estimates a model
_PERMUTATIONS = 99
_L1_C = (0.01, 0.1, 1.0)
_FOLDS, _INNER = 5, 4
_OWN = ("condition", "kind", "signal", "judged", "layer", "coverage")


@dataclass(frozen=True, eq=False)
class _Fitted:
    """What is fitted: one score an example for each signal, from fits that did not see its picture.

    Attributes:
        scores: by signal.
        folds: the outer fold of each example; scores of different folds come from different fits.
        probe: the report of the probe before the answer, None where nothing could be fitted.
        notes: how each signal was made.
        reason: why nothing could be fitted.
    """

    scores: dict[str, np.ndarray]
    folds: np.ndarray
    probe: ProbeReport | None
    notes: dict[str, str]
    reason: str = ""


def summarise(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """How well each signal tells right answers from wrong ones, and what withholding the least sure ones gains."""
    rows = rows.reset_index(drop=True)
    fitted = _fitted(rows, settings.seed)
    options = {"resamples": _RESAMPLES, "seed": settings.seed}
    how = "{k} of each question, temperature {temperature:g}, top-p {top_p:g}".format(**sampling(settings))
    table: list[dict[str, Any]] = []
    for kind, part in _scopes(rows):
        facts = {"condition": part["condition"].iloc[0], "kind": kind, "signal": "", "judged": "", "layer": -1}
        facts["coverage"] = ""
        table += _accuracies(part, facts, options)
        table += _relations(part, fitted, facts, options)
        table += _agreement(part, facts, options, how)
        table += _against_confidence(part, fitted, facts, options)
        for name in CURVES:
            table += _abstention(part, fitted, {**facts, "signal": name}, options)
        if kind == "all":
            table += _report(part, fitted, facts, options)
    return corrected(tidy(table, _OWN))


def _scopes(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """All questions, each kind, and all kinds but existence: the open questions."""
    yield "all", rows
    kinds = sorted(rows["kind"].unique())
    if len(kinds) > 1:
        for kind in kinds:
            yield str(kind), rows[rows["kind"] == kind]
        if "existence" in kinds:
            yield "open", rows[rows["kind"] != "existence"]


def _fitted(rows: pd.DataFrame, seed: int) -> _Fitted:
    """Probes and baselines under one cross-validation grouped by picture, over all questions."""
    right, groups = rows["correct"].to_numpy(bool), rows["group"].tolist()
    options: dict[str, Any] = {"site": SITE, "folds": _FOLDS, "inner_folds": _INNER, "seed": seed}
    options["resamples"] = _RESAMPLES
    lengths = rows["answer_length"] if rows["answer_length"].nunique() > 1 else None
    try:
        before = probe_layers(
            _hidden(rows, "hidden"), right, groups, position="before_answer", permutations=_PERMUTATIONS,
            answers=rows["answer"].tolist(), questions=rows["question"].tolist(), answer_lengths=lengths, **options,
        )  # fmt: skip
    except DataError as error:
        return _Fitted({}, np.zeros(len(rows), dtype=int), None, {}, f"not fitted: {error}")
    after = probe_layers(
        _hidden(rows, "hidden_after"), right, groups, position="after_answer", permutations=0, **options
    )
    chosen = "layers {} chosen on inner folds".format
    scores = {"probe": before.headline_scores, "probe_after_answer": after.headline_scores}
    notes = {
        "probe": f"L2; {chosen(list(before.chosen_layers))}",
        "probe_after_answer": f"L2; {chosen(list(after.chosen_layers))}; {after.notes[0]}",
        "probe_l1": "L1 at the layers of the L2 probe",
        "probe_mlp": "256 hidden units, Adam 1e-4, 50 epochs, at the layers of the L2 probe",
    }
    scores |= _other_probes(_hidden(rows, "hidden"), before, seed)
    for found in before.baselines:
        notes[found.name.replace(" ", "_")] = found.how
        if found.name in ("answer only", "question only", "answer length"):
            scores[found.name.replace(" ", "_")] = found.scores
    return _Fitted(scores, before.folds, before, notes)


def _hidden(rows: pd.DataFrame, column: str) -> np.ndarray:
    """(n, layer, d)"""
    return np.stack(rows[column].to_list()).reshape(len(rows), int(rows["layers"].iloc[0]), -1)


def _other_probes(hidden: np.ndarray, before: ProbeReport, seed: int) -> dict[str, np.ndarray]:
    """Out-of-fold scores of the slower probes, at the layer that the L2 probe's inner folds chose for each fold."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    plan = split(before.labels, before.groups, _FOLDS, _INNER, seed)
    sparse, deep = np.empty(len(hidden)), np.empty(len(hidden))
    for fold, layer in enumerate(before.chosen_layers):
        train, test = plan.parts(fold)
        values, target = torch.as_tensor(hidden[:, layer], dtype=torch.float64), before.labels[train]
        columns = target[:, None].astype(np.float64)
        sparse[test] = score_fold_with("l1", values[train], values[test], columns, plan.inner[fold], _L1_C).test[:, 0]
        network = make_pipeline(StandardScaler(), mlp(seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 50 epochs are the published number
            network.fit(values[train].numpy(), target)
        deep[test] = network.predict_proba(values[test].numpy())[:, 1]
    return {"probe_l1": sparse, "probe_mlp": deep}


def _accuracies(part: pd.DataFrame, facts: dict[str, Any], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for signal, judged, column in (("", "", "correct"), ("agreement", "majority", "majority_correct")):
        own = {**facts, "signal": signal, "judged": judged}
        yield row(mean(part[column], part["group"], **options), "accuracy", "%", scale=100, **own)


def _relations(
    part: pd.DataFrame, fitted: _Fitted, facts: dict[str, Any], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """AUROC of every signal, and the correlation of some."""
    for name in _PLAIN:
        yield from _relation(part, name, {**facts, "signal": name}, options, name in _CORRELATED)
    for judged in ("greedy", "majority"):
        yield from _relation(part, "agreement", {**facts, "signal": "agreement", "judged": judged}, options, True)
    for name in _EVERYWHERE + (_ONCE if facts["kind"] == "all" else ()):
        own = {**facts, "signal": name, "baseline": 0.5, "compared": "chance"}
        if name in fitted.scores:
            score, folds = fitted.scores[name][part.index], fitted.folds[part.index]
            found = auroc(score, part["correct"], part["group"], strata=folds, **options)
            yield _noted(row(found, "AUROC", "", **own), fitted.notes.get(name, ""))
        elif fitted.reason:
            yield row(_none(part, fitted.reason, options), "AUROC", "", **own)


def _relation(
    part: pd.DataFrame, name: str, own: dict[str, Any], options: dict[str, Any], correlated: bool
) -> Iterator[dict[str, Any]]:
    known = part[part[name].notna()]
    left_out = f"{len(part) - len(known)} without a value left out" if len(known) < len(part) else ""
    label = known["majority_correct" if own["judged"] == "majority" else "correct"]
    found = auroc(known[name], label, known["group"], **options)
    yield _noted(row(found, "AUROC", "", baseline=0.5, compared="chance", **own), left_out)
    if correlated:
        r = point_biserial(known[name], label, known["group"], **options)
        fact = {"baseline": 0.0, "compared": "no correlation"}
        yield _noted(row(r, "point-biserial correlation", "", **fact, **own), left_out)


def sampling(settings: Settings) -> dict[str, Any]:
    """How answers are sampled, as `self_consistency` takes it."""
    return {
        "k": settings.samples, "temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed
    }  # fmt: skip


def _agreement(
    part: pd.DataFrame, facts: dict[str, Any], options: dict[str, Any], how: str
) -> Iterator[dict[str, Any]]:
    """How often all samples agree, and how often the answer is right then."""
    agreed = part["agreement"] == 1.0
    own = {**facts, "signal": "agreement"}
    share = mean(agreed, part["group"], **options)
    yield _noted(row(share, ALL_AGREE, "%", scale=100, **own), how)
    for judged, column in (("greedy", "correct"), ("majority", "majority_correct")):
        some = part[agreed]
        found = (
            mean(some[column], some["group"], **options) if len(some) else _none(part, "never do all agree", options)
        )
        compared = {"baseline": 100 * float(part[column].mean()), "compared": "all answers"}
        what = "precision where all samples agree"
        yield row(found, what, "%", scale=100, **{**own, "judged": judged}, **compared)


def _against_confidence(
    part: pd.DataFrame, fitted: _Fitted, facts: dict[str, Any], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    own = {**facts, "signal": "probe", "baseline": 0.0, "compared": "confidence"}
    if fitted.reason:
        found = _none(part, fitted.reason, options)
    else:
        scores = fitted.scores["probe"][part.index], part["confidence"], part["correct"], part["group"]
        found = auroc_difference(*scores, strata=fitted.folds[part.index], **options)
    yield row(found, "probe minus confidence", "", **own)


def _abstention(
    part: pd.DataFrame, fitted: _Fitted, facts: dict[str, Any], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Error rates when the least sure answers are withheld."""
    name = facts["signal"]
    own = {**facts, "judged": "greedy" if name == "agreement" else ""}
    own |= {"baseline": 100 * float(1.0 - part["correct"].mean()), "compared": "all answers given"}
    if name == "probe" and fitted.reason:
        yield row(_none(part, fitted.reason, options), "area under risk-coverage", "%", scale=100, **own)
        return
    score = part[name] if name != "probe" else _ranks(fitted.scores[name][part.index], fitted.folds[part.index])
    known = np.isfinite(np.asarray(score, dtype=np.float64))
    curve = risk_coverage(score[known], part["correct"][known], part["group"][known], **options)
    yield row(curve.area, "area under risk-coverage", "%", scale=100, **own)
    for coverage, risk in zip(curve.coverage, curve.risk, strict=True):
        yield row(risk, "risk", "%", scale=100, **{**own, "coverage": f"{coverage:.1f}"})


def _ranks(scores: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Scores as shares of their own fold that lie below: fits of different folds have different zero points."""
    from scipy.stats import rankdata

    ranks = np.empty(len(scores))
    for fold in np.unique(folds):
        own = folds == fold
        ranks[own] = (rankdata(scores[own]) - 0.5) / own.sum()
    return ranks


def _report(
    part: pd.DataFrame, fitted: _Fitted, facts: dict[str, Any], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """What the probe's own report says: its curve over layers, its place, and its controls."""
    own, chance = {**facts, "signal": "probe"}, {"baseline": 0.5, "compared": "chance"}
    if fitted.probe is None:
        for what in ("peak layer", "onset layer"):
            yield row(_none(part, fitted.reason, options), what, "layer", **own)
        return
    for layer, found in zip(fitted.probe.layers, fitted.probe.auroc, strict=True):
        yield row(found, "AUROC", "", **{**own, "layer": layer}, **chance)
    yield row(fitted.probe.peak, "peak layer", "layer", **own)
    yield row(fitted.probe.onset, "onset layer", "layer", **own)
    for baseline in fitted.probe.baselines:
        if baseline.name in ("shuffled labels", "control task"):
            name = baseline.name.replace(" ", "_")
            yield _noted(row(baseline.auroc, "AUROC", "", **{**facts, "signal": name}, **chance), baseline.how)


def _none(part: pd.DataFrame, reason: str, options: dict[str, Any]) -> Estimate:
    """A number that cannot be had, and why."""
    n, groups, seed = len(part), part["group"].nunique(), options["seed"]
    return Estimate(math.nan, math.nan, math.nan, n, groups, 0.95, METHOD, seed, reason=reason)


def _noted(line: dict[str, Any], more: str) -> dict[str, Any]:
    return {**line, "note": "; ".join(filter(None, (line["note"], more)))}
