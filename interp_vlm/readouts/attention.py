"""How attention lies over a picture: spread, clusters, peak and mass, with and without the sink tokens.

The measures are those whose relation to correct answers is studied in arXiv 2605.08200 and arXiv 2606.17389. They are
pure functions of attention weights over image tokens; rows need not sum to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_vlm.engine.evidence import sink_scores
from interp_vlm.errors import DataError, SelectionError
from interp_vlm.readouts.scores import full_precision
from interp_vlm.tokens.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["cluster_count", "sink_scores", "spatial_entropy", "structure"]


def spatial_entropy(
    weights: Float[Tensor, "*batch n"], normalised: bool = False, *, exclude: Bool[Tensor, "*mask tokens"] | None = None
) -> Float[Tensor, "*batch"]:
    """Shannon entropy H_s of attention over image tokens, renormalised to sum to one, in nats.

    Args:
        weights: attention on each image token; non-negative.
        normalised: divide by ln n, n being the tokens that are not excluded, so that grids of different size compare:
            0 is a single token, 1 is uniform.
        exclude: tokens left out, such as sinks; broadcast against `weights`.

    Returns:
        NaN for a row without any weight: there is no distribution. A single token has entropy 0, and NaN normalised:
        it has no spread to compare.

    Raises:
        DataError: weights that are negative or not finite.

    Source: arXiv 2605.08200 and 2606.17389, spatial entropy H_s.

    Example:
        >>> spatial_entropy(torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.3, 0.0, 0.0, 0.0]]), normalised=True)
        tensor([1., 0.])
    """
    weights, kept = _in_play(weights, exclude)
    shares = weights / weights.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=-1).clamp(min=0.0)  # rounding may leave -0.0
    return entropy / kept.sum(dim=-1).to(entropy.dtype).log() if normalised else entropy


def cluster_count(
    weights: Float[Tensor, "*batch n"],
    cells: Int[np.ndarray, "cells 2"],
    eps: float = 1.5,
    min_samples: int = 3,
    top: float = 0.10,
    *,
    exclude: Bool[Tensor, "*mask tokens"] | None = None,
    views: Int[np.ndarray, " cells"] | None = None,
) -> Int[Tensor, "*batch"]:
    """Number C_k of spatial clusters of the most attended image tokens (DBSCAN on rows and columns of the grid).

    The most attended are ceil(top * n) of the n tokens that have a cell and are not excluded, ties going to the
    earlier token; tokens without any weight are never among them. So a row without weight has no cluster, and neither
    has a picture of fewer than `min_samples` such tokens.

    Args:
        weights: attention on each image token; non-negative.
        cells: row and column of each token (`ImageGrid.cells`), negative for a token without a place.
        eps: reach of a cluster in cells; 1.5 joins the eight neighbours.
        min_samples: tokens within reach, itself included, that make a token the core of a cluster.
        top: fraction of the tokens.
        exclude: tokens left out, such as sinks; broadcast against `weights`.
        views: view of each token (`ImageGrid.views`): tokens of different views are never neighbours, and clusters
            are counted in every view.

    Raises:
        DataError: weights that are negative or not finite, or another number of cells than of tokens.
        SelectionError: a parameter out of range.

    Source: arXiv 2605.08200 and 2606.17389, cluster count C_k with eps 1.5, min_samples 3, top 10%.

    Example:
        >>> cells = np.argwhere(np.ones((6, 6), dtype=bool))
        >>> weights = torch.zeros(36)
        >>> weights[[0, 1, 6, 28, 29, 34, 35]] = 1.0
        >>> int(cluster_count(weights, cells, top=0.2)), int(cluster_count(weights, cells, top=0.1))
        (2, 1)
    """
    if not (0 < top <= 1 and eps > 0 and min_samples >= 1):
        raise SelectionError(
            f"top={top}, eps={eps}, min_samples={min_samples}", expected="0 < top <= 1, eps > 0, min_samples >= 1"
        )
    if len(cells) != weights.shape[-1]:
        raise DataError(f"{len(cells)} cells for {weights.shape[-1]} image tokens", expected="one cell per token")
    points = np.asarray(cells, dtype=np.float64)
    if views is not None:
        points = np.column_stack([points, np.asarray(views) * (eps + 1.0)])
    placed = torch.from_numpy((np.asarray(cells) >= 0).all(axis=1)).to(weights.device)
    weights, kept = _in_play(weights.detach(), exclude)
    kept = kept & placed
    batch, n = weights.shape[:-1], weights.shape[-1]
    wanted = [math.ceil(round(top * count, 9)) for count in kept.sum(dim=-1).flatten().tolist()]
    ranked = weights.masked_fill(~kept, 0.0).reshape(-1, n).sort(dim=-1, descending=True, stable=True)
    rows = zip(wanted, ranked.values.cpu().numpy(), ranked.indices.cpu().numpy(), strict=True)
    counts = [_clusters(points[index[:count][value[:count] > 0]], eps, min_samples) for count, value, index in rows]
    return torch.tensor(counts, dtype=torch.long, device=weights.device).reshape(batch)


def structure(
    pattern: Float[Tensor, "layer head query key"],
    tokens: TokenMap,
    *,
    layers: Sequence[int] | None = None,
    picture: int = 0,
    exclude: Bool[Tensor, "*mask tokens"] | None = None,
    per_head: bool = False,
    eps: float = 1.5,
    min_samples: int = 3,
    top: float = 0.10,
) -> pd.DataFrame:
    """The measures of one example's attention on a picture, layer by layer.

    Rows are averaged over the queries and then over the heads before they are measured. Tokens without a cell
    (newlines, separators) are no part of any measure.

    Args:
        pattern: attention weights of the asked queries, padding left out; the keys are all positions of the padded row
            (`cache["pattern"][example]`, captured at `positions="last"`).
        tokens: the example's token map.
        layers: the numbers of the captured layers; 0, 1, ... by default.
        picture: which picture.
        exclude: image tokens of the picture left out of every measure, such as sinks, in token order: (n,), or
            (layer, n) where it differs by layer, or (layer, head, n) with `per_head`.
        per_head: one row per layer and head instead of the mean over heads.
        eps, min_samples, top: see `cluster_count`.

    Returns:
        One row per layer (and head): `layer`, (`head`), `entropy` in nats, `entropy_normalised`, `entropy_change`
        against the previous layer in the table (NaN in the first), `clusters`, `max_attention` and `image_mass` (the
        largest weight and the sum over the tokens measured, as they were attended, not renormalised), `tokens`
        (how many were measured).

    Raises:
        DataError: a pattern that does not belong to the example.

    Source: arXiv 2605.08200 and 2606.17389.

    Example:
        >>> from interp_vlm.tokens.grid import Geometry, grid_from_geometry
        >>> grid = grid_from_geometry(Geometry.resize((64, 64), (64, 64)), rows=2, cols=2, patch_px=32.0)
        >>> owner = torch.tensor([-1, 0, 0, 0, 0, -1])
        >>> tokens = TokenMap(torch.arange(6), tuple("<....?"), owner > -2, owner, (grid,), key="example")
        >>> pattern = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.2, 0.1], [0.5, 0.0, 0.0, 0.4, 0.0, 0.1]])[:, None, None]
        >>> structure(pattern, tokens)[["layer", "entropy_normalised", "max_attention", "image_mass"]].round(3)
           layer  entropy_normalised  max_attention  image_mass
        0      0                 1.0            0.2         0.8
        1      1                 0.0            0.4         0.4
    """
    import pandas as pd

    if pattern.shape[-1] != len(tokens.ids) or not pattern.shape[-2]:
        raise DataError(
            f"a pattern of {pattern.shape[-2]} queries and {pattern.shape[-1]} keys",
            expected=f"at least one query, and the {len(tokens.ids)} positions of the padded row as keys",
        )
    labels = list(range(len(pattern)) if layers is None else layers)
    if len(labels) != len(pattern):
        raise DataError(f"{len(labels)} layer numbers for a pattern of {len(pattern)} layers", expected="one per layer")
    positions, grid = tokens.picture_tokens(picture).to(pattern.device), tokens.grids[picture]
    weights = full_precision(pattern.detach())[..., positions].mean(dim=-2)
    if not per_head:
        weights = weights.mean(dim=1)
    if exclude is not None and exclude.ndim == 2 and per_head:
        exclude = exclude.unsqueeze(1)
    placed = torch.from_numpy((grid.cells >= 0).all(axis=1)).to(weights.device)
    left_out = ~(_in_play(weights, exclude)[1] & placed)
    measured, kept = _in_play(weights, left_out)
    counts = cluster_count(
        weights, grid.cells, eps, min_samples, top, exclude=left_out, views=grid.views if grid.views.any() else None
    )
    entropy = spatial_entropy(weights, exclude=left_out)
    columns = {
        "entropy": entropy,
        "entropy_normalised": spatial_entropy(weights, normalised=True, exclude=left_out),
        "entropy_change": entropy.diff(dim=0, prepend=torch.full_like(entropy[:1], math.nan)),
        "clusters": counts,
        "max_attention": measured.amax(dim=-1),
        "image_mass": measured.sum(dim=-1),
        "tokens": kept.sum(dim=-1),
    }
    names = ["layer", "head"] if per_head else ["layer"]
    axes = [labels, range(weights.shape[1])] if per_head else [labels]
    frame = pd.MultiIndex.from_product(axes, names=names).to_frame(index=False)
    return frame.assign(**{name: values.cpu().flatten().numpy() for name, values in columns.items()})


def _in_play(weights: Tensor, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights with those left out set to zero, and which ones are kept."""
    weights = full_precision(weights)
    if not bool((weights >= 0).all()) or bool(weights.isinf().any()):
        raise DataError(
            f"attention weights of shape {tuple(weights.shape)} that are negative or not finite",
            expected="weights after the softmax, 0 or more",
            remedy="look for a fully masked row or an overflow in half precision",
        )
    if exclude is None:
        return weights, torch.ones_like(weights, dtype=torch.bool)
    try:
        exclude = exclude.to(weights.device).expand_as(weights)
    except RuntimeError:
        raise DataError(
            f"a mask of shape {tuple(exclude.shape)} for attention of shape {tuple(weights.shape)}",
            expected="one entry per image token, or one such row per layer",
        ) from None
    return weights.masked_fill(exclude, 0.0), ~exclude


def _clusters(points: np.ndarray, eps: float, min_samples: int) -> int:
    """DBSCAN's clusters are the connected parts of its core points; counting those takes a tenth of the time."""
    from scipy.sparse.csgraph import connected_components

    if len(points) < min_samples:  # no core is possible
        return 0
    near = ((points[:, None] - points[None]) ** 2).sum(axis=-1) <= eps**2
    core = near.sum(axis=1) >= min_samples
    return int(connected_components(near[core][:, core], directed=False)[0]) if core.any() else 0
