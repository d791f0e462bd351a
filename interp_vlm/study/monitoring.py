"""Fit a reliability monitor on a data set, and measure one on other data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_vlm.data.example import Example
from interp_vlm.engine.batches import batches
from interp_vlm.engine.place import layers_of
from interp_vlm.errors import DataError
from interp_vlm.probes.layerwise import probe_layers
from interp_vlm.probes.scoring import one_pass
from interp_vlm.sites import site as site_named
from interp_vlm.stats import Estimate, auroc, auroc_difference, mean, risk_coverage
from interp_vlm.study.folder import write_bytes
from interp_vlm.study.judge import Judge
from interp_vlm.study.tables import row, tidy

if TYPE_CHECKING:
    from interp_vlm.probes.monitor import ReliabilityMonitor
    from interp_vlm.probes.report import ProbeReport
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["Judged", "evaluate", "fitted_pictures", "judged", "measure", "probed", "set_aside", "write_report"]

SITE = "resid_post"
PICTURES = Path("report") / "pictures.txt"
SIGNALS = {"monitor": "the monitor's score", "confidence": "probability of the answer's token (baseline)"}

Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Judged:
    """Examples, what the model answered, and the hidden states at the answer position."""

    examples: tuple[Example, ...]
    hidden: Float[Tensor, "example layer feature"]
    layers: tuple[int, ...]
    answers: tuple[str, ...]
    confidence: Float[np.ndarray, " example"]
    right: Bool[np.ndarray, " example"]

    @property
    def groups(self) -> list[str]:
        """The picture of each example."""
        return [example.group for example in self.examples]

    def part(self, rows: np.ndarray) -> Judged:
        """Some of the examples."""
        return Judged(
            tuple(self.examples[row] for row in rows), self.hidden[torch.as_tensor(rows)], self.layers,
            tuple(self.answers[row] for row in rows), self.confidence[rows], self.right[rows],
        )  # fmt: skip


def judged(
    vlm: VLM,
    examples: Sequence[Example],
    layers: Any = "all",
    *,
    site: str = SITE,
    choices: Sequence[str] | None = None,
    batch_size: int = 16,
    progress: Progress = lambda done: None,
) -> Judged:
    """Answer the examples, one forward pass a batch, and say which answers are right."""
    if not len(examples):
        raise DataError("no examples", expected="at least one")
    numbers = tuple(layers_of(site_named(site), layers, vlm.anatomy))

    def passed(rows: Sequence[int], batch: Batch) -> list[tuple[Tensor, str, float, bool]]:
        found = one_pass(vlm, batch, site, numbers, choices)
        judge = Judge(vlm, batch, [examples[row] for row in rows])
        right = [judge.right(number, answer) for number, answer in enumerate(found.answers)]
        progress(len(batch))
        return list(zip(found.hidden.float().cpu(), map(str, found.answers), found.confidence, right, strict=True))

    each = batches(vlm, examples, batch_size).each(passed)
    hidden, answers, confidence, right = zip(*each, strict=True)
    return Judged(
        tuple(examples), torch.stack(hidden), numbers, answers, np.array(confidence), np.array(right, dtype=bool)
    )


def set_aside(groups: Sequence[str], share: float, seed: int) -> Bool[np.ndarray, " example"]:
    """Which examples calibrate the threshold: those of a random share of the pictures.

    Raises:
        DataError: a share that is not from 0 to 1, or too few pictures.

    Example:
        >>> set_aside(["a", "a", "b", "b"], 0.5, seed=0).tolist()
        [True, True, False, False]
    """
    if not 0.0 <= share < 1.0:
        raise DataError(f"the share held out is {share:g}", expected="from 0 to less than 1")
    names = sorted(set(groups))
    count = round(share * len(names))
    if share > 0.0 and count in (0, len(names)):
        raise DataError(f"{len(names)} pictures cannot be parted by the share {share:g}", remedy="add pictures")
    chosen = {names[index] for index in np.random.default_rng(seed).permutation(len(names))[:count]}
    return np.array([group in chosen for group in groups], dtype=bool)


def probed(found: Judged, seed: int) -> ProbeReport:
    """Layerwise probes of the examples, with the baselines that need no further run."""
    return probe_layers(
        found.hidden,
        found.right,
        found.groups,
        position="before_answer",
        site=SITE,
        layers=found.layers,
        confidence=found.confidence,
        answers=found.answers,
        questions=[example.question for example in found.examples],
        permutations=0,
        seed=seed,
    )


def write_report(folder: Path, report: ProbeReport, pictures: Sequence[str]) -> None:
    """What the probe found, beside its monitor: tables, the curve, and which pictures were used."""
    import io

    place = folder / PICTURES.parent
    write_bytes(place / "layers.csv", report.frame().to_csv(index=False).encode())
    write_bytes(place / "signals.csv", report.baseline_frame().to_csv(index=False).encode())
    drawn = io.BytesIO()
    report.plot().savefig(drawn, format="png", dpi=150)
    write_bytes(place / "layers.png", drawn.getvalue())
    write_bytes(folder / PICTURES, "".join(f"{name}\n" for name in sorted(set(pictures))).encode())


def fitted_pictures(folder: Path) -> set[str]:
    """The pictures that a monitor was fitted and its threshold chosen on, as far as its folder knows."""
    path = folder / PICTURES
    return set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()


def evaluate(
    monitor: ReliabilityMonitor,
    vlm: VLM,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress = lambda done: None,
) -> pd.DataFrame:
    """How a monitor does on examples it has not seen, beside the model's own confidence: a tidy table.

    Raises:
        ModelError: another model than the monitor's.
    """
    monitor.bind(vlm)
    found = judged(
        vlm, examples, [monitor.layer], site=monitor.site, choices=monitor.choices, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    scores = monitor.probability(found.hidden[:, 0])
    threshold = None if monitor.threshold is None else monitor.threshold.value
    return measure(scores, found.confidence, found.right, found.groups, threshold, seed=seed)


def measure(
    scores: Float[np.ndarray, " example"],
    confidence: Float[np.ndarray, " example"],
    right: Bool[np.ndarray, " example"],
    groups: Sequence[str],
    threshold: float | None = None,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC, Brier score, risk by coverage and precision at the threshold, of the score and of the confidence.

    Args:
        scores: the monitor's.
        confidence: the model's own, a probability too.
        right: whether the answers were right.
        groups: their pictures.
        threshold: answers with at least this score are reliable; None leaves those rows out.
        seed: of the resampling, and of the draw of one question a picture for the exact interval.
    """
    accuracy = mean(right, groups, seed=seed)
    rows = [row(accuracy, "accuracy", "%", scale=100, signal="", coverage="")]
    chance = {"baseline": 0.5, "compared": "chance"}
    constant = {"baseline": accuracy.value * (1.0 - accuracy.value), "compared": "the accuracy said of every answer"}
    everything = {"baseline": 100.0 * (1.0 - accuracy.value), "compared": "all answers given"}
    for signal, values in (("monitor", scores), ("confidence", confidence)):
        own = {"signal": signal, "coverage": ""}
        rows.append(row(auroc(values, right, groups, seed=seed), "AUROC", "", **own, **chance))
        rows.append(row(mean((values - right) ** 2, groups, seed=seed), "Brier score", "", **own, **constant))
        curve = risk_coverage(values, right, groups, seed=seed)
        rows.append(row(curve.area, "area under risk-coverage", "%", scale=100, **own, **everything))
        for share, risk in zip(curve.coverage, curve.risk, strict=True):
            at = {"signal": signal, "coverage": f"{share:g}"}
            rows.append(row(risk, "risk", "%", scale=100, **at, **everything))
    better = auroc_difference(scores, confidence, right, groups, seed=seed)
    none = {"baseline": 0.0, "compared": "no difference"}
    rows.append(row(better, "AUROC minus that of confidence", "", signal="monitor", coverage="", **none))
    if threshold is not None:
        rows += _at_threshold(scores, confidence, right, groups, threshold, accuracy, seed)
    return tidy(rows, ("signal", "coverage"))


