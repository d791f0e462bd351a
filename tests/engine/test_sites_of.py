"""Sites in plain nnsight traces of a model that the caller wrapped, against plain hooks on the raw model."""

import functools

import pytest
import torch
from nnsight import NNsight
from transformers import LlamaConfig, LlamaForCausalLM

import interp_vlm as iv
from interp_vlm.engine.sites_of import Sites, sites_of
from tests.engine import reference
from tests.engine.settings import Setting
from tests.tiny import FAMILIES, build

CELLS = [("vision_post", 0), ("projector_out", 0)] + [
    (name, 1) for name in ("resid_pre", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")
]
every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def wrapped(family: str) -> tuple[NNsight, Sites]:
    model = NNsight(build(family)[0])
    return model, sites_of(model)


def setting_of(family: str) -> Setting:
    return Setting(family, bits=32)


def last_rows(logits: torch.Tensor, batch: iv.Batch) -> torch.Tensor:
    return logits[torch.arange(len(batch)), batch.last]


@every_family
def test_every_site_reads_as_plain_hooks_see_it(family):
    (model, sites), setting = wrapped(family), setting_of(family)
    found = {}
    with model.trace(**setting.batch.inputs):
        for name, layer in CELLS:
            where = name if name == "projector_out" else (name, layer)
            found[name] = sites[where].clone().save()
    wanted = reference.captured(setting.raw, setting.batch.inputs, CELLS)
    for name, layer in CELLS:
        assert torch.equal(found[name].flatten(), wanted[name, layer].flatten()), name


@every_family
def test_every_site_is_written_as_plain_hooks_edit_it(family):
    (model, sites), setting = wrapped(family), setting_of(family)
    with model.trace(**setting.batch.inputs):
        for where in CELLS:
            sites[where] = -0.5 * sites[where]
        logits = model.output.logits.save()
    edits = {where: lambda value: -0.5 * value for where in CELLS}
    wanted = reference.answers(setting.raw, setting.batch.inputs, edits)
    scale = float(wanted.abs().max())
    assert float((last_rows(logits, setting.batch) - wanted).abs().max()) < 1e-5 * scale
    for left in CELLS:
        others = {where: edit for where, edit in edits.items() if where != left}
        missing = reference.answers(setting.raw, setting.batch.inputs, others)
        assert float((missing - wanted).abs().max()) > 1e-3 * scale, f"{left} could be left out unseen"


@pytest.mark.parametrize(
    ("family", "attn"), [(name, "sdpa") for name in FAMILIES] + [(name, "eager") for name in ("llava", "paligemma")]
)
def test_a_mask_that_is_written_is_a_knockout(family, attn):
    setting = Setting(family, attn, bits=32)
    model = NNsight(build(family, attn=attn)[0])
    sites, batch = sites_of(model), setting.batch
    with model.trace(**batch.inputs):
        keep = sites["attn_mask", 1].expand(-1, 4, -1, -1).clone()
        for row, tokens in enumerate(batch.tokens):
            keep[row, 2, tokens.last, tokens.image] = False
        sites["attn_mask", 1] = keep
        logits = model.output.logits.save()
    knockout = iv.AttentionKnockout(queries="last", keys="image", layers=[1], heads=[2])
    run = setting.vlm.run(batch, knockout, engine="full")
    assert torch.equal(last_rows(logits, batch), run.logits)
    assert not torch.equal(run.logits, run.clean_logits)


def test_a_number_or_a_row_fills_the_site_and_layers_count_from_the_end():
    (model, sites), batch = wrapped("qwen2_vl"), setting_of("qwen2_vl").batch
    row = torch.linspace(-1, 1, 64)
    with model.trace(**batch.inputs):
        sites["mlp_out", -2] = 0
        seen = sites["mlp_out", 1].save()
        sites["resid_post", -1] = row
        last = sites["resid_post", 2].save()
    assert not seen.any()
    assert torch.equal(last, row.expand(3, last.shape[1], -1))


def test_generated_tokens_are_sites_too():
    (model, sites), setting = wrapped("llava"), setting_of("llava")
    shapes = []
    call = {"fn": model._module.generate, **setting.batch.inputs, "max_new_tokens": 3, "do_sample": False}
    with model.trace(**call) as tracer:
        for _ in tracer.iter[0:3]:
            shapes.append(tuple(sites["z", 1].shape))
    assert shapes == [(3, setting.batch.inputs["input_ids"].shape[1], 4, 16), (3, 1, 4, 16), (3, 1, 4, 16)]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (("resid_post", 3), "layer 3 does not exist; expected 0 to 2"),
        (("resid_posts", 1), "there is no site 'resid_posts'"),
        (("pattern", 1), "'pattern' is rebuilt after a run"),
        ("resid_post", r"site 'resid_post' without a layer; expected sites\['resid_post', layer\]"),
    ],
    ids=["layer", "name", "pattern", "no layer"],
)
def test_what_is_no_site_is_refused(where, message):
    (model, sites), batch = wrapped("llava"), setting_of("llava").batch
    with pytest.raises(iv.InterventionError, match=message), model.trace(**batch.inputs):
        sites[where].save()


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("resid_post", 1), torch.zeros(3), r"a value of shape \(3,\) for site 'resid_post'; expected \(3, "),
        (("attn_mask", 1), torch.zeros(3, 1, 2, 2), "a mask of float32; expected booleans"),
        (("attn_mask", 1), torch.ones(3, 1, 2, 2, dtype=torch.bool), r"a value of shape \(3, 1, 2, 2\)"),
    ],
    ids=["shape", "mask of numbers", "mask's shape"],
)
def test_what_does_not_fit_is_refused(where, value, message):
    (model, sites), batch = wrapped("llava"), setting_of("llava").batch
    with pytest.raises(iv.InterventionError, match=message), model.trace(**batch.inputs):
        sites[where] = value


def test_outside_a_trace_there_are_no_values():
    with pytest.raises(iv.InterventionError, match="site 'z' outside a trace"):
        wrapped("llava")[1]["z", 1]


def test_only_known_models_that_nnsight_wraps_have_sites():
    for other in (build("llava")[0], torch.nn.Linear(2, 2), NNsight(torch.nn.Linear(2, 2))):
        with pytest.raises(iv.ModelError, match=r"the sites of a .*; expected .*; pass NNsight\(model\)"):
            sites_of(other)
    text = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8,
                                        num_attention_heads=1))  # fmt: skip
    with pytest.raises(iv.ModelError, match="architecture LlamaForCausalLM is not known"):
        sites_of(NNsight(text))
