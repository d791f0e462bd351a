"""Metrics by which interventions are judged: one number per example, from the logits at the answer position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, overload, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_vlm.errors import DataError, SelectionError
from interp_vlm.readouts.scores import full_precision, log_sums
from interp_vlm.readouts.spelling import answer_vocabulary, prompt_ends, spellings
from interp_vlm.tokens.batch import Batch

__all__ = [
    "LogitDifference",
    "Metric",
    "MetricContext",
    "PairDifference",
    "answer_logprob",
    "answer_probability",
    "flipped",
    "logit_difference",
]

Answers = str | int | list[str] | list[int] | list[str | int] | tuple[str | int, ...] | Int[Tensor, " batch"]
"""One answer for every example (a word or a token id), or a list of one for each."""


@dataclass(frozen=True, eq=False)
class MetricContext:
    """What a metric may know besides the logits of the run it judges.

    Attributes:
        clean_logits: (batch, vocab) at the answer position of the run without interventions.
        batch: the examples; metrics of words read what stands before the answer.
        tokenizer: of the model's processor.
    """

    clean_logits: Float[Tensor, "batch vocab"]
    batch: Batch
    tokenizer: Any

    @cached_property
    def clean_answer(self) -> Bool[Tensor, "batch vocab"]:
        """Which tokens write the answer of the run without interventions."""
        return _answer_of(self.clean_logits.argmax(dim=-1), self.clean_logits, self)


@runtime_checkable
class Metric(Protocol):
    """One number per example of a run, possibly compared with the clean run."""

    def __call__(self, logits: Tensor, context: MetricContext, /) -> Tensor: ...


def answer_logprob(logits: Float[Tensor, "batch vocab"], context: MetricContext) -> Float[Tensor, " batch"]:
    """Log-probability of the clean run's answer, all tokens of the same normalised text together."""
    return _within(full_precision(logits).log_softmax(dim=-1), context.clean_answer.to(logits.device))


def answer_probability(logits: Float[Tensor, "batch vocab"], context: MetricContext) -> Float[Tensor, " batch"]:
    """Probability of the clean run's answer, all tokens of the same normalised text together."""
    return answer_logprob(logits, context).exp()


def flipped(logits: Float[Tensor, "batch vocab"], context: MetricContext) -> Float[Tensor, " batch"]:
    """1.0 where the most probable token says another answer than in the clean run, else 0.0.

    Another spelling of the same answer is no flip. Logits with NaN give NaN.
    """
    kept = context.clean_answer.to(logits.device).gather(-1, logits.argmax(dim=-1, keepdim=True)).squeeze(-1)
    return (~kept).to(full_precision(logits).dtype).masked_fill(logits.isnan().any(dim=-1), math.nan)


class LogitDifference:
    """Score of the clean run's answer minus that of the best other answer; called with two answers, of that fixed pair.

    A score is the log-sum of the exponentiated logits of all tokens that write the answer. The best other answer is
    the one written by the most probable token that is no spelling of the clean answer; which one that is may change
    with the intervention. Values are in nats: the softmax's normaliser cancels.

    Example:
        >>> logit_difference
        logit_difference
        >>> logit_difference("yes", "no")
        logit_difference('yes', 'no')
    """

    __name__ = "logit_difference"

    @overload
    def __call__(self, correct: Tensor, wrong: MetricContext, /) -> Tensor: ...

    @overload
    def __call__(self, correct: Answers, wrong: Answers) -> PairDifference: ...

    def __call__(self, correct: Any, wrong: Any) -> Any:
        """The values for `(logits, context)`, or the metric of a fixed pair for `(correct, wrong)`.

        Args:
            correct: a word or token id for every example, or a list of them, one per example.
            wrong: likewise.
        """
        if isinstance(wrong, MetricContext):
            return self._measure(correct, wrong)
        return PairDifference(correct, wrong)

    def __repr__(self) -> str:
        return self.__name__

    def _measure(self, logits: Tensor, context: MetricContext) -> Tensor:
        scores = full_precision(logits)
        own = context.clean_answer.to(scores.device)
        rival = _answer_of(scores.masked_fill(own, -math.inf).argmax(dim=-1), scores, context)
        ours, theirs = _within(scores, torch.stack([own, rival]))
        return ours - theirs


