"""Captured activations against hooks, and native traces against runs."""

import itertools

import pytest
import torch

import interp_vlm as iv
from interp_vlm.errors import InterventionError, SelectionError
from interp_vlm.tokens import select
from tests.engine import reference
from tests.engine.cases import KINDS, PLACES, by_hand, intervention, together
from tests.engine.settings import QUESTIONS, ROUNDING, Setting, pictures
from tests.tiny import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)
every_padding = pytest.mark.parametrize("padding", ["left", "right"])
HOOKED = [site for site in PLACES if site != "vision_post"]
READ = [*HOOKED, "attn_mask", "vision_post"]


def same_at_real_positions(cache: iv.Cache, site: str, layer: int, wanted: torch.Tensor) -> None:
    """The cache's rows are those of the whole value; what is no position is zero."""
    found = cache.layer(site, layer)
    for row, positions in enumerate(cache.positions):
        real = positions[cache.mask[row]]
        assert torch.equal(found[row, : len(real)], wanted[row, real])
        assert not found[row, len(real) :].any()
        assert (positions[len(real) :] == -1).all()


@every_family
@every_padding
@pytest.mark.parametrize("positions", ["all", "question"])
def test_captured_values_are_those_that_hooks_see(family, padding, positions):
    setting = Setting(family, padding=padding)
    sites = HOOKED if positions == "all" else [site for site in HOOKED if site != "projector_out"]
    cache = setting.vlm.capture(setting.batch, sites, positions)
    wanted = reference.captured(
        setting.raw, setting.batch.inputs, [(site, layer) for site in sites for layer in range(3)]
    )
    counts = [len(select.of(positions).positions(tokens)) for tokens in setting.batch.tokens]
    assert cache.mask.sum(1).tolist() == counts
    assert list(cache) == sites
    for site in sites:
        assert cache.layers[site] == ((0,) if site == "projector_out" else (0, 1, 2))
        for layer in cache.layers[site]:
            if site == "resid_mid":  # x + a, which the reference cannot read off a hook
                entering, out = (wanted[name, layer] for name in ("resid_pre", "attn_out"))
                same_at_real_positions(cache, site, layer, entering + out)
            else:
                same_at_real_positions(cache, site, layer, wanted[site, layer])


@every_family
def test_captured_values_of_the_tower_belong_to_their_examples(family):
    setting = Setting(family)
    together_ = setting.vlm.capture(setting.batch, "vision_post")
    assert together_.layers["vision_post"] == (0, 1, 2)
    for number in range(3):
        alone = setting.vlm.encode(setting.batch.images[number][0], setting.batch.questions[number])
        wanted = reference.captured(setting.raw, alone.inputs, [("vision_post", layer) for layer in range(3)])
        for layer in range(3):
            rows = wanted["vision_post", layer].reshape(-1, together_["vision_post"].shape[-1])
            torch.testing.assert_close(together_["vision_post"][number, layer], rows, rtol=0, atol=ROUNDING)


@every_family
def test_rows_of_pictures_of_different_sizes_are_not_mixed_up(family):
    setting = Setting(family)
    vlm, sizes = setting.vlm, ((40, 30), (60, 20), (20, 60))
    mixed = vlm.encode(pictures(0, sizes), QUESTIONS)
    before = vlm.capture(mixed, "projector_out", "image")["projector_out"][:, 0]
    # each example's own rows alone
    for number in range(3):
        chosen = iv.Ablation("vision_post", layers=vlm.anatomy.vision_read, to="zero", allow_empty=True)
        one = vlm.encode(pictures(0, sizes)[number], QUESTIONS[number])
        expected = vlm.capture(one, "projector_out", "image", interventions=chosen)["projector_out"][0, 0]
        found = vlm.capture(mixed, "projector_out", "image", interventions=chosen)["projector_out"][number, 0]
        torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=ROUNDING)
    # half of the tokens: the projection changes there and nowhere else
    half = select.random(0.5, seed=1)
    patch = iv.Ablation("vision_post", layers=vlm.anatomy.vision_read, positions=half, to="zero")
    after = vlm.capture(mixed, "projector_out", "image", interventions=patch)["projector_out"][:, 0]
    for row, tokens in enumerate(mixed.tokens):
        image = tokens.image
        moved = (after[row] != before[row]).any(-1)[: len(image)]
        named = torch.isin(image, half.positions(tokens))
        if tokens.grids[0].vision_rows is not None:
            fed = torch.tensor(tokens.grids[0].vision_rows)
            shared = torch.isin(fed, fed[named & (fed >= 0).all(1)]).any(1) & (fed >= 0).any(1)
            assert torch.equal(moved, shared)
            assert moved.any()
            assert not moved.all()
    if len({tokens.grids[0].vision_total for tokens in mixed.tokens}) > 1:
        with pytest.raises(
            InterventionError, match=r"the vision tower gives .* rows for the examples; expected equally"
        ):
            vlm.capture(mixed, "vision_post", layers=0)


