"""Evidence for selectors: scores per position, measured on the run without interventions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp_vlm.engine.access import Access
from interp_vlm.engine.attention import patterns
from interp_vlm.engine.full import Program, Recording
from interp_vlm.errors import InterventionError, SelectionError
from interp_vlm.interventions.base import indices
from interp_vlm.models.anatomy import Anatomy
from interp_vlm.tokens.batch import Batch

__all__ = ["evidence", "evidence_program", "sink_scores"]


def sink_scores(
    hidden: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"] | None = None,
    eps: float = 1e-6,
    dims: Sequence[int] | None = None,
) -> Float[Tensor, "*batch"]:
    """How much of an attention sink each token is: the largest |RMSNorm(h)_d|; sinks of large models exceed 20.

    Without a weight a score cannot exceed sqrt(d), so the threshold of 20 needs a model wider than 400.

    Args:
        hidden: residual stream of each token.
        weight: gain of the norm as it multiplies (1 + weight for Gemma); none in the source.
        eps: of the norm.
        dims: the model's known sink dimensions, {1415, 2533} for LLaMA-2-7B; all of them by default.

    Raises:
        SelectionError: a dimension that does not exist.

    Source: Kang et al., arXiv 2503.03321, visual attention sinks (threshold 20).

    Example:
        >>> sink_scores(torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, -9.0, 0.0]]))
        tensor([1.0000, 2.0000])
    """
    hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
    normed = hidden * (hidden.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        normed = normed * weight.to(normed)
    if dims is not None:
        width = hidden.shape[-1]
        if not dims or not all(0 <= dim < width for dim in dims):
            raise SelectionError(f"sink dimensions {list(dims)}", expected=f"one or more of 0 to {width - 1}")
        normed = normed[..., list(dims)]
    return normed.abs().amax(dim=-1)


def evidence_program(anatomy: Anatomy, names: Sequence[str]) -> Program:
    """What a run has to record for this evidence."""
    attention = frozenset(layer for name in names for layer in _attention_layers(anatomy, name))
    return Program(captures={"resid_post": [anatomy.n_layers // 2]} if "sinks" in names else {}, attention=attention)


def evidence(
    access: Access, names: Sequence[str], recording: Recording, batch: Batch
) -> dict[str, Float[Tensor, "batch pos"]]:
    """Scores per position by name, from what the run recorded.

    Raises:
        InterventionError: for a name that does not exist.
    """
    found, anatomy = {}, access.anatomy
    layers = sorted(recording.attention)
    if layers:
        last = batch.last.to(batch.inputs["input_ids"].device)[:, None]
        rows = patterns(access, recording.attention, layers, last, torch.ones_like(last, dtype=torch.bool)).float()
    for name in names:
        if name == "sinks":
            found[name] = sink_scores(recording.values["resid_post", anatomy.n_layers // 2])
        elif wanted := _attention_layers(anatomy, name):
            found[name] = rows[:, [layers.index(layer) for layer in wanted]].mean(dim=(1, 2, 3))
        else:
            raise InterventionError(f"no evidence named {name!r}", expected="'attention', 'attention@LAYER', 'sinks'")
    return found


def _attention_layers(anatomy: Anatomy, name: str) -> tuple[int, ...]:
    """The layers whose attention makes up this evidence: all for "attention", one for "attention@LAYER"."""
    kind, _, layer = name.partition("@")
    if kind != "attention":
        return ()
    return indices(int(layer) if layer else "all", anatomy.n_layers, "layer")
