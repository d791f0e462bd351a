"""Planted circuits: the answer takes the route that is written down, and no other."""

import dataclasses
import functools
import itertools

import pytest
import torch

import interp_vlm as iv
from interp_vlm import testbed
from interp_vlm.errors import ModelError
from interp_vlm.testbed.planted import DETOURS, Edge, Route, plant
from interp_vlm.testbed.planted.route import lay_out

WAYS = [
    (family, detour) for family in testbed.NAMES for detour in DETOURS if detour != "prefix" or family == "paligemma"
]
EACH_WAY = pytest.mark.parametrize(("family", "detour"), WAYS)
EACH_FAMILY = pytest.mark.parametrize("family", testbed.NAMES)
NOTHING = 0.15
"""What the scale of RMSNorm may move a margin of 10 by, when random heads or neurons are taken out."""


@functools.cache
def built(family, seed=0, **options):
    planted = plant(family, seed, **options)
    return planted, planted.pairs(2)


@functools.cache
def together(family, **options):
    """Clean and corrupt pictures in one batch: one run serves both."""
    planted, (clean, corrupt, *_) = built(family, **options)
    pictures = [images[0] for batch in (clean, corrupt) for images in batch.images]
    return planted.vlm.encode(pictures, planted.question)


def margin(planted, logits, right, wrong):
    """Logit of the right answer minus that of the wrong one, for each example."""
    ids = planted.vlm.tokenizer.convert_tokens_to_ids
    return logits.gather(1, torch.tensor([ids(right), ids(wrong)]).T).diff(dim=1).neg().flatten()


def margins(family, interventions, **options):
    """Margins on clean and on corrupt pictures, both for the colour that the clean one shows."""
    planted, (_, _, right, wrong) = built(family, **options)
    logits = planted.vlm.run(together(family, **options), interventions).logits
    return margin(planted, logits, right * 2, wrong * 2).chunk(2)


def cut(edge):
    return iv.AttentionKnockout(edge.queries, edge.keys, [edge.layer], list(edge.heads))


def dependence(family, interventions, **options):
    """How much the answer still depends on the colour: near 20 when it does, near 0 when it does not."""
    clean, corrupt = margins(family, interventions, **options)
    return (clean - corrupt).abs().max()


def margins_after(planted, clean, right, wrong, interventions):
    return planted.vlm.sweep(clean, interventions, iv.logit_difference(right, wrong)).values


def by_layer(cells):
    return [set(group) for _, group in itertools.groupby(sorted(cells), key=lambda cell: cell[0])]


def patch(cache, cells):
    (layer,) = {layer for layer, _ in cells}
    return iv.ActivationPatch("resid_post", [layer], sorted(at for _, at in cells), source=cache)


@EACH_WAY
@pytest.mark.parametrize("options", [{}, {"backup": True, "neurons": False}], ids=["plain", "backup, no neurons"])
def test_the_answer_is_the_colour(family, detour, options):
    planted, (clean, corrupt, right, wrong) = built(family, seed=len(options), detour=detour, **options)
    assert sorted(right) == ["blue", "red"]
    for batch, shown, other in ((clean, right, wrong), (corrupt, wrong, right)):
        run = planted.vlm.run(batch)
        assert [str(answer) for answer in run.answers] == shown
        assert margin(planted, run.logits, shown, other).min() > 9


@EACH_WAY
@pytest.mark.parametrize("seed", [0, 1])
def test_cutting_any_edge_takes_the_whole_effect_away(family, detour, seed):
    planted, _ = built(family, seed=seed, detour=detour)
    assert dependence(family, [], seed=seed, detour=detour) > 19
    for edge in planted.route.edges:
        assert dependence(family, cut(edge), seed=seed, detour=detour) < 0.01
        clean, _ = margins(family, cut(edge), seed=seed, detour=detour)
        assert clean.abs().max() < 0.6  # nothing but the random heads' own liking is left


@EACH_WAY
def test_cutting_everything_else_at_once_leaves_the_answer(family, detour):
    planted, (clean, *_) = built(family, detour=detour)
    tokens, model = clean.tokens[0], planted.vlm.anatomy
    others = []
    for layer in range(model.n_layers):
        idle = [head for head in range(model.n_heads) if (layer, head) not in planted.route.heads]
        units = [unit for unit in range(model.d_mlp) if (layer, unit) not in planted.route.neurons]
        others.append(iv.Ablation("z", [layer], heads=idle, to="zero"))
        others.append(iv.Ablation("mlp_post", [layer], units=units, to="zero"))
        for edge in planted.route.edges:
            if edge.layer == layer:
                apart = sorted({*tokens.all.tolist()} - {*edge.keys, *tokens.text.tolist()})
                others.append(iv.AttentionKnockout(edge.queries, apart, [layer]))
    for value, sign in zip(margins(family, others, detour=detour), (1, -1), strict=True):
        assert (sign * value).min() > 9


