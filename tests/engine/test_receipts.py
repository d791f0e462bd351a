"""Receipts tell the truth, notice a sabotaged run, and what can have no effect is refused with a reason."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import interp_vlm as iv
from interp_vlm.engine.access import Access
from interp_vlm.errors import InterventionError, SelectionError
from interp_vlm.tokens import select
from tests.engine import reference
from tests.engine.cases import KINDS, PLACES, by_hand, intervention
from tests.engine.settings import Setting, pictures
from tests.tiny import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)


def differing(before: torch.Tensor, after: torch.Tensor) -> int:
    return int((before != after).sum())


@pytest.mark.parametrize("site", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_changed_are_counted(kind, site):
    setting, place = Setting("llava"), PLACES[site]
    counts = []

    def counting(edit):
        def counted(value):
            new = edit(value)
            counts.append(differing(value, new))
            return new

        return counted

    edits = {key: counting(edit) for key, edit in by_hand(kind, [place], setting).items()}
    wanted = reference.answers(setting.raw, setting.batch.inputs, edits)
    (receipt,) = setting.vlm.run(setting.batch, intervention(kind, place, setting)).receipts
    assert receipt.changed == sum(counts) > 0
    assert (receipt.unit, receipt.mass_left, receipt.unexplained, receipt.note) == ("values", None, None, "")
    assert receipt.site == site
    assert set(receipt.layers) == set(place.numbers(setting))
    assert receipt.intervention == repr(intervention(kind, place, setting))
    clean = reference.answers(setting.raw, setting.batch.inputs)
    assert receipt.logit_change == pytest.approx(float((wanted - clean).abs().max()), rel=1e-6)
    assert f"{receipt.changed} values changed" in str(receipt)


class TestSabotage:
    """Negative controls: a knockout that does not reach attention must show in its receipt."""

    knockout = iv.AttentionKnockout(queries="last", keys=select.image | select.question, layers=[1])

    @every_family
    @pytest.mark.parametrize("attn", ["sdpa", "eager"])
    def test_a_mask_that_is_not_written_shows(self, family, attn, monkeypatch):
        setting = Setting(family, attn, 32)
        honest = setting.vlm.run(setting.batch, self.knockout).receipts[0]
        monkeypatch.setattr(Access, "write", lambda *_: None)
        receipt = setting.vlm.run(setting.batch, self.knockout).receipts[0]
        assert honest.mass_left == 0.0
        assert receipt.mass_left > 1e-3

    @pytest.mark.parametrize("family", [family for family in FAMILIES if not Setting(family).eager])
    def test_a_mask_that_attention_ignores_shows(self, family, monkeypatch):
        setting, sdpa = Setting(family, bits=32), ALL_ATTENTION_FUNCTIONS["sdpa"]
        honest = setting.vlm.run(setting.batch, self.knockout).receipts[0]

        def ignoring(module, query, key, value, attention_mask, **options):
            if attention_mask is not None:
                attention_mask = torch.ones_like(attention_mask)
            return sdpa(module, query, key, value, attention_mask, **options)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", ignoring)
        receipt = setting.vlm.run(setting.batch, self.knockout).receipts[0]
        assert honest.unexplained < 1e-5
        assert receipt.mass_left == 0.0  # the mask says so, and only
        assert receipt.unexplained > 1e-2

    def test_edges_of_too_few_heads_show(self, monkeypatch):
        setting, write = Setting("llava", bits=32), Access.write

        def first_head_alone(self, site, layer, value):
            before = self.read(site, layer).expand(-1, 4, -1, -1).clone()
            before[:, 0] = value[:, 0]
            write(self, site, layer, before)

        monkeypatch.setattr(Access, "write", first_head_alone)
        assert setting.vlm.run(setting.batch, self.knockout).receipts[0].mass_left > 1e-3


def test_what_was_not_measured_is_not_claimed():
    setting = Setting("llava")
    zeroed = iv.Ablation("z", layers=[1], positions="last", to="zero")
    knockout = iv.AttentionKnockout(layers=[1])
    run = setting.vlm.run(setting.batch, [knockout, zeroed])
    assert run.receipts[0].unexplained is None  # the heads' output is no longer what attention made
    assert run.receipts[0].mass_left == 0.0
    assert setting.vlm.run(setting.batch, knockout).receipts[0].unexplained < 1e-12


@every_family
def test_features_added_between_layers_are_not_claimed_by_an_edit_of_the_projection(family):
    setting = Setting(family)
    receipt = setting.vlm.run(setting.batch, iv.Ablation("projector_out", to="zero")).receipts[0]
    between = family == "qwen3_vl"
    assert ("adds vision features between" in receipt.note) == between
    assert ("adds vision features between" in str(receipt)) == between
    # and it is so: without the projection's content the picture still reaches the answer there, and only there
    other = setting.vlm.run(setting.corrupt, iv.Ablation("projector_out", to="zero"), engine="full")
    same = setting.vlm.run(setting.batch, iv.Ablation("projector_out", to="zero"), engine="full")
    assert torch.equal(other.logits, same.logits) == (not between)
    # an edit of the tower's first layer reaches both
    for batch in (setting.batch, setting.corrupt):
        assert setting.vlm.run(batch, iv.Ablation("vision_post", layers=0, to="zero")).receipts[0].note == ""
    towers = [
        setting.vlm.run(batch, iv.Ablation("vision_post", layers=0, to="zero")).logits
        for batch in (setting.batch, setting.corrupt)
    ]
    torch.testing.assert_close(towers[0], towers[1], rtol=0, atol=1e-12)


USELESS = {
    "an empty selector": (
        iv.AttentionKnockout(keys=select.words("zebra")),
        "words('zebra') selects nothing in example 0 ('is there a cat?') for AttentionKnockout(",
        "expected at least one position in every example",
    ),
    "a selector that is empty in one example": (
        iv.Ablation("resid_post", positions=select.words("cat"), to="zero"),
        "words('cat') selects nothing in example 1",
        "allow_empty=True to leave such examples as they are",
    ),
    "an impossible intersection": (
        iv.Ablation("resid_post", positions=select.image & select.question),
        "image & question selects nothing in example 0",
        "change the selection",
    ),
    "the future": (
        iv.AttentionKnockout(queries="image", keys="last"),
        "blocks no edge: the model attends none of them anyway",
        "expected queries after their keys where attention is causal",
    ),
    "a vision layer that is not read": (
        iv.Ablation("vision_post", layers=-1, to="zero"),
        "edits vision layer 2, which the projector does not read",
        "expected a layer up to 1",
    ),
    "the last layer away from the answer": (
        iv.Ablation("mlp_out", layers=-1, positions="image", to="zero"),
        "edits the last layer's mlp_out away from the answer position, which nothing reads",
        "choose an earlier layer",
    ),
    "queries of the last layer away from the answer": (
        iv.AttentionKnockout(queries="question", keys="image", layers=2),
        "edits the last layer's attn_mask away from the answer position",
        "expected a selection with the last position, or an earlier layer",
    ),
}


@pytest.mark.parametrize("name", USELESS)
def test_what_can_have_no_effect_is_refused_unless_allowed(name):
    setting = Setting("llava")
    value, found, remedy = USELESS[name]
    for attempt in (setting.vlm.run, lambda batch, one: setting.vlm.capture(batch, "resid_post", interventions=one)):
        with pytest.raises(InterventionError) as caught:
            attempt(setting.batch, value)
        assert found in str(caught.value)
        assert remedy in str(caught.value)
        assert "\n" not in str(caught.value)
    allowed = iv.vary(value, allow_empty=[True])[0]
    run = setting.vlm.run(setting.batch, allowed)
    if "one example" not in name:
        assert run.receipts[0].logit_change < 1e-12
        assert torch.equal(setting.vlm.run(setting.batch, allowed, engine="full").logits, run.clean_logits)
    else:  # it acts in the examples where it can
        moved = ((run.logits - run.clean_logits).abs() > 1e-12).any(1)
        assert moved.tolist() == [True, False, False]


def test_the_last_layers_input_still_reaches_the_answer():
    setting = Setting("llava")
    run = setting.vlm.run(setting.batch, iv.Ablation("resid_pre", layers=-1, positions="image", to="zero"))
    assert run.receipts[0].logit_change > 0


@every_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_row_with_nothing_to_attend_is_refused(family, attn):
    setting = Setting(family, attn, 32)
    with pytest.raises(
        InterventionError, match=r"leaves position \d+ of example 0 with no key to attend; expected at l"
    ):
        setting.vlm.run(setting.batch, iv.AttentionKnockout(queries="last", keys="all", layers=[1]))
    both = [iv.AttentionKnockout(keys="image"), iv.AttentionKnockout(keys=~select.image)]
    with pytest.raises(InterventionError, match="leaves position"):  # neither value alone, but both together
        setting.vlm.run(setting.batch, both)


OUT_OF_RANGE = {
    "layer 3 does not exist; expected 0 to 2": iv.AttentionKnockout(layers=3),
    "layer -4 does not exist; expected 0 to 2": iv.Ablation("resid_post", layers=[0, -4]),
    "vision layer 7 does not exist; expected 0 to 2": iv.Ablation("vision_post", layers=7),
    "head 4 does not exist; expected 0 to 3": iv.AttentionKnockout(heads=4),
    "head -5 does not exist": iv.Ablation("z", heads=[-5]),
    "unit 96 does not exist; expected 0 to 95": iv.Ablation("mlp_post", units=[96]),
    "position 400 does not exist": iv.Ablation("resid_post", positions=[400]),
    "position 0 is padding": iv.Ablation("resid_post", positions=[0]),
    "to= has shape (7,); expected a scalar, (64,) or (3, 64) at site 'attn_out'": iv.Ablation(
        "attn_out", to=torch.ones(7)
    ),
    "direction has shape (2, 64); expected (64,) or (1, 64) at site 'resid_post'": iv.Steering(
        "resid_post", layers=[1], direction=torch.ones(2, 64)
    ),
    "direction has shape (); expected (64,)": iv.Steering("resid_post", direction=torch.tensor(1.0)),
    "site 'projector_out' has image tokens only, and the selection names text in example 0": iv.Ablation(
        "projector_out", positions="question"
    ),
    "acts on generated tokens, and a single run generates none": iv.Ablation("z", to="zero", during="generated"),
    "acts on generated tokens, which have no picture": iv.Ablation("vision_post", layers=0, to="zero", during="both"),
}


@pytest.mark.parametrize("said", OUT_OF_RANGE)
def test_what_does_not_exist_is_refused(said):
    setting = Setting("llava")
    batch = setting.vlm.encode(setting.batch.images[0] * 2, ["is there a cat, or a small umbrella?", "cat?"])
    value = OUT_OF_RANGE[said]
    if "padding" in said:
        batch = setting.vlm.encode(setting.batch.images[0] * 2, ["cat?", "is there a cat, or a small umbrella?"])
    with pytest.raises((InterventionError, SelectionError)) as caught:
        setting.vlm.run(batch, value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


class TestPatching:
    def test_needs_what_it_reads(self):
        setting = Setting("llava")
        cache = setting.vlm.capture(setting.corrupt, "resid_post", positions="last", layers=[1])
        for value, said in (
            (
                iv.ActivationPatch("resid_post", layers=[0], positions="last", source=cache),
                "layer 0 of 'resid_post' was",
            ),
            (
                iv.ActivationPatch("resid_post", layers=[1], positions="image", source=cache),
                "holds no 'resid_post' at pos",
            ),
            (
                iv.ActivationPatch(
                    "resid_post", layers=[1], positions="question", source=cache, source_positions="last"
                ),
                "the source gives [1, 1, 1] positions for the examples of the batch; expected [5, ",
            ),
        ):
            with pytest.raises(InterventionError) as caught:
                setting.vlm.run(setting.batch, value)
            assert said in str(caught.value)
        patch = iv.ActivationPatch("resid_post", layers=[1], positions="last", source=cache)
        with pytest.raises(InterventionError, match="the source has 3 examples; expected 2"):
            setting.vlm.run(setting.batch[:2], patch)

    def test_pairs_positions_across_layouts(self):
        setting = Setting("llava")
        vlm, one = setting.vlm, setting.batch[0]
        longer = vlm.encode(setting.batch.images[0], "please, is there a cat?")
        cache = vlm.capture(longer, "resid_post")
        words = iv.ActivationPatch("resid_post", layers=[1], positions=select.words("cat"), source=cache)
        run = vlm.run(one, words)
        here, there = (select.words("cat").positions(batch.tokens[0]) for batch in (one, longer))
        assert here.tolist() != there.tolist()
        by_number = iv.ActivationPatch("resid_post", layers=[1], positions=here, source=cache, source_positions=there)
        assert torch.equal(run.logits, vlm.run(one, by_number).logits)

    def test_reads_the_patched_positions_where_the_layout_is_the_same(self):
        # a random choice depends on the picture, so that the same selector names other tokens in the source
        setting = Setting("llava")
        drawn = select.random(0.3, seed=2)
        cache = setting.vlm.capture(setting.corrupt, "resid_post", layers=[1])
        run = setting.vlm.run(setting.batch, iv.ActivationPatch("resid_post", [1], drawn, source=cache))
        site = ("resid_post", 1)
        theirs = reference.captured(setting.raw, setting.corrupt.inputs, [site])[site]
        wanted = reference.answers(setting.raw, setting.batch.inputs, {site: _patched(setting, drawn, theirs)})
        torch.testing.assert_close(run.logits, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))

    def test_refuses_pictures_of_other_sizes_in_the_tower(self):
        setting = Setting("qwen2_vl")
        other = setting.vlm.encode(pictures(0, ((40, 30), (60, 20))), ["a?", "b?"])
        one = [setting.vlm.capture(other[i], "vision_post", layers=0) for i in range(2)]
        with pytest.raises(InterventionError, match="the source's pictures have"):
            setting.vlm.run(other[0], iv.ActivationPatch("vision_post", 0, source=one[1]))


def _patched(setting, selector, theirs):
    def edit(value):
        new = value.clone()
        for row, tokens in enumerate(setting.batch.tokens):
            where = selector.positions(tokens)
            new[row, where] = theirs[row, where]
        return new

    return edit


class TestAblation:
    def test_needs_something_to_average_or_a_donor(self):
        setting = Setting("llava")
        with pytest.raises(
            InterventionError, match="averages a single row, which is the value itself; expected at least"
        ):
            setting.vlm.run(setting.batch[0], iv.Ablation("resid_post", positions="last", layers=1))
        with pytest.raises(InterventionError, match="resampling needs a donor, and the batch has one example"):
            setting.vlm.run(setting.batch[0], iv.Ablation("resid_post", layers=1, to="resample"))

    def test_a_reference_mean_serves_a_single_example(self):
        setting = Setting("llava")
        vlm = setting.vlm
        for site in ("resid_post", "z", "mlp_post", "projector_out", "vision_post"):
            layers = [0] if PLACES[site].site == "vision_post" else [1, 0]
            mean = iv.reference_mean(vlm, [setting.corrupt, setting.batch], site, layers=layers)
            rows = []
            for batch in (setting.corrupt, setting.batch):
                for number in range(3):  # one at a time: every position counts once, padding not at all
                    cache = vlm.capture(batch[number], site, "image" if site == "projector_out" else "all", layers)
                    rows.append(cache[site][0].transpose(0, 1))
            wanted = torch.cat(rows).mean(0)
            torch.testing.assert_close(mean, wanted if site != "projector_out" else wanted[0], rtol=0, atol=1e-12)
            run = vlm.run(setting.batch[0], iv.Ablation(site, layers=layers, to=mean))
            assert run.receipts[0].logit_change > 0

    @pytest.mark.parametrize("site", ["pattern", "attn_mask"])
    def test_attention_has_no_reference_mean(self, site):
        with pytest.raises(InterventionError, match=f"site '{site}' has no mean to put anywhere"):
            iv.reference_mean(Setting("llava").vlm, Setting("llava").batch, site)

    def test_a_reference_mean_needs_an_example(self):
        vlm, batch = Setting("llava").vlm, Setting("llava").batch
        for reference_batches, positions in (([], "all"), (batch, select.words("zebra"))):
            with pytest.raises(InterventionError, match=r"no 'z' activation at .* to average; expected at least one"):
                iv.reference_mean(vlm, reference_batches, "z", positions=positions)

    def test_who_donates_must_have_something(self):
        vlm, batch = Setting("llava").vlm, Setting("llava").batch
        donated = iv.Ablation("z", positions=select.words("cat"), to="resample", allow_empty=True)
        with pytest.raises(
            InterventionError, match=r"selects nothing in example \d, which donates to example 0; expected a"
        ):
            vlm.run(batch, donated)


class TestExamplesWithoutPictures:
    setting = Setting("llava")

    def test_beside_others_are_left_as_they_are(self):
        vlm = self.setting.vlm
        mixed = vlm.encode([[pictures(0)[0]], []], ["is there a cat?", "is there a dog?"])
        for site in ("vision_post", "projector_out"):
            value = iv.Ablation(site, layers=0, to="zero", allow_empty=True)
            run = vlm.run(mixed, value)
            moved = ((run.logits - run.clean_logits).abs() > 1e-5).any(1)
            assert moved.tolist() == [True, False]
            with pytest.raises(InterventionError, match="image selects nothing in example 1"):
                vlm.run(mixed, iv.vary(value, allow_empty=[False])[0])

    def test_alone_have_no_vision_tower(self):
        vlm = self.setting.vlm
        text = vlm.encode([[], []], ["is there a cat?", "is there a small dog?"])
        assert torch.equal(vlm.run(text).logits, reference.answers(self.setting.raw, text.inputs))
        assert vlm.run(text, iv.Ablation("z", layers=1, to="zero")).receipts[0].changed > 0
        value = iv.Ablation("vision_post", layers=0, to="zero", allow_empty=True)
        for attempt in (lambda: vlm.run(text, value), lambda: vlm.capture(text, "vision_post")):
            with pytest.raises(
                InterventionError, match="site 'vision_post' in a batch without pictures, on which the v"
            ):
                attempt()


def test_a_capture_of_nothing_is_empty():
    cache = Setting("llava").vlm.capture(Setting("llava").batch, ["pattern", "z"], positions=select.words("zebra"))
    assert cache["z"].shape == (3, 3, 0, 4, 16)
    assert not cache.mask.any()
    some = Setting("llava").vlm.capture(Setting("llava").batch, ["pattern", "z"], positions=select.words("cat"))
    assert some.mask.tolist() == [[True], [False], [False]]
    assert not some["pattern"][1:].any()
