"""Bridges against Hugging Face: the same logits bit for bit, the same values at hooks, edits that do what they say."""

import warnings

import pytest
import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module

import interp_vlm as iv
from interp_vlm import testbed
from interp_vlm.interop.transformer_lens import to_bridge
from interp_vlm.testbed.build import load
from tests.engine import reference
from tests.engine.settings import Setting
from tests.interop.bridges import bridge, clean, logits, setting
from tests.tiny import FAMILIES, build

LAYER = 1
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "mlp_post": "mlp.hook_post",
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def name(hook: str) -> str:
    return f"blocks.{LAYER}.{hook}"


def edit(value: torch.Tensor) -> torch.Tensor:
    """Another value at some positions of every example: not a multiple of the old one, which a norm would undo."""
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * value.std()
    chosen = torch.zeros(value.shape[:2] if value.dim() > 2 else value.shape[:1], dtype=torch.bool)
    chosen[..., ::3] = chosen[..., -1] = True
    return torch.where(chosen.view(*chosen.shape, *[1] * (value.dim() - chosen.dim())), noise, value)


@every_family
@pytest.mark.parametrize("padding", ["left", "right"])
def test_logits_are_hugging_faces_own_bit_for_bit(family, padding):
    chosen = setting(family, padding)
    wanted = reference.forward(chosen.raw, chosen.batch.inputs).logits
    assert torch.equal(logits(bridge(family), chosen.batch), wanted)
    assert not torch.equal(logits(bridge(family), chosen.corrupt), wanted)  # the pictures count


@pytest.mark.parametrize("bits", [16, 64])
@pytest.mark.parametrize("family", ["paligemma2", "qwen2_vl", "llava_onevision"])
def test_logits_in_other_precisions_are_hugging_faces_own_bit_for_bit(family, bits):
    chosen = Setting(family, "eager", bits)
    wanted = reference.forward(chosen.raw, chosen.batch.inputs).logits
    found = logits(to_bridge(chosen.vlm), chosen.batch)
    assert found.dtype == chosen.dtype
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", testbed.NAMES)
def test_logits_of_trained_models_are_hugging_faces_own_bit_for_bit(family):
    model, processor = load(testbed.path(family), attn_implementation="eager")
    vlm = iv.VLM(model, processor)
    scenes = iv.data.digit_scenes(n=4)
    batch = vlm.encode([scene.image for scene in scenes], [scene.question for scene in scenes])
    wanted = reference.forward(model, batch.inputs).logits
    assert torch.equal(logits(to_bridge(vlm), batch), wanted)


@every_family
def test_the_cache_holds_what_plain_hooks_see(family):
    chosen = setting(family)
    inputs = dict(chosen.batch.inputs)
    with torch.no_grad():
        _, cache = bridge(family).run_with_cache(inputs.pop("input_ids"), **inputs)
        attended = chosen.raw(**chosen.batch.inputs, output_attentions=True).attentions[LAYER]
    for site, hook in HOOKS.items():
        wanted = reference.captured(chosen.raw, chosen.batch.inputs, [(site, LAYER)])[site, LAYER]
        assert torch.equal(cache[name(hook)], wanted), site
    assert torch.equal(cache["pattern", LAYER], attended)


@every_family
@pytest.mark.parametrize("site", HOOKS)
def test_an_edit_does_what_the_same_edit_by_plain_hooks_does(family, site):
    chosen = setting(family)
    found = logits(bridge(family), chosen.batch, [(name(HOOKS[site]), lambda value, hook: edit(value))])
    with reference.hooked(chosen.raw, {(site, LAYER): edit}):
        wanted = reference.forward(chosen.raw, chosen.batch.inputs).logits
    assert_same_change(found, wanted, clean(family))


@every_family
def test_an_edit_of_the_vision_layer_that_the_projector_reads_counts(family):
    chosen = setting(family)
    read = chosen.vlm.anatomy.vision_read
    layers = "blocks" if "encoder_layers" not in bridge(family).vision_encoder.submodules else "encoder_layers"
    found = logits(
        bridge(family), chosen.batch, [(f"vision_encoder.{layers}.{read}.hook_out", lambda v, hook: edit(v))]
    )
    # Before the hook by which Hugging Face records what the layers give.
    handle = reference.vision_layers(chosen.raw)[read].register_forward_hook(
        lambda module, args, out: (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out), prepend=True
    )
    wanted = reference.forward(chosen.raw, chosen.batch.inputs).logits
    handle.remove()
    assert_same_change(found, wanted, clean(family))


@every_family
def test_an_edit_of_what_the_projector_gives_counts(family):
    chosen = setting(family)
    found = logits(bridge(family), chosen.batch, [("vision_projector.hook_out", lambda value, hook: edit(value))])
    projector = chosen.raw.get_submodule(chosen.vlm.anatomy.projector)
    handle = projector.register_forward_hook(lambda module, args, out: edit(out))
    wanted = reference.forward(chosen.raw, chosen.batch.inputs).logits
    handle.remove()
    assert_same_change(found, wanted, clean(family))


