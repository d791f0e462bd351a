"""The table of sites: every place where an activation can be read or edited.

Names follow TransformerLens. Shapes are per example: `pos` tokens, `d` model width, `h` heads, `k` key positions,
`f` MLP width, `patch` rows of the vision tower.

Example:
    >>> SITES["z"].axes
    ('pos', 'h', 'd_head')
    >>> [name for name, site in SITES.items() if not site.editable]
    ['pattern']
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from interp_vlm.errors import InterventionError

__all__ = ["SITES", "Site", "site"]


@dataclass(frozen=True)
class Site:
    """One row of the table.

    Attributes:
        name: the site's name.
        axes: names of the axes of one example's value.
        part: which part of the model it lies in.
        where: what it is, in words.
        order: rank within one layer, in the order in which the model computes it.
        editable: whether an intervention may write here.
    """

    name: str
    axes: tuple[str, ...]
    part: Literal["decoder", "projector", "vision"]
    where: str
    order: int
    editable: bool = True

    @property
    def per_head(self) -> bool:
        """Whether the value has a head axis that an intervention can index."""
        return "h" in self.axes

    @property
    def layered(self) -> bool:
        """Whether the site exists once per layer (the projector's output exists once)."""
        return self.part != "projector"


_ROWS = (
    Site("vision_post", ("patch", "d_vision"), "vision", "the output of a vision tower layer", 0),
    Site("projector_out", ("patch", "d"), "projector", "the projected image tokens, as the decoder receives them", 1),
    Site("resid_pre", ("pos", "d"), "decoder", "the residual stream entering a layer", 2),
    Site("attn_mask", ("h", "pos", "k"), "decoder", "which edges may be attended; knockout lives here", 3),
    Site("pattern", ("h", "pos", "k"), "decoder", "attention weights, rebuilt from q and k", 4, editable=False),
    Site("z", ("pos", "h", "d_head"), "decoder", "the mix of values of each head, before the output projection", 5),
    Site("attn_out", ("pos", "d"), "decoder", "what attention adds to the residual stream", 6),
    Site("resid_mid", ("pos", "d"), "decoder", "the residual stream between attention and MLP", 7),
    Site("mlp_post", ("pos", "f"), "decoder", "the MLP's neurons, before the down projection", 8),
    Site("mlp_out", ("pos", "d"), "decoder", "what the MLP adds to the residual stream", 9),
    Site("resid_post", ("pos", "d"), "decoder", "the residual stream leaving a layer", 10),
)

SITES: dict[str, Site] = {row.name: row for row in _ROWS}
"""The table of sites: every place where an activation can be read or edited, by name."""


def site(name: str) -> Site:
    """Look a site up by name.

    Args:
        name: a name of the table.

    Raises:
        InterventionError: for a name that is not in the table.

    Example:
        >>> site("mlp_post").where
        "the MLP's neurons, before the down projection"
    """
    try:
        return SITES[name]
    except (KeyError, TypeError):
        raise InterventionError(
            f"there is no site {name!r}", expected="one of " + ", ".join(SITES), remedy="see interp_vlm.sites.SITES"
        ) from None
