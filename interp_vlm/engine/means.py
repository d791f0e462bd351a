"""Means of activations over reference examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_vlm.engine.batches import in_parts
from interp_vlm.errors import InterventionError
from interp_vlm.sites import site as site_named
from interp_vlm.tokens.batch import Batch

if TYPE_CHECKING:
    from interp_vlm.vlm import VLM

__all__ = ["reference_mean"]


def reference_mean(
    vlm: VLM, batches: Batch | Sequence[Batch], site: str, layers: Any = "all", positions: Any = "all"
) -> Float[Tensor, "layer ..."]:
    """The mean activation of a site over reference examples, one row per layer, for `Ablation(..., to=mean)`.

    Args:
        vlm: the model.
        batches: reference examples (other ones than those that are ablated).
        site: where, a name of the site table.
        layers: an int, a range, a list or "all".
        positions: a role, a selector or positions; the mean is over every selected one of every example.

    Returns:
        (layer, ...) in the model's dtype; for `projector_out` a single row.
    """
    if "k" in site_named(site).axes:
        raise InterventionError(
            f"site {site!r} has no mean to put anywhere",
            expected="a site of activations",
            remedy="see interp_vlm.sites",
        )
    if site_named(site).part != "decoder" and isinstance(positions, str) and positions == "all":
        positions = "image"

    def summed(_rows: range, part: Batch) -> tuple[Tensor, int]:
        cache = vlm.capture(part, [site], positions, layers)
        values, mask = cache[site], cache.mask
        if site_named(site).part == "vision":
            mask = torch.ones(values.shape[0], values.shape[2], dtype=torch.bool, device=values.device)
        rows = values.transpose(1, 2)[mask].double()
        return rows.sum(0), len(rows)

    total, count = None, 0
    for batch in [batches] if isinstance(batches, Batch) else batches:
        for _, (some, found) in in_parts(vlm, batch, summed):
            total = some if total is None else total + some
            count += found
    if total is None or count == 0:
        raise InterventionError(
            f"no {site!r} activation at {positions!r} to average", expected="at least one reference example"
        )
    mean = (total / count).to(vlm.dtype)
    return mean if site_named(site).layered else mean[0]
