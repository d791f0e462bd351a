"""Search and cuts on layered graphs: against brute force, token by token and edge by edge."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

from interp_vlm.errors import InterventionError
from interp_vlm.interventions.routes import RouteGraph, alike

SEEDS = range(24)


@dataclass(frozen=True)
class Tokens:
    """A small decoder, token by token: `left` counts the heads of (layer, query, key)."""

    left: np.ndarray
    stays: np.ndarray
    present: np.ndarray
    source: frozenset[int]
    sink: int

    @property
    def layers(self) -> int:
        return len(self.left)

    def graph(self, together: bool) -> RouteGraph:
        """As a `RouteGraph`, with tokens that are alike together or each by itself."""
        length = self.left.shape[1]
        groups = np.array(
            [0 if at in self.source else 2 if at == self.sink else 1 + 2 * (at % 2) for at in range(length)]
        )
        cells = [self.stays[:, at].tobytes() + self.present[:, at].tobytes() for at in range(length)]
        # each layer a kind by itself
        labels = list(zip(groups.tolist(), cells, strict=True)) if together else list(range(length))
        parts = alike(self.left, labels)
        one = [part[0] for part in parts]
        blocks = np.array([[[self.left[layer][np.ix_(q, k)].max() for k in parts] for q in parts]
                           for layer in range(self.layers)])  # fmt: skip
        enters = np.zeros_like(self.present)
        enters[0, list(self.source)] = True
        return RouteGraph(
            tuple(parts), groups[one], blocks, blocks, np.arange(self.layers), self.stays[:, one],
            self.present[:, one], enters[:, one], sink=next(n for n, part in enumerate(parts) if part[0] == self.sink),
        )  # fmt: skip

    def reached(self, removed: frozenset[tuple[int, int, int]] = frozenset()) -> list[set[int]]:
        """Where the source's information is at each level, followed one token and one edge at a time."""
        levels = [{at for at in self.source if self.present[0, at]}]
        for layer in range(self.layers):
            there = {at for at in levels[-1] if self.stays[layer, at]}
            for query, key in np.argwhere(self.left[layer] > 0):
                if int(key) in levels[-1] and (layer, int(query), int(key)) not in removed:
                    there.add(int(query))
            levels.append({at for at in there if self.present[layer + 1, at]})
        return levels

    def hops(self) -> float:
        """The fewest attention steps from the source to the answer."""
        best = {at: 0.0 for at in self.source if self.present[0, at]}
        for layer in range(self.layers):
            there = {at: steps for at, steps in best.items() if self.stays[layer, at]}
            for query, key in np.argwhere(self.left[layer] > 0):
                if int(key) in best:
                    there[int(query)] = min(there.get(int(query), np.inf), best[int(key)] + 1)
            best = {at: steps for at, steps in there.items() if self.present[layer + 1, at]}
        return best.get(self.sink, np.inf)

    def cheapest(self, keys: frozenset[int]) -> int:
        """The fewest edges to remove, from trying every set of them."""
        edges = [(layer, int(query), int(key)) for layer in range(self.layers)
                 for query, key in np.argwhere(self.left[layer] > 0) if key in keys and query != key]  # fmt: skip
        found = [
            sum(int(self.left[edge]) for edge in chosen)
            for size in range(len(edges) + 1)
            for chosen in itertools.combinations(edges, size)
            if self.sink not in self.reached(frozenset(chosen))[-1]
        ]
        return min(found)


def drawn(seed: int, length: int, layers: int, density: float, *, causal: bool = True, cut: bool = True) -> Tokens:
    """A random one; every token may attend itself."""
    rng = np.random.default_rng(seed)
    left = rng.integers(1, 3, (layers, length, length)) * (rng.random((layers, length, length)) < density)
    left = np.tril(left) if causal else left
    left[:, range(length), range(length)] = 2
    stays, present = np.ones((layers, length), dtype=bool), np.ones((layers + 1, length), dtype=bool)
    if cut and seed % 2:
        stays[rng.integers(layers), 1] = False
        present[rng.integers(1, layers), 0] = False
    # a residual stream that is replaced after attention takes in nothing
    left[~stays] = 0
    return Tokens(left, stays, present, frozenset({0, 2}), length - 1)


def blocky(seed: int) -> Tokens:
    """One with many tokens alike: blocks of a mask, causal within and between them or not."""
    rng = np.random.default_rng(seed)
    block = np.array([1, 0, 0, 0, 1, 1, 2, 2, 2, 3])
    pattern = rng.integers(0, 3, (4, 4, 4)) * (rng.random((4, 4, 4)) < 0.45)
    left = pattern[:, block][:, :, block]
    left = np.tril(left) if seed % 2 else left
    left[:, range(10), range(10)] = 2
    return Tokens(left, np.ones((4, 10), dtype=bool), np.ones((5, 10), dtype=bool), frozenset({1, 2, 3}), 9)


def unfolded(graph: RouteGraph, levels: np.ndarray) -> list[set[int]]:
    return [{int(at) for n in np.flatnonzero(level) for at in graph.members[n]} for level in levels]


