"""Leaks: against a search token by token, against runs, and on planted circuits whose routes are known."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import interp_vlm as iv
from interp_vlm.engine.leaks import Leaks, leaks
from interp_vlm.testbed.planted import Planted, plant
from tests.engine import reference
from tests.engine.settings import Setting
from tests.engine.test_knockout import allowed
from tests.tiny import FAMILIES

ROOT = Path(__file__).parents[2]
every_family = pytest.mark.parametrize("family", FAMILIES)
THREE = ("llava", "paligemma", "qwen2_vl")
every_main_family = pytest.mark.parametrize("family", THREE)

SOME = iv.select.random(0.4, seed=1)
REST = iv.select.text - iv.select.last


def knockout(queries: Any, keys: Any, layers: Any = "all", heads: Any = None) -> iv.AttentionKnockout:
    return iv.AttentionKnockout(queries, keys, layers=layers, heads=heads, allow_empty=True)


def zero(site: str, layers: Any, positions: Any, **more: Any) -> iv.Ablation:
    return iv.Ablation(site, layers=layers, positions=positions, to="zero", allow_empty=True, **more)


CASES: dict[str, tuple[Any, list[Any]]] = {
    "nothing done": ("image", []),
    "a window": ("image", [knockout("last", "image", [1])]),
    "the last layers": ("image", [knockout("last", "image", [1, 2])]),
    "all layers, one query": ("image", [knockout("last", "image")]),
    "some heads": ("image", [knockout("text", "image", heads=[0, -1])]),
    "all heads, by twos": ("image", [knockout("text", "image", heads=[0, 1]), knockout("text", "image", heads=[2, 3])]),
    "all text": ("image", [knockout("text", "image")]),
    "all text but for the last layer": ("image", [knockout("text", "image", [0, 1])]),
    "some patches": (SOME, [knockout("text", SOME)]),
    "some patches, all others": (SOME, [knockout(iv.select.all - SOME, SOME)]),
    "question to last": ("question", [knockout("last", "question")]),
    "bos and template too": ("question", [knockout(iv.select.all - iv.select.question, "question")]),
    "heads at z": ("image", [knockout("text", "image", heads=[0, 1]), zero("z", "all", "text", heads=[2, 3])]),
    "one head at z": ("image", [knockout("text", "image", heads=[0, 1]), zero("z", "all", "text", heads=[2])]),
    "attention of the text": ("image", [zero("attn_out", "all", "text")]),
    "pictures wiped after layer 0": ("image", [zero("resid_post", [0], "image"), knockout("text", "image", [0])]),
    "pictures wiped, read before": ("image", [zero("resid_post", [0], "image")]),
    "relays wiped before the last layer": ("image", [zero("resid_pre", [2], REST), knockout("last", "image")]),
    "relays wiped everywhere": ("image", [zero("resid_mid", "all", REST), knockout("last", "image")]),
    "answer wiped halfway": ("image", [zero("resid_mid", [1], "last"), knockout("last", "image", [2])]),
    "units alone": ("image", [zero("resid_post", [0], "image", units=range(60)), knockout("text", "image", [0])]),
    "MLPs": ("image", [zero("mlp_out", "all", "all")]),
    "projected tokens": ("image", [iv.Ablation("projector_out", to="zero")]),
}


def cases(family: str) -> list[str]:
    """All cases in one family, some of them in each other one."""
    step = {"llava": 1, "paligemma": 2, "qwen2_vl": 2}.get(family, 4)
    return list(CASES)[FAMILIES.index(family) % step :: step]


@functools.cache
def found(family: str, case: str) -> Leaks:
    source, interventions = CASES[case]
    setting = Setting(family)
    return leaks(setting.vlm, setting.batch, interventions, source=source)


def by_token(setting: Setting, source: Any, interventions: Sequence[Any], row: int) -> list[set[int]]:
    """Where the source's information is at each level, followed token by token and head by head."""
    tokens, heads = setting.batch.tokens[row], range(setting.vlm.anatomy.n_heads)
    blocked = {
        layer: torch.zeros(len(heads), *mask.shape[2:], dtype=torch.bool) for layer, mask in masks(setting).items()
    }
    wiped: dict[tuple[str, int], set[tuple[int, int]]] = {}  # (head, position)
    for each in interventions:
        if isinstance(each, iv.AttentionKnockout):
            named = torch.zeros_like(blocked[0])
            queries, keys = (iv.select.of(value).positions(tokens) for value in (each.queries, each.keys))
            for head in heads if each.heads is None else each.heads:
                named[head, queries[:, None], keys] = True
            blocked |= {layer: blocked[layer] | named for layer in numbers(each.layers)}
        elif each.units is None:
            where = iv.select.of("image" if each.site == "projector_out" else each.positions).positions(tokens)
            for layer in numbers(each.layers):
                own = itertools.product(each.heads or heads, where.tolist())
                wiped.setdefault((each.site, layer), set()).update(own)

    def gone(site: str, layer: int) -> set[int]:
        return {at for _, at in wiped.get((site, layer), ())}

    begun = set(iv.select.of(source).positions(tokens).tolist())
    added = {at for at in begun if tokens.image_index[at] >= 0} if setting.vlm.anatomy.between_layers else set()
    levels = [begun - gone("projector_out", 0) - gone("resid_pre", 0)]
    for layer, mask in masks(setting).items():
        deaf = wiped.get(("z", layer), set()) | wiped.get(("attn_out", layer), set())
        open_ = (mask[row] & ~blocked[layer]).numpy()
        hears = {int(query) for head in heads for query in open_[head][:, sorted(levels[-1])].any(axis=1).nonzero()[0]
                 if (head, int(query)) not in deaf}  # fmt: skip
        there = ((levels[-1] | hears) & set(tokens.all.tolist())) - gone("resid_mid", layer)
        there |= added if layer < 2 else set()
        levels.append(there - gone("resid_post", layer) - gone("resid_pre", layer + 1))
    return levels