def test_a_part_of_a_picture_needs_to_know_the_towers_rows():
    setting = Setting("llava")
    vlm, batch = setting.vlm, setting.vlm.encode(pictures(0)[0], "is there a cat?")
    import dataclasses

    def forgetful(**forgotten):
        grids = (dataclasses.replace(batch.tokens[0].grids[0], **forgotten),)
        return dataclasses.replace(batch, tokens=(dataclasses.replace(batch.tokens[0], grids=grids),))

    part = iv.Ablation("vision_post", layers=0, positions=select.box(0, 0, 10, 10), to="zero")
    whole = iv.Ablation("vision_post", layers=0, to="zero")
    unknown = forgetful(vision_rows=None)
    assert torch.equal(vlm.run(unknown, whole).logits, vlm.run(batch, whole).logits)
    with pytest.raises(
        SelectionError, match="not known for example 0; expected a selection of whole pictures; use pos"
    ):
        vlm.run(unknown, part)
    # a tower with one entry per picture gives each picture an equal share
    assert torch.equal(vlm.run(forgetful(vision_total=None), part).logits, vlm.run(batch, part).logits)
    with pytest.raises(SelectionError, match="which of the 37 rows of the vision tower belong to which of 1 pictures"):
        vlm.run(forgetful(vision_total=36), whole)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "idefics3", "llava_onevision"])
def test_several_pictures_in_one_example(family):
    setting = Setting(family)
    vlm = setting.vlm
    first, second, other = pictures(3, ((40, 30), (60, 20), (30, 40)))
    batch = vlm.encode([[first, second], [other]], ["are there cats in both?", "is there a cat?"])
    mine = select.box(0, 0, 60, 60, image=1, buffer=9)  # all of the second picture
    with pytest.raises(SelectionError):
        vlm.run(batch, iv.Ablation("projector_out", positions=mine, to="zero"))  # the second example has one picture
    one = batch[0]
    tokens = one.tokens[0]
    assert set(mine.positions(tokens).tolist()) <= set(tokens.picture_tokens(1).tolist())
    for site, layers in (("projector_out", 0), ("vision_post", vlm.anatomy.vision_read)):
        before = vlm.capture(one, "projector_out", "image")["projector_out"][0, 0]
        after = vlm.capture(
            one, "projector_out", "image", interventions=iv.Ablation(site, layers, positions=mine, to="zero")
        )["projector_out"][0, 0]
        moved = (after != before).any(-1)
        assert torch.equal(tokens.image[moved], mine.positions(tokens))
    both = vlm.run(batch, iv.Ablation("vision_post", layers=0, to="zero"))
    for row in range(2):
        alone = vlm.run(batch[row], iv.Ablation("vision_post", layers=0, to="zero"))
        torch.testing.assert_close(both.logits[row], alone.logits[0], rtol=0, atol=ROUNDING)


