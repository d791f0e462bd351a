"""Activations as every probe reads them: one matrix a layer, from an array, a tensor or a cache's site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from interp_vlm.errors import DataError
from interp_vlm.interventions.cache import Cache

__all__ = ["POSITIONS", "Activations", "read"]

POSITIONS = ("before_answer", "after_answer")


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of n examples by layer, and where in the model they were read.

    Attributes:
        values: (n, layer, d).
        layers: the model's number of each layer, in the order of the layer axis.
        site: name of the site table.
        position: "before_answer" or "after_answer".
        model: the model's name, empty when unknown.
    """

    values: Shaped[Tensor, "example layer feature"]
    layers: tuple[int, ...]
    site: str
    position: str
    model: str = ""

    def __len__(self) -> int:
        return len(self.values)

    def layer(self, number: int) -> Float[Tensor, "example feature"]:
        """One layer in float64.

        Raises:
            DataError: for NaN or infinite values.
        """
        values = self.values[:, self.layers.index(number)].to(torch.float64)
        if bad := int((~torch.isfinite(values)).any(1).sum()):
            raise DataError(
                f"activations of layer {number} hold NaN or infinite values in {bad} of {len(values)} examples",
                expected="finite numbers",
                remedy="capture in bfloat16 or float32 (float16 overflows), or leave those examples out on purpose",
            )
        return values


def read(activations: Any, site: str | None, layers: Sequence[int] | None, position: str | None) -> Activations:
    """Activations with their labels of layer, site and position.

    Args:
        activations: (n, layer, d) array or tensor, or a `Cache` with one position of each example.
        site: which site of a cache; for an array only its name in the report.
        layers: which layers to probe (of a cache), or the numbers of the array's layers (by default 0, 1, ...).
        position: "before_answer" or "after_answer"; a cache holds the prompt, which is before the answer.

    Raises:
        DataError: for another shape, a layer that is absent, several positions, or an array without its position.
    """
    if isinstance(activations, Cache):
        found = _from_cache(activations, site, position)
        return _subset(found, layers) if layers is not None else found
    values = activations if isinstance(activations, Tensor) else torch.as_tensor(np.asarray(activations))
    if values.ndim != 3:
        raise DataError(
            f"activations have shape {tuple(values.shape)}",
            expected="(example, layer, feature)",
            remedy="for one layer pass activations[:, None]; for heads flatten the last two axes",
        )
    if position not in POSITIONS:
        raise DataError(
            f"position is {position!r}",
            expected=" or ".join(map(repr, POSITIONS)),
            remedy="say whether the activations were read before or after the first answer token",
        )
    numbers = tuple(range(values.shape[1])) if layers is None else tuple(int(layer) for layer in layers)
    if len(numbers) != values.shape[1] or len(set(numbers)) != len(numbers):
        raise DataError(
            f"layers names {len(numbers)} layers ({len(set(numbers))} different), activations hold {values.shape[1]}",
            expected="one number for each layer of the array",
            remedy="index the array's layer axis to probe fewer layers",
        )
    return Activations(values.detach(), numbers, site or "", str(position))


def _from_cache(cache: Cache, site: str | None, position: str | None) -> Activations:
    if site is None and len(cache) != 1:
        raise DataError(
            f"the cache holds {len(cache)} sites: {', '.join(cache)}", expected="one", remedy="pass site='resid_post'"
        )
    name = site or next(iter(cache))
    values = cache[name]
    if values.shape[2] != 1 or not bool(cache.mask.all()):
        raise DataError(
            f"the cache holds up to {values.shape[2]} positions of each example",
            expected="one",
            remedy="capture with positions='last'",
        )
    if position not in (None, "before_answer"):
        raise DataError(
            f"position is {position!r} for a cache of the prompt",
            expected="'before_answer'",
            remedy="leave position out",
        )
    return Activations(
        values.detach().flatten(2), tuple(cache.layers[name]), name, "before_answer", getattr(cache, "model", "")
    )


def _subset(found: Activations, layers: Sequence[int]) -> Activations:
    if missing := [layer for layer in layers if layer not in found.layers]:
        raise DataError(
            f"layer {missing[0]} is absent from {found.site!r}",
            expected=f"one of {list(found.layers)}",
            remedy="capture it too",
        )
    index = [found.layers.index(layer) for layer in layers]
    return Activations(found.values[:, index], tuple(layers), found.site, found.position, found.model)
