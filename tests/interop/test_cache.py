"""Captured activations as TransformerLens' `ActivationCache`: its values, and analyses that add up."""

import functools
import gc

import pytest
import torch

import interp_vlm as iv
from interp_vlm.interop.transformer_lens import to_bridge
from tests.engine.settings import pictures
from tests.interop.bridges import bridge, setting
from tests.tiny import FAMILIES, build

STREAM = ("resid_pre", "resid_mid", "resid_post")
SITES = (*STREAM, "attn_out", "mlp_out", "z", "mlp_post", "pattern")
SANDWICH = ("gemma3", "paligemma2")  # what attention adds is normed first
BETWEEN = ("qwen3_vl",)  # vision features are added between layers
every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def captured(family: str) -> iv.Cache:
    return setting(family).vlm.capture(setting(family).batch, SITES)


@functools.cache
def converted(family: str):
    return captured(family).to_transformer_lens(bridge(family))


@functools.cache
def theirs(family: str):
    """TransformerLens' own cache of the same run."""
    inputs = dict(setting(family).batch.inputs)
    with torch.no_grad():
        return bridge(family).run_with_cache(inputs.pop("input_ids"), **inputs)[1]


def real(family: str) -> torch.Tensor:
    return setting(family).batch.inputs["attention_mask"].bool()


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@every_family
def test_values_have_transformer_lens_names_shapes_and_positions(family):
    ours, own = converted(family), theirs(family)
    scales = {"ln_final.hook_scale", "blocks.1.ln1.hook_scale", "blocks.2.ln2.hook_scale"}
    named = {name for name in ours if not name.endswith("hook_result")}
    assert len(named - scales) == len(SITES) * setting(family).vlm.anatomy.n_layers
    for name in named | scales:
        rows = real(family)
        found, wanted = ours[name], own[name]
        if name.endswith("hook_pattern"):
            found, wanted = found.transpose(1, 2), wanted.transpose(1, 2)
        assert_close(found[rows], wanted[rows])
        assert not found[~rows].any() or name in scales


@every_family
def test_the_parts_of_the_stream_sum_to_it(family):
    ours = converted(family)
    parts, labels = ours.decompose_resid(return_labels=True)
    assert labels == ["embed"] + [f"{layer}_{part}" for layer in range(3) for part in ("attn_out", "mlp_out")]
    beside = 0
    if family in BETWEEN:
        beside = sum(ours["resid_pre", layer + 1] - ours["resid_post", layer] for layer in range(2))
        assert float(beside.abs().max()) > 0.1
    assert_close(parts.sum(0) + beside, ours["resid_post", -1])
    assert_close(ours.decompose_resid(layer=1).sum(0), ours["resid_post", 0])


@every_family
def test_normed_parts_sum_to_what_the_head_reads(family):
    parts = converted(family).decompose_resid(apply_ln=True).sum(0)
    wanted = theirs(family)["ln_final.hook_normalized"]
    if family not in BETWEEN:
        assert_close(parts[real(family)], wanted[real(family)])


@every_family
def test_the_results_of_heads_sum_to_what_attention_computes(family):
    found, labels = converted(family).stack_head_results(return_labels=True)
    assert labels[:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]
    for layer, heads in enumerate(found.unflatten(0, (3, 4))):
        rows = real(family)
        assert_close(heads.sum(0)[rows], theirs(family)[f"blocks.{layer}.attn.hook_out"][rows])
        if family not in SANDWICH:
            assert_close(heads.sum(0)[rows], captured_rows(family, "attn_out", layer))


def captured_rows(family: str, site: str, layer: int) -> torch.Tensor:
    cache = captured(family)
    return cache[site][:, cache.layers[site].index(layer)][cache.mask]


@every_family
def test_the_logit_lens_is_this_librarys(family):
    own, batch = setting(family).vlm, setting(family).batch
    found = converted(family).logit_lens(positions=None)
    assert found.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    for number, (site, layer) in enumerate([*(("resid_pre", layer) for layer in range(3)), ("resid_post", 2)]):
        lens = iv.logit_lens(own, batch, "all", [layer], site, keep_logits=True)
        assert_close(found.values[number][real(family)], lens.logits[:, 0][lens.mask])
    assert_close(found.values[-1][torch.arange(len(batch)), batch.last], own.run(batch).logits)


