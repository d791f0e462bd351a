"""Every way of the library to say where a model computes, each as one function from a bench to what it names.

Thresholds are those of `bench.counts`; those of methods that measure no effect are the constants here. All were fixed
before the first score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

import interp_vlm as iv
from experiments.ground_truth.bench import LEVEL, Bench, Found
from interp_vlm.study.knockout import EDGES

__all__ = ["CUTS", "METHODS", "PAIRS", "SHARP", "UNPAIRED", "cuts", "pairs"]

SHARP = 0.5
"""Mean attention on one image token from which a head looks important."""
PARTS = 4
"""Into how many parts a group of cells with an effect is split."""
ROLES = {
    "image": iv.select.image,
    "text before the last": iv.select.all - iv.select.image - iv.select.last,
    "last": iv.select.last,
}
"""Where neurons are patched, all positions of a role at a time."""
Head = tuple[int, int]


def knockout(bench: Bench) -> Found:
    """Each head blocked by itself; then, in the heads with an effect, the positions as queries and as keys.

    A blocked head sees the first token alone. Effects are those on the difference between the two pictures.
    """
    first = iv.select.of(bench.places[:1])
    blocks = [
        iv.AttentionKnockout("all", iv.select.all - first, [layer], [head], allow_empty=True)
        for layer, head in bench.heads
    ]
    effects = bench.blocked(blocks)
    heads = _named(bench.heads, bench.counts(effects))
    starts = [
        [(layer, side, place) for place in bench.places]
        for layer in sorted(_layers(heads))
        for side in ("query", "key")
    ]
    ends = _descend(bench, starts, lambda groups: bench.blocked([_ends(group, heads, bench) for group in groups]))
    return Found(_layers(heads), heads, ends=ends, ranking=_ranking(bench, effects))


def _ends(cells: list[tuple[int, str, int]], heads: frozenset[Any], bench: Bench) -> iv.AttentionKnockout:
    """A position that no longer looks at any other, or that no other looks at.

    Of several positions also those edges between them, and of each to itself, but never those to the first token, so
    that every query keeps a key.
    """
    layer, side, _ = cells[0]
    own = [head for at, head in heads if at == layer]
    first, here = iv.select.of(bench.places[:1]), iv.select.of([place for *_, place in cells])
    others = iv.select.all - (here if len(cells) == 1 else first)
    if side == "query":
        return iv.AttentionKnockout(here, others, [layer], own, allow_empty=True)
    if len(cells) > 1:
        here, others = here - first, iv.select.all
    return iv.AttentionKnockout(others, here, [layer], own, allow_empty=True)


def _descend(
    bench: Bench, groups: list[list[Any]], effects_of: Callable[[list[list[Any]]], np.ndarray]
) -> frozenset[Any]:
    """The cells with an effect, found from coarse to fine: groups with an effect are split until they are single."""
    found: set[Any] = set()
    while groups:
        hit = bench.counts(effects_of(groups))
        effective = [group for group, one in zip(groups, hit, strict=True) if one]
        found |= {group[0] for group in effective if len(group) == 1}
        groups = [part for group in effective if len(group) > 1 for part in _split(group)]
    return frozenset(found)


def _split(group: list[Any]) -> list[list[Any]]:
    size = -(-len(group) // PARTS)
    return [group[start : start + size] for start in range(0, len(group), size)]


def windows(bench: Bench, size: int) -> Found:
    """The published protocol: text to image and question to last in windows of layers; names centres with an effect."""
    routes = [EDGES[name] for name in ("image to all text", "question to last")]
    many = [
        iv.AttentionKnockout(queries, keys, window, allow_empty=True)
        for window in iv.windows(bench.vlm, size)
        for queries, keys in routes
    ]
    hit = np.any(bench.counts(bench.blocked(many)).reshape(len(bench.layers), -1), axis=1)
    return Found(layers=_named(bench.layers, hit))


def pairs(bench: Bench) -> Found:
    """Heads that act by themselves, and pairs that together do a tenth of the whole more than the two by themselves.

    Pairs of layers come first; then pairs of heads in layers that act, alone or in a pair.
    """
    alone, together = _coupled(bench, [(layer, None) for layer in bench.layers])
    acting = {layer for layer, _ in alone | together}
    alone, together = _coupled(bench, [place for place in bench.heads if place[0] in acting])
    heads = alone | together
    return Found(_layers(heads), heads)


def _coupled(bench: Bench, places: list[Any]) -> tuple[frozenset[Any], frozenset[Any]]:
    """Which heads (or whole layers) have an effect when blocked alone, and which with another, beyond the two alone."""
    keys = iv.select.all - iv.select.of(bench.places[:1])
    one = {
        (layer, head): iv.AttentionKnockout("all", keys, [layer], head if head is None else [head], allow_empty=True)
        for layer, head in places
    }
    couples = list(combinations(places, 2))
    effects = bench.blocked([*one.values(), *([one[a], one[b]] for a, b in couples)])
    single = dict(zip(places, effects, strict=False))
    beyond = effects[len(places) :] - np.array([single[a] + single[b] for a, b in couples]).reshape(-1, bench.pictures)
    together = {place for couple in _named(couples, bench.counts(beyond)) for place in couple}
    return _named(places, bench.counts(effects[: len(places)])), frozenset(together)


def denoising(bench: Bench) -> Found:
    """Clean activations into the corrupt run: each head, and from coarse to fine the stream's cells and the neurons."""
    return _patched(bench, bench.clean, bench.restored, stream=True)


