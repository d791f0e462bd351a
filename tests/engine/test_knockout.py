"""Attention knockout: against edited masks on the raw model, attention from scratch, and Hugging Face's own weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import interp_vlm as iv
from tests.engine import reference
from tests.engine.settings import SETTINGS, Setting
from tests.tiny import FAMILIES

every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)
every_family = pytest.mark.parametrize("family", FAMILIES)

LAST = iv.AttentionKnockout(queries="last", keys=iv.select.image | iv.select.question, layers=(0, -1))
SOME_HEADS = iv.AttentionKnockout(queries=iv.select.question | iv.select.last, keys="question", layers=1, heads=[0, -1])
# the first question token keeps the template or the picture before it, and itself is blocked: nobody is left empty


def edges(setting: Setting, knockout: iv.AttentionKnockout, heads: int) -> Tensor:
    """(batch, head, query, key): the edges that a knockout names, one by one."""
    length = setting.batch.inputs["input_ids"].shape[1]
    named = torch.zeros(len(setting.batch), heads, length, length, dtype=torch.bool)
    chosen = range(heads) if knockout.heads is None else [head % heads for head in knockout.heads]
    for row, tokens in enumerate(setting.batch.tokens):
        for query in iv.select.of(knockout.queries).positions(tokens).tolist():
            for key in iv.select.of(knockout.keys).positions(tokens).tolist():
                for head in chosen:
                    named[row, head, query, key] = True
    return named


def allowed(mask: Tensor | None, length: int) -> Tensor:
    """What a mask of Hugging Face's lets attention see."""
    if mask is None:
        return torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    return mask if mask.dtype == torch.bool else mask == 0


def without(named: Tensor):
    """An edit of the mask that a self-attention module is handed."""

    def edit(mask: Tensor | None) -> Tensor:
        if mask is not None and mask.dtype != torch.bool:
            return mask.masked_fill(named, torch.finfo(mask.dtype).min)
        return allowed(mask, named.shape[-1]) & ~named

    return edit


def mask_edits(setting: Setting, knockouts: list[iv.AttentionKnockout]) -> dict:
    heads, layers = setting.vlm.anatomy.n_heads, setting.vlm.anatomy.n_layers
    return {
        ("attn_mask", layer % layers): without(edges(setting, knockout, heads))
        for knockout in knockouts
        for layer in ([knockout.layers] if isinstance(knockout.layers, int) else knockout.layers)
    }


@every_setting
def test_knockouts_equal_edited_masks_and_their_receipts_are_true(setting):
    vlm, batch, both = setting.vlm, setting.batch, [LAST, SOME_HEADS]
    seen: dict[int, Tensor] = {}

    def remember(layer: int):
        def look(mask: Tensor | None) -> Tensor | None:
            seen[layer] = allowed(mask, batch.inputs["input_ids"].shape[1])
            return mask

        return look

    with reference.hooked(setting.raw, {("attn_mask", layer): remember(layer) for layer in range(3)}):
        reference.forward(setting.raw, batch.inputs)
    wanted = reference.answers(setting.raw, batch.inputs, mask_edits(setting, both))
    run = vlm.run(batch, both)

    torch.testing.assert_close(run.logits, wanted, rtol=0, atol=setting.tolerance * float(wanted.abs().max()))
    for receipt, knockout, layers in zip(run.receipts, both, [(0, 2), (1,)], strict=True):
        named = edges(setting, knockout, vlm.anatomy.n_heads)
        assert receipt.changed == sum(int((named & seen[layer]).sum()) for layer in layers)
        assert receipt.layers == layers
        assert receipt.unit == "edges"
        assert receipt.mass_left == 0.0
        assert receipt.unexplained < {32: 1e-5, 64: 1e-6 if setting.eager else 1e-13}[setting.bits]
        assert receipt.logit_change == float((run.logits - run.clean_logits).abs().max()) > 0
        assert receipt.dtype == f"float{setting.bits}"
        assert receipt.plan == run.plan.name


@every_family
@pytest.mark.parametrize("bits", [32, 64])
def test_weights_rebuilt_under_sdpa_are_those_of_eager_attention(family, bits):
    sdpa, eager = Setting(family, "sdpa", bits, "right"), Setting(family, "eager", bits, "right")
    for knockouts in ([], [LAST, SOME_HEADS]):
        cache = sdpa.vlm.capture(sdpa.batch, "pattern", interventions=knockouts)
        with reference.hooked(eager.raw, mask_edits(sdpa, knockouts)):
            weights = reference.forward(eager.raw, sdpa.batch.inputs, output_attentions=True).attentions
        for row, positions in enumerate(cache.positions):
            real = positions[cache.mask[row]]
            found = cache["pattern"][row, :, :, : len(real)]
            wanted = torch.stack([layer[row][:, real] for layer in weights])
            # Hugging Face's eager softmax is in single precision, whatever the model's
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if bits == 32 else 3e-6)


@every_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_knocked_out_edges_carry_no_attention_at_all(family, attn):
    setting = Setting(family, attn, 32)
    vlm, batch = setting.vlm, setting.batch
    cache = vlm.capture(batch, "pattern", interventions=[LAST, SOME_HEADS])
    length = batch.inputs["input_ids"].shape[1]
    weights = torch.zeros(len(batch), 3, vlm.anatomy.n_heads, length, length)
    for row, positions in enumerate(cache.positions):
        real = positions[cache.mask[row]]
        weights[row][:, :, real] = cache["pattern"][row, :, :, : len(real)]
    checked = [weights]
    if setting.eager:
        with vlm.trace(batch, output_attentions=True):
            LAST.apply(vlm)
            SOME_HEADS.apply(vlm)
            attentions = vlm.nnsight.output.attentions.save()
        checked.append(torch.stack(attentions, dim=1))
    for found in checked:
        for knockout, layers in ((LAST, (0, 2)), (SOME_HEADS, (1,))):
            named = edges(setting, knockout, vlm.anatomy.n_heads)
            for layer in layers:
                assert (found[:, layer][named] == 0).all()
                assert (found[:, layer][~named] > 0).any()


