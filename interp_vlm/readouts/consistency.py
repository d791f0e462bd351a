"""Self-consistency: how often sampled answers agree, seeded so that an example's samples are its own."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp_vlm.engine.batches import in_parts
from interp_vlm.errors import DataError, SelectionError
from interp_vlm.readouts.scores import full_precision, refuse_nan
from interp_vlm.readouts.spelling import answer_vocabulary, normalised
from interp_vlm.tokens.batch import Batch

if TYPE_CHECKING:
    import pandas as pd

    from interp_vlm.vlm import VLM

__all__ = ["SelfConsistency", "draw", "self_consistency"]


@dataclass(frozen=True, eq=False)
class SelfConsistency:
    """Sampled answers and how far they agree, per example.

    Attributes:
        samples: the k sampled answers of each example, as text.
        majority: the normalised answer sampled most often; of equally frequent ones the greedy answer, else the one
            sampled first.
        greedy: the answer without sampling, as text.
        agreement: share of the samples that give the majority's answer.
        correctness: whose correctness agreement is to be related to, "greedy" or "majority".
        normaliser: how answers were made comparable.
        temperature, top_p, seed, max_new_tokens: how they were sampled.
    """

    samples: tuple[tuple[str, ...], ...]
    majority: tuple[str, ...]
    greedy: tuple[str, ...]
    agreement: Float[Tensor, " example"]
    correctness: Literal["greedy", "majority"]
    normaliser: Callable[[str], str]
    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers whose correctness counts: the greedy ones or the majority's, as `correctness` says."""
        return self.greedy if self.correctness == "greedy" else self.majority

    @property
    def k(self) -> int:
        """How many answers were sampled of each example."""
        return len(self.samples[0]) if self.samples else 0

    def frame(self) -> pd.DataFrame:
        """A tidy table: one row per example."""
        import pandas as pd

        votes = [[self.normaliser(sample) for sample in samples] for samples in self.samples]
        return pd.DataFrame(
            {
                "example": range(len(self.samples)),
                "agreement": self.agreement.double().cpu().numpy(),
                "majority": list(self.majority),
                "greedy": list(self.greedy),
                "agrees_with_greedy": [
                    vote.count(self.normaliser(greedy)) / len(vote)
                    for vote, greedy in zip(votes, self.greedy, strict=True)
                ],
                "distinct": [len(set(vote)) for vote in votes],
                "answer": list(self.answers),
                "correctness": self.correctness,
            }
        )

    def __repr__(self) -> str:
        mean = float(self.agreement.mean()) if len(self.agreement) else math.nan
        return f"SelfConsistency({len(self.samples)} examples, k={self.k}, mean agreement {mean:.3f})"


def self_consistency(
    vlm: VLM,
    batches: Batch | Sequence[Batch],
    k: int = 10,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    *,
    max_new_tokens: int = 1,
    normaliser: Callable[[str], str] = normalised,
    correctness: Literal["greedy", "majority"] = "greedy",
) -> SelfConsistency:
    """Sample k answers of every example and measure how many agree.

    Each sample of each example has random numbers of its own, from the seed and the example's key: the samples do not
    depend on the batch, and the first ones stay as they are with a larger k or longer answers. Answers of one token are
    drawn from the distribution at the answer position, in one forward pass; longer ones are generated, once per sample.

    Args:
        vlm: the model.
        batches: one batch, or several whose examples are laid end to end.
        k: samples per example.
        temperature: divides the logits.
        top_p: only the most probable tokens which together reach this probability are drawn.
        seed: of the random numbers.
        max_new_tokens: length of the answers; more than 1 needs padding on the left.
        normaliser: makes answers comparable before they vote, for example `interp_vlm.data.scorers.vqa_normalise`.
        correctness: whose correctness agreement is to be related to; kept in the result.

    Raises:
        SelectionError: k below 1, a temperature of 0 or less, top_p outside of (0, 1], or another `correctness`.
        DataError: logits with NaN.

    Source: Wang et al. 2023, arXiv 2203.11171; top-p: Holtzman et al. 2020, arXiv 1904.09751.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> example = iv.data.digit_scenes(n=1)[0]
        >>> sampled = iv.self_consistency(vlm, vlm.encode(example.image, example.question), k=5)
        >>> len(sampled.samples[0]), 0.2 <= float(sampled.agreement[0]) <= 1.0
        (5, True)
    """
    if k < 1 or max_new_tokens < 1:
        raise SelectionError(f"k={k} samples of {max_new_tokens} tokens", expected="at least one of each")
    if not (temperature > 0 and 0 < top_p <= 1):
        raise SelectionError(f"temperature={temperature}, top_p={top_p}", expected="temperature > 0 and 0 < top_p <= 1")
    if correctness not in ("greedy", "majority"):
        raise SelectionError(f"correctness={correctness!r}", expected="'greedy' or 'majority'")
    listed = [batches] if isinstance(batches, Batch) else list(batches)
    if not listed:
        raise DataError("no batch to sample from", expected="at least one")
    samples: list[tuple[str, ...]] = []
    greedy: list[str] = []

    def sampled(_rows: range, part: Batch) -> tuple[list[str], list[tuple[str, ...]]]:
        uniforms = _uniforms(part, seed, k, max_new_tokens)
        sampler = _one_token if max_new_tokens == 1 else _generated
        return sampler(vlm, part, uniforms, temperature, top_p)

    for _, (plain, drawn) in (found for batch in listed for found in in_parts(vlm, batch, sampled)):
        greedy += plain
        samples += drawn
    voted = [
        _vote([normaliser(sample) for sample in of_one], normaliser(plain))
        for of_one, plain in zip(samples, greedy, strict=True)
    ]
    return SelfConsistency(
        tuple(samples), tuple(answer for answer, _ in voted), tuple(greedy),
        torch.tensor([share for _, share in voted], dtype=torch.double), correctness, normaliser,
        temperature, top_p, seed, max_new_tokens,
    )  # fmt: skip


