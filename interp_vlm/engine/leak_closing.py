"""Knockouts that close routes: a cut of the graph written in the vocabulary, with selectors instead of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from interp_vlm.engine.place import ResolvedPlace
from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import indices
from interp_vlm.interventions.knockout import AttentionKnockout
from interp_vlm.interventions.routes import Cut, RouteGraph
from interp_vlm.tokens import select
from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.selector import Union

__all__ = ["knockouts"]

Named = tuple[Any, np.ndarray]  # a selector, or a role's name, and what it selects in the batch


def knockouts(
    batch: Batch, places: Sequence[ResolvedPlace], graphs: Sequence[RouteGraph], cuts: Sequence[Cut]
) -> list[AttentionKnockout]:
    """The knockouts that remove exactly the edges of the cuts, of all edges that are left.

    Args:
        batch: the encoded examples.
        places: the interventions that are made already; what they select is used for names.
        graphs: of each example.
        cuts: of each example.

    Raises:
        InterventionError: when no list of knockouts fits all examples.
    """
    known = _known(batch, places)
    found: dict[str, AttentionKnockout] = {}
    for row, (graph, cut) in enumerate(zip(graphs, cuts, strict=True)):
        for knockout in _Example(row, graph, batch, known).knockouts(cut):
            found.setdefault(repr(knockout), knockout)
    made = list(found.values())
    for row, (graph, cut) in enumerate(zip(graphs, cuts, strict=True)):
        if not np.array_equal(_Example(row, graph, batch, known).blocked(made), cut.edges):
            raise InterventionError(
                f"the knockouts that close other examples of the batch do not fit example {row}",
                expected="examples whose prompts are laid out alike",
                remedy="close one example at a time: batch[0], batch[1], ...",
            )
    return made


def _known(batch: Batch, places: Sequence[ResolvedPlace]) -> list[Named]:
    """Selections to name positions by, the caller's own first."""
    own: list[Named] = []
    for place in places:
        if isinstance(place.intervention, AttentionKnockout) and place.keys is not None:
            own += [(place.intervention.queries, place.selected.cpu().numpy())]
            own += [(place.intervention.keys, place.keys.cpu().numpy())]
    roles: list[Any] = ["last", "question", "image", "text"]
    roles += [role - select.last for role in (select.question, select.text, select.template, select.bos)]
    found = own + [(role, _mask(role, batch)) for role in roles]
    image = _mask("image", batch)
    parted = [(value, mask) for value, mask in own if (mask & image).any() and (image & ~mask).any()]
    return found + [(select.image - select.of(value), image & ~mask) for value, mask in parted]


def _mask(selector: Any, batch: Batch) -> Bool[np.ndarray, "batch pos"]:
    mask = np.zeros(tuple(batch.inputs["input_ids"].shape), dtype=bool)
    for row, tokens in enumerate(batch.tokens):
        mask[row, select.of(selector).positions(tokens).numpy()] = True
    return mask


class _Example:
    """One example's cut, in words."""

    def __init__(self, row: int, graph: RouteGraph, batch: Batch, known: Sequence[Named]) -> None:
        self.row, self.graph, self.batch = row, graph, batch
        self.selections = {repr(select.of(value)): mask for value, mask in known}
        parted = [(value, mask, self._classes(mask)) for value, mask in known]
        self.known = [(value, mask, classes) for value, mask, classes in parted if classes is not None]

    def knockouts(self, cut: Cut) -> list[AttentionKnockout]:
        """Knockouts whose edges, of those that are left, are those of the cut."""
        # The keys are named first: with keys that have no edge left to add, rectangles of the cut become one.
        together: dict[tuple[str, tuple[int, ...]], tuple[Named, np.ndarray]] = {}
        for queries, keys, layers in cut.rectangles():
            left = self._left(layers)
            named = self._name(keys, ~np.any(left[queries], axis=0))
            name = repr(named[0]), layers
            both = queries | together[name][1] if name in together else queries
            together[name] = named, both
        made = []
        for (_, layers), ((keys_by, key_mask), queries) in together.items():
            keys = self._classes(key_mask)
            assert keys is not None, "names are of whole classes"
            queries_by, query_mask = self._name(queries, ~np.any(self._left(layers)[:, keys], axis=1))
            every = query_mask.any(axis=1).all() and key_mask.any(axis=1).all()
            made.append(AttentionKnockout(queries_by, keys_by, layers=_range(layers), allow_empty=not every))
        return made

    def _left(self, layers: Sequence[int]) -> Bool[np.ndarray, "query key"]:
        return np.any([self.graph.open[layer] for layer in layers], axis=0)

    def _name(self, must: Bool[np.ndarray, " cls"], harmless: Bool[np.ndarray, " cls"]) -> Named:
        """A selector of these classes and at most harmless others: the first that does, or as few as together do, or
        positions by number."""
        fitting = [each for each in self.known if not (each[2] & ~must & ~harmless).any()]
        for value, mask, classes in fitting:
            if not (must & ~classes).any():
                return value, mask
        value, chosen, missing = None, np.zeros_like(self.known[0][1]), must
        while missing.any():
            gains = [int((classes & missing).sum()) for _, _, classes in fitting]
            if not gains or max(gains) == 0:
                return self._numbered(must)
            other, mask, classes = fitting[gains.index(max(gains))]
            value = select.of(other) if value is None else value | select.of(other)
            chosen, missing = chosen | mask, missing & ~classes
        return value, chosen

    def _numbered(self, classes: Bool[np.ndarray, " cls"]) -> Named:
        places = sorted(int(at) for number in np.flatnonzero(classes) for at in self.graph.members[number])
        mask = np.zeros_like(self.known[0][1])
        mask[:, places] = True
        return select.positions(places), mask

    def _classes(self, mask: Bool[np.ndarray, "batch pos"]) -> Bool[np.ndarray, " cls"] | None:
        """The classes that a mask selects; None where it parts one."""
        inside = [mask[self.row, own] for own in self.graph.members]
        return None if any(own.any() != own.all() for own in inside) else np.array([own[0] for own in inside])

    def blocked(self, made: Sequence[AttentionKnockout]) -> Bool[np.ndarray, "layer query key"]:
        """The edges that knockouts remove from those that are left; all edges, where they part a class."""
        edges = np.zeros((self.graph.n_layers, *self.graph.left.shape[1:]), dtype=bool)
        for knockout in made:
            sides = [self._selected(value) for value in (knockout.queries, knockout.keys)]
            if sides[0] is None or sides[1] is None:
                return np.ones_like(edges)
            for layer in indices(knockout.layers, self.graph.n_layers, "layer"):
                edges[layer] |= sides[0][:, None] & sides[1][None] & self.graph.open[layer]
        return edges

    def _selected(self, value: Any) -> Bool[np.ndarray, " cls"] | None:
        """What a name selects here; unions of names are made of what is known, which may have needed evidence."""
        selector = select.of(value)
        if repr(selector) in self.selections:
            return self._classes(self.selections[repr(selector)])
        if isinstance(selector, Union):
            parts = [self._selected(part) for part in (selector.left, selector.right)]
            return None if parts[0] is None or parts[1] is None else parts[0] | parts[1]
        return self._classes(_mask(selector, self.batch))


def _range(layers: tuple[int, ...]) -> range | list[int]:
    whole = range(layers[0], layers[-1] + 1)
    return whole if len(whole) == len(layers) else list(layers)