@EACH_WAY
def test_patching_the_routes_positions_swaps_the_answer_and_no_other_does_anything(family, detour):
    planted, (clean, corrupt, right, wrong) = built(family, detour=detour)
    cache = planted.vlm.capture(corrupt, ["resid_post"])
    swapped = margins_after(planted, clean, right, wrong, [patch(cache, {cell}) for cell in planted.route.positions])
    assert swapped.max() < -9
    # each layer's other cells together; the last layer's are read by nothing
    cells = set(itertools.product(range(planted.vlm.anatomy.n_layers - 1), clean.tokens[0].all.tolist()))
    others = [cells_of - planted.route.positions for cells_of in by_layer(cells)]
    kept = margins_after(planted, clean, right, wrong, [patch(cache, cells) for cells in others])
    assert (kept - margins(family, [], detour=detour)[0]).abs().max() < 0.01


@EACH_WAY
def test_only_the_routes_heads_and_neurons_carry_the_difference(family, detour):
    planted, (clean, corrupt, right, wrong) = built(family, seed=1, detour=detour)
    cache = planted.vlm.capture(corrupt, ["z", "mlp_post"])
    model = planted.vlm.anatomy
    heads = list(itertools.product(range(model.n_layers), range(model.n_heads)))
    patches = [iv.ActivationPatch("z", [layer], "all", [head], source=cache) for layer, head in heads]
    for layer in range(model.n_layers):
        units = [unit for unit in range(model.d_mlp) if (layer, unit) not in planted.route.neurons]
        patches.append(iv.ActivationPatch("mlp_post", [layer], "all", units=units, source=cache))
    patches += [
        iv.ActivationPatch("mlp_post", [layer], "all", units=[unit], source=cache)
        for layer, unit in planted.route.neurons
    ]
    drop = planted.vlm.sweep(clean, patches, iv.logit_difference(right, wrong))
    drop = drop.baseline - drop.values
    share = {(edge.layer, head): 20 / len(edge.heads) for edge in planted.route.edges for head in edge.heads}
    expected = [share.get(head, 0.0) for head in heads] + [0.0] * model.n_layers + [10.0, 10.0]
    assert torch.allclose(drop, torch.tensor(expected)[:, None].expand_as(drop), atol=0.8)
    unmoved = torch.tensor(expected) == 0
    assert drop[unmoved].abs().max() < 0.05  # a bystander's size changes the scale of the last token by a hair


@EACH_FAMILY
def test_decoys_look_as_sharply_as_the_route_and_change_nothing(family):
    planted, (clean, corrupt, *_) = built(family, decoys=4)
    pattern = planted.vlm.capture(clean, ["pattern"], positions="last")["pattern"]
    (edge,), (signal,) = planted.route.edges, planted.signal
    for layer, head in (*planted.decoys, *planted.route.heads):
        assert pattern[:, layer, head, 0, signal].min() > 0.99
    before, _ = margins(family, [], decoys=4)
    for layer, head in planted.decoys:
        for change in (
            iv.Ablation("z", [layer], heads=[head], to="zero"),
            iv.AttentionKnockout("last", planted.signal, [layer], [head]),
        ):
            after, _ = margins(family, change, decoys=4)
            assert (after - before).abs().max() < NOTHING
    # every second one hands the colour to the last token, where probes find it and nothing reads it
    after = [
        planted.vlm.capture(batch, ["attn_out"], positions="last")["attn_out"][:, :, 0] for batch in (clean, corrupt)
    ]
    moved = (after[0] - after[1]).norm(dim=-1).amin(dim=0)
    writing = {layer for layer, _ in planted.decoys[1::2]} | {edge.layer}
    assert {layer for layer in range(planted.vlm.anatomy.n_layers) if moved[layer] > 1} == writing


