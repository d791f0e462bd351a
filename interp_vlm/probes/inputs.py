"""Activations as every probe reads them: one matrix a layer, from an array, a tensor, a cache's site or a store's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_vlm.errors import DataError
from interp_vlm.interventions.cache import Cache
from interp_vlm.readouts.store import Store

__all__ = ["POSITIONS", "Activations", "read", "read_columns"]

POSITIONS = ("before_answer", "after_answer")


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of n examples by layer, and where in the model they were read.

    Attributes:
        load: gives (n, d) of a layer, by its number in the model; of a store, from disk.
        shape: (n, layer, d).
        layers: the model's number of each layer.
        site: name of the site table.
        position: "before_answer" or "after_answer".
        model: the model's name, empty when unknown.
    """

    load: Callable[[int], Tensor] = field(repr=False)
    shape: tuple[int, int, int]
    layers: tuple[int, ...]
    site: str
    position: str
    model: str = ""

    def __len__(self) -> int:
        return self.shape[0]

    def layer(self, number: int) -> Float[Tensor, "example feature"]:
        """One layer: float64 stays, anything shorter comes as float32, which holds it exactly.

        Raises:
            DataError: for NaN or infinite values.
        """
        values = self.load(number)
        values = values if values.dtype == torch.float64 else values.to(torch.float32)
        if bad := int((~torch.isfinite(values)).any(1).sum()):
            raise DataError(
                f"activations of layer {number} hold NaN or infinite values in {bad} of {len(values)} examples",
                expected="finite numbers",
                remedy="capture in bfloat16 or float32 (float16 overflows), or leave those examples out on purpose",
            )
        return values


def read(
    activations: Any,
    site: str | None,
    layers: Sequence[int] | None,
    position: str | None,
    position_index: int | None = None,
) -> Activations:
    """Activations with their labels of layer, site and position.

    Args:
        activations: (n, layer, d) array or tensor, a `Cache`, or a `Store`, whose layers are read when asked for.
        site: which site of a cache or store; for an array only its name in the report.
        layers: which layers to probe, or the numbers of the array's layers (by default 0, 1, ...).
        position: "before_answer" or "after_answer"; caches and stores hold the prompt, which is before the answer.
        position_index: which of several positions of each example in a store; negative ones count from its last.

    Raises:
        DataError: for another shape, a layer that is absent, several positions, or an array without its position.
    """
    if isinstance(activations, Store):
        return _subset(_from_store(activations, site, position, position_index), layers)
    if position_index is not None:
        raise DataError(
            f"position_index={position_index} for activations without a position axis",
            expected="a store",
            remedy="index the positions yourself, or leave position_index out",
        )
    if isinstance(activations, Cache):
        return _subset(_from_cache(activations, site, position), layers)
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
    return _held(values.detach(), numbers, site or "", str(position))


def _held(values: Tensor, layers: tuple[int, ...], site: str, position: str, model: str = "") -> Activations:
    """Activations that are in memory, (n, layer, d)."""
    n, count, d = values.shape
    place = {number: index for index, number in enumerate(layers)}
    return Activations(lambda number: values[:, place[number]], (n, count, d), layers, site, position, model)


def _from_cache(cache: Cache, site: str | None, position: str | None) -> Activations:
    name = _site(list(cache), site, "cache")
    values = cache[name]
    if values.shape[2] != 1 or not bool(cache.mask.all()):
        raise DataError(
            f"the cache holds up to {values.shape[2]} positions of each example",
            expected="one",
            remedy="capture with positions='last'",
        )
    _before_answer(position, "cache")
    layers = tuple(cache.layers[name])
    return _held(values.detach().flatten(2), layers, name, "before_answer", getattr(cache, "model", ""))


def _from_store(store: Store, site: str | None, when: str | None, index: int | None) -> Activations:
    name = _site(list(store.sites), site, "store")
    _before_answer(when, "store")
    fewest, most = store.index["positions"].agg(["min", "max"])
    if index is None and (fewest, most) != (1, 1):
        raise DataError(
            f"the store holds {fewest} to {most} positions of each example ({store.selection})",
            expected="one",
            remedy="say which: position_index=-1 is the last that was kept",
        )
    if index is not None and not -fewest <= index < fewest:
        raise DataError(
            f"position_index={index}, an example of the store holds {fewest} positions",
            expected=f"{-fewest} to {fewest - 1}",
        )
    position = -1 if index is None else index
    d = int(store.layer(name, store.sites[name][0], [0], position).numel())

    def load(number: int) -> Tensor:
        # one position of one layer is in memory, in the store's own number type
        return store.layer(name, number, position=position).flatten(1)

    layers = store.sites[name]
    return Activations(load, (len(store), len(layers), d), layers, name, "before_answer", store.model.name)


def read_columns(activations: Any, **given: Any) -> dict[str, Any]:
    """What was given beside the activations, completed from the index where they are a store's.

    Raises:
        DataError: labels that are neither given nor in a store; an answer that its store could not score.
    """
    columns: Mapping[str, str] = {
        "labels": "correct", "groups": "group", "confidence": "confidence", "answers": "answer", "questions": "question"
    }  # fmt: skip
    if not isinstance(activations, Store):
        if given["labels"] is None:
            raise DataError("labels are missing", expected="True or False for each example", remedy="give labels=")
        return given
    index = activations.index
    if given["labels"] is None and (unknown := int(index["correct"].isna().sum())):
        raise DataError(
            f"{unknown} of {len(index)} answers in the store {activations.folder} have no score",
            expected="right or wrong for each example",
            remedy="give labels=, or write the store with another scorer",
        )
    return {
        name: index[columns[name]].tolist() if value is None and name in columns else value
        for name, value in given.items()
    }


def _site(sites: Sequence[str], site: str | None, what: str) -> str:
    if site is None and len(sites) != 1:
        raise DataError(
            f"the {what} holds {len(sites)} sites: {', '.join(sites)}", expected="one", remedy="pass site='resid_post'"
        )
    name = site or sites[0]
    if name not in sites:
        raise DataError(
            f"site {name!r} is absent from the {what}", expected=f"one of {', '.join(sites)}", remedy="capture it too"
        )
    return name


def _before_answer(position: str | None, what: str) -> None:
    if position not in (None, "before_answer"):
        raise DataError(
            f"position is {position!r} for a {what} of the prompt",
            expected="'before_answer'",
            remedy="leave position out",
        )


def _subset(found: Activations, layers: Sequence[int] | None) -> Activations:
    if layers is None:
        return found
    if missing := [layer for layer in layers if layer not in found.layers]:
        raise DataError(
            f"layer {missing[0]} is absent from {found.site!r}",
            expected=f"one of {list(found.layers)}",
            remedy="capture it too",
        )
    if not len(layers) or len(set(layers)) < len(layers):
        raise DataError(f"layers is {list(layers)}", expected="at least one layer, each once")
    n, _, d = found.shape
    return replace(found, layers=tuple(layers), shape=(n, len(layers), d))
