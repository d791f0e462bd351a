"""What a probe must beat: confidence, the answer, the question or the answer's length alone; and the control task."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from interp_vlm.errors import DataError
from interp_vlm.probes import measures
from interp_vlm.probes.folds import Split
from interp_vlm.probes.nested import score_fold
from interp_vlm.probes.report import Baseline
from interp_vlm.stats import bootstrap
from interp_vlm.stats.inputs import as_column

__all__ = ["Columns", "control_labels", "side_baselines"]

MOST_WORDS = 2000


@dataclass(frozen=True, eq=False)
class Columns:
    """What is known of each example beside its activations; None where it was not given."""

    confidence: Float[np.ndarray, " example"] | None
    answers: tuple[str, ...] | None
    questions: tuple[str, ...] | None
    answer_lengths: Float[np.ndarray, " example"] | None
    types: Int[np.ndarray, " example"] | None
    type_name: str

    @classmethod
    def checked(
        cls,
        n: int,
        confidence: ArrayLike | None,
        answers: Sequence[str] | None,
        questions: Sequence[str] | None,
        answer_lengths: ArrayLike | None,
        types: Sequence[Hashable] | None,
    ) -> Columns:
        """The columns, each with one value an example.

        Raises:
            DataError: for a column of another length, or numbers that are not finite.
        """
        texts = {name: _texts(name, value, n) for name, value in (("answers", answers), ("questions", questions))}
        named = [("types", types), ("questions", texts["questions"]), ("answers", texts["answers"])]
        name, given = next(((name, value) for name, value in named if value is not None), ("", None))
        codes = None
        if given is not None:
            if len(given) != n:
                raise DataError(f"{name} has {len(given)} values", expected=f"{n}, one for each example")
            number = {value: i for i, value in enumerate(dict.fromkeys(given))}
            codes = np.array([number[value] for value in given], dtype=np.intp)
        return cls(
            None if confidence is None else as_column(confidence, "confidence", n),
            texts["answers"],
            texts["questions"],
            None if answer_lengths is None else as_column(answer_lengths, "answer_lengths", n),
            codes,
            name,
        )

    @property
    def type_count(self) -> int:
        return 0 if self.types is None else int(self.types.max()) + 1


def control_labels(side: Columns, rng: np.random.Generator) -> Bool[np.ndarray, " example"] | None:
    """A random label for each type, half of the types True (Hewitt and Liang 2019, section 2).

    A probe that learns them memorises types; one that is selective does not. None when no type occurs twice: nothing
    that could be memorised would come back in the test part.
    """
    if side.types is None or side.type_count < 2 or side.type_count == len(side.types):
        return None
    return rng.permutation(np.arange(side.type_count) % 2 == 0)[side.types]


def side_baselines(
    side: Columns,
    labels: Bool[np.ndarray, " example"],
    codes: Int[np.ndarray, " example"],
    plan: Split,
    C: Sequence[float],
    options: dict[str, Any],
) -> list[Baseline]:
    """Each baseline on the probe's own folds, with the probe's own choice of C."""
    found = []
    if side.confidence is not None:
        estimate = bootstrap.auroc(side.confidence, labels, codes, **options)
        found.append(Baseline("output confidence", estimate, "the score itself, nothing fitted", side.confidence))
    for name, texts, how in (
        ("answer only", side.answers, "logistic regression on which answer was given"),
        ("question only", side.questions, "logistic regression on the question's words and pairs of words"),
    ):
        if texts is not None:
            whole = name == "answer only"
            scores = _scores([_text_features(texts, *plan.parts(k), whole) for k in _folds(plan)], labels, plan, C)
            found.append(_fitted(name, how, scores, labels, codes, plan, options))
    if side.answer_lengths is not None:
        lengths = torch.as_tensor(side.answer_lengths)[:, None]
        parts = [tuple(lengths[rows] for rows in plan.parts(k)) for k in _folds(plan)]
        scores = _scores(parts, labels, plan, C)
        how = "logistic regression on the length"
        found.append(_fitted("answer length", how, scores, labels, codes, plan, options))
    return found


def _folds(plan: Split) -> range:
    return range(len(plan.inner))


def _scores(parts: Sequence[Any], labels: np.ndarray, plan: Split, C: Sequence[float]) -> np.ndarray:
    """Out-of-fold logits from the features of each fold's training and test part."""
    scores = np.empty(len(labels))
    for fold, (train_features, test_features) in enumerate(parts):
        train, test = plan.parts(fold)
        target = labels[train, None].astype(np.float64)
        scores[test] = score_fold(train_features, test_features, target, plan.inner[fold], C).test[:, 0]
    return scores


def _fitted(
    name: str, how: str, scores: np.ndarray, labels: np.ndarray, codes: np.ndarray, plan: Split, options: dict[str, Any]
) -> Baseline:
    return Baseline(name, measures.auroc(scores, labels, plan.outer, codes, **options), how, scores)


def _text_features(texts: Sequence[str], train: np.ndarray, test: np.ndarray, whole: bool) -> tuple[Tensor, Tensor]:
    """Which words, pairs of words (or whole texts) of the training part each text holds."""
    from sklearn.feature_extraction.text import CountVectorizer

    rule: dict[str, Any] = {"analyzer": _whole} if whole else {"ngram_range": (1, 2), "token_pattern": r"\S+"}
    vectoriser = CountVectorizer(binary=True, max_features=MOST_WORDS, **rule)
    fitted = vectoriser.fit_transform([texts[row] for row in train])
    other = vectoriser.transform([texts[row] for row in test])
    return tuple(torch.as_tensor(matrix.toarray().astype(np.float64)) for matrix in (fitted, other))  # type: ignore[return-value]


def _whole(text: str) -> list[str]:
    return [text.strip().lower()]


def _texts(name: str, values: Sequence[str] | None, n: int) -> tuple[str, ...] | None:
    if values is None:
        return None
    if isinstance(values, str) or len(values) != n:
        raise DataError(f"{name} has {len(values)} values", expected=f"{n} texts, one for each example")
    return tuple(str(value) for value in values)