@EACH_WAY
def test_a_backup_restores_what_the_route_no_longer_delivers(family, detour):
    options = {"detour": detour, "backup": True}
    planted, (clean, corrupt, right, wrong) = built(family, **options)
    (backup,) = planted.backups
    (spare,) = backup.edges
    assert spare.layer > planted.route.edges[-1].layer
    assert spare.keys == planted.signal
    asleep, _ = margins(family, cut(spare), **options)
    assert asleep.min() > 9
    for edge in planted.route.edges:
        woken, turned = margins(family, cut(edge), **options)
        assert woken.min() > 9
        assert turned.max() < -9
        assert dependence(family, [cut(edge), cut(spare)], **options) < 0.01
    # the mean of both colours tells that the patch was read, not which: the backup sleeps on
    final = planted.route.edges[-1]
    mean = iv.Ablation("z", [final.layer], final.queries, list(final.heads), to="mean")
    assert dependence(family, mean, **options) < 0.01
    # what the backup holds while it sleeps is not the answer
    source = planted.vlm.capture(corrupt, ["z"])
    patch = iv.ActivationPatch("z", [spare.layer], "last", list(spare.heads), source=source)
    kept = margin(planted, planted.vlm.run(clean, patch).logits, right, wrong)
    assert kept.min() > 9


@EACH_FAMILY
def test_a_detour_through_the_question_is_missed_by_cutting_the_last_tokens_view_of_the_picture(family):
    options = {"detour": "question"}
    planted, (clean, *_) = built(family, **options)
    first, second = planted.route.edges
    assert set(first.queries) <= set(clean.tokens[0].question.tolist())
    assert second.keys == first.queries
    assert second.layer > first.layer
    straight = iv.AttentionKnockout("last", "image")
    assert margins(family, straight, **options)[0].min() > 9
    to_question = iv.AttentionKnockout("question", "image")
    assert dependence(family, to_question, **options) < 0.01
    assert dependence(family, [straight, to_question], **options) < 0.01


def test_a_detour_through_the_prefix_goes_against_the_order_of_the_tokens():
    options = {"detour": "prefix"}
    for seed in range(3):
        planted, (clean, *_) = built("paligemma", seed=seed, **options)
        first, second = planted.route.edges
        assert first.queries < first.keys == planted.signal
        assert set(first.queries) <= set(clean.tokens[0].image.tolist())
        assert second.keys == first.queries
        straight = iv.AttentionKnockout("last", planted.signal)
        assert margins("paligemma", straight, seed=seed, **options)[0].min() > 9
        backwards = iv.AttentionKnockout(first.queries, range(first.queries[0] + 1, 49))
        assert dependence("paligemma", backwards, seed=seed, **options) < 0.01
    with pytest.raises(ModelError, match="see no later patch"):
        plant("llava", detour="prefix")


@EACH_WAY
def test_in_a_null_model_the_answer_does_not_depend_on_the_picture(family, detour):
    planted, (clean, corrupt, *_) = built(family, detour=detour, null=True, backup=True)
    runs = [planted.vlm.run(batch) for batch in (clean, corrupt)]
    assert {str(answer) for run in runs for answer in run.answers} == {planted.answers[0]}
    assert torch.allclose(runs[0].logits, runs[1].logits, atol=0.01)
    assert planted.route == Route(())
    assert planted.backups == planted.bystanders == ()
    real, _ = built(family, detour=detour, backup=True)
    assert set(planted.decoys) == {*real.decoys, *real.route.heads, *real.backups[0].heads}


@EACH_FAMILY
def test_bystanders_fire_with_the_answer_and_change_nothing(family):
    planted, (clean, corrupt, *_) = built(family)
    posts = [
        planted.vlm.capture(batch, ["mlp_post"], positions="last")["mlp_post"][:, :, 0] for batch in (clean, corrupt)
    ]
    before, _ = margins(family, [])
    for layer, unit in planted.bystanders:
        assert (posts[0] - posts[1])[:, layer, unit].abs().min() > 15
        after, _ = margins(family, iv.Ablation("mlp_post", [layer], units=[unit], to="zero"))
        assert (after - before).abs().max() < NOTHING
    assert planted.bystanders
    assert not set(planted.bystanders) & set(planted.route.neurons)