logit_difference = LogitDifference()
"""Score of the clean run's answer minus that of the best other answer, in nats.

`logit_difference("yes", "no")` is that of a fixed pair; lists give one pair for each example.
"""


@dataclass(frozen=True)
class PairDifference:
    """Score of one answer minus that of another, as made by `logit_difference(correct, wrong)`.

    A word's score is the log-sum of the exponentiated logits of its `spellings` after the example's prompt; that of a
    token id is its logit.

    Attributes:
        correct: a word or token id for every example, or a tuple of them, one per example.
        wrong: likewise.

    Raises:
        SelectionError: a word is no single token after its prompt, a token id has no logit, or the two answers of an
            example share a token.
        DataError: a list holds another number of answers than there are examples.
    """

    correct: Any
    wrong: Any

    def __post_init__(self) -> None:
        for side in ("correct", "wrong"):
            value = getattr(self, side)
            value = value.tolist() if isinstance(value, Tensor) else value
            each = [value] if isinstance(value, str | int) else value
            if not isinstance(each, list | tuple) or not all(type(answer) in (str, int) for answer in each):
                raise SelectionError(f"the {side} answer is {value!r}", expected="words or token ids")
            object.__setattr__(self, side, tuple(value) if isinstance(value, list) else value)

    @property
    def __name__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        sides = (f"<{len(side)} answers>" if isinstance(side, tuple) else repr(side) for side in self._sides)
        return f"logit_difference({', '.join(sides)})"

    def __call__(self, logits: Float[Tensor, "batch vocab"], context: MetricContext) -> Float[Tensor, " batch"]:
        """The difference for each example, in nats."""
        pairs = list(zip(*(self._per_example(side, len(logits)) for side in self._sides), strict=True))
        ends = prompt_ends(context.batch, context.tokenizer)
        if len(ends) != len(pairs):
            raise DataError(f"{len(pairs)} rows of logits for a batch of {len(ends)}", expected="one row per example")
        ids = [self._ids(pair, end, context.tokenizer) for pair, end in zip(pairs, ends, strict=True)]
        correct, wrong = log_sums(full_precision(logits), ids).reshape(-1, 2).unbind(dim=-1)
        return correct - wrong

    @property
    def _sides(self) -> tuple[Any, Any]:
        return self.correct, self.wrong

    def _per_example(self, answers: Any, examples: int) -> tuple[str | int, ...]:
        if not isinstance(answers, tuple):
            return (answers,) * examples
        if len(answers) != examples:
            raise DataError(
                f"{self!r} names {len(answers)} answers for {examples} examples", expected="one answer per example"
            )
        return answers

    def _ids(self, pair: tuple[str | int, ...], end: str, tokenizer: Any) -> list[tuple[int, ...]]:
        ids = [(answer,) if isinstance(answer, int) else spellings(tokenizer, end, answer) for answer in pair]
        if set(ids[0]) & set(ids[1]):
            raise SelectionError(f"{pair[0]!r} and {pair[1]!r} are the same answer", expected="two different answers")
        return ids


def _answer_of(tokens: Tensor, logits: Tensor, context: MetricContext) -> Bool[Tensor, "batch vocab"]:
    """Which tokens write the same answer as each example's token."""
    answers = answer_vocabulary(context.tokenizer).answers(logits.shape[-1], logits.device)
    return answers == answers[tokens].unsqueeze(-1)


def _within(scores: Tensor, chosen: Tensor) -> Tensor:
    return scores.masked_fill(~chosen, -math.inf).logsumexp(dim=-1)
