"""Leaks: the routes by which blocked information still reaches the answer, and the smallest knockout that closes them.

What may attend what is read from the masks that attention received in a run, not from a family's name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp_vlm.engine.access import as_keep
from interp_vlm.engine.full import Program, forward
from interp_vlm.engine.leak_closing import knockouts
from interp_vlm.engine.leak_words import Route, Stop, role_of, spans, stops, told
from interp_vlm.engine.place import ResolvedPlace
from interp_vlm.engine.runner import Engine
from interp_vlm.errors import InterventionError
from interp_vlm.interventions.ablation import Ablation
from interp_vlm.interventions.base import CellIntervention, Intervention, indices
from interp_vlm.interventions.knockout import AttentionKnockout
from interp_vlm.interventions.patch import ActivationPatch
from interp_vlm.interventions.routes import RouteGraph, alike
from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from interp_vlm.vlm import VLM

__all__ = ["Leaks", "leaks"]

_COLUMNS = (
    "example", "route", "kind", "step", "source", "target", "keys", "queries", "first_layer", "last_layer", "layers",
    "heads",
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Leaks:
    """The routes that interventions leave to the information of the source, example by example.

    Attributes:
        routes: for each example, the direct routes and the shortest ones through other tokens; empty where closed.
        source: for each example, the positions whose information is followed.
        graphs: for each example, what may be attended where; what routes and cuts are computed on.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> scene = iv.data.digit_scenes(n=1)[0]
        >>> batch = vlm.encode(scene.image, scene.question)
        >>> knockout = iv.AttentionKnockout("last", "image", layers=range(1, 4))
        >>> found = leaks(vlm, batch, knockout)
        >>> [route.kind for route in found.routes[0]]
        ['before the window', 'through template tokens', 'through question tokens']
        >>> leaks(vlm, batch, knockout.closing(vlm, batch)).closed
        True
    """

    routes: tuple[tuple[Route, ...], ...]
    source: tuple[tuple[int, ...], ...]
    graphs: tuple[RouteGraph, ...]
    _batch: Batch = field(repr=False)
    _places: tuple[ResolvedPlace, ...] = field(repr=False)
    _sources: Bool[Tensor, "batch pos"] = field(repr=False)

    @property
    def closed(self) -> bool:
        """Whether no route is left in any example."""
        return all(graph.closed for graph in self.graphs)

    def explain(self) -> str:
        """The routes in words, examples that are alike together."""
        texts: dict[str, list[int]] = defaultdict(list)
        for example in range(len(self.graphs)):
            texts[self._explained(example)].append(example)
        if len(self.graphs) == 1:
            return next(iter(texts))
        return "\n".join(f"example{'s' if len(own) > 1 else ''} {spans(own)}: {text}" for text, own in texts.items())

    def _explained(self, example: int) -> str:
        role, places, routes = role_of(self._batch.tokens[example]), self.source[example], self.routes[example]
        if not places:
            return "closed: there is no source"
        many = len(places) > 1
        source = f"{' and '.join(dict.fromkeys(role[at] for at in places))} token{'s' if many else ''} {spans(places)}"
        if not routes:
            return f"closed: nothing of {source} reaches the answer through the decoder"
        ways = f"still reach{'' if many else 'es'} the answer by {len(routes)} route{'s' if len(routes) > 1 else ''}"
        return "\n".join([f"{source} {ways}", *(f"  {route}" for route in routes)])

    def frame(self) -> pd.DataFrame:
        """A tidy table: one row per example, route and step.

        Columns: example, route (its number), kind, step, source and target (what they are), keys and queries (how many
        positions), first_layer, last_layer, layers (how many), heads (the most in which the step can be made).
        """
        import pandas as pd

        rows = [
            {
                "example": example, "route": number, "kind": route.kind, "step": step,
                "source": route.stops[step].name, "target": route.stops[step + 1].name,
                "keys": len(route.stops[step].positions), "queries": len(route.stops[step + 1].positions),
                "first_layer": layers[0], "last_layer": layers[-1], "layers": len(layers), "heads": route.heads[step],
            }
            for example, routes in enumerate(self.routes)
            for number, route in enumerate(routes)
            for step, layers in enumerate(route.layers)
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=pd.Index(_COLUMNS))

    def plot(self, example: int = 0) -> Figure:
        """Layers across, groups of tokens up, what is blocked, and the routes that are left.

        Args:
            example: which example of the batch.
        """
        from interp_vlm.engine.leak_plot import plot_leaks

        return plot_leaks(self, example)

    def groups(self, example: int) -> tuple[Stop, ...]:
        """The groups of tokens that the routes of an example are told by, the answer position by itself."""
        return tuple(stops(self._batch.tokens[example], self.graphs[example], self._sources[example].numpy()))

    def closing(self, edges: str = "source") -> list[AttentionKnockout]:
        """The smallest knockouts to add, so that no route is left: run them together with the interventions.

        Smallest means the fewest attention edges, counted as receipts do: one for each layer, head, query and key (but
        not in heads whose `z` is replaced, which carry nothing).

        Args:
            edges: "source" removes only edges whose key is a source, so that no other token loses a reader of what is
                its own; "any" may remove every edge. "any" is never larger, and mostly cuts the answer position off
                from its question too.

        Raises:
            InterventionError: when the answer position carries the source itself, or the examples of the batch differ
                so much that the same knockouts do not fit all.
        """
        if edges not in ("source", "any"):
            raise InterventionError(f"edges={edges!r}", expected="'source' or 'any'")
        cuts = [graph.cut(self._source_classes(row) if edges == "source" else None)
                for row, graph in enumerate(self.graphs)]  # fmt: skip
        return knockouts(self._batch, self._places, self.graphs, cuts)

    def _source_classes(self, row: int) -> Bool[np.ndarray, " cls"]:
        graph, source = self.graphs[row], self._sources[row].numpy()
        return np.array([bool(source[own[0]]) for own in graph.members])

    def __repr__(self) -> str:
        counts = ", ".join(str(len(routes)) for routes in self.routes)
        return f"Leaks({'closed' if self.closed else 'open'}; routes left by example: {counts})"

    def __str__(self) -> str:
        return self.explain()


def leaks(
    vlm: VLM, batch: Batch, interventions: Intervention | Sequence[Intervention] = (), *, source: Any = None
) -> Leaks:
    """Find the routes by which information of the source still reaches the answer past the interventions.

    Information moves along the residual stream and, where the captured mask and the interventions leave a head, from
    key to query. It is stopped where `Ablation` or `ActivationPatch` replaces a position's whole residual stream, and
    does not enter a position whose `attn_out`, or `z` in the heads that could bring it, is replaced. What a mean keeps
    of it, and single units, are not followed: replaced units stop nothing, and `Steering` stops nothing. An edit of
    `vision_post` stops only pictures whose rows are replaced whole.

    A route says that information can pass, not that the model's weights make use of it. No route is a proof: whatever
    the source holds, the answer is the same.

    Args:
        vlm: the model.
        batch: encoded examples.
        interventions: those that would be run together.
        source: whose information is followed, a role, a selector or positions: by default all keys that are blocked, or
            the picture where no attention is.

    Returns:
        A `Leaks` with `.routes`, `.closed`, `.explain()`, `.frame()`, `.plot()` and `.closing()`.

    Raises:
        InterventionError: for interventions that a run would refuse, or a source that selects nothing.

    Source:
        Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021, for paths through the residual stream;
        Geva et al. 2023, section 5, for the knockout whose detours these are.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> scene = iv.data.digit_scenes(n=1)[0]
        >>> batch = vlm.encode(scene.image, scene.question)
        >>> leaks(vlm, batch, iv.AttentionKnockout("text", "image")).closed
        True
    """
    engine: Engine = vlm._engine
    listed = [interventions] if isinstance(interventions, Intervention) else list(interventions)
    places = engine.resolve(batch, listed)
    sources = _sources(vlm, batch, places, source)
    masks = _captured(engine, batch)
    routes, graphs = [], []
    for row, tokens in enumerate(batch.tokens):
        graph = _Example(engine, tokens, row, places, sources[row].numpy()).graph(masks)
        named = stops(tokens, graph, sources[row].numpy())
        graphs.append(graph)
        routes.append(tuple(route for path in graph.paths() for route in told(path, graph, named)))
    followed = tuple(tuple(row.nonzero().flatten().tolist()) for row in sources)
    return Leaks(tuple(routes), followed, tuple(graphs), batch, tuple(places), sources)


def _sources(vlm: VLM, batch: Batch, places: Sequence[ResolvedPlace], source: Any) -> Bool[Tensor, "batch pos"]:
    blocked = [place.keys for place in places if place.keys is not None]
    if source is None and blocked:
        return torch.stack(blocked).any(dim=0).cpu()
    found = torch.zeros(batch.inputs["input_ids"].shape, dtype=torch.bool)
    for row, positions in enumerate(vlm.positions(batch, "image" if source is None else source)):
        if len(positions) == 0:
            raise InterventionError(
                f"source={source!r} selects nothing in example {row}",
                expected="positions whose information is followed",
                remedy="name a source=" if source is None else "change the selection",
            )
        found[row, positions.cpu()] = True
    return found


def _captured(engine: Engine, batch: Batch) -> list[Bool[Tensor, "#batch head query key"]]:
    """Each layer's mask, True where attention is allowed; layers that share one share the tensor."""
    known = engine.clean.known(batch)
    count = engine.anatomy.n_layers
    if known is not None and known.trunk is not None:
        return [known.trunk.keep(layer) for layer in range(count)]
    inputs = {**batch.inputs, "use_cache": False}
    calls = forward(engine.root, engine.access, inputs, Program(calls=frozenset(range(count)))).calls
    given = [calls[layer]["attention_mask"] for layer in range(count)]
    keeps = {id(mask): as_keep(mask, batch.inputs["input_ids"], None, layer) for layer, mask in enumerate(given)}
    return [keeps[id(mask)] for mask in given]


