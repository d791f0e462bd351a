"""One example's use of attention as a row of numbers: the features on which a classifier of correctness is fitted.

The classifier of the studied work (arXiv 2605.08200) had eleven attention features, which it does not list. Here are
more, so that its result cannot be for want of features.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_vlm.errors import DataError
from interp_vlm.readouts.attention import cluster_count, spatial_entropy
from interp_vlm.readouts.scores import full_precision
from interp_vlm.tokens.token_map import TokenMap

__all__ = ["FEATURES", "POOLED", "attention_features", "attention_map", "layer_features", "pooled"]

FEATURES = {
    "entropy": "spatial entropy H_s of the attention on the picture, in nats",
    "entropy_normalised": "H_s / ln n: 0 for one token, 1 for even attention",
    "clusters": "number of clusters C_k of the most attended tenth of the tokens",
    "largest": "largest share of the picture's attention on one token",
    "top_tenth": "share of the picture's attention on the most attended tenth of its tokens",
    "gini": "Gini coefficient of the attention on the picture: 0 for even attention",
    "spread": "root mean squared distance from the centre of the attention, in sides of the picture",
    "off_centre": "distance of the centre of the attention from the picture's centre, in sides of the picture",
    "image_mass": "attention on the picture",
    "question_mass": "attention on the question",
    "first_mass": "attention on the first token of the row, the usual sink of text",
    "own_mass": "attention of the last token on itself",
    "head_largest_mass": "attention on the picture of the head that looks at it most",
    "head_smallest_mass": "attention on the picture of the head that looks at it least",
    "head_disagreement": "how far the heads' pictures differ: entropy of their mean less their mean entropy, in nats",
    "between_layers": "total variation between the attention on the picture here and one layer before",
}
"""What is measured in each layer, in words. Of the last prompt token's attention, averaged over heads unless said."""

POOLED = 8
"""Rows and columns of the grid to which attention maps of differing size are pooled."""

_TENTH = 0.10


def attention_features(
    pattern: Float[Tensor, "layer head query key"], tokens: TokenMap, *, picture: int = 0
) -> dict[str, float]:
    """Every feature of `FEATURES` as its mean over layers ("mean NAME") and in the last layer ("last NAME").

    Beside them "change entropy": H_s of the last layer less that of the first.

    Args:
        pattern: attention weights of the last prompt token (`cache["pattern"][example]`, captured at
            `positions="last"`).
        tokens: the example's token map.
        picture: which picture.

    Returns:
        NaN where there is nothing to measure: no attention on the picture, or a single layer for "between_layers".

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> scene = iv.data.digit_scenes(n=1)[0]
        >>> batch = vlm.encode(scene.image, scene.question)
        >>> pattern = vlm.capture(batch, "pattern", positions="last")["pattern"]
        >>> features = attention_features(pattern[0], batch.tokens[0])
        >>> len(features), 0 <= features["mean entropy_normalised"] <= 1
        (33, True)
    """
    layers = layer_features(pattern, tokens, picture=picture)
    row = {f"mean {name}": _mean(values) for name, values in layers.items()}
    row |= {f"last {name}": float(values[-1]) for name, values in layers.items()}
    return {**row, "change entropy": float(layers["entropy"][-1] - layers["entropy"][0])}


def layer_features(
    pattern: Float[Tensor, "layer head query key"], tokens: TokenMap, *, picture: int = 0
) -> dict[str, Float[np.ndarray, " layer"]]:
    """The features of `FEATURES` layer by layer; `between_layers` is NaN in the first.

    Tokens without a place in the picture (separators) are no part of the picture's attention.

    Raises:
        DataError: a pattern that does not belong to the example.
    """
    heads, places = _on_picture(pattern, tokens, picture)
    whole = full_precision(pattern.detach())[:, :, -1].mean(dim=1)
    mean = heads.mean(dim=1)
    shares = mean / mean.sum(dim=-1, keepdim=True)
    each = (heads / heads.sum(dim=-1, keepdim=True)).nan_to_num()  # a head that does not look has no picture
    grid, kept = tokens.grids[picture], places
    ordered = shares.sort(dim=-1, descending=True).values
    n = shares.shape[-1]
    top = math.ceil(round(_TENTH * n, 9))  # as `cluster_count` takes them
    ranks = torch.arange(n, 0, -1, dtype=shares.dtype, device=shares.device)
    at = torch.from_numpy(_centres(tokens, picture)[kept]).to(shares)
    centre = shares @ at
    distance = ((at - centre[:, None]) ** 2).sum(dim=-1)
    between = 0.5 * (shares[1:] - shares[:-1]).abs().sum(dim=-1)
    masses = heads.sum(dim=-1)
    views = grid.views[kept] if grid.views.any() else None
    values = {
        "entropy": spatial_entropy(mean),
        "entropy_normalised": spatial_entropy(mean, normalised=True),
        "clusters": cluster_count(mean, grid.cells[kept], top=_TENTH, views=views),
        "largest": ordered[:, 0],
        "top_tenth": ordered[:, :top].sum(dim=-1),
        # Of shares in rising order x_1 .. x_n with sum 1: (2 sum(i x_i) - (n + 1)) / n.
        "gini": (2 * (ordered * ranks).sum(dim=-1) - (n + 1)) / n,
        "spread": (shares * distance).sum(dim=-1).clamp(min=0).sqrt(),
        "off_centre": (centre - 0.5).norm(dim=-1),
        "image_mass": mean.sum(dim=-1),
        "question_mass": whole[:, tokens.question.to(whole.device)].sum(dim=-1),
        "first_mass": whole[:, tokens.all[:1].to(whole.device)].sum(dim=-1),
        "own_mass": whole[:, tokens.last.to(whole.device)].sum(dim=-1),
        "head_largest_mass": masses.amax(dim=-1),
        "head_smallest_mass": masses.amin(dim=-1),
        "head_disagreement": spatial_entropy(each.sum(dim=1)) - spatial_entropy(each).nanmean(dim=1),
        "between_layers": torch.cat([between.new_full((1,), torch.nan), between]),
    }
    return {name: values[name].double().cpu().numpy() for name in FEATURES}


