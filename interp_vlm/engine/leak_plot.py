"""Leaks as a picture: layers across, groups of tokens up, what is blocked, and the routes that are left."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp_vlm.engine.leak_words import Route, spans

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp_vlm.engine.leaks import Leaks
    from interp_vlm.interventions.routes import RouteGraph

__all__ = ["plot_leaks"]

# Okabe and Ito's colours, which most colour-blind readers can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_BLOCKED, _LANE = "#7f7f7f", "#e9e9e9"
_LETTERS = 13.5  # of the legend to the inch


def plot_leaks(found: Leaks, example: int) -> Figure:
    """See `Leaks.plot`."""
    from matplotlib import pyplot

    graph, routes, groups = found.graphs[example], found.routes[example], found.groups(example)
    cuts = _blocked(graph)
    ways = [_groups_of(route, groups) for route in routes]
    source = {int(group) for group in graph.groups[graph.enters.any(axis=0)]}
    end = int(graph.groups[graph.sink])
    shown = source | {end} | {group for way in ways for group in way} | {group for pair in cuts for group in pair}
    lanes = {group: height for height, group in enumerate(sorted(shown, key=lambda one: groups[one].positions[0]))}
    width = 9.0 + min(4.0, 0.15 * max(0, graph.n_layers - 8))
    labels = [_legend(number, route, int(_LETTERS * width)) for number, route in enumerate(routes)]
    height = 1.2 + 0.75 * len(lanes) + 0.2 * (2 + sum(map(len, labels)))
    # Made by pyplot, so that notebooks can show it, and closed, so that they show it once.
    figure = pyplot.figure(figsize=(width, height), layout="constrained")
    pyplot.close(figure)
    axes = figure.add_subplot()
    _draw_lanes(axes, graph, lanes, cuts)
    for number, (route, way) in enumerate(zip(routes, ways, strict=True)):
        offset = 0.4 / len(routes) * (number - (len(routes) - 1) / 2)
        _draw_route(axes, route, [lanes[group] + offset for group in way], graph.n_layers, _colour(number))
    names = [f"{'source: ' if group in source else ''}{groups[group]}" for group in lanes]
    axes.set_yticks(list(lanes.values()), [textwrap.fill(name, 34) for name in names], fontsize=8)
    axes.set_ylim(-0.6, len(lanes) - 0.4)
    _label_layers(axes, graph.n_layers)
    left = f"{len(routes)} route{'s' if len(routes) > 1 else ''} left" if routes else "closed: no route left"
    way = f"From tokens {spans(found.source[example])} to the answer at token {groups[end].positions[0]}"
    axes.set_title(f"{way}: {left}", fontsize=10)
    _explain(figure, labels, any(len(own) > 1 for route in routes for own in route.layers), bool(cuts))
    return figure


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _blocked(graph: RouteGraph) -> dict[tuple[int, int], list[int]]:
    """The layers at which every edge between two groups is taken away, by (key group, query group)."""
    found: dict[tuple[int, int], list[int]] = {}
    for layer in range(graph.n_layers):
        allowed, left = graph.allowed[graph.kind[layer]], graph.left[graph.kind[layer]]
        pairs = {(int(graph.groups[key]), int(graph.groups[query])) for query, key in np.argwhere(left < allowed)}
        for key, query in sorted(pairs):
            within = np.ix_(graph.groups == query, graph.groups == key)
            if not left[within].any():
                found.setdefault((key, query), []).append(layer)
    return found


def _groups_of(route: Route, groups: Sequence[Any]) -> list[int]:
    """The groups that a route's stops are parts of."""
    holds = [set(group.positions) for group in groups]
    return [next(n for n, own in enumerate(holds) if stop.positions[0] in own) for stop in route.stops]


def _draw_lanes(axes: Any, graph: RouteGraph, lanes: dict[int, int], cuts: dict[tuple[int, int], list[int]]) -> None:
    """The residual stream of each group, and crosses on the edges that are blocked."""
    for height in lanes.values():
        axes.fill_between([0, graph.n_layers], height - 0.25, height + 0.25, color=_LANE, linewidth=0, zorder=1)
    for (key, query), layers in cuts.items():
        low, high = lanes[key], lanes[query]
        for layer in layers:
            axes.plot([layer, layer + 1], [low, high], color=_BLOCKED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=2)
        middle = (low + high) / 2
        axes.plot(
            [layer + 0.5 for layer in layers], [middle] * len(layers), "x", color=_BLOCKED, markersize=6, zorder=3
        )


def _draw_route(axes: Any, route: Route, heights: list[float], n_layers: int, colour: str) -> None:
    """Every edge that the route can take, thinly, and the earliest way through, boldly."""
    level, xs, ys = 0, [0.0], [heights[0]]
    faint = 0.45 if n_layers <= 8 else 0.25
    for layers, low, high in zip(route.layers, heights[:-1], heights[1:], strict=True):
        for layer in layers:
            axes.plot([layer, layer + 1], [low, high], color=colour, linewidth=1.0, alpha=faint, zorder=4)
        first = next(layer for layer in layers if layer >= level)
        xs += [first, first + 1]
        ys += [low, high]
        level = first + 1
    axes.plot([*xs, n_layers], [*ys, heights[-1]], color=colour, linewidth=2.0, solid_joinstyle="round", zorder=5)
    # A dot where the route stops: other lanes are only passed over.
    axes.plot(xs[::2], ys[::2], "o", color=colour, markersize=4, zorder=6)
    axes.plot([n_layers], [heights[-1]], ">", color=colour, markersize=5, zorder=6, clip_on=False)


def _label_layers(axes: Any, n_layers: int) -> None:
    step = max(1, n_layers // 16)
    shown = range(0, n_layers, step)
    axes.set_xticks([layer + 0.5 for layer in shown], list(map(str, shown)))
    axes.set_xticks(range(n_layers + 1), minor=True)
    axes.tick_params(axis="x", which="major", length=0)
    axes.grid(axis="x", which="minor", color="#f0f0f0", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlim(-0.1, n_layers + 0.25)
    axes.set_xlabel("layer: attention moves information up or down, the residual stream keeps it where it is")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _legend(number: int, route: Route, width: int) -> list[str]:
    return textwrap.wrap(f"{number + 1}. {route}", width, subsequent_indent="   ")


def _explain(figure: Any, labels: Sequence[Sequence[str]], repeated: bool, blocked: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_colour(number), linewidth=2, label="\n".join(lines))
        for number, lines in enumerate(labels)
    ]
    if repeated:
        thin = Line2D([], [], color="0.3", linewidth=1.0, alpha=0.45, label="thin: the same at its other layers")
        handles.append(thin)
    if blocked:
        cross = Line2D([], [], color=_BLOCKED, linestyle=(0, (2, 2)), linewidth=0.8, marker="x", markersize=6,
                       label="blocked in every head")  # fmt: skip
        handles.append(cross)
    if handles:
        figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=8)