@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_search_finds_what_following_every_edge_finds(together):
    closed = 0
    for seed in SEEDS:
        for tokens in (drawn(seed, 7, 4, 0.16, causal=bool(seed % 3)), blocky(seed)):
            graph = tokens.graph(together)
            assert unfolded(graph, graph.reached) == tokens.reached()
            assert graph.closed == (tokens.sink not in tokens.reached()[-1])
            assert graph.closed == (graph.paths() == [])
            closed += graph.closed
            if not graph.closed:
                assert min(len(path.hops) for path in graph.paths()) == tokens.hops()
    assert 5 < closed < 2 * len(SEEDS) - 5


def test_tokens_that_are_alike_are_taken_together():
    counts = [len(blocky(seed).graph(True).members) for seed in SEEDS]
    assert np.mean(counts) < 8  # of 10
    assert max(counts) <= 10


def test_every_edge_of_a_path_is_open_and_leads_on():
    for seed in SEEDS:
        tokens = drawn(seed, 7, 4, 0.3)
        graph = tokens.graph(True)
        for path in graph.paths():
            assert len(path.groups) == len(path.hops) + 1
            for (layers, keys, queries), start, stop in zip(path.hops, path.groups, path.groups[1:], strict=False):
                assert layers == tuple(sorted(layers))
                assert layers
                assert set(graph.groups[keys]) == {start}
                assert set(graph.groups[queries]) == {stop}
                for layer in layers:
                    used = graph.open[layer] & queries[:, None] & keys[None]
                    assert (used & graph.reached[layer][None] & graph.leading[layer + 1][:, None]).any()
            firsts = [layers[0] for layers, _, _ in path.hops]
            lasts = [layers[-1] for layers, _, _ in path.hops]
            assert firsts == sorted(set(firsts))
            assert lasts == sorted(set(lasts))


@pytest.mark.parametrize("among", ["any", "source"])
def test_no_smaller_cut_exists(among):
    """Every set of edges is tried; keys of the source alone, or all keys."""
    sizes = []
    for seed in range(80):
        tokens = drawn(seed, 4, 2 + seed % 2, 0.5, causal=bool(seed % 3))
        keys = tokens.source if among == "source" else frozenset(range(4))
        edges = sum(int((np.delete(tokens.left[:, at], at, axis=1) > 0).sum()) for at in range(4))
        if edges > 10:  # 2**10 sets are enough to try
            continue
        graph = tokens.graph(True)
        cut = graph.cut(np.array([own[0] in tokens.source for own in graph.members]) if among == "source" else None)
        if among == "any" or tokens.sink not in _ever(replace(tokens, left=_without(tokens, keys))):
            assert cut.count == tokens.cheapest(keys)
            sizes.append(cut.count)
        assert tokens.sink not in tokens.reached(_edges(graph, cut))[-1]
    assert len(sizes) > 20
    assert 0 in sizes
    assert len(set(sizes)) > 4


def _without(tokens: Tokens, keys: frozenset[int]) -> np.ndarray:
    left = tokens.left.copy()
    left[:, :, list(keys)] = 0
    return left


def _ever(tokens: Tokens) -> set[int]:
    return set().union(*tokens.reached())


def _edges(graph: RouteGraph, cut) -> frozenset[tuple[int, int, int]]:
    return frozenset(
        (int(layer), int(q), int(k))
        for layer, query, key in np.argwhere(cut.edges)
        for q in graph.members[query]
        for k in graph.members[key]
    )


def test_cutting_classes_costs_what_cutting_tokens_costs():
    for seed in SEEDS:
        tokens = blocky(seed)
        cut, apart = tokens.graph(True).cut(), tokens.graph(False).cut()
        assert cut.count == apart.count
        edges = _edges(tokens.graph(True), cut)
        assert sum(int(tokens.left[edge]) for edge in edges) == cut.count
        assert tokens.sink not in tokens.reached(edges)[-1]


def test_one_edge_fewer_opens_a_route():
    tried = 0
    for seed in SEEDS:
        for among in (None, "source"):
            tokens = drawn(seed, 6, 3, 0.4)
            graph = tokens.graph(True)
            keys = np.array([own[0] in tokens.source for own in graph.members])
            edges = _edges(graph, graph.cut(keys if among else None))
            for edge in edges:
                assert tokens.sink in tokens.reached(edges - {edge})[-1]
                tried += 1
    assert tried > 100


def test_rectangles_hold_every_edge_once():
    for seed in SEEDS:
        cut = drawn(seed, 6, 3, 0.5).graph(True).cut()
        count = np.zeros(cut.edges.shape, dtype=int)
        for queries, keys, layers in cut.rectangles():
            count[list(layers)] += queries[:, None] & keys[None]
        np.testing.assert_array_equal(count, cut.edges.astype(int))


def test_an_answer_that_carries_the_source_cannot_be_closed():
    tokens = replace(drawn(0, 4, 2, 0.5), sink=2)
    assert next(path.hops for path in tokens.graph(True).paths()) == ()
    with pytest.raises(InterventionError, match="the answer position carries the source itself"):
        tokens.graph(True).cut()