def assert_same_change(found, wanted, unchanged):
    """Equal to what was wanted, at a place where doing nothing is far from it."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert (wanted - unchanged).abs().max() > 0.05


def blocked_by_mask(setting, head, keys):
    """Hugging Face's logits when one head of a layer may not attend some keys, by the mask of its attention."""

    def without(mask):
        mask = mask.expand(-1, setting.vlm.anatomy.n_heads, -1, -1).clone()
        mask[:, head, :, keys] = torch.finfo(mask.dtype).min
        return mask

    with reference.hooked(setting.raw, {("attn_mask", LAYER): without}):
        return reference.forward(setting.raw, setting.batch.inputs).logits


@every_family
def test_an_edit_of_the_scores_is_an_edit_of_the_mask(family):
    chosen, head, keys = setting(family), 2, slice(-9, -6)

    def without(scores, hook):
        scores = scores.clone()
        scores[:, head, :, keys] = torch.finfo(scores.dtype).min
        return scores

    found = logits(bridge(family), chosen.batch, [(name("attn.hook_attn_scores"), without)])
    # The rows of padding, which attend nothing at all, are nobody's business.
    rows = chosen.batch.inputs["attention_mask"].bool()
    assert_same_change(found[rows], blocked_by_mask(chosen, head, keys)[rows], clean(family)[rows])


@every_family
def test_an_edit_of_the_pattern_mixes_the_values_anew(family):
    chosen = setting(family)
    inputs, anatomy = chosen.batch.inputs, chosen.vlm.anatomy

    def changed(pattern):  # every head attends what the next one did, and its last rows nothing
        pattern = pattern.roll(1, dims=1)
        pattern[:, 0, -2:] = 0
        return pattern

    attn = reference.decoder_layers(chosen.raw)[LAYER].self_attn
    values = []
    handle = attn.v_proj.register_forward_hook(lambda module, args, out: values.append(out))
    with torch.no_grad():
        attended = chosen.raw(**inputs, output_attentions=True).attentions[LAYER]
    handle.remove()
    heads = (
        values[0].unflatten(-1, (anatomy.n_kv_heads, -1)).repeat_interleave(anatomy.n_heads // anatomy.n_kv_heads, 2)
    )
    mixed = torch.einsum("bhqk,bkhd->bqhd", changed(attended), heads)
    with reference.hooked(chosen.raw, {("z", LAYER): lambda value: mixed}):
        wanted = reference.forward(chosen.raw, inputs).logits
    hooks = [(name("attn.hook_pattern"), lambda pattern, hook: changed(pattern))]
    assert_same_change(logits(bridge(family), chosen.batch, hooks), wanted, clean(family))


@pytest.mark.parametrize(
    ("family", "hook"),
    [
        ("qwen2_5_vl", "blocks.1.attn.hook_pattern"),
        ("qwen2_5_vl", "blocks.1.attn.hook_attn_scores"),
        ("llava", "blocks.1.hook_resid_mid"),
        ("llava", "vision_encoder.encoder_layers.1.hook_out"),
    ],
)
def test_the_comparison_would_notice_an_edit_that_is_discarded(family, hook):
    """TransformerLens' own adapters: they keep half of an edit of the stream, and nothing of the others."""
    chosen = setting(family)
    model = build.__wrapped__(family, attn="eager")[0]
    theirs = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the edit is discarded
        found = logits(theirs, chosen.batch, [(hook, lambda value, hook: value.flip(1))])
    ours = logits(bridge(family), chosen.batch, [(hook, lambda value, hook: value.flip(1))])
    assert (found - ours).abs().max() > 0.05


@every_family
def test_a_bridge_generates_what_the_model_does(family):
    vlm, over = setting(family).vlm, bridge(family)
    batch = setting(family).batch
    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")
    options = {"max_new_tokens": 3, "do_sample": False, "stop_at_eos": False}
    found = over.hf_generate(ids, return_type="tokens", **options, **inputs)
    wanted = vlm.generate(batch, max_new_tokens=3, min_new_tokens=3).ids
    assert torch.equal(found[:, ids.shape[1] :], wanted)


@every_family
def test_gradients_reach_every_hook_and_not_the_model(family):
    chosen, over = setting(family), bridge(family)
    inputs, seen = dict(chosen.batch.inputs), {}

    def keep(gradient, hook):
        seen[hook.name] = gradient.abs().max()

    hooks = [(name(hook), keep) for hook in (*HOOKS.values(), "attn.hook_pattern", "attn.hook_attn_scores")]
    over.embed.weight.requires_grad_(True)
    with over.hooks(bwd_hooks=hooks):
        over(inputs.pop("input_ids"), **inputs)[:, -1].logsumexp(-1).sum().backward()
    over.embed.weight.requires_grad_(False)
    assert len(seen) == len(hooks)
    assert all(gradient > 0 for gradient in seen.values())
    assert all(weight.grad is None and not weight.requires_grad for weight in chosen.vlm.model.parameters())
