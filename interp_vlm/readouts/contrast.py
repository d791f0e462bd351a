"""The right answer against another: which tokens stand for each, what their scores are, and their linear direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_vlm.errors import DataError, SelectionError
from interp_vlm.readouts.scores import full_precision
from interp_vlm.readouts.spelling import answer_vocabulary, prompt_ends, spellings
from interp_vlm.tokens.batch import Batch

__all__ = ["Contrast", "contrast"]


@dataclass(frozen=True, eq=False)
class Contrast:
    """For each example, the tokens that write the right answer and those that it is held against.

    Attributes:
        names: the right answer of each example, normalised.
        own: (batch, vocab) the tokens that write it.
        other: (batch, vocab) those of the fixed other answer, or None: the best other answer, wherever it is asked for.
        answers: (vocab,) number of the answer that each token writes.
    """

    names: tuple[str, ...]
    own: Bool[Tensor, "batch vocab"]
    other: Bool[Tensor, "batch vocab"] | None
    answers: Int[Tensor, " vocab"]

    def margin(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos"]:
        """Score of the right answer minus that of the other one, in nats; a score is the log-sum over its tokens."""
        scores = full_precision(logits)
        return _log_sum(scores, self.own[:, None]) - _log_sum(scores, self.against(scores))

    def probability(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos"]:
        """Probability of the right answer, all its tokens together."""
        return _log_sum(full_precision(logits).log_softmax(dim=-1), self.own[:, None]).exp()

    def against(self, scores: Float[Tensor, "batch pos vocab"]) -> Bool[Tensor, "batch _ vocab"]:
        """The tokens of the other answer: the fixed one's, or those of the best other answer at each position."""
        if self.other is not None:
            return self.other[:, None]
        best = scores.masked_fill(self.own[:, None], -math.inf).argmax(dim=-1)
        return self.answers == self.answers[best].unsqueeze(-1)

    def weights(
        self, logits: Float[Tensor, "batch pos vocab"]
    ) -> tuple[Float[Tensor, "batch pos vocab"], Float[Tensor, "batch pos"]]:
        """The margin as a linear function of the logits at hand: (weights, constant).

        Where an answer has several tokens, log-sum = sum(p * logit) + entropy(p) with p their softmax: frozen at these
        logits it is linear, equals the margin here, and has its gradient.
        """
        scores = full_precision(logits)
        own, own_entropy = _frozen(scores, self.own[:, None])
        other, other_entropy = _frozen(scores, self.against(scores))
        return own - other, own_entropy - other_entropy


def contrast(
    tokenizer: Any, batch: Batch, logits: Float[Tensor, "batch vocab"], correct: Any = None, wrong: Any = None
) -> Contrast:
    """Which tokens to hold against which, for each example of a batch.

    Args:
        tokenizer: of the model's processor.
        batch: the examples; how a word is spelt depends on what stands before the answer.
        logits: of the clean run at the answer position.
        correct: the right answer, a word or token id for every example or a list of one for each; by default the answer
            that the model gives.
        wrong: likewise, the answer to hold it against; by default the best other answer. With it, a word stands for its
            spellings after the prompt and a token id for itself; without it, both for all tokens of the same text.

    Raises:
        SelectionError: a word is no single token after its prompt, a token id has no logit, or the two answers of an
            example share a token.
        DataError: another number of answers than of examples.
    """
    vocab, device = logits.shape[-1], logits.device
    vocabulary = answer_vocabulary(tokenizer)
    answers = vocabulary.answers(vocab, device)
    if correct is None and wrong is not None:
        raise SelectionError(
            "a wrong answer without a right one", expected="correct=... too", remedy="or leave out wrong"
        )
    ends = prompt_ends(batch, tokenizer) if correct is not None else ()
    given = logits.argmax(dim=-1).tolist() if correct is None else _each(correct, len(batch), "right")
    ids = [_tokens(tokenizer, ends, row, answer, vocab) for row, answer in enumerate(given)]
    names = tuple(vocabulary.label(int(answers[tokens[0]])) for tokens in ids)
    own = _mask(ids, vocab, device)
    if wrong is None:
        firsts = torch.tensor([tokens[0] for tokens in ids], device=device)
        return Contrast(names, answers == answers[firsts].unsqueeze(-1), None, answers)
    others = _each(wrong, len(batch), "wrong")
    other = _mask([_tokens(tokenizer, ends, row, answer, vocab) for row, answer in enumerate(others)], vocab, device)
    shared = (own & other).any(dim=-1).nonzero().flatten().tolist()
    if shared:
        raise SelectionError(
            f"{given[shared[0]]!r} and {others[shared[0]]!r} are the same answer in example {shared[0]}",
            expected="two different answers",
        )
    return Contrast(names, own, other, answers)


def _each(answers: Any, examples: int, side: str) -> list[str | int]:
    answers = answers.tolist() if isinstance(answers, Tensor) else answers
    listed = [answers] * examples if isinstance(answers, str | int) else list(answers)
    if not all(isinstance(answer, str) or type(answer) is int for answer in listed):
        raise SelectionError(f"the {side} answers are {answers!r}", expected="words or token ids")
    if len(listed) != examples:
        raise DataError(f"{len(listed)} {side} answers for {examples} examples", expected="one per example")
    return [str(answer) if isinstance(answer, str) else answer for answer in listed]


def _tokens(tokenizer: Any, ends: Sequence[str], row: int, answer: str | int, vocab: int) -> tuple[int, ...]:
    if isinstance(answer, str):
        return spellings(tokenizer, ends[row], answer)
    if not 0 <= answer < vocab:
        raise SelectionError(f"token {answer} has no logit", expected=f"a token id from 0 to {vocab - 1}")
    return (answer,)


def _mask(ids: Sequence[Sequence[int]], vocab: int, device: torch.device) -> Bool[Tensor, "batch vocab"]:
    mask = torch.zeros(len(ids), vocab, dtype=torch.bool, device=device)
    for row, tokens in enumerate(ids):
        mask[row, list(tokens)] = True
    return mask


def _log_sum(scores: Tensor, chosen: Tensor) -> Tensor:
    return scores.masked_fill(~chosen, -math.inf).logsumexp(dim=-1)


def _frozen(scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over the chosen tokens, and its entropy."""
    logs = scores.masked_fill(~chosen, -math.inf).log_softmax(dim=-1)
    weights = logs.exp()
    return weights, -(weights * logs.masked_fill(~chosen, 0)).sum(dim=-1)
