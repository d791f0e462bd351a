"""From a probe report to a monitor: one layer, fitted again on all examples, its scores calibrated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_vlm.errors import DataError, ModelError
from interp_vlm.interventions.cache import Cache
from interp_vlm.probes.inputs import read
from interp_vlm.probes.logistic import reduce, solve
from interp_vlm.probes.monitor import ReliabilityMonitor
from interp_vlm.probes.nested import score_fold
from interp_vlm.probes.scoring import refuse_elsewhere, width
from interp_vlm.readouts.identity import identity_of
from interp_vlm.readouts.store import Store

if TYPE_CHECKING:
    from interp_vlm.probes.report import ProbeReport
    from interp_vlm.vlm import VLM

__all__ = ["fit_monitor", "platt"]

SAME = 1e-2  # of the scores' standard deviation: more is no rounding


def fit_monitor(
    report: ProbeReport,
    activations: Any,
    vlm: VLM,
    *,
    layer: int | None = None,
    kinds: Sequence[str] | None = None,
    choices: Sequence[str] | None = None,
    C: Sequence[float],
    standardise: bool = True,
) -> ReliabilityMonitor:
    """See `ProbeReport.monitor`."""
    _refuse(report, vlm)
    if isinstance(activations, Store):
        activations.check(vlm)
    if isinstance(activations, (Cache, Store)):
        _refuse_other_positions(activations)
        found = read(activations, report.site, list(report.layers), None)
    else:
        found = read(activations, report.site, list(report.layers), report.position)
    n = len(report.labels)
    if len(found) != n or (kinds is not None and len(kinds) != n):
        count = len(found) if len(found) != n else len(kinds or ())
        what = "activations" if len(found) != n else "kinds"
        raise DataError(f"{what} of {count} examples", expected=f"the report's {n}")
    chosen = _layer(report, layer)
    if chosen >= vlm.anatomy.n_layers or found.shape[2] != width(vlm, report.site):
        raise ModelError(
            f"the report is about layer {chosen} with {found.shape[2]} numbers",
            expected=f"{vlm.name}: layers 0 to {vlm.anatomy.n_layers - 1} with {width(vlm, report.site)}",
            remedy="give the model and the activations that were probed",
        )
    values, targets = found.layer(chosen), report.labels[:, None].astype(np.float64)
    _refuse_other_activations(report, chosen, values, targets, standardise)
    strength = sorted(C)[score_fold(values, values[:1], targets, report.folds, C, standardise=standardise).chosen[0]]
    weights, intercept = _fitted(values, targets, strength, standardise)
    logits = report.layer_scores(chosen)
    slope, offset = platt(logits, report.labels)
    from scipy.special import expit

    return ReliabilityMonitor(
        model=identity_of(vlm),
        site=report.site,
        layer=chosen,
        weights=weights,
        intercept=intercept,
        slope=slope,
        offset=offset,
        C=float(strength),
        auroc=report.headline,
        scores=expit(slope * logits + offset),
        labels=report.labels,
        groups=report.groups,
        kinds=tuple(sorted(set(map(str, kinds or ())))),
        choices=None if choices is None else tuple(choices),
        seed=report.seed,
    )


def platt(logits: Float[np.ndarray, " example"], labels: Bool[np.ndarray, " example"]) -> tuple[float, float]:
    """Slope and offset of the sigmoid that turns logits of unseen examples into probabilities (Platt 1999).

    Targets are Platt's (n + 1) / (n + 2), so that classes which are told apart perfectly leave the slope finite. A
    negative slope would turn the probe round: the slope is then 0 and every example has the share of right answers.

    Example:
        >>> slope, offset = platt(np.array([-1.0, 1.0, -1.0, 1.0]), np.array([False, True, True, False]))
        >>> round(slope, 3), round(offset, 3)
        (0.0, 0.0)
    """
    from sklearn.linear_model import LogisticRegression

    right, wrong = int(labels.sum()), int((~labels).sum())
    aim = np.where(labels, (right + 1.0) / (right + 2.0), 1.0 / (wrong + 2.0))
    twice = np.concatenate([logits, logits])[:, None]
    classes = np.repeat([1, 0], len(logits))
    model = LogisticRegression(C=np.inf, max_iter=1000).fit(twice, classes, np.concatenate([aim, 1.0 - aim]))
    slope, offset = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope <= 0.0:
        share = float(aim.mean())
        return 0.0, float(np.log(share / (1.0 - share)))
    return slope, offset


def _fitted(
    values: Float[Tensor, "example feature"], targets: Float[np.ndarray, "example 1"], C: float, standardise: bool
) -> tuple[Float[np.ndarray, " feature"], float]:
    """Coefficients and intercept of one probe, for the features as they are."""
    reduced = reduce(values, standardise=standardise)
    labels = torch.as_tensor(targets).to(reduced.rows)
    solved = solve(reduced, labels, torch.ones_like(labels), torch.tensor([C]).to(reduced.rows))
    weights, intercept = reduced.raw(*solved)
    return weights[:, 0].cpu().numpy().astype(np.float64), float(intercept[0])


def _refuse(report: ProbeReport, vlm: VLM) -> None:
    if report.saw_answer:
        raise DataError(
            "the probe read after the first answer token: its score would need a second forward step, and has seen the "
            "answer",
            expected="a probe of the prompt's last token (position 'before_answer')",
            remedy="capture with positions='last' and probe again",
        )
    if report.probe != "l2":
        raise DataError(
            f"the report is of a probe {report.probe!r}", expected="'l2'", remedy="call probe_layers(..., probe='l2')"
        )
    if not report.site:
        raise DataError(
            "the report does not say at which site the activations were read",
            expected="a site, so that the monitor knows what to read",
            remedy="pass site='resid_post' (or where they were captured) to probe_layers",
        )
    refuse_elsewhere(report.site)
    if report.model and report.model != vlm.name:
        raise ModelError(
            f"the report is about {report.model}, the model is {vlm.name}",
            expected=report.model,
            remedy="load the model that was probed",
        )


def _refuse_other_positions(activations: Cache | Store) -> None:
    if isinstance(activations, Store):
        right = activations.selection == "last"
    else:
        last = torch.cat([tokens.last for tokens in activations.tokens]).to(activations.positions)
        right = activations.positions.shape[1] == 1 and bool((activations.positions[:, 0] == last).all())
    if not right:
        raise DataError(
            "the activations were not read at the last prompt token",
            expected="the position at which the answer is read",
            remedy="capture with positions='last'",
        )


def _layer(report: ProbeReport, layer: int | None) -> int:
    if layer is not None:
        report.layer_scores(layer)
        return layer
    votes = Counter(report.chosen_layers)
    return min(number for number, count in votes.items() if count == max(votes.values()))


def _refuse_other_activations(
    report: ProbeReport, layer: int, values: Float[Tensor, "example feature"], targets: np.ndarray, standardise: bool
) -> None:
    """One fold is fitted again: it must give the report's scores."""
    train, test = np.flatnonzero(report.folds != 0), np.flatnonzero(report.folds == 0)
    strength = float(report.C[report.layers.index(layer), 0])
    weights, intercept = _fitted(values[train], targets[train], strength, standardise)
    again = values[test].cpu().numpy() @ weights + intercept
    scores = report.layer_scores(layer)
    apart = float(np.abs(again - scores[test]).max())
    if not apart <= SAME * float(scores.std() + 1e-12):
        raise DataError(
            f"these activations are not the ones probed: at layer {layer} their scores differ by up to {apart:.3g}",
            expected="the report's activations, in its order, and its `standardise`",
            remedy="pass what probe_layers was given",
        )