def draw(
    logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, "batch draw"], temperature: float, top_p: float
) -> Int[Tensor, "batch draw"]:
    """Tokens drawn from softmax(logits / temperature), cut to its nucleus, at given uniform numbers.

    The nucleus is the smallest set of most probable tokens that reaches `top_p`; a token of it is where the uniform
    number falls in their cumulated probabilities, most probable first.

    Example:
        >>> draw(torch.tensor([[0.0, 3.0, 2.0]]), torch.tensor([[0.1, 0.99]]), temperature=1.0, top_p=0.9)
        tensor([[1, 2]])
    """
    scores = full_precision(logits).double() / temperature
    probabilities, tokens = scores.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    reached = probabilities.cumsum(dim=-1)
    kept = probabilities.masked_fill(reached - probabilities >= top_p, 0)
    cumulated = kept.cumsum(dim=-1)
    mass, last = cumulated[:, -1:], (kept > 0).sum(dim=-1, keepdim=True) - 1
    place = torch.searchsorted(cumulated, uniforms.to(cumulated) * mass, right=True)
    return tokens.gather(-1, place.minimum(last))


def _uniforms(batch: Batch, seed: int, k: int, steps: int) -> Float[Tensor, "batch step draw"]:
    """Each sample's own uniform numbers, from the seed, the example's key and the sample's number alone."""
    rows = []
    for tokens in batch.tokens:
        own = []
        for sample in range(k):
            digest = hashlib.blake2b(f"{seed}/{tokens.key}/{sample}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            own.append([float(torch.rand((), generator=generator, dtype=torch.double)) for _ in range(steps)])
        rows.append(own)
    return torch.tensor(rows, dtype=torch.double).reshape(len(batch), k, steps).transpose(1, 2)


def _one_token(
    vlm: VLM, batch: Batch, uniforms: Tensor, temperature: float, top_p: float
) -> tuple[list[str], list[tuple[str, ...]]]:
    logits = vlm.run(batch).logits
    refuse_nan(logits)
    text = answer_vocabulary(vlm.tokenizer).text
    drawn = draw(logits, uniforms[:, 0].to(logits.device), temperature, top_p)
    return [text(token) for token in logits.argmax(dim=-1).tolist()], [tuple(map(text, row)) for row in drawn.tolist()]


def _generated(
    vlm: VLM, batch: Batch, uniforms: Tensor, temperature: float, top_p: float
) -> tuple[list[str], list[tuple[str, ...]]]:
    def texts(**options: Any) -> list[str]:
        made = vlm.generate(batch, max_new_tokens=uniforms.shape[1], **_PLAIN, **options).texts
        return [text.strip() for text in made]

    start = batch.inputs["input_ids"].shape[1]
    greedy = texts()
    columns = [
        texts(logits_processor=[_Drawing(numbers, start, temperature, top_p)]) for numbers in uniforms.unbind(dim=-1)
    ]
    return greedy, list(zip(*columns, strict=True))


# A checkpoint's generation settings (Qwen2-VL's repetition penalty and top-k) would sample from another distribution.
_PLAIN = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


class _Drawing:
    """Makes Hugging Face's greedy generation take the tokens that are drawn here: all other scores become -inf."""

    def __init__(self, uniforms: Tensor, start: int, temperature: float, top_p: float) -> None:
        self.uniforms, self.start, self.temperature, self.top_p = uniforms, start, temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        refuse_nan(scores)
        numbers = self.uniforms[:, input_ids.shape[1] - self.start, None].to(scores.device)
        chosen = draw(scores, numbers, self.temperature, self.top_p)
        return torch.full_like(scores, -math.inf).scatter(-1, chosen, 0.0)


def _vote(votes: Sequence[str], greedy: str) -> tuple[str, float]:
    """The answer given most often, and its share."""
    counts = Counter(votes)
    most = max(counts.values())
    tied = [answer for answer, count in counts.items() if count == most]
    return greedy if greedy in tied else tied[0], most / len(votes)
