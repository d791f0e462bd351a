"""Interventions as TransformerLens hooks: the logits of the engine's own full run, for every value in every family."""

import functools

import pytest
import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module

import interp_vlm as iv
from interp_vlm import testbed
from interp_vlm.interop.transformer_lens import to_bridge
from interp_vlm.interventions.base import Intervention
from tests.engine.cases import KINDS, intervention, together
from tests.interop.bridges import bridge, logits, setting
from tests.tiny import FAMILIES, build

every_family = pytest.mark.parametrize("family", FAMILIES)
TOLERANCE = 1e-5  # of the largest logit
VISIBLE = 1e-3

ATTENTION = iv.select.top(0.3, by="attention")
KNOCKOUTS = {
    "every layer": iv.AttentionKnockout("last", "image"),
    "window": iv.AttentionKnockout("question", "image", layers=range(0, 2)),
    "heads": iv.AttentionKnockout(iv.select.question | iv.select.last, "image", layers=[1], heads=[2, -1]),
    "evidence": iv.AttentionKnockout("last", ATTENTION - iv.select.last, layers=[1]),
}
OTHERS = {
    "one layer's evidence": iv.Ablation("resid_pre", 1, iv.select.top(0.2, by="attention@-1"), to="zero"),
    "sinks": iv.Ablation("resid_mid", 1, iv.select.top(0.2, by="sinks") | iv.select.last, to="mean"),
    "everywhere": iv.Steering("attn_out", direction=torch.linspace(-1, 1, 64)),
}


def answers(family: str, *many: Intervention) -> torch.Tensor:
    """The answer logits of the family's bridge with interventions as its hooks."""
    batch = setting(family).batch
    return answered(bridge(family), batch, [each.as_hooks(bridge(family), batch) for each in many])


def answered(over, batch: iv.Batch, lists=()) -> torch.Tensor:
    hooks = [hook for found in lists for hook in found]
    return logits(over, batch, hooks)[torch.arange(len(batch)), batch.last]


@functools.cache
def clean(family: str) -> torch.Tensor:
    return answers(family)


def assert_parity(family: str, *many: Intervention) -> None:
    """The bridge's answers are the engine's, which are not those without interventions."""
    own = setting(family)
    wanted = own.vlm.run(own.batch, many, engine="full").logits
    assert distance(answers(family, *many), wanted) < TOLERANCE, many
    assert distance(clean(family), wanted) > VISIBLE, many


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of logits, relative to the largest."""
    assert wanted.isfinite().all()
    return float((found - wanted).abs().max() / wanted.abs().max())


@every_family
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_site_together(family, kind):
    own = setting(family)
    # Each of them counts: tests/engine/test_parity.py leaves out one after another.
    assert_parity(family, *[intervention(kind, place, own) for place in together(kind)])


@every_family
def test_knockouts_and_selections_by_evidence(family):
    for each in (*KNOCKOUTS.values(), *OTHERS.values()):
        assert_parity(family, each)


@every_family
def test_an_edit_of_the_last_vision_layer_that_is_read(family):
    # LLaVA takes its features from an inner layer's output, beside the hook that sees it.
    read = setting(family).vlm.anatomy.vision_read
    assert_parity(family, iv.Ablation("vision_post", read, to="zero"))


@every_family
def test_another_layer_or_head_gives_another_answer(family):
    own = setting(family)
    for right, wrong in (
        (iv.Ablation("z", 1, "all", heads=[1], to="zero"), iv.Ablation("z", 1, "all", heads=[2], to="zero")),
        (KNOCKOUTS["heads"], iv.AttentionKnockout(iv.select.question | iv.select.last, "image", 1, heads=[0, 1])),
        (KNOCKOUTS["window"], iv.AttentionKnockout("question", "image", layers=[0])),
    ):
        wanted = own.vlm.run(own.batch, right, engine="full").logits
        assert distance(answers(family, right), wanted) < TOLERANCE
        assert distance(answers(family, wrong), wanted) > VISIBLE


def test_edits_of_the_same_cells_apply_in_the_order_of_the_list():
    zero = iv.Ablation("resid_post", 1, "last", to="zero")
    step = iv.Steering("resid_post", 1, "last", direction=torch.linspace(-1, 1, 64))
    own = setting("qwen2_vl")
    for many in ([zero, step], [step, zero]):
        wanted = own.vlm.run(own.batch, many, engine="full").logits
        assert distance(answers("qwen2_vl", *many), wanted) < TOLERANCE
    assert distance(answers("qwen2_vl", zero, step), wanted) > VISIBLE


@pytest.mark.parametrize("family", testbed.NAMES)
def test_trained_models_change_their_answers_alike(family):
    vlm = iv.load(f"testbed:{family}")
    pairs = iv.data.digit_pairs(n=4)
    clean, corrupt = (
        vlm.encode([each.image for each in scenes], [each.question for each in scenes])
        for scenes in ([pair.clean for pair in pairs], [pair.corrupt for pair in pairs])
    )
    over = to_bridge(vlm)
    patch = iv.ActivationPatch("resid_pre", 0, "image", source=vlm.capture(clean, "resid_pre"))
    for each in (patch, iv.AttentionKnockout("last", "image")):
        run = vlm.run(corrupt, each, engine="full")
        found = answered(over, corrupt, [each.as_hooks(over, corrupt)])
        assert distance(found, run.logits) < TOLERANCE
        assert torch.equal(found.argmax(-1), run.logits.argmax(-1))
        assert not torch.equal(found.argmax(-1), run.clean_logits.argmax(-1))


def test_nothing_stays_behind():
    own, batch = bridge("llava"), setting("llava").batch
    before = answered(own, batch)
    hooks = [each.as_hooks(own, batch) for each in (KNOCKOUTS["evidence"], iv.Ablation("z", 1, to="mean"))]
    first = answered(own, batch, hooks)
    assert torch.equal(answered(own, batch), before)
    assert torch.equal(answered(own, batch, hooks), first)
    assert not torch.equal(first, before)


def booted(family: str, **options):
    """A bridge with TransformerLens' own adapter."""
    model = build.__wrapped__(family)[0]
    name = type(model).__name__
    return build_bridge_from_module(model, name, hf_config=model.config, dtype=torch.float32, **options)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize("site", ["resid_mid", "vision_post"])
