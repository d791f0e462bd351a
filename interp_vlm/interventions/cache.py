"""Captured activations: what `vlm.capture` returns, and what `ActivationPatch` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from interp_vlm.errors import InterventionError
from interp_vlm.tokens.token_map import TokenMap

__all__ = ["Cache"]


@dataclass(frozen=True, eq=False)
class Cache(Mapping[str, Tensor]):
    """Activations of one batch by site, padded where examples select different numbers of positions.

    Attributes:
        activations: per site (batch, layer, pos, ...); `pattern` is (batch, layer, head, query, key) with `pos` the
            query rows; `projector_out` has one layer; `vision_post` has the rows of the example's pictures as `pos`.
        layers: per site, the layers captured, in the order of the layer axis.
        positions: (batch, pos) absolute positions in the padded rows, -1 where `mask` is False.
        mask: (batch, pos) False for padding.
        tokens: the batch's token maps.
        model: name of the model that the activations come from.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> pair = iv.data.digit_pairs(n=1)[0]
        >>> batch = vlm.encode([pair.clean.image, pair.corrupt.image], pair.clean.question)
        >>> cache = vlm.capture(batch, sites=["resid_post"], positions="last")
        >>> cache["resid_post"].shape
        torch.Size([2, 4, 1, 128])
    """

    activations: Mapping[str, Shaped[Tensor, "batch _ _ ..."]]
    layers: Mapping[str, tuple[int, ...]]
    positions: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    tokens: tuple[TokenMap, ...]
    model: str = ""

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.activations[name]
        except KeyError:
            raise InterventionError(
                f"site {name!r} was not captured",
                expected="one of " + ", ".join(self.activations),
                remedy=f"capture it: vlm.capture(batch, sites=[{name!r}])",
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    def layer(self, name: str, layer: int) -> Shaped[Tensor, "batch pos ..."]:
        """The values of one site at one layer.

        Raises:
            InterventionError: when the layer was not captured.
        """
        values = self[name]
        captured = self.layers[name]
        if layer not in captured:
            raise InterventionError(
                f"layer {layer} of {name!r} was not captured",
                expected=f"one of {list(captured)}",
                remedy="capture it too",
            )
        return values[:, captured.index(layer)]

    def rows(
        self, name: str, layer: int, wanted: Sequence[Int[Tensor, " _"]]
    ) -> tuple[Shaped[Tensor, "row ..."], tuple[int, ...]]:
        """The rows at absolute positions, example after example, and how many each example gives.

        Args:
            name: a captured site.
            layer: a captured layer.
            wanted: positions in each example of the captured batch.

        Raises:
            InterventionError: for a position that was not captured.
        """
        values = self.layer(name, layer)
        chosen = []
        for row, positions in enumerate(wanted):
            have = {position: column for column, position in enumerate(self.positions[row].tolist()) if position >= 0}
            asked = positions.tolist()
            missing = [position for position in asked if position not in have]
            if missing:
                raise InterventionError(
                    f"the source holds no {name!r} at position {missing[0]} of example {row}",
                    expected=f"the {len(asked)} positions that are patched",
                    remedy="capture the source at the positions that are patched",
                )
            chosen.append(values[row, [have[position] for position in asked]])
        return torch.cat(chosen), tuple(len(rows) for rows in chosen)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Cache:
        """The same cache with its values on another device or in another dtype."""
        values = {name: value.to(device=device, dtype=dtype or value.dtype) for name, value in self.activations.items()}
        return Cache(values, self.layers, self.positions, self.mask, self.tokens, self.model)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.activations.items())
        return f"Cache({shapes})"
