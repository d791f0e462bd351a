"""The truth margin, and the part that each attention and MLP layer has in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_vlm.engine.devices import returned
from interp_vlm.errors import ModelError
from interp_vlm.readouts.contrast import Contrast, contrast
from interp_vlm.readouts.lens import column_chunks, unembed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from interp_vlm.interventions.cache import Cache
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["TruthMargin", "truth_margin"]


@dataclass(frozen=True, eq=False)
class TruthMargin:
    """The last layer's truth margin, split into parts that add up to it.

    `total = embedding + sum(attention) + sum(mlp) + sum(between) + constant + unexplained`

    Attributes:
        total: (batch, pos) score of the right answer minus that of the other one, in nats; of a model that soft-caps
            its logits, before the cap.
        embedding: (batch, pos) part of what enters the first layer.
        attention: (batch, layer, pos) part of what each attention layer adds.
        mlp: (batch, layer, pos) part of what each MLP adds.
        between: (batch, layer, pos) part of what is added before each layer (Qwen3-VL's visual features), else zero.
        constant: (batch, pos) what no part carries: a bias of the head, and the spread of an answer over its spellings.
        unexplained: (batch, pos) rounding of the residual stream.
        positions: (batch, pos) absolute positions in the padded rows, -1 where `mask` is False.
        mask: (batch, pos) False for padding; the values are NaN there.
        answers: the right answer of each example.
        given: True if these were given, False if they are the model's own answers.
    """

    total: Float[Tensor, "batch pos"]
    embedding: Float[Tensor, "batch pos"]
    attention: Float[Tensor, "batch layer pos"]
    mlp: Float[Tensor, "batch layer pos"]
    between: Float[Tensor, "batch layer pos"]
    constant: Float[Tensor, "batch pos"]
    unexplained: Float[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    answers: tuple[str, ...]
    given: bool

    @property
    def mlp_share(self) -> Float[Tensor, "batch pos"]:
        """MLP layers' part of what attention and MLP layers add together; beyond 0 to 1 where they are opposed."""
        mlp = self.mlp.sum(dim=1)
        return mlp / (mlp + self.attention.sum(dim=1))

    @property
    def running(self) -> Float[Tensor, "batch layer pos"]:
        """The parts up to and with each layer, at the scale of the last norm; unlike the logit lens's own margins."""
        steps = self.attention + self.mlp + self.between
        return (self.embedding + self.constant)[:, None] + steps.cumsum(dim=1)

    def frame(self) -> pd.DataFrame:
        """A tidy table: example, position, part, layer (-1 for parts of no layer), value, answer and total."""
        import pandas as pd

        rows, columns = self.mask.nonzero(as_tuple=True)
        parts: list[tuple[str, int, Tensor]] = [("embedding", -1, self.embedding)]
        for layer in range(self.attention.shape[1]):
            parts += [(name, layer, getattr(self, name)[:, layer]) for name in ("between", "attention", "mlp")]
        parts += [("constant", -1, self.constant), ("unexplained", -1, self.unexplained)]
        values = torch.stack([value[rows, columns] for _, _, value in parts], dim=1).cpu()
        places, n = self.positions[rows, columns], len(parts)
        return pd.DataFrame(
            {
                "example": rows.repeat_interleave(n).cpu().numpy(),
                "position": places.repeat_interleave(n).cpu().numpy(),
                "part": [name for name, _, _ in parts] * len(rows),
                "layer": [layer for _, layer, _ in parts] * len(rows),
                "value": values.flatten().numpy(),
                "answer": [self.answers[row] for row in rows.tolist() for _ in range(n)],
                "total": self.total[rows, columns].repeat_interleave(n).cpu().numpy(),
            }
        )

    def plot(self, ax: Any = None) -> Figure:
        """Mean part of attention and MLP by layer, as bars."""
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(6.4, 3.6), layout="constrained") if ax is None else ax.figure
        axes = figure.add_subplot() if ax is None else ax
        layers = torch.arange(self.attention.shape[1]).numpy()
        for offset, name in ((-0.2, "attention"), (0.2, "mlp")):
            means = getattr(self, name).transpose(1, 2)[self.mask].mean(dim=0).cpu().numpy()
            axes.bar(layers + offset, means, width=0.4, label="MLP" if name == "mlp" else name)
        axes.axhline(0.0, color="0.4", linewidth=1)
        axes.set(xlabel="layer", ylabel="part of the truth margin (nats)")
        axes.legend(frameon=False, fontsize="small")
        if ax is None:
            pyplot.close(figure)
        return figure

    def __repr__(self) -> str:
        share = float(self.mlp_share[self.mask].median())
        return (
            f"TruthMargin({len(self.total)} examples, {self.attention.shape[1]} layers; median MLP share {share:.2f})"
        )