def _at_threshold(
    scores: np.ndarray,
    confidence: np.ndarray,
    right: np.ndarray,
    groups: Sequence[str],
    threshold: float,
    accuracy: Estimate,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """What is called reliable, how much of it is right, and the same share of answers by the model's confidence."""
    reliable, pictures = scores >= threshold, np.asarray(groups)
    own: dict[str, Any] = {"signal": "monitor", "coverage": f"{reliable.mean():.3g}"}
    all_ = {"baseline": 100.0 * accuracy.value, "compared": "accuracy of all answers"}
    yield row(mean(reliable, groups, seed=seed), "share called reliable", "%", scale=100, **own)
    for name, kept in (("right", right), ("wrong", ~right)):
        called = reliable if name == "right" else ~reliable
        quantity = "right answers called reliable" if name == "right" else "wrong answers not called reliable"
        yield row(mean(called[kept], pictures[kept], seed=seed), quantity, "%", scale=100, **own)
    yield row(
        mean(right[reliable], pictures[reliable], seed=seed),
        "precision at the threshold",
        "%",
        scale=100,
        **own,
        **all_,
    )
    yield row(
        _exact(right, reliable, pictures, seed), "precision at the threshold, one question a picture", "%", scale=100,
        **own, **all_,
    )  # fmt: skip
    # the surest by confidence, as many as the monitor calls reliable
    surest = np.argsort(-confidence, kind="stable")[: int(reliable.sum())]
    other = {**own, "signal": "confidence"}
    same = mean(right[surest], pictures[surest], seed=seed)
    yield row(same, "precision at the same coverage", "%", scale=100, **other, **all_)


def _exact(right: np.ndarray, reliable: np.ndarray, pictures: np.ndarray, seed: int, level: float = 0.95) -> Estimate:
    """Share right among the reliable, of one question a picture, with the exact binomial interval."""
    from scipy.stats import binomtest

    order = np.random.default_rng(seed).permutation(len(pictures))
    drawn = order[np.unique(pictures[order], return_index=True)[1]]
    drawn = drawn[reliable[drawn]]
    n, hits = len(drawn), int(right[drawn].sum())
    method = "exact binomial (Clopper-Pearson), one question drawn from each picture"
    if not n:
        reason = "nothing is called reliable"
        return Estimate(math.nan, math.nan, math.nan, 0, 0, level, method, seed, reason=reason)
    interval = binomtest(hits, n).proportion_ci(level, method="exact")
    return Estimate(hits / n, float(interval.low), float(interval.high), n, n, level, method, seed)