def attention_map(
    pattern: Float[Tensor, "layer head query key"], tokens: TokenMap, *, most: int = 256, picture: int = 0
) -> Float[np.ndarray, "layer head row col"]:
    """The last token's attention on the picture, head by head, as a grid of rows and columns.

    Args:
        pattern, tokens, picture: as in `attention_features`.
        most: a picture of more tokens, or one in several views, is pooled to `POOLED` rows and columns.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> scene = iv.data.digit_scenes(n=1)[0]
        >>> batch = vlm.encode(scene.image, scene.question)
        >>> pattern = vlm.capture(batch, "pattern", positions="last")["pattern"]
        >>> attention_map(pattern[0], batch.tokens[0]).shape
        (4, 4, 7, 7)
    """
    heads, kept = _on_picture(pattern, tokens, picture)
    grid = tokens.grids[picture]
    weights = heads.cpu().numpy()
    if weights.shape[-1] > most or weights.shape[-1] != grid.rows * grid.cols or (grid.views[kept] != 0).any():
        return pooled(weights, _centres(tokens, picture)[kept])
    found = np.zeros((*weights.shape[:2], grid.rows, grid.cols), dtype=weights.dtype)
    rows, cols = grid.cells[kept].T
    found[..., rows, cols] = weights
    return found


def pooled(
    weights: Float[np.ndarray, "layer head n"], centres: Float[np.ndarray, "n 2"], size: int = POOLED
) -> Float[np.ndarray, "layer head size size"]:
    """Attention summed over the cells of a `size` x `size` grid laid over the picture.

    Args:
        weights: attention on each token.
        centres: row and column of each token's middle, as shares of the picture's height and width.
        size: rows and columns of the grid.

    Example:
        >>> pooled(np.array([[[0.1, 0.2, 0.3]]]), np.array([[0.1, 0.1], [0.2, 0.3], [0.9, 0.1]]), size=2).round(3)
        array([[[[0.3, 0. ],
                 [0.3, 0. ]]]])
    """
    cells = np.clip((centres * size).astype(np.intp), 0, size - 1)
    within = np.eye(size * size, dtype=weights.dtype)[cells[:, 0] * size + cells[:, 1]]
    flat = weights @ within
    return flat.reshape(*weights.shape[:2], size, size)


def _on_picture(pattern: Tensor, tokens: TokenMap, picture: int) -> tuple[Tensor, np.ndarray]:
    """The last query's attention on the picture's tokens that have a cell, (layer, head, n), and which those are."""
    if pattern.ndim != 4 or pattern.shape[-1] != len(tokens.ids) or not pattern.shape[-2]:
        raise DataError(
            f"a pattern of shape {tuple(pattern.shape)}",
            expected=f"(layer, head, query, {len(tokens.ids)}): at least one query and the padded row as keys",
            remedy='vlm.capture(batch, "pattern", positions="last")["pattern"][example]',
        )
    kept = np.flatnonzero((tokens.grids[picture].cells >= 0).all(axis=1))
    positions = tokens.picture_tokens(picture)[torch.from_numpy(kept)].to(pattern.device)
    return full_precision(pattern.detach())[:, :, -1][..., positions], kept


def _centres(tokens: TokenMap, picture: int) -> Float[np.ndarray, "n 2"]:
    """Row and column of every token's middle, as shares of the picture; of padding, by its cell."""
    grid = tokens.grids[picture]
    x0, y0, x1, y1 = grid.boxes.T
    width, height = grid.size
    centres = np.stack([(y0 + y1) / 2 / height, (x0 + x1) / 2 / width], axis=1)
    by_cell = (grid.cells + 0.5) / np.array([max(grid.rows, 1), max(grid.cols, 1)])
    return np.clip(np.where(np.isnan(centres), by_cell, centres), 0.0, 1.0)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