def attention_from_scratch(module: torch.nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, keep: Tensor) -> Tensor:
    """Llama's attention, head by head and query by query; `keep` is (batch, head, query, key)."""
    width = module.head_dim
    heads, kv_heads = module.q_proj.out_features // width, module.k_proj.out_features // width
    outputs = torch.zeros(*hidden.shape[:2], heads, width, dtype=hidden.dtype)
    for row, x in enumerate(hidden):
        q, k, v = ((proj(x)).view(len(x), -1, width) for proj in (module.q_proj, module.k_proj, module.v_proj))
        for head in range(heads):
            source = head * kv_heads // heads
            rotated = [turn(t, cos[row], sin[row]) for t in (q[:, head], k[:, source])]
            for query in range(len(x)):
                keys = keep[row, head, query].nonzero().flatten()
                if len(keys):
                    scores = torch.stack([rotated[0][query] @ rotated[1][key] / math.sqrt(width) for key in keys])
                    outputs[row, query, head] = (scores.exp() / scores.exp().sum()) @ v[keys, source]
    return module.o_proj(outputs.flatten(2))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding as a rotation of pairs (i, i + half)."""
    half = x.shape[-1] // 2
    a, b, c, s = x[:, :half], x[:, half:], cos[:, :half], sin[:, :half]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


def scratch(keep: Tensor):
    """A hook that computes a self-attention module's output anew."""

    def hook(module, args, kwargs, output):
        cos, sin = kwargs["position_embeddings"]
        cos, sin = (t.expand(len(keep), -1, -1) for t in (cos, sin))
        return (attention_from_scratch(module, kwargs["hidden_states"], cos, sin, keep), *output[1:])

    return hook


def answers_from_scratch(model, inputs, keeps: dict[int, Tensor]) -> Tensor:
    """The reference answers with attention of some layers computed by hand."""
    modules = reference.decoder_layers(model)
    handles = [modules[i].self_attn.register_forward_hook(scratch(keep), with_kwargs=True) for i, keep in keeps.items()]
    try:
        return reference.answers(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_knockouts_equal_attention_computed_from_scratch(padding):
    setting = Setting("llava", "sdpa", 64, padding)
    batch = setting.batch
    real = batch.inputs["attention_mask"].bool()
    causal = torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()[None, None] & real[:, None, None]
    causal = causal.expand(-1, 4, -1, -1)
    keeps = {
        0: causal & ~edges(setting, LAST, 4),
        1: causal & ~edges(setting, SOME_HEADS, 4),
        2: causal & ~edges(setting, LAST, 4),
    }
    wanted = answers_from_scratch(setting.raw, batch.inputs, keeps)
    found = setting.vlm.run(batch, [LAST, SOME_HEADS]).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))


@every_family
def test_who_may_attend_only_itself_receives_its_own_value(family):
    setting = Setting(family, padding="right")
    vlm, alone = setting.vlm, setting.vlm.encode(setting.batch.images[0][0], "is there a cat?")
    everyone = iv.select.all
    many = [
        iv.AttentionKnockout(queries=here, keys=everyone - iv.select.positions(here), allow_empty=True)
        for here in range(alone.tokens[0].length)
    ]
    cache = vlm.capture(alone, ["pattern", "attn_mask"], interventions=many)
    itself = torch.eye(alone.tokens[0].length, dtype=torch.bool).expand_as(cache["attn_mask"])
    assert torch.equal(cache["attn_mask"], itself)
    assert torch.equal(cache["pattern"], itself.to(cache["pattern"].dtype))

    def own_value(module, args, kwargs, output):
        kwargs_v = module.v_proj(kwargs["hidden_states"]).unflatten(-1, (-1, module.head_dim))
        groups = module.q_proj.out_features // module.v_proj.out_features
        return (module.o_proj(kwargs_v.repeat_interleave(groups, dim=2).flatten(2)), *output[1:])

    handles = [
        layer.self_attn.register_forward_hook(own_value, with_kwargs=True)
        for layer in reference.decoder_layers(setting.raw)
    ]
    wanted = reference.answers(setting.raw, alone.inputs)
    for handle in handles:
        handle.remove()
    found = vlm.run(alone, many)
    torch.testing.assert_close(found.logits, wanted, rtol=0, atol=setting.tolerance * float(wanted.abs().max()))
    assert all(receipt.mass_left == 0.0 for receipt in found.receipts)


@pytest.mark.parametrize("family", ["llava", "paligemma", "gemma3"])
def test_in_half_precision_too(family):
    setting = Setting(family, bits=16)
    run = setting.vlm.run(setting.batch, [LAST, SOME_HEADS])
    wanted = reference.answers(setting.raw, setting.batch.inputs, mask_edits(setting, [LAST, SOME_HEADS]))
    torch.testing.assert_close(run.logits, wanted, rtol=0, atol=setting.tolerance * float(wanted.abs().max()))
    assert [receipt.mass_left for receipt in run.receipts] == [0.0, 0.0]
    assert {receipt.dtype for receipt in run.receipts} == {"bfloat16"}