def numbers(layers: Any) -> list[int]:
    return list(range(3)) if layers == "all" else list(layers)


@functools.cache
def masks(setting: Setting) -> dict[int, Tensor]:
    """Each layer's own mask, as the raw model hands it to attention."""
    seen: dict[int, Tensor] = {}

    def remember(layer: int) -> reference.Edit:
        def look(mask: Any) -> Any:
            seen[layer] = allowed(mask, setting.batch.inputs["input_ids"].shape[1])
            return mask

        return look

    with reference.hooked(setting.raw, {("attn_mask", layer): remember(layer) for layer in range(3)}):
        reference.forward(setting.raw, setting.batch.inputs)
    return {layer: mask.expand(len(setting.batch), -1, -1, -1) for layer, mask in seen.items()}


@every_family
def test_search_by_groups_finds_what_search_by_tokens_finds(family):
    setting = Setting(family)
    for number, case in enumerate(cases(family)):
        row = number % 3
        graph, wanted = found(family, case).graphs[row], by_token(setting, *CASES[case], row)
        got = [{int(at) for n in np.flatnonzero(level) for at in graph.members[n]} for level in graph.reached]
        assert got == wanted, case
        assert (found(family, case).routes[row] == ()) == (int(setting.batch.last[row]) not in wanted[-1]), case


def disturbed(setting: Setting, source: Any, interventions: Sequence[Any]) -> Tensor:
    """For each example, how far the answer's logits move when what enters the decoder at the source is another."""
    noise = torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # what the interventions put there are the same numbers in both runs: zeros, not means of what was there
    site = "resid_pre" if source == "question" else "projector_out"
    push = iv.Steering(site, layers=0, positions=source, direction=noise)
    still = setting.vlm.run(setting.batch, list(interventions), engine="full").logits
    moved = setting.vlm.run(setting.batch, [push, *interventions], engine="full").logits
    return (still - moved).abs().amax(dim=1)


@every_family
def test_another_source_changes_the_answer_exactly_where_a_route_is_left(family):
    setting = Setting(family)
    seen = set()
    for case in cases(family):
        source, interventions = CASES[case]
        moved = disturbed(setting, source, interventions)
        for row, graph in enumerate(found(family, case).graphs):
            # vision features that enter between layers are not disturbed here: then a route may be one of theirs alone
            if graph.closed or not setting.vlm.anatomy.between_layers:
                assert (float(moved[row]) == 0.0) == graph.closed, case
            seen.add(graph.closed)
    assert seen == {True, False}


