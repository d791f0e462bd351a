"""Scores of closed answers: the summed probability of everything that writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_vlm.errors import DataError, SelectionError
from interp_vlm.readouts.spelling import normalised, spellings_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ClosedScores", "closed_scores", "full_precision", "log_sums", "refuse_nan"]


@dataclass(frozen=True, eq=False)
class ClosedScores:
    """Scores of a closed set of answers.

    Attributes:
        choices: the answers as they were asked for.
        logprobs: (batch, choice) log of the summed probability of all spellings of each answer.
        coverage: (batch,) probability of all choices together: how far the closed set describes the model at all.
        ids: of each example and choice, the tokens that were summed.
    """

    choices: tuple[str, ...]
    logprobs: Float[Tensor, "batch choice"]
    coverage: Float[Tensor, " batch"]
    ids: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def best(self) -> Int[Tensor, " batch"]:
        """Index of the most probable choice."""
        return self.logprobs.argmax(dim=-1)

    def frame(self) -> pd.DataFrame:
        """Tidy table: example, choice, logprob, and the example's coverage."""
        import pandas as pd

        rows = zip(self.logprobs.tolist(), self.coverage.tolist(), strict=True)
        records = [
            (example, choice, logprob, coverage)
            for example, (logprobs, coverage) in enumerate(rows)
            for choice, logprob in zip(self.choices, logprobs, strict=True)
        ]
        return pd.DataFrame.from_records(records, columns=["example", "choice", "logprob", "coverage"])


def closed_scores(
    logits: Float[Tensor, "batch vocab"], tokenizer: Any, prompts: Sequence[str], choices: Sequence[str]
) -> ClosedScores:
    """Score each answer of a closed set by the summed probability of its spellings after each prompt.

    Args:
        logits: at the answer position of each example.
        prompts: the text before the answer of each example as the model reads it (`prompt_ends`).
        choices: such as `["yes", "no"]`; they must differ by more than case and surrounding blanks.

    Raises:
        SelectionError: a choice has no spelling of one token, or two choices are the same answer.
        DataError: the number of prompts differs from the number of rows, or a row contains NaN.
    """
    if isinstance(prompts, str) or len(prompts) != len(logits):
        found = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise DataError(f"{found} for {len(logits)} rows of logits", expected="a list of one prompt per row")
    if isinstance(choices, str) or not choices or len({normalised(choice) for choice in choices}) < len(choices):
        raise SelectionError(
            f"the choices {choices!r} are no closed set",
            expected="a list of answers which differ by more than case and surrounding blanks",
        )
    refuse_nan(logits)
    ids = [spellings_of(tokenizer, prompt, choices) for prompt in prompts]
    logprobs = log_sums(full_precision(logits).log_softmax(dim=-1), ids).reshape(len(ids), len(choices))
    coverage = logprobs.logsumexp(dim=-1).exp()
    return ClosedScores(tuple(choices), logprobs, coverage, tuple(tuple(row) for row in ids))


def log_sums(
    scores: Float[Tensor, "batch vocab"], ids: Sequence[Sequence[Sequence[int]]]
) -> Float[Tensor, "batch answer"]:
    """Log of the summed exponentials of the scores of each answer's tokens.

    Args:
        ids: for every example, for every answer, its tokens; equally many answers for every example.

    Raises:
        SelectionError: a token that the scores do not have.
    """
    answers = [tokens for row in ids for tokens in row]
    wrong = [token for tokens in answers for token in tokens if not 0 <= token < scores.shape[-1]]
    if wrong:
        raise SelectionError(f"token {wrong[0]} has no logit", expected=f"a token id from 0 to {scores.shape[-1] - 1}")
    longest = max((len(tokens) for tokens in answers), default=1)
    padded = [[[*tokens, *[-1] * (longest - len(tokens))] for tokens in row] for row in ids]
    index = torch.tensor(padded, dtype=torch.long, device=scores.device).reshape(len(ids), -1, longest)
    found = scores.unsqueeze(1).expand(-1, index.shape[1], -1).gather(-1, index.clamp(min=0))
    return found.masked_fill(index < 0, -math.inf).logsumexp(dim=-1)


def full_precision(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """At least single precision: half precision loses the small differences that are measured here."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def refuse_nan(logits: Float[Tensor, "batch vocab"]) -> None:
    """Raise a DataError that names the examples whose logits contain NaN: they have no answer."""
    broken = logits.isnan().any(dim=-1).nonzero().flatten().tolist()
    if broken:
        raise DataError(
            f"the logits of examples {broken[:8]} contain NaN",
            expected="numbers",
            remedy="look for an overflow in half precision or for a fully masked row",
        )
