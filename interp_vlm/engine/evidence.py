"""Evidence for selectors: scores per position, measured on the run without interventions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp_vlm.errors import SelectionError

__all__ = ["sink_scores"]


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