@every_main_family
@pytest.mark.parametrize("among", ["source", "any"])
def test_closing_closes_and_costs_what_it_says(family, among):
    setting = Setting(family)
    vlm, batch = setting.vlm, setting.batch[:1]
    for case in ("nothing done", "some heads", "some patches", "one head at z", "relays wiped before the last layer"):
        source, interventions = CASES[case]
        result = leaks(vlm, batch, interventions, source=source)
        added = result.closing(among)
        every = [*interventions, *added]
        assert leaks(vlm, batch, every, source=source).closed
        (graph,) = result.graphs
        keys = np.array([int(own[0]) in result.source[0] for own in graph.members])
        count = graph.cut(keys if among == "source" else None).count
        run = vlm.run(batch, every, engine="full")
        removed = sum(receipt.changed for receipt in run.receipts[len(interventions) :])
        # a receipt counts edges of the mask, in heads whose z is replaced as well
        assert removed == count if "at z" not in case else removed > count, case
        assert count <= result.graphs[0].cut(keys).count
        if among == "source":
            blocked = {int(at) for each in added for at in iv.select.of(each.keys).positions(batch.tokens[0])}
            assert blocked <= set(result.source[0])


@every_main_family
def test_one_edge_fewer_opens_a_route(family):
    """In runs: with any single edge of the cut left, the answer sees the source again."""
    setting = Setting(family)
    vlm, batch = setting.vlm, setting.batch[:1]
    one = int(batch.tokens[0].image[5])  # a single patch, so that there are few edges
    source = iv.select.positions([one])
    base = knockout("last", source, [1, 2])
    (graph,) = leaks(vlm, batch, base).graphs
    cut = graph.cut(np.array([int(own[0]) == one for own in graph.members]))
    every = [
        (int(layer), int(at)) for layer, query, _ in np.argwhere(cut.edges) for at in graph.members[query].tolist()
    ]
    assert 4 * len(every) == cut.count

    def without(left: tuple[int, int] | None) -> list[Any]:
        rest = [edge for edge in every if edge != left]
        return [base, *(knockout(iv.select.positions([at for layer, at in rest if layer == own]), source, [own])
                        for own in range(3) if any(layer == own for layer, _ in rest))]  # fmt: skip

    push = iv.Steering("resid_pre", layers=0, positions=source, direction=torch.ones(64, dtype=torch.float64))

    def moved(interventions: list[Any]) -> float:
        still = vlm.run(batch, interventions, engine="full").logits
        return float((vlm.run(batch, [push, *interventions], engine="full").logits - still).abs().max())

    assert moved(without(None)) == 0.0
    for edge in every[:: max(1, len(every) // 6)]:
        assert not leaks(vlm, batch, without(edge), source=source).closed
        assert moved(without(edge)) > 0.0


def planted(family: str, detour: str | None, seed: int = 0) -> tuple[Planted, iv.Batch, iv.Batch]:
    made = plant(family, seed, detour=detour)
    clean, corrupt, right, wrong = made.pairs(2)
    assert [str(answer) for answer in made.vlm.run(clean).answers] == right
    assert [str(answer) for answer in made.vlm.run(corrupt).answers] == wrong
    return made, clean, corrupt


def apart(made: Planted, clean: iv.Batch, corrupt: iv.Batch, interventions: Sequence[Any]) -> float:
    """How much of the difference between red and blue is left: the smallest of the pictures, in logits."""
    red, blue = made.vlm.tokenizer.convert_tokens_to_ids(list(made.answers))
    runs = (made.vlm.run(batch, list(interventions)) for batch in (clean, corrupt))
    rows = [run.logits[:, red] - run.logits[:, blue] for run in runs]
    return float((rows[0] - rows[1]).abs().min())


def follows(route: Any, made: Planted) -> bool:
    """Whether the planted edges lie on a route, each at its layer and position."""
    edges = made.route.edges
    if len(route.layers) != len(edges):
        return False
    ends = zip(edges, route.stops[:-1], route.stops[1:], route.layers, strict=True)
    return all(
        edge.layer in layers and {*edge.keys} <= {*start.positions} and {*edge.queries} <= {*stop.positions}
        for edge, start, stop, layers in ends
    )


DETOURS = [
    ("llava", None, 0), ("paligemma", None, 1), ("qwen2_vl", None, 2), ("llava", "question", 3),
    ("paligemma", "question", 4), ("qwen2_vl", "question", 5), ("paligemma", "prefix", 6),
]  # fmt: skip


@pytest.mark.parametrize(("family", "detour", "seed"), DETOURS)
def test_the_true_route_of_a_planted_circuit_is_named_and_closed(family, detour, seed):
    made, clean, corrupt = planted(family, detour, seed)
    source = iv.select.positions(made.signal)
    first, last = made.route.edges[0], made.route.edges[-1]
    if detour is None:  # a window that misses the one layer where the patch is read
        direct = knockout("last", source, [layer for layer in range(made.vlm.anatomy.n_layers) if layer != last.layer])
    else:  # the answer position never reads the patch: someone else does
        direct = knockout("last", source)
    everyone = knockout(iv.select.all - source, source)
    unreadable = apart(made, clean, corrupt, [everyone])
    untouched = apart(made, clean, corrupt, [])
    assert unreadable == pytest.approx(0.0, abs=1e-4 * untouched)

    # the knockout of the direct route does next to nothing, and leaks says why
    assert apart(made, clean, corrupt, [direct]) > 0.5 * untouched
    found = made.vlm.leaks(clean, direct)
    kind = {"question": "through question tokens", "prefix": "through the bidirectional prefix"}.get(detour or "")
    for routes in found.routes:
        true = [route for route in routes if follows(route, made)]
        assert len(true) == 1
        assert first.keys == true[0].stops[0].positions
        assert kind is None or kind in true[0].kinds
        assert detour is not None or true[0].layers == ((last.layer,),)

    # closed, nothing is left of the picture's colour: the effect is that of a patch that nobody can read
    closing = direct.closing(made.vlm, clean)
    assert made.vlm.leaks(clean, closing, source=source).closed
    assert apart(made, clean, corrupt, closing) == pytest.approx(unreadable, abs=1e-4 * untouched)
    whole = made.vlm.run(clean, everyone).logits
    torch.testing.assert_close(made.vlm.run(clean, closing).logits, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))


@every_main_family
def test_one_true_edge_left_open_is_a_leak_that_the_model_uses(family):
    """The negative control: everything closed but for the edges of the planted route."""
    made, clean, corrupt = planted(family, "question")
    source = iv.select.positions(made.signal)
    first, second = made.route.edges
    everyone = iv.select.all - source
    rest = [layer for layer in range(made.vlm.anatomy.n_layers) if layer != first.layer]
    others = everyone - iv.select.positions(first.queries)
    almost = [knockout(everyone, source, rest), knockout(others, source, [first.layer])]
    found = made.vlm.leaks(clean, almost)
    for (route,) in found.routes:
        assert route.kinds == ("through question tokens",)
        assert [stop.positions for stop in route.stops] == [first.keys, first.queries, second.queries]
        assert route.layers[0] == (first.layer,)
        assert second.layer in route.layers[1]
    assert apart(made, clean, corrupt, almost) > 0.5 * apart(made, clean, corrupt, [])
    relay = zero("resid_post", [first.layer], iv.select.positions(first.queries))
    assert made.vlm.leaks(clean, [*almost, relay]).closed
    assert apart(made, clean, corrupt, [*almost, relay]) == pytest.approx(0.0, abs=1e-4)


# -- words, tables, pictures -------------------------------------------------------------------------------------------


@functools.cache
def scene(name: str, questions: tuple[str, ...] = ("what colour is the 2 ?",)) -> tuple[iv.VLM, iv.Batch]:
    vlm = iv.load(name)
    return vlm, vlm.encode([iv.data.digit_scenes(n=1)[0].image] * len(questions), list(questions))


def test_routes_are_told_in_words():
    vlm, batch = scene("testbed:llava")
    found = vlm.leaks(batch, iv.AttentionKnockout("last", "image", layers=[1, 2]))
    assert found.explain() == str(found)
    assert found.explain().splitlines() == [
        "image tokens 2-50 still reach the answer by 4 routes",
        "  before the window: image tokens 2-50 -> last token 58 at layer 0",
        "  after the window: image tokens 2-50 -> last token 58 at layer 3",
        "  through template tokens: image tokens 2-50 -> template token 51 at layers 0-2"
        " -> last token 58 at layers 1-3",
        "  through question tokens: image tokens 2-50 -> question tokens 52-57 at layers 0-2"
        " -> last token 58 at layers 1-3",
    ]
    assert found.explain() in (ROOT / "docs" / "leaks.md").read_text()
    assert repr(found) == "Leaks(open; routes left by example: 4)"
    one = vlm.leaks(batch, iv.AttentionKnockout("text", 7, layers=[0, 2, 3]), source=7)
    assert one.explain().splitlines()[0] == "image token 7 still reaches the answer by 4 routes"
    nobody = vlm.leaks(batch, knockout("last", iv.select.words("zebra")))
    assert nobody.closed
    assert nobody.explain() == "closed: there is no source"
    closed = vlm.leaks(batch, iv.AttentionKnockout("text", "image"))
    assert closed.explain() == "closed: nothing of image tokens 2-50 reaches the answer through the decoder"
    assert repr(closed) == "Leaks(closed; routes left by example: 0)"


def kinds(name: str, *interventions: Any, source: Any = None) -> list[str]:
    vlm, batch = scene(name)
    return [route.kind for route in vlm.leaks(batch, list(interventions), source=source).routes[0]]


def test_kinds_say_how_a_route_gets_past():
    text = ["through template tokens", "through question tokens"]
    assert kinds("testbed:llava", knockout("last", "image", [0, 3])) == ["between the blocked layers", *text]
    assert kinds("testbed:llava", knockout("last", "image", heads=[0])) == ["through heads left", *text]
    assert kinds("testbed:llava", source="image") == ["not blocked at any layer", *text]
    assert kinds("testbed:llava", knockout("text", "image", heads=[0, 1, 2])) == [
        "through heads left", *(f"{kind}, through heads left" for kind in text)
    ]  # fmt: skip
    assert kinds("testbed:llava", source="last") == ["along the answer position's own residual stream"]
    # in PaliGemma an earlier patch reads a later one, and the picture reads the question
    some = iv.select.box(0, 0, 20, 20)
    assert "through image tokens that were not blocked, through the bidirectional prefix" in kinds(
        "testbed:paligemma", knockout("last", some)
    )
    assert "through image tokens, through the bidirectional prefix" in kinds(
        "testbed:paligemma", knockout("last", "question")
    )
    assert "through image tokens that were not blocked" in kinds("testbed:llava", knockout("last", some))
    assert kinds("testbed:llava", knockout("last", "question")) == []


def test_examples_that_are_alike_are_told_together():
    vlm, batch = scene("testbed:llava", ("what colour is the 2 ?", "is there a 2 ?", "what colour is the 3 ?"))
    found = vlm.leaks(batch, iv.AttentionKnockout("last", "image"))
    heads = [line for line in found.explain().splitlines() if line.startswith("example")]
    assert [line.split(":")[0] for line in heads] == ["examples 0, 2", "example 1"]
    # by roles, one list of knockouts closes examples of any length
    added = found.closing()
    assert added == [iv.AttentionKnockout("text", "image", layers=range(0, 3))]  # what is blocked already may stay
    assert vlm.leaks(batch, [iv.AttentionKnockout("last", "image"), *added]).closed
    with pytest.raises(iv.InterventionError, match=r"do not fit example .*close one example at a time"):
        found.closing("any")
    assert all(len(vlm.leaks(batch[n], iv.AttentionKnockout("last", "image")).closing("any")) == 1 for n in range(3))


def test_frame_has_a_row_for_every_step():
    vlm, batch = scene("testbed:qwen2_vl")
    found = vlm.leaks(batch, iv.AttentionKnockout("last", "image", layers=[1, 2], heads=[0]))
    table = found.frame()
    assert len(table) == sum(len(route.layers) for route in found.routes[0])
    through = table[table["kind"] == "through question tokens"]
    assert through[["source", "target"]].to_numpy().tolist() == [
        ["image tokens", "question tokens"], ["question tokens", "last token"]
    ]  # fmt: skip
    left = table[table["kind"] == "through heads left"].iloc[0]
    assert (left["heads"], left["first_layer"], left["last_layer"], left["layers"]) == (3, 1, 2, 2)
    closed = vlm.leaks(batch, iv.AttentionKnockout("text", "image")).frame()
    assert len(closed) == 0
    assert list(closed.columns) == list(table.columns)


def test_picture_shows_every_route_and_what_is_blocked():
    vlm, batch = scene("testbed:llava")
    found = vlm.leaks(batch, iv.AttentionKnockout("last", "image", layers=[1, 2]))
    figure = found.plot()
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["template tokens 1, 51", "source: image tokens 2-50", "question tokens 52-57", "last token 58"]
    legend = [" ".join(text.get_text().split()) for text in figure.legends[0].get_texts()]
    assert legend == [f"{n + 1}. {route}" for n, route in enumerate(found.routes[0])] + [
        "thin: the same at its other layers",
        "blocked in every head",
    ]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_xdata().tolist() for line in crosses] == [[1.5, 2.5]]
    closed = vlm.leaks(batch, iv.AttentionKnockout("text", "image")).plot()
    assert closed.axes[0].get_title() == "From tokens 2-50 to the answer at token 58: closed: no route left"


