"""From which score on an answer is called reliable: thresholds with a guarantee on calibration examples.

Precision: a fixed sequence of thresholds, strictest first, is tested one after another by the exact binomial test and
left at the first that fails (Angelopoulos et al. 2021, "Learn then test", arXiv 2110.01052, section 3.1.2: fixed
sequence testing needs no correction, as long as the sequence was fixed before the labels were seen). Recall: the split
conformal quantile with its (n + 1) correction (Vovk, Gammerman and Shafer 2005; Lei et al. 2018).

Both need independent examples, and questions about one picture are not. One question of each picture is therefore drawn
at random (Dunn, Wasserman and Ramdas 2022, arXiv 1809.07441, section 3: subsampling one observation of a group is
exact); the guarantee is then about a random question on a random picture of the kind that calibrated it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from interp_vlm.errors import DataError
from interp_vlm.stats.inputs import as_classes, as_column, as_groups, check_level

__all__ = ["Threshold", "precision_threshold", "recall_threshold", "threshold_sequence"]

SLACK = 2  # the strictest threshold is as lenient as it must be to pass with so many wrong answers among the accepted
STEPS = 60
HELD_OUT = "pictures that the monitor was not fitted on"


@dataclass(frozen=True)
class Threshold:
    """A score from which on an answer counts as reliable, and what is known of it.

    Attributes:
        value: reliable where the score is at least this.
        goal: "precision" (share right among the reliable), "recall of right" (share of the right answers that are
            called reliable) or "recall of wrong" (share of the wrong ones that are not).
        wanted: the precision or recall asked for.
        confidence: probability, over calibration sets, that the precision is at least `wanted`; None for recall, whose
            guarantee is an average over calibration sets.
        low: lower end of the exact (Clopper-Pearson) interval at that confidence of the precision at this threshold;
            None for recall.
        observed: precision or recall among the examples that calibrated it.
        coverage: share of those examples that it calls reliable.
        n: examples that calibrated it, one of each picture; for recall those of that class.
        accepted: how many examples (of either class, one of each picture) it calls reliable.
        tested: thresholds tested, this one included.
        seed: of the draw of one example a picture.
        assumes: what the guarantee rests on.
    """

    value: float
    goal: str
    wanted: float
    confidence: float | None
    low: float | None
    observed: float
    coverage: float
    n: int
    accepted: int
    tested: int
    seed: int
    assumes: str

    def __str__(self) -> str:
        sure = "on average over calibration sets" if self.confidence is None else f"with confidence {self.confidence:g}"
        return (
            f"score of at least {self.value:.4g}: {self.goal} of at least {self.wanted:g} {sure} "
            f"(observed {self.observed:.3f} on n={self.n}, {self.coverage:.0%} called reliable)"
        )


def threshold_sequence(
    reference: ArrayLike, n: int, precision: float, *, confidence: float = 0.9, steps: int = STEPS
) -> Float[np.ndarray, " threshold"]:
    """Thresholds to test, strictest first, from the scores of other examples than those that will test them.

    The strictest accepts as many of `n` examples as would pass with two wrong answers among them; the last accepts all.

    Args:
        reference: scores from 0 to 1 of the examples that the monitor was fitted on.
        n: how many independent examples (pictures) will test the thresholds.
        precision, confidence: as for `precision_threshold`.

    Example:
        >>> threshold_sequence(np.linspace(0, 1, 101), 1000, 0.95, steps=4).round(2).tolist()
        [0.9, 0.6, 0.3, 0.0]
    """
    from scipy.stats import binom

    check_level(precision)
    check_level(confidence)
    scores = _as_scores(reference, "reference")
    counts = np.arange(1, n + 1)
    passing = counts[binom.cdf(SLACK, counts, 1.0 - precision) <= 1.0 - confidence]
    first = passing[0] / n if len(passing) else 1.0
    shares = np.linspace(first, 1.0, steps)
    return np.unique(np.append(np.quantile(scores, 1.0 - shares[:-1]), 0.0))[::-1]


def precision_threshold(
    scores: ArrayLike,
    labels: ArrayLike,
    precision: float,
    *,
    sequence: ArrayLike,
    confidence: float = 0.9,
    groups: ArrayLike | Sequence[Any] | None = None,
    seed: int = 0,
    assumes: str = HELD_OUT,
) -> Threshold:
    """The lowest threshold of a fixed sequence whose precision is at least `precision`, with a guarantee.

    In at most a share 1 - `confidence` of calibration sets the precision of the threshold returned is below
    `precision`, whatever the scores are worth. The errors of the guarantee: calibration examples that are not like
    those it will be used on, and a sequence chosen by these labels.

    Args:
        scores: (n,) from 0 to 1.
        labels: (n,) True where the answer is right.
        precision: wanted share of right answers among the accepted.
        sequence: thresholds, strictest first (`threshold_sequence`).
        confidence: of the guarantee.
        groups: (n,) pictures; one example of each is drawn.
        seed: of that draw.
        assumes: whose scores these are, for the record.

    Raises:
        DataError: no threshold passes; the message says what precision can be promised.

    Example:
        >>> scores, sequence = np.linspace(0, 1, 400), [0.75, 0.5, 0.25, 0.0]
        >>> precision_threshold(scores, scores > 0.4, 0.9, sequence=sequence).value
        0.5
    """
    check_level(precision)
    check_level(confidence)
    values, right = _one_of_each(scores, labels, groups, seed)
    thresholds = as_column(sequence, "sequence")
    if not len(thresholds) or bool(np.any(np.diff(thresholds) >= 0.0)):
        raise DataError("the sequence of thresholds does not fall", expected="the strictest first, none twice")
    order = np.argsort(values)
    accepted = len(values) - np.searchsorted(values[order], thresholds, side="left")
    hits = np.concatenate([[0], np.cumsum(right[order][::-1])])[accepted]
    low = _lower_bound(hits, accepted, confidence)
    failed = np.flatnonzero(low < precision)
    passed = int(failed[0]) if len(failed) else len(thresholds)
    if passed == 0:
        at = float(thresholds[0]), int(hits[0]), int(accepted[0]), float(low[0])
        raise _unreachable(precision, confidence, *at, len(values))
    chosen = passed - 1
    return Threshold(
        float(thresholds[chosen]), "precision", precision, confidence, float(low[chosen]),
        float(hits[chosen] / accepted[chosen]), float(accepted[chosen] / len(values)), len(values),
        int(accepted[chosen]), min(passed + 1, len(thresholds)), seed, assumes,
    )  # fmt: skip


def recall_threshold(
    scores: ArrayLike,
    labels: ArrayLike,
    recall: float,
    *,
    of: str = "right",
    groups: ArrayLike | Sequence[Any] | None = None,
    seed: int = 0,
    assumes: str = HELD_OUT,
) -> Threshold:
    """The threshold that keeps a share `recall` of the right answers, or stops that share of the wrong ones.

    On average over calibration sets a further right answer is called reliable (`of="right"`), or a further wrong one is
    not (`of="wrong"`), with probability at least `recall`: split conformal prediction within one class.

    Args:
        scores: (n,) from 0 to 1.
        labels: (n,) True where the answer is right.
        recall: wanted share.
        of: "right" or "wrong".
        groups: (n,) pictures; one example (of that class) of each is drawn.
        seed: of that draw.
        assumes: whose scores these are, for the record.

    Raises:
        DataError: too few wrong answers to promise to stop that share of them; the message says what can be promised.

    Example:
        >>> scores = np.linspace(0, 1, 101)
        >>> recall_threshold(scores, scores > 0.495, 0.9).value
        0.54
    """
    check_level(recall)
    if of not in ("right", "wrong"):
        raise DataError(f"of is {of!r}", expected="'right' or 'wrong'")
    values = _as_scores(scores, "scores")
    right = as_classes(labels, "labels", len(values))
    rows = np.flatnonzero(right == (of == "right"))
    codes, _ = as_groups(groups, len(values))
    own = np.sort(values[rows[_drawn(codes[rows], seed)]])
    n = len(own)
    if not n:
        raise DataError(f"no {of} answer among {len(values)}", expected="at least one", remedy="add examples")
    if of == "right":
        place = math.floor((1.0 - recall) * (n + 1) + 1e-9)
        value = float(own[place - 1]) if place else 0.0  # too few to give up any: everything is kept
        kept = int((own >= value).sum())
    else:
        place = math.ceil(recall * (n + 1) - 1e-9)
        if place > n:
            raise DataError(
                f"{n} pictures with a wrong answer cannot promise to stop a share of {recall:g}",
                expected=f"at least {math.ceil(recall / (1.0 - recall) - 1e-9)} of them",
                remedy=f"add examples, or ask for at most {n / (n + 1):.3g}",
            )
        value = float(np.nextafter(own[place - 1], 2.0))
        kept = int((own < value).sum())
    drawn, _ = _one_of_each(scores, labels, groups, seed)
    accepted = int((drawn >= value).sum())
    return Threshold(
        value, f"recall of {of}", recall, None, None, kept / n, accepted / len(drawn), n, accepted, 1, seed, assumes
    )


def _lower_bound(
    hits: Int[np.ndarray, " threshold"], trials: Int[np.ndarray, " threshold"], confidence: float
) -> Float[np.ndarray, " threshold"]:
    """One-sided lower bounds of shares (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    found = beta.ppf(1.0 - confidence, np.maximum(hits, 1), trials - hits + 1)
    return np.where(hits > 0, found, 0.0)


def _one_of_each(
    scores: ArrayLike, labels: ArrayLike, groups: ArrayLike | Sequence[Any] | None, seed: int
) -> tuple[Float[np.ndarray, " picture"], Bool[np.ndarray, " picture"]]:
    values = _as_scores(scores, "scores")
    right = as_classes(labels, "labels", len(values))
    rows = _drawn(as_groups(groups, len(values))[0], seed)
    return values[rows], right[rows]


def _drawn(codes: Int[np.ndarray, " example"], seed: int) -> Int[np.ndarray, " picture"]:
    """One row of each group, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(codes))
    return order[np.unique(codes[order], return_index=True)[1]]


def _as_scores(scores: ArrayLike, name: str) -> Float[np.ndarray, " example"]:
    values = as_column(scores, name)
    if not len(values) or values.min() < 0.0 or values.max() > 1.0:
        span = f"from {values.min():g} to {values.max():g}" if len(values) else "none at all"
        raise DataError(f"{name} are {span}", expected="numbers from 0 to 1")
    return values


def _unreachable(
    precision: float, confidence: float, threshold: float, hits: int, accepted: int, low: float, n: int
) -> DataError:
    at = f"at the strictest threshold tested, {threshold:.4g}, {hits} of {accepted} answers are right"
    return DataError(
        f"no threshold promises a precision of {precision:g} with confidence {confidence:g} on {n} pictures: {at}, "
        f"which promises {low:.3g}",
        expected=f"at least {precision:g}",
        remedy="ask for a lower precision or confidence, or calibrate on more pictures",
    )
