"""Answers as people read them, with their scores; the one place to import answer readouts and metrics from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_vlm.errors import SelectionError
from interp_vlm.readouts.metrics import (
    LogitDifference,
    Metric,
    MetricContext,
    PairDifference,
    answer_logprob,
    answer_probability,
    flipped,
    logit_difference,
)
from interp_vlm.readouts.scores import ClosedScores, closed_scores, full_precision, refuse_nan
from interp_vlm.readouts.spelling import answer_vocabulary, prompt_ends, spellings

__all__ = [
    "Answer",
    "ClosedScores",
    "LogitDifference",
    "Metric",
    "MetricContext",
    "PairDifference",
    "answer_logprob",
    "answer_probability",
    "closed_scores",
    "flipped",
    "logit_difference",
    "prompt_ends",
    "read_answers",
    "spellings",
]


class Answer(str):
    """An answer that prints as its text and carries what the model thought of it.

    Attributes:
        scores: log-probability of each answer, all its spellings together, most probable first: of the closed choices
            if these were given, otherwise of the most probable answers by their normalised text.
        coverage: probability of all answers in `scores` together.
        token: the most probable token that writes this answer.
        logprob: log-probability of that token alone; its exponential is the usual confidence (maximal softmax).

    Example:
        >>> answer = Answer("yes", scores={"yes": -0.1, "no": -2.4}, coverage=0.995, token=3, logprob=-0.2)
        >>> print(answer, answer.scores["no"], answer == "yes")
        yes -2.4 True
    """

    scores: dict[str, float]
    coverage: float
    token: int
    logprob: float

    def __new__(
        cls,
        text: str,
        scores: Mapping[str, float] | None = None,
        coverage: float = math.nan,
        token: int = -1,
        logprob: float = math.nan,
    ) -> Answer:
        self = super().__new__(cls, text)
        self.scores, self.coverage, self.token, self.logprob = dict(scores or {}), coverage, token, logprob
        return self


def read_answers(
    logits: Float[Tensor, "batch vocab"],
    tokenizer: Any,
    prompts: Sequence[str] | None = None,
    choices: Sequence[str] | None = None,
    k: int = 5,
) -> list[Answer]:
    """The answer of each example: the most probable of the choices, or the most probable token's text.

    Args:
        logits: at the answer position of each example.
        prompts: needed with `choices`: the text before each answer as the model reads it (`prompt_ends`).
        choices: a closed set of answers; without it the vocabulary is open.
        k: how many of the most probable answers an open answer lists in `scores`, its own always among them.

    Raises:
        SelectionError: `choices` without `prompts`, or as in `closed_scores`.
        DataError: a row contains NaN.
    """
    logits = logits.detach()
    if choices is None:
        refuse_nan(logits)
        return [_open_answer(row, tokenizer, k) for row in logits]
    if prompts is None:
        raise SelectionError(
            "choices were given without prompts",
            expected="the prompt of each example",
            remedy="pass prompts=prompt_ends(batch, tokenizer): how a choice is spelt depends on it",
        )
    scores = closed_scores(logits, tokenizer, prompts, choices)
    tokens = full_precision(logits).log_softmax(dim=-1)
    return [_closed_answer(scores, row_scores, row) for row, row_scores in enumerate(tokens)]


def _open_answer(logits: Tensor, tokenizer: Any, k: int) -> Answer:
    vocabulary = answer_vocabulary(tokenizer)
    logprobs = logits.cpu().double().log_softmax(dim=-1)
    token = int(logprobs.argmax())
    answers = vocabulary.answers(len(logprobs))
    mass = torch.zeros(int(answers.max()) + 1, dtype=torch.double).index_add_(0, answers, logprobs.exp())
    ranked = mass.clone()
    ranked[answers[token]] = (
        math.inf
    )  # its spellings together may weigh less than another answer's: list it all the same
    listed = ranked.topk(max(1, min(k, len(mass)))).indices
    listed = listed[mass[listed].argsort(descending=True)]
    scores = dict(zip(map(vocabulary.label, listed.tolist()), mass[listed].log().tolist(), strict=True))
    return Answer(vocabulary.text(token), scores, float(mass[listed].sum()), token, float(logprobs[token]))


def _closed_answer(scores: ClosedScores, logprobs: Tensor, row: int) -> Answer:
    best = int(scores.best[row])
    token = max(scores.ids[row][best], key=lambda token: float(logprobs[token]))
    named = dict(zip(scores.choices, scores.logprobs[row].tolist(), strict=True))
    ranked = dict(sorted(named.items(), key=lambda item: -item[1]))
    return Answer(scores.choices[best], ranked, float(scores.coverage[row]), token, float(logprobs[token]))
