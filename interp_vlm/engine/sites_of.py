"""The sites of a model that the caller wrapped, in plain nnsight traces."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from interp_vlm.engine.access import Access
from interp_vlm.engine.place import layers_of
from interp_vlm.errors import InterventionError, ModelError
from interp_vlm.models.anatomy import describe
from interp_vlm.sites import Site, site

__all__ = ["Sites", "sites_of"]

Where = str | tuple[str, int]


class Sites:
    """The sites of one wrapped model by name and layer: `sites["resid_post", 12]`, read and written inside a trace.

    Values have the shapes of the site table behind a batch axis; masks are True where attention is allowed. A site
    without layers needs no layer: `sites["projector_out"]`. As in every trace, sites are visited in the model's own
    order, and a value that is kept beside an edit of the same site has to be cloned.

    Attributes:
        anatomy: the facts of the model.

    Raises:
        InterventionError: outside a trace; for a site or layer that does not exist, a value of another shape, and
            `pattern`, which is rebuilt after a run.
    """

    def __init__(self, access: Access, block: str = "model.trace(...)", vlm: str = "iv.VLM(model, processor)") -> None:
        self._access, self.anatomy = access, access.anatomy
        self._block, self._vlm = block, vlm

    def __getitem__(self, where: Where) -> Shaped[Tensor, "batch ..."]:
        row, layer = self._found(where)
        return self._access.read(row.name, layer)

    def __setitem__(self, where: Where, value: Shaped[Tensor, "..."] | float) -> None:
        row, layer = self._found(where)
        live = self._access.read(row.name, layer)
        self._access.write(row.name, layer, _fitting(value, live, row))

    def _found(self, where: Where) -> tuple[Site, int]:
        """The row of the table and the layer, counted from the front."""
        name, layer = where if isinstance(where, tuple) else (where, None)
        row = site(name)
        if name == "pattern":
            raise InterventionError(
                "'pattern' is rebuilt after a run",
                expected="another site in a trace",
                remedy=f"{self._vlm}.capture(batch, sites=['pattern'])",
            )
        if layer is None and row.layered:
            raise InterventionError(f"site {name!r} without a layer", expected=f"sites[{name!r}, layer]")
        try:
            Mediator.current(f"site {name!r}")
        except ValueError:
            raise InterventionError(
                f"site {name!r} outside a trace",
                expected=f"a `with {self._block}:` block around it",
                remedy=f"or use {self._vlm}.capture",
            ) from None
        return row, layers_of(row, [layer], self.anatomy)[0]

    def __repr__(self) -> str:
        return f"Sites({self.anatomy.architecture}, {self.anatomy.n_layers} layers)"


def sites_of(root: Any) -> Sites:
    """The sites of a model that is wrapped by nnsight already, by the names of the site table.

    Args:
        root: `NNsight(model)` around a Hugging Face model of a registered architecture.

    Raises:
        ModelError: for something that nnsight does not wrap, or an architecture that is not in the table.

    Example:
        >>> import interp_vlm as iv
        >>> from nnsight import NNsight
        >>> vlm = iv.load("testbed:llava")
        >>> example = iv.data.digit_scenes(n=1)[0]
        >>> inputs = vlm.encode(example.image, example.question).inputs
        >>> model = NNsight(vlm.model)
        >>> sites = sites_of(model)
        >>> with model.trace(**inputs):
        ...     sites["z", 1] = torch.zeros_like(sites["z", 1])
        ...     added = sites["attn_out", 1].save()
        >>> float(added.abs().max())
        0.0
    """
    model: Any = root._module if isinstance(root, Envoy) else None
    if not hasattr(model, "config"):
        raise ModelError(
            f"the sites of a {type(root if model is None else model).__name__}",
            expected="a Hugging Face model that nnsight wraps",
            remedy="pass NNsight(model)",
        )
    return Sites(Access(root, describe(model)))


def _fitting(value: Any, live: Tensor, row: Site) -> Tensor:
    """The value in the live one's type and shape; a mask may tell heads apart where the live one has one for all."""
    new, shape = torch.as_tensor(value, device=live.device), live.shape
    if row.name == "attn_mask":
        if new.dtype != torch.bool:
            raise InterventionError(
                f"a mask of {new.dtype}".replace("torch.", ""), expected="booleans, True where attention is allowed"
            )
        shape = torch.broadcast_shapes(shape, (*new.shape[:-2], 1, 1)) if new.dim() == live.dim() else shape
    try:
        return new.to(live.dtype).expand(shape).contiguous()
    except RuntimeError:
        raise InterventionError(
            f"a value of shape {tuple(new.shape)} for site {row.name!r}", expected=f"{tuple(live.shape)}"
        ) from None
