"""Routes in words: which tokens they pass, at which layers, and how they get past the interventions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from interp_vlm.interventions.routes import Path, RouteGraph
from interp_vlm.tokens.token_map import TokenMap

__all__ = ["Route", "Stop", "role_of", "spans", "stops", "told"]

_ROLES = ("image", "question", "template", "bos")
_OWN = "along the answer position's own residual stream"
_BACK = "through the bidirectional prefix"
_HEADS = "through heads left"


@dataclass(frozen=True)
class Stop:
    """Tokens that a route passes.

    Attributes:
        name: what they are, in words.
        role: "image", "question", "template" or "bos".
        positions: where they are, in the padded row.
    """

    name: str
    role: str
    positions: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {spans(self.positions)}"


@dataclass(frozen=True)
class Route:
    """One way for the source's information to the answer.

    Attributes:
        kinds: how it gets past the interventions, in words.
        stops: the tokens passed, from the source to the answer position.
        layers: for each step from a stop to the next, the layers at which attention can make it on this route.
        heads: for each step, the most heads in which it can be made.
    """

    kinds: tuple[str, ...]
    stops: tuple[Stop, ...]
    layers: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The kinds in one text."""
        return ", ".join(self.kinds)

    @property
    def text(self) -> str:
        """The way itself: stops and layers."""
        parts = [str(self.stops[0])]
        for stop, layers in zip(self.stops[1:], self.layers, strict=True):
            parts.append(f"{stop} at layer{'s' if len(layers) > 1 else ''} {spans(layers)}")
        return " -> ".join(parts)

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def spans(numbers: Sequence[int], most: int = 4) -> str:
    """Sorted numbers as ranges, or how many they are and between which where they are scattered.

    Example:
        >>> spans([3, 4, 5, 9]), spans(range(0, 20, 2))
        ('3-5, 9', '0-18 (10 of them)')
    """
    breaks = [n for n in range(1, len(numbers)) if numbers[n] != numbers[n - 1] + 1]
    ends = list(zip([0, *breaks], [*breaks, len(numbers)], strict=True))
    if len(ends) > most:
        return f"{numbers[0]}-{numbers[-1]} ({len(numbers)} of them)"
    return ", ".join(
        str(numbers[start]) if stop - start == 1 else f"{numbers[start]}-{numbers[stop - 1]}" for start, stop in ends
    )


def role_of(tokens: TokenMap) -> dict[int, str]:
    """What each position is."""
    return {int(at): role for role in _ROLES for at in tokens.role(role)}


def stops(tokens: TokenMap, graph: RouteGraph, source: Bool[np.ndarray, " pos"]) -> list[Stop]:
    """What each group is called."""
    roles, last = role_of(tokens), int(tokens.last)
    source_roles = {roles[int(at)] for at in np.flatnonzero(source)}
    found = []
    for group in range(int(graph.groups.max()) + 1):
        own = [graph.members[number] for number in np.flatnonzero(graph.groups == group)]
        places = np.sort(np.concatenate(own))
        role, plural = roles[int(places[0])], "s" if len(places) > 1 else ""
        unblocked = role in source_roles and not source[places[0]]
        name = f"{role} token{plural}" + (f" that {'were' if plural else 'was'} not blocked" if unblocked else "")
        found.append(Stop("last token" if places[0] == last else name, role, tuple(places.tolist())))
    return found


def told(path: Path, graph: RouteGraph, stops: Sequence[Stop]) -> list[Route]:
    """A path as routes: a direct one is split by where its layers lie to those that are blocked."""
    if not path.hops:
        return [Route((_OWN,), (stops[path.groups[0]],), (), ())]
    passed = [path.hops[0][1], *(queries for _, _, queries in path.hops)]
    tokens = [_part(stops[group], classes, graph) for group, classes in zip(path.groups, passed, strict=True)]
    steps = [_Step(graph, *hop) for hop in path.hops]
    if len(steps) == 1:
        return [
            Route((kind, *steps[0].backward), tuple(tokens), (layers,), (steps[0].heads(layers),))
            for kind, layers in steps[0].by_window().items()
        ]
    kinds = [f"through {_plural(stops[group].name)}" for group in dict.fromkeys(path.groups[1:-1])]
    kinds += [_BACK] if any(step.backward for step in steps) else []
    kinds += [_HEADS] if any(step.partial(step.layers) for step in steps) else []
    layers = tuple(step.layers for step in steps)
    return [Route(tuple(kinds), tuple(tokens), layers, tuple(step.heads(step.layers) for step in steps))]


def _part(stop: Stop, classes: Bool[np.ndarray, " cls"], graph: RouteGraph) -> Stop:
    """The tokens of a group that take part."""
    own = sorted(int(at) for n in np.flatnonzero(classes) for at in graph.members[n])
    name = stop.name.replace("tokens", "token").replace("were", "was") if len(own) == 1 else stop.name
    return Stop(name, stop.role, tuple(own))


def _plural(name: str) -> str:
    return name.replace("token ", "tokens ").replace("was", "were") + ("s" if name.endswith("token") else "")


@dataclass(frozen=True, eq=False)
class _Step:
    """One attention step of a path."""

    graph: RouteGraph
    layers: tuple[int, ...]
    keys: Bool[np.ndarray, " cls"]
    queries: Bool[np.ndarray, " cls"]

    def _counts(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        graph = self.graph
        within = np.ix_(self.queries, self.keys)
        return graph.left[graph.kind[layer]][within], graph.allowed[graph.kind[layer]][within]

    def heads(self, layers: Sequence[int]) -> int:
        return max(int(self._counts(layer)[0].max()) for layer in layers)

    def partial(self, layers: Sequence[int]) -> bool:
        """Whether every open edge has lost heads, in all these layers."""
        return all(bool((left < allowed)[left > 0].all()) for left, allowed in map(self._counts, layers))

    @property
    def backward(self) -> tuple[str, ...]:
        """Whether a query reads a later position."""
        last_key = np.array([own[-1] for own in self.graph.members])[self.keys]
        first_query = np.array([own[0] for own in self.graph.members])[self.queries]
        earlier = last_key[None] > first_query[:, None]
        back = any(bool((earlier & (self._counts(layer)[0] > 0)).any()) for layer in self.layers)
        return (_BACK,) if back else ()

    def by_window(self) -> dict[str, tuple[int, ...]]:
        """The layers by where they lie to those in which edges of this step are blocked."""
        blocked = []
        for layer in range(self.graph.n_layers):
            left, allowed = self._counts(layer)
            if bool((left < allowed).any()):
                blocked.append(layer)
        found: dict[str, list[int]] = defaultdict(list)
        for layer in self.layers:
            if not blocked:
                kind = "not blocked at any layer"
            elif layer in blocked:
                kind = _HEADS
            elif layer < blocked[0]:
                kind = "before the window"
            else:
                kind = "after the window" if layer > blocked[-1] else "between the blocked layers"
            found[kind].append(layer)
        return {kind: tuple(own) for kind, own in found.items()}