@every_family
@every_padding
def test_a_trace_reads_what_a_capture_records_and_writes_what_a_run_does(family, padding):
    setting = Setting(family, bits=32, padding=padding)
    vlm, batch = setting.vlm, setting.batch
    edits = [intervention("steer", place, setting) for place in together("steer")]
    edits.append(iv.AttentionKnockout(queries="last", keys="question", layers=[2]))
    edits.sort(key=_first_stop)
    run, cache = vlm.run(batch, edits), vlm.capture(batch, "resid_post", interventions=edits)
    with vlm.trace(batch):
        for edit in edits:
            edit.apply(vlm)
        hidden = vlm.site("resid_post", 2).save()
        logits = vlm.nnsight.output.logits.save()
    assert torch.equal(logits[torch.arange(3), batch.last], run.logits)
    same_at_real_positions(cache, "resid_post", 2, hidden)
    with vlm.trace(batch):
        values = {"projector_out": vlm.site("projector_out")}
        for layer in range(3):
            for site in ("resid_pre", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post"):
                values[site, layer] = vlm.site(site, layer).clone()
        values = values.save()
    with vlm.trace(batch):
        mask = vlm.site("attn_mask", -1).save()
    values["attn_mask", 2] = mask.expand(3, vlm.anatomy.n_heads, -1, -1).transpose(1, 2)
    plain = vlm.capture(batch, [*HOOKED, "attn_mask"])
    plain.activations["attn_mask"] = plain["attn_mask"].transpose(2, 3)  # position by position, as the others are
    for key, value in values.items():
        same_at_real_positions(plain, *(key if isinstance(key, tuple) else (key, 0)), value)


def _first_stop(edit):
    part = {"vision": 0, "projector": 1, "decoder": 2}[edit.where.part]
    layers = [edit.layers] if isinstance(edit.layers, int) else edit.layers
    return part, min(layer % 3 for layer in layers), edit.where.order


class TestTrace:
    setting = Setting("llava", bits=32)

    @pytest.mark.parametrize("kind", KINDS)
    def test_apply_equals_run_for_every_kind(self, kind):
        vlm, batch = self.setting.vlm, self.setting.batch
        edit = intervention(kind, PLACES["z"], self.setting)
        with vlm.trace(batch):
            edit.apply(vlm)
            logits = vlm.nnsight.output.logits.save()
        assert torch.equal(logits[torch.arange(3), batch.last], vlm.run(batch, edit).logits)

    def test_the_block_goes_on_beside_the_later_layers(self):
        vlm, batch = self.setting.vlm, self.setting.batch
        knockout = iv.AttentionKnockout(layers="all")
        with vlm.trace(batch):
            knockout.apply(vlm)
            early = vlm.site("resid_post", 0).clone().save()
            halfway = vlm.nnsight.model.language_model.layers[1].output.clone().save()
            late = vlm.site("resid_post", -1).save()
        cache = vlm.capture(batch, "resid_post", interventions=knockout)
        for layer, found in enumerate((early, halfway, late)):
            same_at_real_positions(cache, "resid_post", layer, found)

    def test_two_interventions_over_the_same_layers(self):
        vlm, batch = self.setting.vlm, self.setting.batch
        edits = [
            iv.Ablation("resid_post", positions="image", to=0.5),
            iv.Steering("resid_post", positions="all", direction=torch.ones(64)),
        ]
        for ordered in itertools.permutations(edits):
            with vlm.trace(batch):
                for edit in ordered:
                    edit.apply(vlm)
                seen = vlm.site("resid_post", 2).save()
            cache = vlm.capture(batch, "resid_post", interventions=list(ordered))
            same_at_real_positions(cache, "resid_post", 2, seen)

    def test_what_was_there_before_and_after_an_edit(self):
        vlm, batch = self.setting.vlm, self.setting.batch
        with vlm.trace(batch):
            before = vlm.site("resid_mid", 1).clone().save()
            iv.Ablation("resid_mid", layers=1, to="zero").apply(vlm)
            after = vlm.site("resid_mid", 1).save()
        assert before[0, -1].any()
        assert not after[0, -1].any()

    def test_selectors_by_evidence_are_resolved_before(self):
        vlm = self.setting.vlm
        batch = vlm.encode(pictures(4), QUESTIONS)
        edit = iv.Ablation("resid_post", layers=1, positions=select.top(0.3), to="zero")

        def traced():
            with vlm.trace(batch):
                edit.apply(vlm)
                logits = vlm.nnsight.output.logits.save()
            return logits[torch.arange(3), batch.last]

        with pytest.raises(
            InterventionError, match=r"selects by attention, .* call vlm.positions\(batch, selector\) bef"
        ):
            traced()
        vlm.positions(batch, edit.positions)
        assert torch.equal(traced(), vlm.run(batch, edit).logits)

    def test_what_cannot_be_is_refused(self):
        vlm, batch = self.setting.vlm, self.setting.batch
        with pytest.raises(InterventionError, match=r"site 'resid_post' outside a trace; expected a `with vlm.trace"):
            vlm.site("resid_post", 0)
        with pytest.raises(InterventionError, match=r"AttentionKnockout\(.*\).apply outside a trace"):
            iv.AttentionKnockout().apply(vlm)
        for wrong, said in (
            (lambda: vlm.site("pattern", 0), "'pattern' is rebuilt after a run"),
            (lambda: vlm.site("resid_post", 3), "layer 3 does not exist; expected 0 to 2"),
            (lambda: vlm.site("stream", 0), "there is no site 'stream'"),
            (lambda: iv.AttentionKnockout("image", "last").apply(vlm), "blocks no edge"),
        ):
            with pytest.raises(InterventionError, match=said):
                _traced(vlm, batch, wrong)

    def test_gradients_flow_where_they_are_asked_for(self):
        vlm, batch = self.setting.vlm, self.setting.batch
        with vlm.trace(batch):
            hidden = vlm.site("resid_post", 0)
            hidden.requires_grad_(True)
            iv.AttentionKnockout(layers=[1, 2]).apply(vlm)
            logits = vlm.nnsight.output.logits
            gradient = torch.autograd.grad(logits[0, -1].max(), hidden)[0].save()
        assert gradient[0].any()
        assert not gradient[1].any()


def _traced(vlm, batch, act):
    with vlm.trace(batch):
        act()


class TestCapture:
    setting = Setting("llava")

    def test_under_interventions_records_what_they_left(self):
        setting = self.setting
        kind = "tensor"
        edits = [intervention(kind, place, setting) for place in together(kind)]
        cache = setting.vlm.capture(setting.batch, READ, interventions=edits)
        seen = {}

        def looking(key, edit):
            def look(value):
                seen[key] = edit(value) if edit else value
                return seen[key].clone()

            return look

        hooks = by_hand(kind, together(kind), setting)
        keys = [(site, layer) for site in HOOKED for layer in cache.layers[site] if site != "resid_mid"]
        keys.remove(("attn_out", 1))  # where the reference makes the edit of resid_mid
        with reference.hooked(setting.raw, {**hooks, **{key: looking(key, hooks.get(key)) for key in keys}}):
            reference.forward(setting.raw, setting.batch.inputs)
        for key in keys:
            torch.testing.assert_close(
                cache.layer(*key)[cache.mask],
                torch.cat([seen[key][row, cache.positions[row][cache.mask[row]]] for row in range(3)]),
                rtol=0, atol=ROUNDING,
            )  # fmt: skip

    def test_masks_are_recorded_per_head_even_where_some_layers_share_one(self):
        vlm, batch = self.setting.vlm, self.setting.batch
        cache = vlm.capture(
            batch, ["attn_mask", "pattern"], "last", interventions=iv.AttentionKnockout(layers=[1], heads=[2])
        )
        mask = cache["attn_mask"]
        assert mask.shape == (3, 3, 4, 1, batch.inputs["input_ids"].shape[1])
        assert mask.dtype == torch.bool
        assert torch.equal(cache["pattern"] > 0, mask)
        assert torch.equal(mask[:, 0], mask[:, 2])
        image = batch.inputs["input_ids"] == vlm.anatomy.image_token_id
        assert not mask[:, 1, 2, 0][image].any()
        assert mask[:, 1, [0, 1, 3], 0][:, :, :].sum() > mask[:, 1, 2].sum()

    def test_patterns_sum_to_one(self):
        cache = self.setting.vlm.capture(self.setting.batch, "pattern")
        totals = cache["pattern"].sum(-1)
        real = cache.mask[:, None, None].expand_as(totals)
        torch.testing.assert_close(totals, real.double(), rtol=0, atol=1e-12)

    def test_values_do_not_alias_the_model_or_each_other(self):
        vlm, batch = self.setting.vlm, self.setting.batch
        first = vlm.capture(batch, HOOKED)
        kept = {site: value.clone() for site, value in first.items()}
        vlm.run(batch, [iv.Ablation("resid_mid", to="zero"), iv.Ablation("resid_post", to="zero")])
        second = vlm.capture(batch, HOOKED)
        for site, value in second.items():
            assert torch.equal(first[site], kept[site])
            assert torch.equal(value, kept[site])
            value.zero_()
        assert torch.equal(vlm.capture(batch, "z")["z"], kept["z"])

    def test_what_is_missing_is_named(self):
        cache = self.setting.vlm.capture(self.setting.batch, ["z"], "last", layers=[1])
        with pytest.raises(
            InterventionError, match=r"site 'pattern' was not captured; expected one of z; capture it: "
        ):
            cache["pattern"]
        with pytest.raises(InterventionError, match=r"layer 0 of 'z' was not captured; expected one of \[1\]"):
            cache.layer("z", 0)
        with pytest.raises(InterventionError, match="there is no site 'q'"):
            self.setting.vlm.capture(self.setting.batch, "q")
        assert repr(cache) == "Cache(z (3, 1, 1, 4, 16))"
        half = cache.to("cpu", torch.float16)
        assert half["z"].dtype == torch.float16
        assert half.layers == cache.layers