def test_masks_of_an_earlier_run_serve_as_well():
    vlm, batch = scene("testbed:llava", ("is there a 3 ?",))
    knockouts = iv.AttentionKnockout("last", "image", layers=[2])
    before = vlm.leaks(batch, knockouts).explain()
    vlm.run(batch, knockouts)
    assert vlm._engine.clean.known(batch).trunk is not None
    assert vlm.leaks(batch, knockouts).explain() == before


def test_what_cannot_be_closed_is_refused():
    vlm, batch = scene("testbed:llava")
    with pytest.raises(iv.InterventionError, match="the answer position carries the source itself"):
        vlm.leaks(batch, source="last").closing()
    with pytest.raises(iv.InterventionError, match="edges='all'"):
        vlm.leaks(batch, source="image").closing("all")
    with pytest.raises(iv.InterventionError, match="selects nothing in example 0"):
        vlm.leaks(batch, source=iv.select.words("zebra"))
    with pytest.raises(iv.InterventionError, match="no key to attend"):
        vlm.leaks(batch, iv.AttentionKnockout("last", "all"))


def test_closing_starts_with_the_knockout_itself():
    vlm, batch = scene("testbed:paligemma")
    knockouts = iv.AttentionKnockout("last", "image", layers=[2])
    for among in ("source", "any"):
        every = knockouts.closing(vlm, batch, edges=among)
        assert every[0] is knockouts
        assert vlm.leaks(batch, every, source="image").closed


def test_the_page_shows_what_the_experiment_measures():
    # loaded by its path: experiments are programs, not part of the package
    spec = importlib.util.spec_from_file_location("experiment_leaks", ROOT / "experiments" / "leaks.py")
    assert spec is not None
    assert spec.loader is not None
    experiment = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    page = (ROOT / "docs" / "leaks.md").read_text()
    assert experiment.HEADER in page
    for family, detour in experiment.CASES:
        begun = experiment.row(family, detour, [experiment.Measured(True, 3.0, 1.0, 0.0, 0.0)] * 2).split("2 of 2")[0]
        assert begun in page
    measured = experiment.measure("llava", "question", 7, pairs=2)
    assert measured.named
    assert measured.routes >= 2
    assert measured.knockout == pytest.approx(1.0, abs=0.05)
    assert measured.closed == pytest.approx(measured.unreadable, abs=1e-4)
    assert measured.closed == pytest.approx(0.0, abs=1e-4)
