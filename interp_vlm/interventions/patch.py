"""Activation patching: put activations of another run in the place of this run's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import CellIntervention, Indices, Place
from interp_vlm.interventions.cache import Cache
from interp_vlm.tokens import select

__all__ = ["ActivationPatch"]


@dataclass(frozen=True, repr=False, eq=False, init=False)
class ActivationPatch(CellIntervention):
    """Replace the chosen cells by those of another run (clean into corrupt, or corrupt into clean).

    Example i of the batch receives from example i of the source, position by position in order; the source needs as
    many positions as are patched.

    Attributes:
        source: the `Cache` of the other run, which holds the site, the layers and the positions.
        source_positions: where to read in the source; by default the positions that are patched where source and batch
            have their pictures and padding in the same places, otherwise what `positions` selects in the source.

    Raises:
        InterventionError: when the source lacks the site, a layer or a position, or has another number of positions.

    Source:
        Meng et al., "Locating and Editing Factual Associations in GPT", 2022, section 2; for paired pictures instead of
        noise: Golovanevsky et al., "What Do VLMs NOTICE?", 2024.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> pair = iv.data.digit_pairs(n=1)[0]
        >>> clean = vlm.encode(pair.clean.image, pair.clean.question)
        >>> corrupt = vlm.encode(pair.corrupt.image, pair.corrupt.question)
        >>> cache = vlm.capture(clean, sites=["resid_pre"], positions="image")
        >>> patch = ActivationPatch("resid_pre", layers=[0], positions="image", source=cache)
        >>> vlm.run(corrupt, patch).answers[0] == vlm.run(clean).answers[0]
        True
    """

    source: Cache
    source_positions: Any = None

    def __init__(
        self,
        site: str,
        layers: Indices = "all",
        positions: Any = "all",
        heads: Indices | None = None,
        units: Indices | None = None,
        *,
        source: Cache,
        source_positions: Any = None,
        **common: Any,
    ) -> None:
        if not isinstance(source, Cache):
            raise InterventionError(
                f"source is a {type(source).__name__}",
                expected="a Cache",
                remedy="capture the other run: vlm.capture(batch, sites=[...])",
            )
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "source_positions", source_positions)
        super().__init__(site, layers, positions, heads, units, **common)
        source[site]

    @property
    def reads_prompts(self) -> bool:
        return True

    def replacement(self, rows: Shaped[Tensor, "row ..."], layer: int, place: Place) -> Shaped[Tensor, "..."]:
        if self.where.part == "vision":
            return self._tower_rows(rows, layer, place)
        donated, counts = self.source.rows(self.site, layer, self._read_at(place))
        if counts != place.counts:
            raise InterventionError(
                f"the source gives {list(counts)} positions for the examples of the batch",
                expected=f"{list(place.counts)}",
                remedy="pair examples whose selections have equal length, or name source_positions=",
            )
        if donated.shape[1:] != rows.shape[1:]:
            raise InterventionError(
                f"the source's rows have shape {tuple(donated.shape[1:])}",
                expected=f"{tuple(rows.shape[1:])}",
                remedy="capture the source with the model that is patched",
            )
        return donated.to(device=rows.device, dtype=rows.dtype)

    def _read_at(self, place: Place) -> list[Tensor]:
        """The positions of the source that are read, by example."""
        if len(self.source.tokens) != len(place.tokens):
            raise InterventionError(
                f"the source has {len(self.source.tokens)} examples",
                expected=f"{len(place.tokens)}, one for each of the batch",
                remedy="capture one source example for each example that is patched",
            )
        pairs = list(zip(self.source.tokens, place.tokens, strict=True))
        alike = all(
            torch.equal(theirs.image_index, ours.image_index)
            and torch.equal(theirs.attention_mask, ours.attention_mask)
            for theirs, ours in pairs
        )
        if self.source_positions is None and alike:
            return [row.nonzero().flatten() for row in place.selected]
        selector = self._selector if self.source_positions is None else select.of(self.source_positions)
        return [selector.positions(tokens) for tokens in self.source.tokens]

    def _tower_rows(self, rows: Shaped[Tensor, "row ..."], layer: int, place: Place) -> Shaped[Tensor, "row ..."]:
        """The vision tower's rows have no text positions: row i of the source goes to row i."""
        theirs, ours = (
            [[grid.vision_total for grid in t.grids] for t in maps] for maps in (self.source.tokens, place.tokens)
        )
        if self.source_positions is not None or theirs != ours:
            raise InterventionError(
                f"the source's pictures have {theirs} rows of the vision tower",
                expected=f"{ours}, as the pictures that are patched, and no source_positions",
                remedy="capture pictures of the same sizes in the same order",
            )
        return self.source.layer(self.site, layer).flatten(0, 1).to(rows.device)[place.tower_rows]
