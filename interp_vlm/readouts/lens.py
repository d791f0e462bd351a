"""The logit lens: what every layer would answer, were it the last one; and how sure a distribution of answers is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_vlm.engine.devices import returned
from interp_vlm.errors import InterventionError
from interp_vlm.readouts.contrast import Contrast, contrast
from interp_vlm.readouts.scores import full_precision
from interp_vlm.readouts.spelling import answer_vocabulary

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["LogitLens", "logit_entropy", "logit_lens", "output_confidence", "unembed"]

STREAM = ("resid_pre", "resid_mid", "resid_post")
# Logits are made for so many numbers at a time: a picture's tokens times a vocabulary of 150,000 would fill a machine.
CHUNK = 2**25
_MEASURES = {
    "margin": "truth margin (nats)",
    "probability": "probability of the answer",
    "entropy": "entropy (nats)",
    "confidence": "largest probability",
}


def logit_entropy(logits: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape"]:
    """Entropy of the distribution over the next token, in nats: from 0 to the log of the vocabulary's size.

    Example:
        >>> round(float(logit_entropy(torch.zeros(8)).exp()), 4)
        8.0
    """
    logprobs = full_precision(logits).log_softmax(dim=-1)
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(dim=-1)


def output_confidence(logits: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape"]:
    """Largest probability of the distribution over the next token.

    Example:
        >>> output_confidence(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor(0.5000)
    """
    return full_precision(logits).softmax(dim=-1).amax(dim=-1)


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What every layer would answer; all tensors are (batch, layer, pos), NaN where an example has fewer positions.

    Attributes:
        site: where the residual stream was read.
        layers: the layers read, in the order of the layer axis.
        positions: (batch, pos) absolute positions in the padded rows, -1 where `mask` is False.
        mask: (batch, pos) False for padding.
        pieces: per example, the text of its positions.
        answers: the answer that `margin` and `probability` are about, one per example.
        given: True if these answers were given as the right ones, False if they are the model's own.
        margin: score of the answer minus the best other one's (or the fixed other one's), in nats: the truth margin
            where the right answers were given.
        probability: of the answer, all its spellings together.
        entropy: of the distribution over the next token, in nats.
        confidence: its largest probability.
        top: the most probable tokens, (batch, layer, pos, k).
        words: the text of every token of the vocabulary.
        logits: (batch, layer, pos, vocab) if they were to be kept, else None.
    """

    site: str
    layers: tuple[int, ...]
    positions: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    pieces: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    given: bool
    margin: Float[Tensor, "batch layer pos"]
    probability: Float[Tensor, "batch layer pos"]
    entropy: Float[Tensor, "batch layer pos"]
    confidence: Float[Tensor, "batch layer pos"]
    top: Int[Tensor, "batch layer pos k"]
    words: tuple[str, ...]
    logits: Float[Tensor, "batch layer pos vocab"] | None = None

    def frame(self) -> pd.DataFrame:
        """A tidy table: one row per example, layer and position."""
        import pandas as pd

        rows, columns = self.mask.nonzero(as_tuple=True)
        depth, count = len(self.layers), len(rows)
        table: dict[str, Any] = {
            "example": rows.repeat_interleave(depth).cpu().numpy(),
            "layer": list(self.layers) * count,
            "position": self.positions[rows, columns].repeat_interleave(depth).cpu().numpy(),
            "piece": [self.pieces[row][column] for row, column in _pairs(rows, columns) for _ in range(depth)],
            "answer": [self.answers[row] for row in rows.tolist() for _ in range(depth)],
        }
        for name in _MEASURES:
            table[name] = getattr(self, name)[rows, :, columns].flatten().double().cpu().numpy()
        table["top"] = [self.words[token] for token in self.top[rows, :, columns, 0].flatten().tolist()]
        return pd.DataFrame(table)

    def plot(self, measure: str = "margin", ax: Any = None) -> Figure:
        """One measure by layer: each example (a position of an example) faint, their mean strong.

        Args:
            measure: "margin", "probability", "entropy" or "confidence".
            ax: axes to draw into.
        """
        from matplotlib import pyplot

        if measure not in _MEASURES:
            raise InterventionError(f"measure {measure!r}", expected="one of " + ", ".join(_MEASURES))
        values = getattr(self, measure).transpose(1, 2)[self.mask].double().cpu().numpy()
        figure = pyplot.figure(figsize=(6.4, 3.6), layout="constrained") if ax is None else ax.figure
        axes = figure.add_subplot() if ax is None else ax
        axes.plot(self.layers, values[:200].T, color="0.75", linewidth=0.6)
        axes.plot(self.layers, values.mean(axis=0), color="C0", marker="o", markersize=4)
        if measure == "margin":
            axes.axhline(0.0, color="0.4", linestyle="--", linewidth=1)
        axes.set(xlabel=f"layer ({self.site})", ylabel=_MEASURES[measure])
        if ax is None:
            pyplot.close(figure)
        return figure

    def __repr__(self) -> str:
        batch, depth, positions = self.margin.shape
        return f"LogitLens({batch} examples x {depth} layers of {self.site} x {positions} positions)"


def logit_lens(
    vlm: VLM,
    batch: Batch,
    positions: Any = "last",
    layers: Any = "all",
    site: str = "resid_post",
    *,
    correct: Any = None,
    wrong: Any = None,
    k: int = 5,
    keep_logits: bool = False,
) -> LogitLens:
    """Read the residual stream as if each layer were the last: final norm, output head, and the logits' soft-cap.

    The final norm is applied exactly once, by the model's own module: what is read is the stream itself, whereas
    Hugging Face's last hidden state is normed already. At the last layer the logits are the model's own.

    Args:
        vlm: the model.
        batch: encoded examples.
        positions: a role, a selector or positions; visual tokens too.
        layers: an int, a range, a list or "all".
        site: "resid_post", "resid_mid" or "resid_pre".
        correct: the right answer, a word or token id for every example or a list of one for each; by default the answer
            that the model gives.
        wrong: likewise, the answer to hold it against; by default the best other answer, which may change by layer.
        k: how many of the most probable tokens to keep.
        keep_logits: keep the logits too, (batch, layer, pos, vocab).

    Raises:
        InterventionError: for a site that is no residual stream, or a layer that does not exist.
        SelectionError: as in `contrast`, for `correct` and `wrong`.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> example = iv.data.digit_scenes(n=1)[0]
        >>> lens = iv.logit_lens(vlm, vlm.encode(example.image, example.question), correct=example.answer)
        >>> lens.margin.shape
        torch.Size([1, 4, 1])
    """
    if site not in STREAM:
        raise InterventionError(
            f"the logit lens of {site!r}",
            expected=f"the residual stream: {', '.join(STREAM)}",
            remedy="for what attention and the MLP add, use iv.truth_margin",
        )
    cache = vlm.capture(batch, site, positions, layers)
    hidden = cache[site]
    held = contrast(vlm.tokenizer, batch, vlm.run(batch).clean_logits, correct, wrong)
    words = tuple(map(answer_vocabulary(vlm.tokenizer).text, range(held.own.shape[-1])))
    read = _Reading(held, k, keep_logits, hidden.shape[:3])
    for part, logits in _by_chunks(vlm, hidden):
        read.add(part, logits)
    pieces = tuple(
        tuple(tokens.pieces[place] if place >= 0 else "" for place in places)
        for tokens, places in zip(batch.tokens, cache.positions.tolist(), strict=True)
    )
    return LogitLens(
        site=site, layers=cache.layers[site], positions=cache.positions, mask=cache.mask, pieces=pieces,
        answers=held.names, given=correct is not None, words=words, **read.values_where(cache.mask),
    )  # fmt: skip


def unembed(vlm: VLM, hidden: Float[Tensor, "*shape d"], *, softcap: bool = True) -> Float[Tensor, "*shape vocab"]:
    """The logits of a residual stream: the model's own final norm once, its head, and its soft-cap if it has one.

    Args:
        vlm: the model.
        hidden: residual stream, not normed.
        softcap: False leaves the soft-cap out.
    """
    norm, head = vlm.model.get_submodule(vlm.anatomy.final_norm), vlm.model.get_submodule(vlm.anatomy.head)
    cap = vlm.anatomy.final_softcap
    with torch.no_grad():
        logits = returned(head, returned(norm, hidden))
        return logits if cap is None or not softcap else cap * torch.tanh(logits / cap)


def _by_chunks(vlm: VLM, hidden: Tensor) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """Logits by layer and piece of the positions, so that few are in memory at a time."""
    batch, depth, positions, _ = hidden.shape
    for layer in range(depth):
        for part in column_chunks(batch, positions, vlm.anatomy.d_vocab):
            yield (layer, part), unembed(vlm, hidden[:, layer, part])


def column_chunks(batch: int, positions: int, vocab: int) -> Iterator[slice]:
    """The positions in pieces whose logits fit into memory."""
    step = max(1, CHUNK // (max(1, batch) * vocab))
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


class _Reading:
    """Collects the measures, chunk after chunk."""

    def __init__(self, held: Contrast, k: int, keep_logits: bool, shape: tuple[int, ...]) -> None:
        self.held, self.k, self.keep_logits, self.shape = held, k, keep_logits, shape
        self.values: dict[str, Tensor] = {}

    def add(self, part: tuple[int, slice], logits: Tensor) -> None:
        layer, columns = part
        found = {
            "margin": self.held.margin(logits),
            "probability": self.held.probability(logits),
            "entropy": logit_entropy(logits),
            "confidence": output_confidence(logits),
            "top": logits.topk(min(self.k, logits.shape[-1]), dim=-1).indices,
        }
        if self.keep_logits:
            found["logits"] = logits
        for name, value in found.items():
            if name not in self.values:
                self.values[name] = value.new_zeros(*self.shape, *value.shape[2:])
            self.values[name][:, layer, columns] = value

    def values_where(self, mask: Tensor) -> dict[str, Tensor]:
        """The measures by name, NaN outside the mask."""
        empty = ~mask[:, None].expand(self.shape)
        values = {name: value.to(mask.device) for name, value in self.values.items()}
        return {n: v.masked_fill(empty, math.nan) if n in _MEASURES else v for n, v in values.items()}


def _pairs(rows: Tensor, columns: Tensor) -> list[tuple[int, int]]:
    return list(zip(rows.tolist(), columns.tolist(), strict=True))
