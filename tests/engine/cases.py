"""Every intervention on cells at every site, as a value of the vocabulary and as a hand-written edit of hooks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import interp_vlm as iv
from tests.engine import reference
from tests.engine.reference import Edit, Edits
from tests.engine.settings import Setting

__all__ = ["KINDS", "PLACES", "Place", "by_hand", "cells", "intervention", "row_indices", "together"]

KINDS = ("zero", "mean", "resample", "tensor", "patch", "steer")


@dataclass(frozen=True)
class Place:
    """Where an edit acts: chosen so that the edits at all sites together still leave each a say in the answer."""

    site: str
    layers: Any = 0
    positions: Any = "all"
    heads: Any = None
    units: Any = None

    def numbers(self, setting: Setting) -> list[int]:
        """The layers as non-negative numbers."""
        count = len(reference.decoder_layers(setting.raw))
        listed = [self.layers] if isinstance(self.layers, int) else self.layers
        return [layer % count for layer in listed]


PLACES = {
    place.site: place
    for place in (
        Place("vision_post", 0),
        Place("projector_out", 0, iv.select.random(0.5, seed=1)),
        Place("resid_pre", (1,), "question"),
        Place("z", range(1, 2), "text", heads=(-2, 1)),
        Place("attn_out", 0, "image"),
        Place("resid_mid", (1,), "last"),
        Place("mlp_post", 1, "all", units=(90, 3, 50)),
        Place("mlp_out", -1, "last"),
        Place("resid_post", (1, 0), "all", units=range(0, 64, 9)),
    )
}


def together(kind: str) -> list[Place]:
    """The places whose edits of one kind all matter in one run: a patched tower leaves its projection nothing to do."""
    return [place for place in PLACES.values() if not (kind == "patch" and place.site == "vision_post")]


def row_indices(batch: iv.Batch, positions: Any) -> list[Tensor]:
    """Positions by example."""
    return [iv.select.of(positions).positions(tokens) for tokens in batch.tokens]


def intervention(kind: str, place: Place, setting: Setting) -> iv.Ablation | iv.ActivationPatch | iv.Steering:
    """The intervention as a value."""
    where = {"layers": place.layers, "positions": place.positions, "heads": place.heads, "units": place.units}
    if kind == "patch":
        return iv.ActivationPatch(place.site, **where, source=_source(setting))
    if kind == "steer":
        return iv.Steering(place.site, **where, direction=direction(place, setting), scale=0.7)
    to: Any = given(place, setting) if kind == "tensor" else kind
    return iv.Ablation(place.site, **where, to=to, seed=3)


@functools.cache
def _source(setting: Setting) -> iv.Cache:
    return setting.vlm.capture(setting.corrupt, list(PLACES), positions="all")


def by_hand(kind: str, places: Sequence[Place], setting: Setting) -> Edits:
    """The same edits as functions for hooks."""
    _activations(setting), _activations(setting, corrupt=True)  # now, while no edit is hooked
    edits: dict[tuple[str, int], Edit] = {}
    for place in places:
        for layer in place.numbers(setting):
            edits[place.site, layer] = functools.partial(_edited, kind, place, layer, setting)
    return edits


def _edited(kind: str, place: Place, layer: int, setting: Setting, value: Tensor) -> Tensor:
    edited = _by_example(value.clone(), place)
    where = _where(place, setting)
    for example, positions in enumerate(where):
        old = edited[example, positions]
        new = _new_rows(kind, place, layer, setting, old, example)
        edited[example, positions] = torch.where(cells(place, old.shape[1:]), new, old)
    return edited.reshape(value.shape)


@functools.cache
def _where(place: Place, setting: Setting) -> list[Tensor]:
    """The edited rows of each example; of the vision tower all."""
    if place.site == "vision_post":
        rows = _by_example(_activations(setting)[place.site, 0], place).shape[1]
        return [torch.arange(rows)] * len(setting.batch)
    return row_indices(setting.batch, place.positions)


def cells(place: Place, shape: Sequence[int]) -> Tensor:
    """Which cells of a row are edited."""
    chosen = torch.zeros(tuple(shape), dtype=torch.bool)
    heads = slice(None) if place.heads is None else list(place.heads)
    if len(shape) == 2:
        chosen[heads] = True
    else:
        chosen[slice(None) if place.units is None else list(place.units)] = True
    return chosen


def _new_rows(kind: str, place: Place, layer: int, setting: Setting, old: Tensor, example: int) -> Tensor:
    """What one example's rows are replaced by: a row for each, or one for all."""
    number = place.numbers(setting).index(layer)
    if kind == "zero":
        return torch.zeros_like(old)
    if kind == "steer":
        found = direction(place, setting)
        return old + 0.7 * (found[number] if found.dim() == old.dim() else found)
    if kind == "tensor":
        found = given(place, setting)
        if place.units is None:
            return found
        if found.dim() == 2:  # one row for each layer, in the order in which the layers are named
            return found[number]
        return torch.zeros_like(old[0]).index_put((torch.tensor(place.units),), found)
    if kind == "patch":
        theirs = _by_example(_activations(setting, corrupt=True)[place.site, layer], place)
        return theirs[example, _where(place, setting)[example]]
    if kind == "mean":
        return _mean(place, layer, setting)
    assert kind == "resample"
    clean, where = _by_example(_activations(setting)[place.site, layer], place), _where(place, setting)
    donor = _donors(len(where), seed=3)[example]
    mine, theirs = len(where[example]), len(where[donor])
    return torch.stack([clean[donor, where[donor][row * theirs // mine]] for row in range(mine)])


@functools.cache
def _mean(place: Place, layer: int, setting: Setting) -> Tensor:
    """Over the selected rows of the batch; over all image tokens where image tokens alone are selected."""
    clean = _by_example(_activations(setting)[place.site, layer], place)
    if place.site == "vision_post":
        return clean.flatten(0, 1).mean(0)
    pool = _where(place, setting)
    if _images_only(setting.batch, pool):
        pool = row_indices(setting.batch, "image")
    return torch.cat([clean[row, positions] for row, positions in enumerate(pool)]).mean(0)


def _images_only(batch: iv.Batch, where: list[Tensor]) -> bool:
    image = batch.inputs["input_ids"] == batch.tokens[0].ids[batch.tokens[0].image[0]]
    return all(bool(image[row, positions].all()) for row, positions in enumerate(where))


def _by_example(value: Tensor, place: Place) -> Tensor:
    return value.reshape(3, -1, value.shape[-1]) if place.site == "vision_post" else value


def _donors(count: int, seed: int) -> dict[int, int]:
    """Everybody receives from the one before in a random circle."""
    circle = np.random.default_rng(seed).permutation(count).tolist()
    return {receiver: circle[number - 1] for number, receiver in enumerate(circle)}


@functools.cache
def _activations(setting: Setting, corrupt: bool = False) -> dict[tuple[str, int], Tensor]:
    sites = [(place.site, layer) for place in PLACES.values() for layer in place.numbers(setting)]
    return reference.captured(setting.raw, (setting.corrupt if corrupt else setting.batch).inputs, sites)


def _row_shape(place: Place, setting: Setting) -> tuple[int, ...]:
    value = _activations(setting)[place.site, place.numbers(setting)[0]]
    return tuple(value.shape[-1:] if place.site == "vision_post" else value.shape[2:])


def _drawn(shape: tuple[int, ...], seed: int, setting: Setting) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(setting.dtype)


@functools.cache
def given(place: Place, setting: Setting) -> Tensor:
    """A tensor to put there: a row, one value for each unit, or one row for each layer."""
    shape = _row_shape(place, setting)
    if place.units is not None:
        shape = (len(place.layers), *shape) if isinstance(place.layers, tuple) else (len(place.units),)
    return _drawn(shape, 5, setting)


@functools.cache
def direction(place: Place, setting: Setting) -> Tensor:
    """A direction to add: one row, or one for each of several layers."""
    shape, layers = _row_shape(place, setting), place.numbers(setting)
    return _drawn(shape if len(layers) == 1 else (len(layers), *shape), 6, setting)
