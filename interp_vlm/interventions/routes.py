"""Routes of information through a decoder: a layered graph of the residual stream, searched and cut.

Nothing here knows a model: masks, blocked edges and replaced cells come in as arrays. Positions that are treated alike
are taken together as classes, which loses nothing (`alike`), so that long prompts cost little.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from interp_vlm.errors import InterventionError

__all__ = ["Cut", "Path", "RouteGraph", "alike"]

Edges = Sequence[np.ndarray]  # of each layer, (query, key)

_FAR = np.iinfo(np.int32).max // 2
_LONGEST = 3  # stops between source and answer that are looked for once a shorter route is known


@dataclass(frozen=True, eq=False)
class Path:
    """A way for information from a source to the answer, by groups of classes.

    Attributes:
        groups: the groups passed, from the source to the answer position.
        hops: for each attention step, the layers at which it can happen and the key and query classes that take part.
    """

    groups: tuple[int, ...]
    hops: tuple[tuple[tuple[int, ...], Bool[np.ndarray, " cls"], Bool[np.ndarray, " cls"]], ...]


@dataclass(frozen=True, eq=False)
class Cut:
    """Attention edges whose removal leaves no route.

    Attributes:
        edges: True where the edges from a key class to a query class are cut.
        count: how many edges that are, one for each layer, head, query and key, as receipts count them.
    """

    edges: Bool[np.ndarray, "layer query key"]
    count: int

    def rectangles(self) -> Iterator[tuple[Bool[np.ndarray, " cls"], Bool[np.ndarray, " cls"], tuple[int, ...]]]:
        """The edges as query classes, key classes and layers, each edge once."""
        found: dict[tuple[bytes, tuple[int, ...]], list[int]] = defaultdict(list)
        for query in np.flatnonzero(self.edges.any(axis=(0, 2))):
            by_keys: dict[bytes, list[int]] = defaultdict(list)
            for layer in np.flatnonzero(self.edges[:, query].any(axis=1)):
                by_keys[self.edges[layer, query].tobytes()].append(int(layer))
            for keys, layers in by_keys.items():
                found[keys, tuple(layers)].append(int(query))
        for (keys, layers), queries in found.items():
            chosen = np.zeros(self.edges.shape[1], dtype=bool)
            chosen[queries] = True
            yield chosen, np.frombuffer(keys, dtype=bool), layers


@dataclass(frozen=True, eq=False)
class RouteGraph:
    """Where information can go in the decoder's run on one example.

    A node is the residual stream of a class of positions before a layer; after the last layer comes one level more.
    Over a layer, information stays where it is (residual stream) or moves from a key to a query (attention).

    Attributes:
        members: the positions of each class, which are treated alike (see `alike`).
        groups: for each class the number of the group that words call it by.
        allowed: by kind of layer, the heads in which the model's own mask lets a query class attend a key class.
        left: the same after the interventions.
        kind: the kind of each layer.
        stays: whether the residual stream of a class is carried over a layer.
        present: whether the residual stream of a class at a level is the run's own, not a replacement.
        enters: where the source's information enters.
        sink: the class of the answer position.

    Example:
        >>> causal = np.tril(np.ones((1, 3, 3), dtype=np.int16))  # three tokens, one head
        >>> everywhere = np.ones((3, 3), dtype=bool)
        >>> first = np.eye(3, dtype=bool) & (np.arange(3) == 0)  # the first token, at the input alone
        >>> graph = RouteGraph(
        ...     tuple(np.arange(3)[:, None]), np.arange(3), causal, causal, np.zeros(2, dtype=int),
        ...     everywhere[:2], everywhere, first, sink=2,
        ... )
        >>> [path.groups for path in graph.paths()]
        [(0, 2), (0, 1, 2)]
        >>> graph.cut(np.array([True, False, False])).count
        3
    """

    members: tuple[Int[np.ndarray, " _"], ...]
    groups: Int[np.ndarray, " cls"]
    allowed: Int[np.ndarray, "kind query key"]
    left: Int[np.ndarray, "kind query key"]
    kind: Int[np.ndarray, " layer"]
    stays: Bool[np.ndarray, "layer cls"]
    present: Bool[np.ndarray, "level cls"]
    enters: Bool[np.ndarray, "level cls"]
    sink: int

    @property
    def n_layers(self) -> int:
        return len(self.kind)

    @cached_property
    def open(self) -> Edges:
        """For each layer, the edges in which any head is left."""
        kinds = self.left > 0
        return [kinds[kind] for kind in self.kind]

    @cached_property
    def reached(self) -> Bool[np.ndarray, "level cls"]:
        """Where the source's information gets to."""
        return self._forward(self.open)

    @cached_property
    def leading(self) -> Bool[np.ndarray, "level cls"]:
        """From where information gets to the answer."""
        return self._backward(self.open)

    @property
    def closed(self) -> bool:
        """Whether nothing of the source gets to the answer."""
        return not bool(self.reached[-1, self.sink])

    def _forward(self, edges: Edges) -> Bool[np.ndarray, "level cls"]:
        reached = self.enters & self.present
        for layer in range(self.n_layers):
            here = reached[layer]
            there = (here & self.stays[layer]) | edges[layer][:, here].any(axis=1)
            reached[layer + 1] |= there & self.present[layer + 1]
        return reached

    def _backward(self, edges: Edges) -> Bool[np.ndarray, "level cls"]:
        leading = np.zeros_like(self.present)
        leading[-1, self.sink] = self.present[-1, self.sink]
        for layer in reversed(range(self.n_layers)):
            there = leading[layer + 1]
            here = (there & self.stays[layer]) | edges[layer][there].any(axis=0)
            leading[layer] = here & self.present[layer]
        return leading

    # -- routes ----------------------------------------------------------------------------------------------------

    def paths(self) -> list[Path]:
        """The surviving routes: for each source group the direct one, and the shortest through each smallest set of
        other groups that suffices."""
        on_way = (self.reached & self.leading).any(axis=0)
        end = int(self.groups[self.sink])
        found = []
        for start in np.unique(self.groups[self.enters.any(axis=0) & on_way]).tolist():
            others = [group for group in np.unique(self.groups[on_way]).tolist() if group not in (start, end)]
            direct = self._suffices((start, end), start)
            if direct:
                found.append(self._shortest((start, end), start))
            if start != end or not direct:  # else the answer position is a source: there is nothing to pass through
                found += [self._shortest((start, *stops, end), start, direct)
                          for stops in self._stops(start, end, others, direct)]  # fmt: skip
        return found

    def _stops(self, start: int, end: int, others: Sequence[int], direct: bool) -> Iterator[tuple[int, ...]]:
        """The smallest sets of groups that suffice to pass information on; where it can go straight, it must not."""
        enough: list[set[int]] = []
        for size in range(1, len(others) + 1):
            if size > _LONGEST and (enough or direct):
                return
            for stops in itertools.combinations(others, size):
                if any(known <= set(stops) for known in enough):
                    continue
                if self._suffices((start, *stops, end), start, direct):
                    enough.append(set(stops))
                    yield stops

    def _suffices(self, groups: Sequence[int], start: int, around: bool = False) -> bool:
        return bool(self._fewest(groups, start, around)[-1, self.sink] < _FAR)

    def _fewest(self, groups: Sequence[int], start: int, around: bool) -> Int[np.ndarray, "level cls"]:
        """The fewest hops from the source group to each node within groups; around: not straight to the answer."""
        within = np.isin(self.groups, groups)
        hops = np.where(self.enters & self.present & (self.groups == start), 0, _FAR)
        for layer, edges in enumerate(self._edges(start, around)):
            here = hops[layer]
            there = np.where(self.stays[layer], here, _FAR)
            for steps in np.unique(here[here < _FAR])[::-1]:
                there[edges[:, here == steps].any(axis=1) & (there > steps)] = steps + 1
            there[~(self.present[layer + 1] & within)] = _FAR
            hops[layer + 1] = np.minimum(hops[layer + 1], there)
        return hops

    def _edges(self, start: int, around: bool) -> Edges:
        if not around:
            return self.open
        straight = (self.groups == self.groups[self.sink])[:, None] & (self.groups == start)[None]
        return [edges & ~straight for edges in self.open]

    def _shortest(self, groups: Sequence[int], start: int, around: bool = False) -> Path:
        """The path with the fewest hops within groups, walked back from the answer."""
        hops = self._fewest(groups, start, around)
        edges = self._edges(start, around)
        level, here, passed = self.n_layers, self.sink, [self.sink]
        while hops[level, here] > 0 or not (self.enters & self.present)[level, here]:
            level -= 1
            if self.stays[level, here] and hops[level, here] == hops[level + 1, here]:
                continue
            before = edges[level][here] & (hops[level] + 1 == hops[level + 1, here])
            here = int(np.flatnonzero(before)[0])
            passed.append(here)
        order = tuple(int(self.groups[each]) for each in reversed(passed))
        return Path(order, tuple(self._hops(order)))

    def _hops(self, groups: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], np.ndarray, np.ndarray]]:
        """Every layer and class by which information can take these groups in this order."""
        inside = [self.groups == group for group in groups]
        reached = [self.enters & self.present & inside[0]]
        for layer in range(self.n_layers):  # the source moves along its own residual stream
            reached[0][layer + 1] |= reached[0][layer] & self.stays[layer] & self.present[layer + 1]
        for own in inside[1:]:
            reached.append(np.zeros_like(self.present))
            for layer in range(self.n_layers):
                moved = self.open[layer][:, reached[-2][layer]].any(axis=1)
                there = (reached[-1][layer] & self.stays[layer]) | moved
                reached[-1][layer + 1] = there & own & self.present[layer + 1]
        leading = np.zeros_like(self.present)
        leading[-1, self.sink] = self.present[-1, self.sink]
        ways: list[tuple[tuple[int, ...], np.ndarray, np.ndarray]] = []
        for step in reversed(range(len(groups))):
            for layer in reversed(range(self.n_layers)):
                leading[layer] |= leading[layer + 1] & self.stays[layer] & self.present[layer] & inside[step]
            if step == 0:
                break
            before = np.zeros_like(self.present)
            layers, keys, queries = [], np.zeros(len(self.members), dtype=bool), np.zeros(len(self.members), dtype=bool)
            for layer in range(self.n_layers):
                edges = self.open[layer] & leading[layer + 1][:, None]
                before[layer] = edges.any(axis=0) & inside[step - 1] & self.present[layer]
                used = edges & reached[step - 1][layer][None]
                if used.any():
                    layers.append(layer)
                    keys |= used.any(axis=0)
                    queries |= used.any(axis=1)
            ways.append((tuple(layers), keys, queries))
            leading = before
        return reversed(ways)

    # -- cuts ------------------------------------------------------------------------------------------------------

    def cut(self, keys: Bool[np.ndarray, " cls"] | None = None) -> Cut:
        """The fewest attention edges to remove so that no route is left: a minimum cut.

        Args:
            keys: only edges that end in these key classes may be removed; None for any edge.

        Raises:
            InterventionError: when no removal of such edges closes the routes.

        Source:
            Ford and Fulkerson, "Maximal flow through a network", 1956. Classes lose nothing here: outside, the members
            of a class have the same edges, so the choice that is cheapest for one of them is cheapest for all, and
            when all make the same choice no edge between them is cut.
        """
        may = np.ones(len(self.members), dtype=bool) if keys is None else keys

        fixed = [edges & ~may[None] for edges in self.open]
        near, far = self._forward(fixed), self._backward(fixed)
        if (near & far).any():
            raise InterventionError(
                "no knockout closes these routes: the answer position carries the source itself",
                expected="a source that the answer position has to attend",
                remedy="leave the last position out of the source",
            )
        side = self._source_side(near, far, may)
        edges = np.stack([
            self.open[layer] & (side[layer] & self.reached[layer])[None]
            & (~side[layer + 1] & self.leading[layer + 1])[:, None]
            for layer in range(self.n_layers)
        ])  # fmt: skip
        return Cut(edges, sum(int(self._weight(layer)[edges[layer]].sum()) for layer in range(self.n_layers)))

    @cached_property
    def _weights(self) -> Int[np.ndarray, "kind query key"]:
        size = np.array([len(own) for own in self.members], dtype=np.int64)
        return self.left.astype(np.int64) * size[:, None] * size[None]

    def _weight(self, layer: int) -> Int[np.ndarray, "query key"]:
        return self._weights[self.kind[layer]]

    def _source_side(self, near: np.ndarray, far: np.ndarray, may: np.ndarray) -> Bool[np.ndarray, "level cls"]:
        """The nodes on the source's side of a minimum cut, of all such cuts the one nearest to the source."""
        between = self.reached & self.leading & ~near & ~far
        if not between.any():
            return near
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        number = np.full(near.shape, -1)
        number[near], number[far] = 0, 1
        number[between] = np.arange(2, 2 + int(between.sum()))
        tails, heads, sizes = self._arcs(number, may)
        # No cut needs more than all that leaves the source or all that enters the sink: that much is endless.
        endless = 1 + min(int(sizes[(tails == 0) & (heads > 1)].sum()), int(sizes[(heads == 1) & (tails > 1)].sum()))
        if endless >= np.iinfo(np.int32).max:
            raise InterventionError(
                f"{endless} edges to choose the fewest of",
                expected="fewer than 2**31",
                remedy="cut edges='source'",
            )
        inner = (tails > 1) | (heads > 1)  # what leads straight across is cut in any case
        sizes = np.where(sizes < 0, endless, np.minimum(sizes, endless))
        shape = (int(between.sum()) + 2,) * 2
        summed = coo_array((sizes[inner], (tails[inner], heads[inner])), shape=shape).tocsr()
        summed.data = np.minimum(summed.data, endless).astype(np.int32)
        flow = maximum_flow(summed, 0, 1).flow
        rest = (summed - flow).tocsr()
        rest.data[rest.data < 0] = 0
        rest.eliminate_zeros()
        side = np.zeros(shape[0], dtype=bool)
        side[breadth_first_order(rest, 0, return_predecessors=False)] = True
        return near | (between & side[number])

    def _arcs(self, number: np.ndarray, may: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arcs between numbered nodes as (tails, heads, sizes); those that must not be cut have size -1."""
        parts = []
        for layer in range(self.n_layers):
            here, there = number[layer], number[layer + 1]
            stay = np.flatnonzero(self.stays[layer] & (here > 1) & (there >= 0))
            parts.append((here[stay], there[stay], np.full(len(stay), -1)))
            query, key = np.nonzero(self.open[layer] & (there >= 1)[:, None] & ((here == 0) | (here > 1))[None])
            sizes = np.where(may[key], self._weight(layer)[query, key], -1)
            parts.append((here[key], there[query], sizes))
        tails, heads, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
        real = tails != heads
        return tails[real], heads[real], sizes[real]


def alike(left: Int[np.ndarray, "kind query key"], labels: Sequence[Hashable]) -> list[Int[np.ndarray, " _"]]:
    """The coarsest classes of positions with equal labels and, in every kind of layer, equal edges to and from
    everything outside their class.

    What reaches one member of a class reaches the others at the same layer, and whatever one passes on the others pass
    on too. Edges inside a class then add nothing, and a search over classes finds what a search over positions finds.

    Args:
        left: heads in which each position may attend each other one, by kind of layer.
        labels: positions with different labels are never taken together.

    Example:
        >>> causal = np.tril(np.ones((1, 5, 5), dtype=int))
        >>> [part.tolist() for part in alike(causal, ["text", "image", "image", "text", "text"])]
        [[0], [1, 2], [3, 4]]
    """
    first: dict[Hashable, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        first[label].append(position)
    parts = [np.array(own) for own in first.values()]
    while True:
        finer = [piece for part in parts for piece in _split(left, part)]
        if len(finer) == len(parts):
            return sorted(parts, key=lambda part: int(part[0]))
        parts = finer


def _split(left: np.ndarray, part: np.ndarray) -> list[np.ndarray]:
    if len(part) == 1:
        return [part]
    outside = np.ones(left.shape[1], dtype=bool)
    outside[part] = False
    rows = left[:, part][:, :, outside].swapaxes(0, 1).reshape(len(part), -1)
    columns = left[:, :, part][:, outside].transpose(2, 0, 1).reshape(len(part), -1)
    found: dict[bytes, list[int]] = defaultdict(list)
    for position, edges in zip(part, np.concatenate([rows, columns], axis=1), strict=True):
        found[edges.tobytes()].append(int(position))
    return [np.array(own) for own in found.values()]