def noising(bench: Bench) -> Found:
    """Corrupt activations into the clean run: each head, and from coarse to fine the neurons."""
    return _patched(bench, bench.corrupt, bench.removed, stream=False)


def _patched(bench: Bench, source: Any, effects_of: Callable[[Sequence[Any]], np.ndarray], stream: bool) -> Found:
    cache = bench.vlm.capture(source, ["z", "resid_post", "mlp_post"])
    effects = effects_of([_patch(cache, "z", layer, heads=[head]) for layer, head in bench.heads])
    heads = _named(bench.heads, bench.counts(effects))

    def cells(groups: list[list[Any]]) -> np.ndarray:
        return effects_of([_patch(cache, "resid_post", g[0][0], [place for _, place in g]) for g in groups])

    def units(groups: list[list[Any]]) -> np.ndarray:
        return effects_of(
            [_patch(cache, "mlp_post", g[0][1], ROLES[g[0][0]], units=[unit for *_, unit in g]) for g in groups]
        )

    layers = [[(layer, place) for place in bench.places] for layer in bench.layers]
    positions = _descend(bench, layers, cells) if stream else None
    width = range(bench.vlm.anatomy.d_mlp)
    by_role = _descend(
        bench, [[(role, layer, unit) for unit in width] for role in ROLES for layer in bench.layers], units
    )
    neurons = frozenset((layer, unit) for _, layer, unit in by_role)
    return Found(_layers(heads), heads, None, positions, neurons, _ranking(bench, effects))


def _patch(cache: iv.Cache, site: str, layer: int, positions: Any = "all", **cells: Any) -> iv.ActivationPatch:
    return iv.ActivationPatch(site, [layer], positions, **cells, source=cache, allow_empty=True)


def attribution(bench: Bench) -> Found:
    """Attribution patching: the first-order estimate of denoising, from one backward pass a site."""
    estimates = {
        site: iv.attribution(bench.vlm, bench.clean, bench.corrupt, site, bench.metric)
        for site in ("z", "resid_post", "mlp_post")
    }
    by_head = estimates["z"].values.nansum(dim=2).flatten(1).T.double().cpu().numpy()
    heads = _named(bench.heads, bench.counts(by_head))
    stream = estimates["resid_post"]
    cells = [(layer, int(place)) for layer in stream.layers for place in stream.positions[0]]
    positions = _named(cells, bench.counts(stream.values.flatten(1).T.double().cpu().numpy()))
    units = estimates["mlp_post"].neurons
    assert units is not None
    by_unit = units.nansum(dim=2).flatten(1).T.double().cpu().numpy()
    names = [(layer, unit) for layer in bench.layers for unit in range(units.shape[-1])]
    return Found(_layers(heads), heads, None, positions, _named(names, bench.counts(by_unit)), _ranking(bench, by_head))


def direct(bench: Bench) -> Found:
    """Direct logit attribution of each head at the answer, clean picture against corrupt."""
    parts = [
        iv.head_contributions(bench.vlm, batch, correct=bench.right, wrong=bench.wrong).heads[..., 0]
        for batch in (bench.clean, bench.corrupt)
    ]
    effects = (parts[0] - parts[1]).detach().flatten(1).T.double().cpu().numpy()
    heads = _named(bench.heads, bench.counts(effects))
    return Found(_layers(heads), heads, ranking=_ranking(bench, effects))