def truth_margin(
    vlm: VLM, batch: Batch, positions: Any = "last", *, correct: Any = None, wrong: Any = None
) -> TruthMargin:
    """Split the truth margin into what each attention and MLP layer adds to it (direct logit attribution).

    The final norm's scale is frozen at the run's own, which makes the margin linear in the residual stream, so that the
    parts of what is added to the stream add up to it.

    Args:
        vlm: the model.
        batch: encoded examples.
        positions: a role, a selector or positions; margins are those of the answer as if it were read there.
        correct: the right answer, a word or token id for every example or a list of one for each; by default the answer
            that the model gives.
        wrong: likewise, the answer to hold it against; by default the best other answer of the last layer.

    Raises:
        ModelError: the parts do not add up, so the anatomy misses something that is added to the stream.
        SelectionError: as in `contrast`, for `correct` and `wrong`.

    Source: Elhage et al. 2021, "A mathematical framework for transformer circuits", direct logit attribution.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> example = iv.data.digit_scenes(n=1)[0]
        >>> split = iv.truth_margin(vlm, vlm.encode(example.image, example.question), correct=example.answer)
        >>> parts = split.embedding + split.attention.sum(1) + split.mlp.sum(1) + split.constant
        >>> bool((parts - split.total).abs().max() < 1e-3)
        True
    """
    cache = vlm.capture(batch, ["resid_pre", "attn_out", "mlp_out", "resid_post"], positions)
    held = contrast(vlm.tokenizer, batch, vlm.run(batch).clean_logits, correct, wrong)
    total, constant, direction, rounding = _linear(vlm, held, cache["resid_post"])
    added = {"attention": cache["attn_out"].double(), "mlp": cache["mlp_out"].double(), "between": _between(cache)}
    parts = {name: torch.einsum("blpd,bpd->blp", value, direction) for name, value in added.items()}
    embedding = (cache["resid_pre"][:, 0].double() * direction).sum(dim=-1)
    unexplained = total - constant - embedding - sum(part.sum(dim=1) for part in parts.values())
    _check(vlm, unexplained[cache.mask], rounding[cache.mask])
    blank = ~cache.mask
    one = {"total": total, "embedding": embedding, "constant": constant, "unexplained": unexplained}
    return TruthMargin(
        **{name: value.masked_fill(blank, torch.nan) for name, value in one.items()},
        **{name: value.masked_fill(blank[:, None], torch.nan) for name, value in parts.items()},
        positions=cache.positions, mask=cache.mask, answers=held.names, given=correct is not None,
    )  # fmt: skip


def _linear(vlm: VLM, held: Contrast, stream: Tensor) -> list[Tensor]:
    """At each position: the margin, its constant, the direction of the stream that it reads, how far it may be rounded.

    Rounding of the stream after each layer, and of the logits, moves the margin by no more than that.
    """
    pieces = []
    batch, _, positions, _ = stream.shape
    for part in column_chunks(batch, positions, vlm.anatomy.d_vocab):
        final = stream[:, -1, part]
        logits = unembed(vlm, final, softcap=False)
        weights, constant = held.weights(logits)
        direction, bias = _direction(vlm, final, weights)
        moved = torch.einsum("blpd,bpd->bp", stream[:, :, part].double().abs(), direction.abs())
        rounding = 8 * torch.finfo(stream.dtype).eps * (moved + logits.double().abs().amax(dim=-1))
        pieces.append((held.margin(logits).double(), constant.double() + bias, direction, rounding))
    return [torch.cat(found, dim=1) for found in zip(*pieces, strict=True)]


def _direction(vlm: VLM, final: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The direction of the residual stream that the margin reads, at the final norm's own scale, and the head's bias.

    Every norm of the table multiplies each number of the stream by a factor of its own: its gain times the scale of the
    run. Reading the factor off the module's output keeps the run's own rounding, and Gemma's 1 + w.
    """
    norm, head = vlm.model.get_submodule(vlm.anatomy.final_norm), vlm.model.get_submodule(vlm.anatomy.head)
    with torch.no_grad():
        normed, gain = returned(norm, final).double(), returned(norm, torch.ones_like(final)).double()
    stream = final.double()
    scale = stream.square().mean(dim=-1, keepdim=True).rsqrt()
    factor = torch.where(stream == 0, gain * scale, normed / stream)
    used = (weights != 0).flatten(0, 1).any(dim=0).nonzero().flatten()  # a few tokens of the vocabulary
    few = weights[..., used].double()
    with torch.no_grad(), align_module_device(head):  # offloaded weights are brought in
        matrix: Any = head.weight
        bias: Any = getattr(head, "bias", None)
        used = used.to(matrix.device)
        read = few @ matrix[used].to(few)
        return factor * read, few.sum(dim=-1) * 0 if bias is None else few @ bias[used].to(few)


def _between(cache: Cache) -> Tensor:
    """What is added to the stream before each layer, after the one below it."""
    entering, leaving = cache["resid_pre"].double(), cache["resid_post"].double()
    return torch.cat([torch.zeros_like(entering[:, :1]), entering[:, 1:] - leaving[:, :-1]], dim=1)


def _check(vlm: VLM, missed: Tensor, allowed: Tensor) -> None:
    if bool((missed.abs() > allowed).any()):
        worst = float(missed.abs().max())
        raise ModelError(
            f"the parts of {vlm.name}'s layers miss the margin by up to {worst:.3g} nats",
            expected="attention and MLP outputs that add up to the residual stream",
            remedy=f"check the row of family {vlm.anatomy.family!r}: attn_out, mlp_out, final_norm",
        )
