"""What each attention head adds to the truth margin by itself: direct logit attribution, head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_vlm.engine.devices import returned
from interp_vlm.errors import ModelError
from interp_vlm.readouts import margin
from interp_vlm.readouts.contrast import contrast

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import nn

    from interp_vlm.interventions.cache import Cache
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["READ", "HeadContributions", "head_contributions", "heads_of"]

READ = ("z", "attn_out", "resid_post")
"""The sites that the parts are computed from."""


@dataclass(frozen=True, eq=False)
class HeadContributions:
    """The attention part of the truth margin, split into heads.

    `truth_margin(...).attention = heads.sum("head") + bias + unexplained`

    Attributes:
        heads: (batch, layer, head, pos) part of the margin that each head adds, in nats.
        bias: (batch, layer, pos) part of the output projection's bias; zero where it has none.
        unexplained: (batch, layer, pos) rounding.
        positions: (batch, pos) absolute positions in the padded rows, -1 where `mask` is False.
        mask: (batch, pos) False for padding; the values are NaN there.
        answers: the right answer of each example.
        given: True if these were given, False if they are the model's own answers.
    """

    heads: Float[Tensor, "batch layer head pos"]
    bias: Float[Tensor, "batch layer pos"]
    unexplained: Float[Tensor, "batch layer pos"]
    positions: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    answers: tuple[str, ...]
    given: bool

    @property
    def strength(self) -> Float[Tensor, "layer head"]:
        """Mean size of each head's part, whichever way it pushes, over examples and positions."""
        return self.heads.permute(0, 3, 1, 2)[self.mask].abs().mean(dim=0)

    def top(self, k: int = 10) -> tuple[tuple[int, int], ...]:
        """The (layer, head) of the k strongest heads, strongest first."""
        strength = self.strength
        best = strength.flatten().argsort(descending=True, stable=True)[:k].tolist()
        return tuple(divmod(place, strength.shape[1]) for place in best)

    def frame(self) -> pd.DataFrame:
        """A tidy table: example, position, layer, head, value and answer."""
        import pandas as pd

        rows, columns = self.mask.nonzero(as_tuple=True)
        layers, heads = self.heads.shape[1:3]
        n = layers * heads
        layer, head = torch.arange(n) // heads, torch.arange(n) % heads
        return pd.DataFrame(
            {
                "example": rows.repeat_interleave(n).cpu().numpy(),
                "position": self.positions[rows, columns].repeat_interleave(n).cpu().numpy(),
                "layer": layer.repeat(len(rows)).numpy(),
                "head": head.repeat(len(rows)).numpy(),
                "value": self.heads.permute(0, 3, 1, 2)[self.mask].flatten().cpu().numpy(),
                "answer": [self.answers[row] for row in rows.tolist() for _ in range(n)],
            }
        )

    def plot(self, ax: Any = None) -> Figure:
        """Mean part of each head, as a map of layers and heads."""
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator

        figure = pyplot.figure(figsize=(4.8, 3.6), layout="constrained") if ax is None else ax.figure
        axes = figure.add_subplot() if ax is None else ax
        means = self.heads.permute(0, 3, 1, 2)[self.mask].mean(dim=0).cpu().numpy()
        reach = float(abs(means).max()) or 1.0
        drawn = axes.imshow(means, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", origin="lower")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="head", ylabel="layer")
        figure.colorbar(drawn, ax=axes, label="mean part of the truth margin (nats)")
        if ax is None:
            pyplot.close(figure)
        return figure

    def __repr__(self) -> str:
        batch, layers, heads, _ = self.heads.shape
        shown = ", ".join(f"layer {layer} head {head}" for layer, head in self.top(3))
        return f"HeadContributions({batch} examples, {layers} layers of {heads} heads; strongest: {shown})"


def head_contributions(
    vlm: VLM, batch: Batch, positions: Any = "last", *, correct: Any = None, wrong: Any = None
) -> HeadContributions:
    """Split the attention part of the truth margin into heads (direct logit attribution).

    A head's part is its mix of values through its own columns of the output projection, against the direction of the
    residual stream that the margin reads. The final norm's scale is frozen at the run's own, and so is the scale of the
    norm that some decoders (Gemma 2 and 3) put between the output projection and the residual stream: both are then
    linear, and the parts add up to `truth_margin(...).attention`.

    Args:
        vlm: the model.
        batch: encoded examples.
        positions: a role, a selector or positions; margins are those of the answer as if it were read there.
        correct: the right answer, as in `truth_margin`; by default the answer that the model gives.
        wrong: the answer to hold it against; by default the best other answer of the last layer.

    Raises:
        ModelError: the heads do not add up to what attention adds to the stream.
        SelectionError: as in `contrast`, for `correct` and `wrong`.

    Source: Elhage et al. 2021, "A mathematical framework for transformer circuits", direct logit attribution.

    Example:
        >>> import interp_vlm as iv
        >>> from interp_vlm.readouts.head_contribution import head_contributions
        >>> vlm = iv.load("testbed:llava")
        >>> example = iv.data.digit_scenes(n=1)[0]
        >>> batch = vlm.encode(example.image, example.question)
        >>> split, whole = head_contributions(vlm, batch), iv.truth_margin(vlm, batch)
        >>> bool((split.heads.sum(dim=2) + split.bias - whole.attention).abs().max() < 1e-3)
        True
    """
    return heads_of(vlm, batch, vlm.capture(batch, READ, positions), correct=correct, wrong=wrong)


def heads_of(vlm: VLM, batch: Batch, cache: Cache, *, correct: Any = None, wrong: Any = None) -> HeadContributions:
    """`head_contributions` from activations of the clean run that were captured already: at least the sites `READ`."""
    held = contrast(vlm.tokenizer, batch, vlm.run(batch).clean_logits, correct, wrong)
    _, _, direction, _ = margin._linear(vlm, held, cache["resid_post"])
    mixes, added = cache["z"], cache["attn_out"]
    heads, bias, rounding = [], [], []
    for layer, block in enumerate(vlm.model.get_submodule(vlm.anatomy.layers).children()):
        part, of_bias, allowed = _layer(vlm, block, mixes[:, layer], direction)
        heads.append(part)
        bias.append(of_bias)
        rounding.append(allowed)
    parts, of_bias, allowed = torch.stack(heads, dim=1), torch.stack(bias, dim=1), torch.stack(rounding, dim=1)
    whole = torch.einsum("blpd,bpd->blp", added.double(), direction)
    unexplained = whole - parts.sum(dim=2) - of_bias
    blank = ~cache.mask
    _check(vlm, unexplained.masked_fill(blank[:, None], 0), allowed)
    return HeadContributions(
        heads=parts.masked_fill(blank[:, None, None], torch.nan),
        bias=of_bias.masked_fill(blank[:, None], torch.nan),
        unexplained=unexplained.masked_fill(blank[:, None], torch.nan),
        positions=cache.positions, mask=cache.mask, answers=held.names, given=correct is not None,
    )  # fmt: skip


def _layer(vlm: VLM, block: nn.Module, mix: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one layer: each head's part (batch, head, pos), the bias's (batch, pos), and how far they may be rounded."""
    anatomy = vlm.anatomy
    projection: Any = block.get_submodule(f"{anatomy.attn}.{anatomy.o}")
    with align_module_device(projection):  # offloaded weights are brought in
        weight = projection.weight.detach().to(direction)
        offset = None if projection.bias is None else projection.bias.detach().to(direction)
    with torch.no_grad():
        raw = returned(projection, mix.flatten(-2))
    reading = direction * _scale(vlm, block, raw)
    through = (reading @ weight).unflatten(-1, mix.shape[-2:])
    products = mix.double() * through
    of_bias = 0 if offset is None else reading @ offset
    size = (reading.abs() * raw.double().abs()).sum(dim=-1) + products.abs().sum(dim=(-2, -1))
    # Sums of d numbers round by up to a few times root d; norms compute in single precision whatever their dtype.
    step = max(torch.finfo(mix.dtype).eps, 2.0**-23 if anatomy.attn_out != anatomy.attn else 0.0)
    allowed = 8 * step * size * mix.shape[-1] ** 0.5
    return products.sum(dim=-1).movedim(-1, 1), reading.new_zeros(reading.shape[:-1]) + of_bias, allowed


def _scale(vlm: VLM, block: nn.Module, raw: Tensor) -> Tensor | float:
    """The factor on each number between the projection and the residual stream: a norm's gain and scale, or 1."""
    anatomy = vlm.anatomy
    if anatomy.attn_out == anatomy.attn:
        return 1.0
    norm = block.get_submodule(anatomy.attn_out)
    with torch.no_grad():
        normed, gain = returned(norm, raw).double(), returned(norm, torch.ones_like(raw)).double()
    stream = raw.double()
    flat = gain * stream.square().mean(dim=-1, keepdim=True).rsqrt()
    return torch.where(stream == 0, flat, normed / stream)


def _check(vlm: VLM, missed: Tensor, allowed: Tensor) -> None:
    if bool((missed.abs() > allowed).any()):
        raise ModelError(
            f"the heads of {vlm.name} miss what attention adds by up to {float(missed.abs().max()):.3g} nats",
            expected="heads that add up, through the output projection, to what attention adds to the stream",
            remedy=f"check the row of family {vlm.anatomy.family!r}: attn, o, attn_out",
        )
