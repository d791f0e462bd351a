"""Steering: add a direction to chosen activations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor

from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import CellIntervention, Indices, Place, real_numbers

__all__ = ["Steering"]


@dataclass(frozen=True, repr=False, eq=False, init=False)
class Steering(CellIntervention):
    """Add `scale * direction` to the chosen positions of a site.

    Attributes:
        direction: one row of the site, (d,), or one per layer, (layer, d); at `z` (head, d_head) or one such per layer.
        scale: its multiple, in units of the direction as given (it is not normalised).

    Raises:
        InterventionError: when the direction's shape is not a row of the site.

    Source:
        Turner et al., "Activation Addition: Steering Language Models Without Optimization", 2023, section 3.

    Example:
        >>> import torch
        >>> Steering("resid_post", layers=[2], positions="last", direction=torch.ones(128), scale=4.0)
        Steering(site='resid_post', layers=[2], positions='last', direction=tensor[128], scale=4.0)
    """

    direction: Float[Tensor, "..."]
    scale: float = 1.0

    def __init__(
        self,
        site: str,
        layers: Indices = "all",
        positions: Any = "all",
        heads: Indices | None = None,
        units: Indices | None = None,
        *,
        direction: Float[Tensor, "..."],
        scale: float = 1.0,
        **common: Any,
    ) -> None:
        if not isinstance(direction, Tensor):
            raise InterventionError(
                f"direction is a {type(direction).__name__}", expected="a tensor", remedy="use torch.as_tensor"
            )
        real_numbers(direction, "direction")
        if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
            raise InterventionError(f"scale={scale!r}", expected="a finite number")
        object.__setattr__(self, "direction", direction)
        object.__setattr__(self, "scale", scale)
        super().__init__(site, layers, positions, heads, units, **common)

    def replacement(self, rows: Shaped[Tensor, "row ..."], layer: int, place: Place) -> Shaped[Tensor, "..."]:
        direction, shape = self.direction, rows.shape[1:]
        if direction.shape != shape:
            if direction.shape[1:] != shape or direction.shape[0] != len(place.layers):
                raise InterventionError(
                    f"direction has shape {tuple(direction.shape)}",
                    expected=f"{tuple(shape)} or {(len(place.layers), *shape)} at site {self.site!r}",
                )
            direction = direction[place.layers.index(layer)]
        return rows + self.scale * direction.to(device=rows.device, dtype=rows.dtype)