@dataclass(frozen=True, eq=False)
class _Example:
    """One example of a batch with its interventions, on the way to its graph."""

    engine: Engine
    tokens: TokenMap
    row: int
    places: Sequence[ResolvedPlace]
    source: Bool[np.ndarray, " pos"]

    def graph(self, masks: Sequence[Bool[Tensor, "#batch head query key"]]) -> RouteGraph:
        real = self.tokens.all.numpy()
        acting = [tuple(n for n, place in enumerate(self.places) if self._attends(place, layer))
                  for layer in range(len(masks))]  # fmt: skip
        kinds = list(dict.fromkeys(zip(map(id, masks), acting, strict=True)))
        kind = np.array([kinds.index(key) for key in zip(map(id, masks), acting, strict=True)])
        of_kind = [next(layer for layer in range(len(masks)) if kind[layer] == number) for number in range(len(kinds))]
        before = np.stack([self._heads(masks[layer], layer, ()) for layer in of_kind])
        after = np.stack([self._heads(masks[layer], layer, acting[layer]) for layer in of_kind])
        before, after = (counts[:, real][:, :, real] for counts in (before, after))
        stays, present, enters = (cells[:, real] for cells in self._cells(len(masks)))
        groups = self._groups(real)
        cells = [stays[:, at].tobytes() + present[:, at].tobytes() for at in range(len(real))]
        parts = alike(after, list(zip(groups, cells, strict=True)))
        one = np.array([part[0] for part in parts])
        return RouteGraph(
            members=tuple(real[part] for part in parts),
            groups=np.array(groups)[one],
            allowed=_blocks(before, parts),
            left=_blocks(after, parts),
            kind=kind,
            stays=stays[:, one],
            present=present[:, one],
            enters=enters[:, one],
            sink=next(n for n, part in enumerate(parts) if real[part[0]] == int(self.tokens.last)),
        )

    def _attends(self, place: ResolvedPlace, layer: int) -> bool:
        """Whether an intervention takes edges away in a layer."""
        if layer not in place.layers:
            return False
        knockout = isinstance(place.intervention, AttentionKnockout)
        return knockout or (place.site.name in ("z", "attn_out", "resid_mid") and _replaces(place, heads=True))

    def _heads(self, keep: Tensor, layer: int, acting: Sequence[int]) -> Int[np.ndarray, "query key"]:
        """In how many heads each edge is left by these interventions."""
        n_heads = self.engine.anatomy.n_heads
        keep = keep[self.row : self.row + 1] if len(keep) > 1 else keep
        here = [self.places[number] for number in acting]
        blocking = [place for place in here if isinstance(place.intervention, AttentionKnockout)]
        for place in blocking:
            assert isinstance(place.intervention, AttentionKnockout)
            assert place.keys is not None
            both = (place.selected, place.keys)
            rows, keys = (cells[self.row : self.row + 1].to(keep.device) for cells in both)
            keep = place.intervention.block(keep, rows, keys, n_heads)
        # What attention hands on is replaced after it has looked, which empties no row of the mask.
        for place in (place for place in here if place not in blocking):
            assert isinstance(place.intervention, CellIntervention)
            chosen = torch.zeros(n_heads, dtype=torch.bool, device=keep.device)
            named = place.intervention.heads
            chosen[list(indices("all" if named is None else named, n_heads, "head"))] = True
            gone = place.selected[self.row, None, :, None].to(keep.device) & chosen[:, None, None]
            keep = keep & ~(gone[:1] if bool(chosen.all()) else gone)
        counts = keep[0].sum(dim=0).to(torch.int16) * (n_heads if keep.shape[1] == 1 else 1)
        return counts.cpu().numpy()

    def _cells(self, n_layers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the residual stream is carried on, where it is the run's own, and where the source enters."""
        length = len(self.source)
        stays, present = np.ones((n_layers, length), dtype=bool), np.ones((n_layers + 1, length), dtype=bool)
        enters = np.zeros((n_layers + 1, length), dtype=bool)
        # Vision features that are added between layers enter there as well: wherever, to be on the safe side.
        image = self.tokens.image_index.numpy() >= 0
        enters[0] = self.source
        if self.engine.anatomy.between_layers:
            enters[:-1] |= self.source & image
        for place in self.places:
            if not _replaces(place):
                continue
            rows, site = place.selected[self.row].cpu().numpy(), place.site
            if site.part == "projector":
                present[0, rows] = False
            elif site.part == "vision" and bool(rows[image].all()) and not self.engine.anatomy.between_layers:
                enters[:, image] = False
            for layer in place.layers if site.part == "decoder" else ():
                if site.name == "resid_mid":
                    stays[layer, rows] = False
                elif site.name in ("resid_pre", "resid_post"):
                    present[layer + (site.name == "resid_post"), rows] = False
        return stays, present, enters

    def _groups(self, real: np.ndarray) -> list[int]:
        """For each position the number of its group: equal role, treated alike by source and interventions."""
        role = role_of(self.tokens)
        last = int(self.tokens.last)
        marks = {place.selected[self.row].cpu().numpy().tobytes() for place in self.places}
        marks |= {place.keys[self.row].cpu().numpy().tobytes() for place in self.places if place.keys is not None}
        bits = [np.frombuffer(mark, dtype=bool) for mark in sorted(marks)]
        labels = [(role[at], at == last, bool(self.source[at]), *(bool(mark[at]) for mark in bits)) for at in real]
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        return [numbers[label] for label in labels]


def _replaces(place: ResolvedPlace, heads: bool = False) -> bool:
    """Whether a place's cells are replaced whole, so that nothing of this run's own passes them."""
    value = place.intervention
    if not isinstance(value, Ablation | ActivationPatch) or value.units is not None:
        return False
    return heads or value.heads is None


def _blocks(counts: Int[np.ndarray, "kind pos pos"], parts: Sequence[np.ndarray]) -> Int[np.ndarray, "kind cls cls"]:
    """The most between any two members."""
    order = np.concatenate(parts)
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    sorted_counts = counts[:, order][:, :, order]
    return np.maximum.reduceat(np.maximum.reduceat(sorted_counts, starts, axis=1), starts, axis=2)