def test_edits_that_transformer_lens_own_adapters_drop_count_here(family, site):
    own, theirs = setting(family), booted(family)
    layer = own.vlm.anatomy.vision_read if site == "vision_post" else 1
    each = iv.Ablation(site, layer, to="mean")
    wanted = own.vlm.run(own.batch, each, engine="full").logits
    assert distance(answered(theirs, own.batch, [each.as_hooks(theirs, own.batch)]), wanted) < TOLERANCE
    assert distance(clean(family), wanted) > VISIBLE


def test_a_knockout_that_the_bridge_would_ignore_is_refused():
    theirs, batch = booted("qwen2_5_vl"), setting("qwen2_5_vl").batch
    hooks = KNOCKOUTS["every layer"].as_hooks(theirs, batch)
    with pytest.raises(iv.InterventionError, match=r"leaves 0\.\d+ attention on its edges in layer 0.*iv.to_bridge"):
        logits(theirs, batch, hooks)


def test_a_site_without_a_hook_is_refused():
    own = setting("llava")
    blind = booted("llava", post_adapter_hook=lambda adapter: adapter.components.pop("vision_encoder"))
    with pytest.raises(iv.InterventionError, match=r"no hook for site 'vision_post' of LlavaFor.*edit 'projector_out'"):
        iv.Ablation("vision_post", 0, to="zero").as_hooks(blind, own.batch)


def test_another_batch_is_refused():
    own = setting("llava")
    hooks = iv.Ablation("resid_post", 1, to="zero").as_hooks(bridge("llava"), own.batch)
    with pytest.raises(iv.InterventionError, match=r"the model computes 2 x \d+ rows where Ablation"):
        logits(bridge("llava"), own.batch[:2], hooks)


@pytest.mark.parametrize(
    ("each", "message"),
    [
        (iv.AttentionKnockout("last", "image", layers=[3]), "layer 3 does not exist"),
        (iv.Steering("mlp_out", 1, direction=torch.ones(64), during="generated"), "acts on generated tokens"),
        (iv.Ablation("vision_post", 2, to="zero"), "vision layer 2, which the projector does not read"),
        (iv.Ablation("resid_post", -1, "image", to="zero"), "which nothing reads"),
    ],
    ids=["layer", "generated", "vision layer", "unread"],
)
def test_what_the_engine_refuses_is_refused(each, message):
    with pytest.raises(iv.InterventionError, match=message):
        each.as_hooks(bridge("llava"), setting("llava").batch)


@pytest.mark.parametrize(
    ("each", "message"),
    [
        (iv.AttentionKnockout("last", "all"), "with no key to attend"),
        (iv.AttentionKnockout("image", "last"), "blocks no edge"),
    ],
    ids=["every key", "the future"],
)
def test_knockouts_without_meaning_are_refused_as_they_run(each, message):
    batch = setting("llava").batch
    hooks = each.as_hooks(bridge("llava"), batch)
    with pytest.raises(iv.InterventionError, match=message):
        logits(bridge("llava"), batch, hooks)


def test_only_bridges_as_they_were_booted_are_taken():
    own = setting("llava")
    with pytest.raises(iv.ModelError, match=r"bridge is a VLM; expected a TransformerBridge; .*to_bridge"):
        KNOCKOUTS["window"].as_hooks(own.vlm, own.batch)
    processed = to_bridge(own.vlm)
    processed.compatibility_mode = True
    with pytest.raises(iv.ModelError, match="compatibility mode"):
        KNOCKOUTS["window"].as_hooks(processed, own.batch)
