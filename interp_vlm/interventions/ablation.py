"""Ablation: replace chosen cells by nothing, by their mean, by another example's, or by a given value."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import CellIntervention, Indices, Place, indices, real_numbers

__all__ = ["Ablation"]

_WORDS = ("zero", "mean", "resample")


@dataclass(frozen=True, repr=False, eq=False, init=False)
class Ablation(CellIntervention):
    """Replace the chosen cells of a site.

    Attributes:
        to: what to put there.
            "zero": zeros (off-distribution for most sites; prefer the mean).
            "mean": the mean over the batch's clean run at the selected positions; when only image tokens are selected,
                over all image tokens of the batch, so that a patch mask does not depend on which patches it masks.
            "resample": the clean values of another example of the batch, chosen by `seed`, at its selected positions
                (evenly spaced over them where the numbers of positions differ).
            a tensor: a scalar, one row of the site, one value per unit in `units`, or one row per layer in `layers`
                (as `iv.reference_mean` gives it).
        seed: seed of the choice of donors.

    Raises:
        InterventionError: when "mean" has one row to average or "resample" has one example: both would change nothing.

    Source:
        Mean ablation: Wang et al., "Interpretability in the Wild", 2022, section 3. Resampling: Chan et al., "Causal
        Scrubbing", 2022.

    Example:
        >>> Ablation("mlp_post", layers=[21], units=[1512, 1360], to="zero")
        Ablation(site='mlp_post', layers=[21], units=[1512, 1360], to='zero')
    """

    to: str | Tensor = "mean"
    seed: int = 0

    def __init__(
        self,
        site: str,
        layers: Indices = "all",
        positions: Any = "all",
        heads: Indices | None = None,
        units: Indices | None = None,
        to: str | Tensor | float = "mean",
        seed: int = 0,
        **common: Any,
    ) -> None:
        value = torch.as_tensor(to) if isinstance(to, int | float) else to
        if not isinstance(value, Tensor) and value not in _WORDS:
            raise InterventionError(f"to={to!r}", expected="'zero', 'mean', 'resample' or a tensor")
        if isinstance(value, Tensor):
            real_numbers(value, "to=")
        if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
            raise InterventionError(f"seed={seed!r}", expected="a whole number from 0")
        object.__setattr__(self, "to", value)
        object.__setattr__(self, "seed", seed)
        super().__init__(site, layers, positions, heads, units, **common)

    @property
    def needs_clean(self) -> bool:
        return isinstance(self.to, str) and self.to != "zero"

    def replacement(self, rows: Shaped[Tensor, "row ..."], layer: int, place: Place) -> Shaped[Tensor, "..."]:
        if isinstance(self.to, Tensor):
            return self._given(rows, layer, place)
        if self.to == "zero":
            return torch.zeros_like(rows)
        if self.to == "mean":
            pool = place.clean(layer, _image_pool(place))
            if len(pool) < 2:
                raise InterventionError(
                    f"{self!r} averages a single row, which is the value itself",
                    expected="at least two rows to average",
                    remedy="run a larger batch, or pass to=iv.reference_mean(vlm, reference_batch, site, layers=...)",
                )
            return pool.double().mean(0).to(rows.dtype)
        return self._donated(layer, place)

    def _given(self, rows: Tensor, layer: int, place: Place) -> Tensor:
        value = self.to
        assert isinstance(value, Tensor)
        row_shape = rows.shape[1:]
        if value.dim() == 0 or value.shape == row_shape:
            return value
        if self.units is not None and value.shape == (len(indices(self.units, row_shape[-1], "unit")),):
            full = rows.new_zeros(row_shape[-1])
            full[list(indices(self.units, row_shape[-1], "unit"))] = value.to(rows)
            return full
        if value.shape[1:] == row_shape and value.shape[0] == len(place.layers):
            return value[place.layers.index(layer)]
        raise InterventionError(
            f"to= has shape {tuple(value.shape)}",
            expected=f"a scalar, {tuple(row_shape)} or {(len(place.layers), *row_shape)} at site {self.site!r}",
        )

    def _donated(self, layer: int, place: Place) -> Tensor:
        counts = np.asarray(place.counts)
        donors = derangement(len(counts), self.seed)
        starts = np.concatenate([[0], counts.cumsum()])
        source = []
        for example, donor in enumerate(donors):
            if counts[example] and not counts[donor]:
                raise InterventionError(
                    f"{self!r} selects nothing in example {donor}, which donates to example {example}",
                    expected="a donor with at least one selected position",
                    remedy="leave the example out, or choose another seed",
                )
            source.append(starts[donor] + (np.arange(counts[example]) * counts[donor]) // max(counts[example], 1))
        index = torch.from_numpy(np.concatenate(source))
        clean = place.clean(layer)
        return clean[index.to(clean.device)]


def derangement(n: int, seed: int) -> np.ndarray:
    """A permutation of n examples that leaves none in its place: each one's donor.

    Raises:
        InterventionError: for fewer than two examples.
    """
    if n < 2:
        raise InterventionError(
            "resampling needs a donor, and the batch has one example", expected="a batch of two or more"
        )
    order = np.random.default_rng(seed).permutation(n)
    donors = np.empty(n, dtype=int)
    donors[order] = np.roll(order, 1)
    return donors


def _image_pool(place: Place) -> Tensor | None:
    """All image tokens of the batch when only image tokens are selected, else the selected rows themselves."""
    images = torch.zeros_like(place.selected)
    for row, tokens in enumerate(place.tokens):
        images[row, tokens.image.to(images.device)] = True
    return images if bool((images | ~place.selected).all()) else None
