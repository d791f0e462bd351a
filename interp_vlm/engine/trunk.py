"""The trunk: what one run without interventions leaves behind for cones to start from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_vlm.engine.access import as_keep
from interp_vlm.engine.prefix import Prefix

__all__ = ["Trunk"]

# What a decoder layer may be called with: a tensor of another name would have rows that nobody here knows to cut.
_CUT = ("attention_mask", "position_embeddings", "position_ids")


@dataclass(eq=False)
class Trunk:
    """One clean run of a batch, as far as cones need it.

    Attributes:
        calls: the keyword arguments with which the model called each decoder layer, without its key-value cache.
        residuals: the residual stream before a layer, for the layers that were asked for.
        keys, values: what each layer attends, keys after q/k norms and rotation.
        plans: the plans that are exact for edits of some rows, as they have been worked out.
        touched: likewise the rows in which knockouts change anything.
        spreads: likewise how far edits of some rows spread through some masks.
    """

    calls: list[Mapping[str, Any]]
    residuals: dict[int, Float[Tensor, "batch pos d"]]
    keys: list[Float[Tensor, "batch head pos d_head"]]
    values: list[Float[Tensor, "batch head pos d_head"]]
    plans: dict[Hashable, Any] = field(default_factory=dict)
    touched: dict[Hashable, Bool[Tensor, "batch pos"]] = field(default_factory=dict)
    spreads: dict[Hashable, tuple[int, bool, bool]] = field(default_factory=dict)
    _keeps: dict[int, Tensor] = field(default_factory=dict)
    _attended: dict[frozenset[int], Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Positions of the batch's rows."""
        return self.keys[0].shape[2]

    @property
    def unknown(self) -> list[str]:
        """Names of tensors that layers are called with and whose rows cannot be cut."""
        names = {name for call in self.calls for name, value in call.items() if isinstance(value, Tensor)}
        return sorted(names - set(_CUT))

    def keep(self, layer: int) -> Bool[Tensor, "#batch head query key"]:
        """A layer's mask, True where attention is allowed."""
        mask = self.calls[layer]["attention_mask"]
        if id(mask) not in self._keeps:
            like = self.keys[layer].new_empty(len(self.keys[layer]), self.length, 0)
            self._keeps[id(mask)] = as_keep(mask, like, None, layer)
        return self._keeps[id(mask)]

    def attended(self, layers: Iterable[int]) -> Bool[Tensor, "#batch query key"]:
        """Where attention is allowed in any of the layers and heads."""
        masks = {id(self.calls[layer]["attention_mask"]): layer for layer in layers}
        if (known := self._attended.get(frozenset(masks))) is None:
            found = [self.keep(layer).any(dim=1) for layer in masks.values()]
            found = [each.to(found[0].device) for each in found]
            known = self._attended[frozenset(masks)] = torch.stack(torch.broadcast_tensors(*found)).any(dim=0)
        return known

    def call(self, layer: int, rows: Callable[[torch.device], Int[Tensor, "batch row"]]) -> dict[str, Any]:
        """The keyword arguments of a layer for some rows of each example, without a mask; `rows` gives them where an
        argument lies."""
        call = {name: value for name, value in self.calls[layer].items() if name != "attention_mask"}
        call["position_embeddings"] = tuple(_taken(part, rows) for part in call["position_embeddings"])
        if call.get("position_ids") is not None:
            call["position_ids"] = _taken(call["position_ids"][..., None], rows)[..., 0]
        return call

    def prefix(self, stop: int) -> Prefix:
        """Keys and values of the first positions, for attention."""
        return Prefix(self.keys, self.values, stop)

    @property
    def nbytes(self) -> int:
        """Memory held: residuals, keys and values."""
        held = [*self.residuals.values(), *self.keys, *self.values]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _taken(value: Tensor, rows: Callable[[torch.device], Int[Tensor, "batch row"]]) -> Tensor:
    """Rows of (batch or 1, pos, ...)."""
    at = rows(value.device)
    value = value.expand(len(at), *value.shape[1:])
    return value[torch.arange(len(at), device=at.device)[:, None], at]
