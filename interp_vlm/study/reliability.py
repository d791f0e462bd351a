"""Which signals tell right answers from wrong ones: the output, samples, attention and hidden states, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from interp_vlm.readouts.answers import Answer
from interp_vlm.readouts.attention import structure
from interp_vlm.readouts.consistency import self_consistency
from interp_vlm.readouts.lens import logit_entropy
from interp_vlm.readouts.spelling import answer_vocabulary, normalised
from interp_vlm.study.answered import answered
from interp_vlm.study.encoding import identity, measured
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.judge import Judge
from interp_vlm.study.reliability_tables import SITE, sampling, summarise

if TYPE_CHECKING:
    from interp_vlm.data.example import Example
    from interp_vlm.study.material import Shard
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.tokens.token_map import TokenMap
    from interp_vlm.vlm import VLM

__all__ = ["RELIABILITY"]


def measure(bench: Bench, shard: Shard) -> pd.DataFrame:
    """One row per question with every signal of its answer; a higher signal is meant to go with a right answer.

    `hidden` and `hidden_after` are the residual stream after each layer, flattened (layer, d), at the last token of the
    prompt and one position later, where the model has read its own answer.
    """
    vlm, settings = bench.vlm, bench.settings
    how = sampling(settings)

    def rows_of(examples: Sequence[Example], batch: Batch) -> Iterator[dict[str, Any]]:
        run = vlm.run(batch)
        # One capture serves both positions: no token of the prompt sees the answer that follows it.
        longer = answered(vlm, batch, [answer.token for answer in run.answers])
        end = int(longer.last.max())
        cache = vlm.capture(longer, ["pattern", SITE], positions=[end - 1, end])
        sampled = self_consistency(vlm, batch, **how)
        certainty = -logit_entropy(run.logits.float())
        judge = Judge(vlm, batch, examples)
        for number, (example, answer) in enumerate(zip(examples, run.answers, strict=True)):
            right = judge.right(number, answer)
            yield {
                **identity(example, shard.condition),
                "answer": str(answer),
                "correct": right,
                "answer_length": len(answer),
                **_output(answer),
                "logit_certainty": float(certainty[number]),
                **_attention(longer.tokens[number], cache["pattern"][number, :, :, :1]),
                "agreement": float(sampled.agreement[number]),
                "majority": sampled.majority[number],
                "majority_correct": _majority_right(vlm, judge, number, sampled.majority[number], answer, right),
                "layers": cache[SITE].shape[1],
                "hidden": _flat(cache[SITE][number, :, 0]),
                "hidden_after": _flat(cache[SITE][number, :, 1]),
            }

    return pd.DataFrame(measured(vlm, shard.examples, settings.batch_size, rows_of))


def _output(answer: Answer) -> dict[str, float]:
    """What the distribution at the answer position says of the answer, all its spellings together."""
    own = answer.scores[normalised(answer)]
    others = [score for text, score in answer.scores.items() if text != normalised(answer)]
    return {"confidence": exp(own), "margin": own - max(others)}


def _attention(tokens: TokenMap, pattern: Tensor) -> dict[str, float]:
    """How one position's attention lies on the picture, the mean over heads and layers."""
    shape = structure(pattern.mean(dim=0, keepdim=True), tokens).iloc[0]
    return {
        "attention_entropy": -float(shape["entropy_normalised"]),
        "attention_clusters": -float(shape["clusters"]),
        "attention_peak": float(shape["max_attention"]),
    }


def _majority_right(vlm: VLM, judge: Judge, number: int, majority: str, greedy: Answer, right: bool) -> bool:
    """Whether the answer sampled most often is right; samples are text, so any token that writes it may count."""
    if majority == normalised(greedy):
        return right
    tokens = answer_vocabulary(vlm.tokenizer).ids.get(majority, (-1,))
    return any(judge.right(number, Answer(majority, token=token)) for token in tokens)


def _flat(hidden: Tensor) -> Any:
    """One example's (layer, d) as numbers in a row."""
    return hidden.detach().to(torch.float32).cpu().numpy().ravel()


RELIABILITY = Experiment("reliability", lambda material: material.errors, measure, summarise, passes=3, closing=6)
