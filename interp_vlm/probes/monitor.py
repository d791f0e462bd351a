"""A probe to deploy: from one forward pass the answer, and how probably it is right.

monitor = report.monitor(activations, vlm).at_precision(0.95)
monitor.save("runs/monitor")
ReliabilityMonitor.load("runs/monitor").score(vlm, image, "is there a red 7 ?")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from interp_vlm.engine.batches import in_parts
from interp_vlm.errors import DataError
from interp_vlm.probes.scoring import Pass, one_pass
from interp_vlm.probes.thresholds import Threshold, precision_threshold, recall_threshold, threshold_sequence
from interp_vlm.readouts.answers import Answer
from interp_vlm.readouts.identity import ModelIdentity, identity_of
from interp_vlm.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd

    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["ReliabilityMonitor", "Scored"]

OWN_PICTURES = (
    "scores of cross-validation on the pictures that the monitor was fitted on: those of its final fit are close to "
    "them, not the same, so that the guarantee is approximate"
)


@dataclass(frozen=True)
class Scored:
    """One answer and what to think of it.

    Attributes:
        answer: the model's.
        confidence: probability of the token that writes it, the usual confidence.
        score: the monitor's probability that it is right.
        reliable: whether the score reaches the threshold; None without one.
    """

    answer: Answer
    confidence: float
    score: float
    reliable: bool | None


@dataclass(frozen=True, eq=False)
class ReliabilityMonitor:
    """A linear probe of one layer, calibrated and bound to the model that it was fitted on.

    Made by `report.monitor()`. The score is the probability that the answer is right: Platt's sigmoid of the probe's
    logit, fitted on the logits of cross-validation.

    Attributes:
        model: identity of the model (name, revision, anatomy, prompt template, weights).
        site: where the hidden state is read, at the last prompt token.
        layer: at which layer.
        weights: of the probe, for the hidden state as it is; fitted on all examples.
        intercept: of the probe.
        slope: of the calibration.
        offset: of the calibration.
        C: inverse strength of the penalty, chosen by cross-validation.
        auroc: the report's headline: layer and C chosen on inner folds, unseen pictures.
        scores: the examples' scores on unseen pictures (cross-validation), calibrated.
        labels: True where the answer was right.
        groups: number of each example's picture.
        kinds: kinds of question that it was fitted on; () when they were not given.
        choices: closed answers that the model chooses between; None for the whole vocabulary.
        threshold: from which score on an answer is called reliable; None: no answer is called anything.
        seed: of the report's folds.
    """

    model: ModelIdentity
    site: str
    layer: int
    weights: Float[np.ndarray, " feature"]
    intercept: float
    slope: float
    offset: float
    C: float
    auroc: Estimate
    scores: Float[np.ndarray, " example"]
    labels: Bool[np.ndarray, " example"]
    groups: Int[np.ndarray, " example"]
    kinds: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    threshold: Threshold | None = None
    seed: int = 0
    _checked: WeakKeyDictionary[Any, bool] = field(default_factory=WeakKeyDictionary, init=False, repr=False)

    @property
    def position(self) -> str:
        """Where in time the hidden state is read."""
        return "before_answer"

    @property
    def n(self) -> int:
        """How many examples it was fitted on."""
        return len(self.labels)

    @property
    def pictures(self) -> int:
        """How many pictures these examples are about."""
        return len(np.unique(self.groups))

    def bind(self, vlm: VLM) -> ReliabilityMonitor:
        """Make sure that this is the model that the monitor was fitted on; done once for each loaded model.

        Raises:
            ModelError: another name, revision, anatomy, prompt template or other weights; it names what differs.
        """
        if vlm not in self._checked:
            self.model.refuse(identity_of(vlm), f"this monitor of {self.site!r} at layer {self.layer}")
            self._checked[vlm] = True
        return self

    def score(self, vlm: VLM, images: Any, questions: str | Sequence[str]) -> list[Scored]:
        """Answer questions and say how probably each answer is right, in a single forward pass.

        Args:
            vlm: the model that the monitor was fitted on.
            images: as for `vlm.encode`.
            questions: likewise.

        Raises:
            ModelError: another model.
            DataError: a picture that cannot be read, or numbers that do not match.
        """
        self.bind(vlm)
        return self.run(vlm, vlm.encode(images, questions))

    def run(self, vlm: VLM, batch: Batch) -> list[Scored]:
        """`score` of an encoded batch.

        Raises:
            ModelError: another model.
        """
        self.bind(vlm)
        parts = in_parts(vlm, batch, lambda _, part: one_pass(vlm, part, self.site, [self.layer], self.choices))
        return [scored for _, found in parts for scored in self._scored(found)]

    def _scored(self, found: Pass) -> list[Scored]:
        scores = self.probability(found.hidden[:, 0]).tolist()
        return [
            Scored(answer, confidence, score, None if self.threshold is None else score >= self.threshold.value)
            for answer, confidence, score in zip(found.answers, found.confidence, scores, strict=True)
        ]

    def probability(
        self, hidden: Float[Tensor, "example feature"] | Float[np.ndarray, "example feature"]
    ) -> Float[np.ndarray, " example"]:
        """The score of hidden states that were read already, at this site and layer, at the last prompt token.

        Raises:
            DataError: another width, or NaN.
        """
        values = torch.as_tensor(hidden).detach()
        if values.ndim != 2 or values.shape[1] != len(self.weights):
            raise DataError(
                f"hidden states of shape {tuple(values.shape)}",
                expected=f"(example, {len(self.weights)}), {self.site!r} of layer {self.layer}",
            )
        logits = values.to("cpu", torch.float64) @ torch.from_numpy(self.weights) + self.intercept
        if bad := int((~logits.isfinite()).sum()):
            raise DataError(
                f"hidden states of {bad} of {len(logits)} examples hold NaN or infinite values",
                expected="finite numbers",
                remedy="load the model in bfloat16 or float32 (float16 overflows)",
            )
        return torch.sigmoid(self.slope * logits + self.offset).numpy()

    def at_precision(
        self,
        precision: float,
        *,
        confidence: float = 0.9,
        scores: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        groups: ArrayLike | Sequence[Any] | None = None,
        seed: int = 0,
    ) -> ReliabilityMonitor:
        """The monitor with the lowest threshold at which the reliable answers are right in a share `precision`.

        With `confidence`, over calibration sets (`interp_vlm.probes.thresholds`). Give the scores of pictures that the
        monitor was not fitted on, if there are any: without them its own scores of cross-validation calibrate, and the
        guarantee is approximate.

        Args:
            precision: wanted share.
            confidence: of the guarantee.
            scores: of held-out examples.
            labels: whether their answers were right.
            groups: their pictures.
            seed: of the draw of one example a picture.

        Raises:
            DataError: no threshold can promise that precision; it says what can be promised.
        """
        held = self._calibration(scores, labels, groups)
        count = len(held["labels"]) if held["groups"] is None else len(set(np.asarray(held["groups"]).tolist()))
        sequence = threshold_sequence(self.scores, count, precision, confidence=confidence)
        found = precision_threshold(**held, precision=precision, sequence=sequence, confidence=confidence, seed=seed)
        return replace(self, threshold=found)

    def at_recall(
        self,
        recall: float,
        *,
        of: str = "right",
        scores: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        groups: ArrayLike | Sequence[Any] | None = None,
        seed: int = 0,
    ) -> ReliabilityMonitor:
        """The monitor with the threshold that keeps a share `recall` of right answers, or stops so many of the wrong.

        Args:
            recall: wanted share, on average over calibration sets (split conformal prediction).
            of: "right": that share of the right answers is called reliable; "wrong": of the wrong ones is not.
            scores: of held-out examples, as for `at_precision`.
            labels: likewise.
            groups: likewise.
            seed: of the draw of one example a picture.

        Raises:
            DataError: too few examples of that class.
        """
        return replace(
            self,
            threshold=recall_threshold(**self._calibration(scores, labels, groups), recall=recall, of=of, seed=seed),
        )

    def _calibration(self, scores: Any, labels: Any, groups: Any) -> dict[str, Any]:
        if (scores is None) != (labels is None):
            raise DataError("held-out scores without labels, or labels without scores", expected="both")
        if scores is None:
            return {"scores": self.scores, "labels": self.labels, "groups": self.groups, "assumes": OWN_PICTURES}
        return {"scores": scores, "labels": labels, "groups": groups}

    def save(self, folder: str | Path) -> Path:
        """Write the monitor as safetensors and JSON, whole or not at all.

        Raises:
            DataError: when the disk refuses.
        """
        from interp_vlm.probes.monitor_files import save

        return save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> ReliabilityMonitor:
        """A monitor that `save` wrote; numbers and text are read, nothing is executed.

        Raises:
            DataError: a file is missing, changed or damaged, or not as `save` writes it.
        """
        from interp_vlm.probes.monitor_files import load

        return load(Path(folder))

    def frame(self) -> pd.DataFrame:
        """The examples that it was fitted on, with their scores of cross-validation: a tidy table."""
        import pandas as pd

        return pd.DataFrame({"group": self.groups, "correct": self.labels, "score": self.scores})

    def __repr__(self) -> str:
        kinds = f" of {', '.join(self.kinds)}" if self.kinds else ""
        return (
            f"ReliabilityMonitor({self.model.name}, {self.site!r} at layer {self.layer}: AUROC {self.auroc}, "
            f"n={self.n}{kinds} about {self.pictures} pictures; {self.threshold or 'no threshold'})"
        )
