"""Where a planted answer flows: the truth against which methods of localisation are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from interp_vlm.errors import ModelError
from interp_vlm.testbed import NAMES

__all__ = ["DETOURS", "N_LAYERS", "Edge", "Layout", "Route", "lay_out", "routes_of"]

DETOURS = (None, "question", "prefix")
"""Straight from the patch to the last token, by way of a word of the question, or of an earlier patch (PaliGemma)."""

N_LAYERS = 6
N_HEADS = 4
N_UNITS = 256
N_PATCHES = 49


@dataclass(frozen=True)
class Edge:
    """One hop of a route: in `layer`, the `heads` carry the answer from the `keys` to the `queries`.

    Attributes:
        layer: decoder layer.
        heads: query heads that share the load in equal parts.
        queries: token positions in the prompt that read.
        keys: token positions in the prompt that are read.
    """

    layer: int
    heads: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """The way of the answer through a decoder.

    Attributes:
        edges: hops, in the order of their layers; none in a null model.
        neurons: (layer, unit) of the neurons that turn what the last token has received into the answer.
        n_layers: of the decoder.

    Example:
        >>> route = Route((Edge(2, (1,), (60,), (17,)),), ((3, 40), (3, 200)), n_layers=4)
        >>> sorted(route.positions)
        [(0, 17), (1, 17), (2, 60), (3, 60)]
        >>> sorted(route.heads), sorted(route.layers)
        ([(2, 1)], [2])
        >>> print(route)
        position 17 -> position 60 at layer 2 (head 1) -> neurons 3.40 and 3.200
    """

    edges: tuple[Edge, ...]
    neurons: tuple[tuple[int, int], ...] = ()
    n_layers: int = N_LAYERS

    @property
    def positions(self) -> frozenset[tuple[int, int]]:
        """(layer, position) of every cell of `resid_post` on whose content the answer depends.

        A cell counts from the layer that writes it up to the one before the layer that reads it; the last token's up
        to the last layer. At `resid_pre` the same cells lie one layer higher, and the first keys also at layer 0.
        """
        if not self.edges:
            return frozenset()
        starts = [0, *(edge.layer for edge in self.edges)]
        ends = [*(edge.layer for edge in self.edges), self.n_layers]
        places = [*(edge.keys for edge in self.edges), *(edge.queries for edge in self.edges[-1:])]
        return frozenset(
            (layer, position)
            for start, end, place in zip(starts, ends, places, strict=True)
            for layer in range(start, end)
            for position in place
        )

    @property
    def layers(self) -> frozenset[int]:
        """Layers in which attention moves the answer."""
        return frozenset(edge.layer for edge in self.edges)

    @property
    def heads(self) -> frozenset[tuple[int, int]]:
        """(layer, head) of every head that moves the answer."""
        return frozenset((edge.layer, head) for edge in self.edges for head in edge.heads)

    def __str__(self) -> str:
        if not self.edges:
            return "no route"
        stops = [f"position {' and '.join(map(str, self.edges[0].keys))}"]
        for edge in self.edges:
            heads = f"head{'s' if len(edge.heads) > 1 else ''} {' and '.join(map(str, edge.heads))}"
            stops.append(f"position {' and '.join(map(str, edge.queries))} at layer {edge.layer} ({heads})")
        if self.neurons:
            stops.append("neurons " + " and ".join(f"{layer}.{unit}" for layer, unit in self.neurons))
        return " -> ".join(stops)


@dataclass(frozen=True)
class Layout:
    """What is drawn at random for one planted model, before any weight is written.

    Attributes:
        detour: as asked for.
        patch: the patch that is coloured, as an index into the grid, row by row.
        relay: word of the question (an index) or patch that hands the answer on; None for the straight route.
        hops: (layer, heads) of each edge.
        backup: (layer, heads) of the backup, or None.
        decoys: (layer, head) that look at the patch and hand nothing on.
        neurons: (layer, unit): the first fires for the first answer, the second for the second.
        bystanders: (layer, unit) that fire as the neurons do, and that nothing reads.
    """

    detour: str | None
    patch: int
    relay: int | None
    hops: tuple[tuple[int, tuple[int, ...]], ...]
    backup: tuple[int, tuple[int, ...]] | None
    decoys: tuple[tuple[int, int], ...]
    neurons: tuple[tuple[int, int], ...]
    bystanders: tuple[tuple[int, int], ...]

    @property
    def backup_heads(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of the backup's heads."""
        return () if self.backup is None else tuple((self.backup[0], head) for head in self.backup[1])