def sharpness(bench: Bench) -> Found:
    """The baseline: heads in which some text position pays half of its attention or more to one image token."""
    cache = bench.vlm.capture(bench.clean, "pattern", positions="text")
    image = bench.clean.tokens[0].image.tolist()
    rows = cache.positions[0].tolist()
    mean = cache["pattern"].double().mean(dim=0)[..., image].cpu().numpy()  # layer, head, query, image token
    sharpest = mean.max(axis=(2, 3))
    heads = _named(bench.heads, (sharpest >= SHARP).ravel())
    ends = set()
    for layer, _, query, key in np.argwhere(mean >= SHARP):
        ends |= {(int(layer), "query", rows[query]), (int(layer), "key", image[key])}
    ranking = dict(zip(bench.heads, sharpest.ravel().tolist(), strict=True))
    return Found(_layers(heads), heads, ends=frozenset(ends), ranking=ranking)


def probes(bench: Bench) -> Found:
    """The onset of a layerwise probe of the answer at the last position, where it is above chance (permutations)."""
    values, labels, groups = _labelled(bench)["resid_post"]
    report = iv.probe_layers(
        values, labels, groups, position="before_answer", site="resid_post", permutations=39, resamples=1000,
        folds=3, inner_folds=2,
    )  # fmt: skip
    if not np.isfinite(report.onset.value):
        return Found(layers=frozenset())
    onset = int(report.onset.value)
    p = report.auroc[onset].p
    return Found(layers=frozenset({onset} if p is not None and p <= 1.0 - LEVEL + 1e-9 else ()))


def l1_neurons(bench: Bench) -> Found:
    """Stable neurons of L1 logistic regression on each layer's MLP at the last position."""
    values, labels, groups = _labelled(bench)["mlp_post"]
    found = frozenset(
        (layer, unit)
        for layer in bench.layers
        for unit in iv.stable_neurons(values[:, layer], labels, groups, draws=20).units
    )
    return Found(neurons=found)


def _labelled(bench: Bench) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each site (example, layer, unit) at the last position, which answer is right, and the pair it belongs to."""
    first, second = bench.probed
    caches = [bench.vlm.capture(batch, ["resid_post", "mlp_post"], positions="last") for batch in (first, second)]
    stacked = {
        site: np.concatenate([cache[site][:, :, 0].double().cpu().numpy() for cache in caches])
        for site in ("resid_post", "mlp_post")
    }
    return {site: (values, bench.labels, np.arange(len(values)) % len(first)) for site, values in stacked.items()}


def _named(names: Sequence[Any] | range, hit: np.ndarray) -> frozenset[Any]:
    return frozenset(name for name, one in zip(names, hit, strict=True) if one)


def _layers(heads: frozenset[Any]) -> frozenset[Any]:
    return frozenset(layer for layer, _ in heads)


def _ranking(bench: Bench, effects: np.ndarray) -> dict[Head, float]:
    return dict(zip(bench.heads, effects.mean(axis=1).tolist(), strict=True))


def cuts(bench: Bench) -> dict[str, float]:
    """Share of the pictures' difference that is gone when their way is cut: the planted edges, what one would cut first
    (the last token's sight of the patch, in every layer), and that with its leaks closed."""
    planted = bench.planted
    edges = [iv.AttentionKnockout(list(e.queries), list(e.keys), [e.layer], list(e.heads)) for e in planted.route.edges]
    sight = iv.AttentionKnockout("last", list(planted.signal))
    closed = sight.closing(bench.vlm, bench.clean[:1])
    effects = bench.blocked([edges, [sight], closed]).mean(axis=1) / bench.whole.mean()
    return dict(zip(CUTS, effects.tolist(), strict=True))


CUTS = ("the planted edges", "the last token's sight of the patch, every layer", "the same with its leaks closed")
METHODS: dict[str, Callable[[Bench], Found]] = {
    "knockout": knockout,
    "knockout windows of 1": lambda bench: windows(bench, 1),
    "knockout windows of 3": lambda bench: windows(bench, 3),
    "patching, clean into corrupt": denoising,
    "patching, corrupt into clean": noising,
    "attribution patching": attribution,
    "direct logit attribution": direct,
    "probe's onset": probes,
    "L1 neurons": l1_neurons,
    "attention sharpness": sharpness,
}
PAIRS = "knockout of pairs"
UNPAIRED = ("probe's onset", "L1 neurons", "attention sharpness")
"""Methods that do not compare the pictures of a pair."""
