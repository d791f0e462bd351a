"""Families of interventions: one value varied along named fields."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import Intervention

if TYPE_CHECKING:
    from interp_vlm.vlm import VLM

__all__ = ["vary", "windows"]

AnyIntervention = TypeVar("AnyIntervention", bound=Intervention)


def vary(intervention: AnyIntervention, **fields: Iterable[Any]) -> list[AnyIntervention]:
    """The product of the given fields' values, as copies of one intervention.

    Args:
        intervention: the value to copy.
        fields: for each field to vary, its values; the last field varies fastest.

    Raises:
        InterventionError: for a field that the intervention does not have, or one value where a list is wanted.

    Example:
        >>> from interp_vlm.interventions.knockout import AttentionKnockout
        >>> len(vary(AttentionKnockout(), layers=[0, 1, 2], keys=["image", "question"]))
        6
    """
    known = list(intervention._fields())
    for name in fields:
        if name not in known:
            raise InterventionError(
                f"{type(intervention).__name__} has no field {name!r}", expected="one of " + ", ".join(known)
            )
        if isinstance(fields[name], str) or not isinstance(fields[name], Iterable):
            raise InterventionError(
                f"{name}={fields[name]!r} is one value", expected="a list of the values to try", remedy="put it into []"
            )
    base = intervention._fields()
    return [
        type(intervention)(**{**base, **dict(zip(fields, chosen, strict=True))})
        for chosen in itertools.product(*fields.values())
    ]


def windows(model: VLM | int, size: int) -> list[range]:
    """Windows of layers centred on every layer, cut at the ends of the model.

    Args:
        model: a `VLM`, or its number of layers.
        size: width of a full window, in layers.

    Returns:
        One range per layer of the model.

    Source:
        Geva et al. 2023, section 5; Zhang et al., arXiv 2411.18620, use a width of 9.

    Example:
        >>> windows(4, 3)
        [range(0, 2), range(0, 3), range(1, 4), range(2, 4)]
    """
    count = model if isinstance(model, int) else model.anatomy.n_layers
    if not isinstance(size, int) or size < 1:
        raise InterventionError(f"a window of {size!r} layers", expected="a whole number from 1")
    before = (size - 1) // 2
    return [range(max(0, layer - before), min(count, layer - before + size)) for layer in range(count)]