@EACH_FAMILY
def test_pictures_of_a_pair_differ_in_the_coloured_patch_alone(family):
    planted, (clean, corrupt, right, wrong) = built(family)
    assert [planted.answers.index(answer) for answer in right] == [0, 1]
    assert [planted.answers.index(answer) for answer in wrong] == [1, 0]
    row, column = divmod(planted.patch, 7)
    entry = [planted.vlm.capture(batch, ["resid_pre"], layers=[0])["resid_pre"][:, 0] for batch in (clean, corrupt)]
    moved = (entry[0] - entry[1]).norm(dim=-1)
    assert moved[:, list(planted.signal)].min() > 1.9
    moved[:, list(planted.signal)] = 0
    assert moved.max() < 1e-3
    for (ours,), (theirs,) in zip(clean.images, corrupt.images, strict=True):
        box = (column * 8, row * 8, column * 8 + 8, row * 8 + 8)
        theirs = theirs.copy()
        assert ours.tobytes() != theirs.tobytes()
        theirs.paste(ours.crop(box), box)
        assert ours.tobytes() == theirs.tobytes()
    again, *_ = planted.pairs(3)
    assert all(
        ours[0].tobytes() == theirs[0].tobytes() for ours, theirs in zip(clean.images, again.images, strict=False)
    )
    other, *_ = planted.pairs(2, seed=1)
    assert other.images[0][0].tobytes() != clean.images[0][0].tobytes()


@EACH_FAMILY
def test_the_same_arguments_give_the_same_model_and_other_seeds_other_routes(family):
    one, two = plant(family, 3, detour="question"), plant(family, 3, detour="question")
    assert all(map(torch.equal, one.vlm.model.state_dict().values(), two.vlm.model.state_dict().values()))
    assert (one.route, one.decoys, one.bystanders) == (two.route, two.decoys, two.bystanders)
    layouts = [lay_out(family, seed, words=6) for seed in range(40)]
    assert len({(layout.patch, layout.hops, layout.neurons) for layout in layouts}) == 40
    assert {layer for layout in layouts for layer, _ in layout.hops} == {1, 2, 3, 4, 5}
    assert {heads for layout in layouts for _, heads in layout.hops} > {(0,), (1,), (2,), (3,)}


@EACH_FAMILY
def test_no_coordinate_of_the_stream_is_special(family):
    planted, (clean, corrupt, *_) = built(family)
    last = [
        planted.vlm.capture(batch, ["resid_post"], "last", [-1])["resid_post"].flatten(0, 2)
        for batch in (clean, corrupt)
    ]
    change = (last[0] - last[1]).abs().mean(0)
    assert change.max() < 6 * change.median()
    weights = [
        value
        for name, value in planted.vlm.model.named_parameters()
        if "language_model.layers" in name and value.ndim == 2
    ]
    assert all((value == 0).double().mean() < 0.15 for value in weights)


def test_a_planted_model_survives_the_disk(tmp_path):
    planted, (clean, *_) = built("qwen2_vl", detour="question")
    planted.vlm.model.save_pretrained(tmp_path)
    planted.vlm.processor.save_pretrained(tmp_path)
    again = iv.load(str(tmp_path))
    batch = again.encode([images[0] for images in clean.images], planted.question)
    assert torch.allclose(again.run(batch).logits, planted.vlm.run(clean).logits, atol=1e-4)


def test_positions_of_a_route_by_hand():
    detour = Route((Edge(1, (0, 2), (7,), (3,)), Edge(3, (1,), (9,), (7,))), ((3, 5), (3, 6)), n_layers=5)
    assert detour.positions == {(0, 3), (1, 7), (2, 7), (3, 9), (4, 9)}
    assert detour.heads == {(1, 0), (1, 2), (3, 1)}
    assert detour.layers == {1, 3}
    assert str(detour) == (
        "position 3 -> position 7 at layer 1 (heads 0 and 2) -> position 9 at layer 3 (head 1) -> neurons 3.5 and 3.6"
    )
    assert str(Route(())) == "no route"
    assert Route(()).positions == Route(()).heads == frozenset()
    with pytest.raises(dataclasses.FrozenInstanceError):
        detour.edges = ()


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt", {}, "no planted model of family 'gpt'"),
        ("llava", {"detour": "window"}, "detour='window'"),
        ("qwen2_vl", {"detour": "prefix"}, "see no later patch"),
        ("llava", {"decoys": 24}, "24 decoys; expected 0 to 2"),
        ("llava", {"decoys": -1}, "-1 decoys"),
        ("llava", {"seed": -1}, "seed -1; expected 0 or more"),
    ],
)
def test_what_cannot_be_planted_is_refused(family, options, message):
    with pytest.raises(ModelError, match=message):
        plant(family, **options)