def test_logits_are_attributed_to_parts():
    ours, own = converted("qwen2_vl"), setting("qwen2_vl")
    parts = ours.decompose_resid(pos_slice=-1)
    shares = ours.logit_attrs(parts, tokens=torch.tensor([5, 6, 7]), pos_slice=-1)
    logits = own.vlm.run(own.batch).logits[torch.arange(3), torch.tensor([5, 6, 7])]
    gain = own.vlm.model.get_submodule(own.vlm.anatomy.final_norm).weight
    head = own.vlm.model.get_submodule(own.vlm.anatomy.head).weight[torch.tensor([5, 6, 7])]
    scale = ours["ln_final.hook_scale"][:, -1]
    # The gain of the final norm stands between the stream and the head; TransformerLens leaves it to folded weights.
    assert_close((ours["resid_post", -1][:, -1] / scale * gain * head).sum(-1), logits)
    assert_close(shares.sum(0), (ours["resid_post", -1][:, -1] / scale * head).sum(-1))


def test_edited_runs_are_told_apart():
    own = setting("llava")
    edited = own.vlm.capture(own.batch, SITES, interventions=iv.Ablation("z", 1, heads=[2], to="zero"))
    heads = edited.to_transformer_lens(bridge("llava")).stack_head_results()
    assert not heads[1 * 4 + 2].any()
    assert heads[1 * 4 + 1].any()


def test_chosen_positions_keep_their_order():
    own = setting("qwen2_vl")
    cache = own.vlm.capture(own.batch, ("resid_pre", "resid_post", "pattern"), positions="last")
    ours = cache.to_transformer_lens(bridge("qwen2_vl"))
    assert ours["resid_post", 1].shape == (3, 1, 64)
    assert_close(ours["pattern", 1], theirs("qwen2_vl")["pattern", 1][torch.arange(3), :, own.batch.last][:, :, None])
    assert_close(ours.logit_lens(positions=0).values[-1], own.vlm.run(own.batch).logits)


@pytest.mark.parametrize(
    ("sites", "analysis", "missing"),
    [
        (("attn_out", "mlp_out"), lambda cache: cache.decompose_resid(), ("resid_pre", 0)),
        (("resid_pre", "mlp_out"), lambda cache: cache.decompose_resid(), ("attn_out", 0)),
        (("attn_out",), lambda cache: cache.stack_head_results(), ("z", 0)),
        (("z",), lambda cache: cache.stack_head_results(incl_remainder=True), ("resid_post", 2)),
        (("resid_pre",), lambda cache: cache.logit_lens(), ("resid_post", 2)),
        (("resid_pre", "attn_out", "mlp_out"), lambda cache: cache.decompose_resid(apply_ln=True), ("resid_post", 2)),
    ],
    ids=["embed", "attn_out", "z", "remainder", "lens", "norm"],
)
def test_an_analysis_names_the_site_that_it_needs(sites, analysis, missing):
    own = setting("llava")
    cache = own.vlm.capture(own.batch, sites).to_transformer_lens(bridge("llava"))
    message = r"site '{}' was not captured at layer {}; expected .*; capture it: vlm\.capture".format(*missing)
    with pytest.raises(iv.InterventionError, match=message):
        analysis(cache)


def test_names_that_are_no_sites_are_as_absent_as_ever():
    with pytest.raises(KeyError):
        converted("llava")["blocks.0.attn.hook_q"]


def test_sites_without_a_place_there_are_left_out():
    own = setting("llava")
    cache = own.vlm.capture(own.batch, ("attn_mask", "resid_post"), positions="last", layers=[1])
    assert list(cache.to_transformer_lens(bridge("llava"))) == ["blocks.1.hook_resid_post"]


def test_a_cache_finds_its_model_while_that_exists():
    model, processor = build("llava")
    vlm = iv.VLM(model, processor)
    batch = vlm.encode(pictures(0)[0], "is there a cat?")
    cache, logits = vlm.capture(batch, ("resid_pre", "resid_post"), "last").to("cpu"), vlm.run(batch).logits
    torch.testing.assert_close(cache.to_transformer_lens().logit_lens().values[-1], logits)
    del vlm
    gc.collect()
    with pytest.raises(iv.ModelError, match=r"not in memory any more; expected a bridge .*iv\.to_bridge\(vlm\)"):
        cache.to_transformer_lens()


def test_a_bridge_of_another_model_is_refused():
    wide = iv.load("testbed:llava")
    with pytest.raises(iv.ModelError, match=r"expected the bridge's 4 layers of width 128; pass a bridge of the"):
        captured("llava").to_transformer_lens(to_bridge(wide))
