"""Keys and values that a cone's rows attend besides their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Prefix"]


class Prefix:
    """Keys and values of a run without interventions, in the place of attention's key-value cache.

    Args:
        keys, values: of every layer; keys after q/k norms and rotation.
        stop: how many positions of them are attended.
    """

    def __init__(
        self,
        keys: Sequence[Float[Tensor, "batch head pos d_head"]],
        values: Sequence[Float[Tensor, "batch head pos d_head"]],
        stop: int,
    ) -> None:
        self._keys, self._values, self._stop = keys, values, stop

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The prefix with the rows' own keys and values behind it: attention calls this, and nothing is kept."""
        before, known = self.before(layer)
        return torch.cat([before, keys], dim=2), torch.cat([known, values], dim=2)

    def before(self, layer: int) -> tuple[Tensor, Tensor]:
        """The prefix of a layer."""
        return self._keys[layer][:, :, : self._stop], self._values[layer][:, :, : self._stop]