def lay_out(
    family: str,
    seed: int,
    *,
    words: int,
    detour: str | None = None,
    backup: bool = False,
    decoys: int = 2,
    neurons: bool = True,
    null: bool = False,
) -> Layout:
    """Draw the route of a seed.

    Args:
        words: number of tokens of the question.
        others: see `plant`.

    Raises:
        ModelError: for an unknown family or detour, a detour that the family's masks forbid, or too many decoys.
    """
    if family not in NAMES:
        raise ModelError(f"no planted model of family {family!r}", expected=" or ".join(NAMES))
    if detour not in DETOURS:
        raise ModelError(f"detour={detour!r}", expected="None, 'question' or 'prefix'")
    if detour == "prefix" and family != "paligemma":
        raise ModelError(
            f"detour='prefix' in {family}, whose patches see no later patch",
            expected="family 'paligemma'",
            remedy="or detour='question'",
        )
    if seed < 0:
        raise ModelError(f"seed {seed}", expected="0 or more")
    rng = np.random.default_rng([seed, NAMES.index(family), DETOURS.index(detour)])
    patch = int(rng.integers(1, N_PATCHES))
    relay = {None: None, "question": int(rng.integers(words)), "prefix": int(rng.integers(patch))}[detour]
    n_hops = 1 if detour is None else 2
    # never layer 0: the patch's own position then belongs to the route at one layer's output at least
    layers = np.sort(rng.choice(np.arange(1, N_LAYERS), n_hops + backup, replace=False)).tolist()
    sharing = 1 if backup else int(rng.integers(1, 3))
    chosen = [tuple(sorted(rng.choice(N_HEADS, sharing, replace=False).tolist())) for _ in layers]
    moving = list(zip(layers, chosen, strict=True))
    taken = {(layer, head) for layer, heads in moving for head in heads}
    free = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS) if (layer, head) not in taken]
    if not 0 <= decoys <= len(free):
        raise ModelError(f"{decoys} decoys", expected=f"0 to {len(free)}, the heads that are left")
    looking = [free[k] for k in rng.choice(len(free), decoys, replace=False)]
    spots = [(int(rng.integers(layers[-1], N_LAYERS)), unit) for unit in rng.choice(N_UNITS, 4, replace=False).tolist()]
    spots[1] = (spots[0][0], spots[1][1])
    return Layout(
        detour, patch, relay, tuple(moving[:n_hops]), moving[n_hops] if backup else None, tuple(looking),
        tuple(spots[:2]) if neurons else (), () if null else tuple(spots[2:]),
    )  # fmt: skip


def routes_of(layout: Layout, image: Any, question: Any, last: int) -> tuple[Route, tuple[Route, ...]]:
    """The route and its backups, in token positions of the prompt.

    Args:
        image: positions of the image tokens.
        question: positions of the question's tokens.
        last: position of the last token.
    """
    stops = [int(image[layout.patch])]
    if layout.relay is not None:
        stops.append(int((image if layout.detour == "prefix" else question)[layout.relay]))
    stops.append(last)
    edges = [
        Edge(layer, heads, (query,), (key,))
        for (layer, heads), key, query in zip(layout.hops, stops[:-1], stops[1:], strict=True)
    ]
    spare = () if layout.backup is None else (Route((Edge(*layout.backup, (last,), (stops[0],)),), layout.neurons),)
    return Route(tuple(edges), layout.neurons), spare
