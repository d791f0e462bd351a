"""Every fact of the table holds in the modules: paths, counts, what adds up to the residual stream, who sees whom."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers as hf

from interp_vlm.errors import ModelError
from interp_vlm.models import describe
from tests.models.tiny_model import Tiny, noise
from tests.tiny import FAMILIES, build


@pytest.fixture(params=FAMILIES)
def exact(request):
    """Every family in turn, in double precision under eager attention, which returns its weights."""
    return Tiny(request.param, torch.float64, "eager")


def watched(tiny: Tiny, batch, paths, **kwargs):
    """Outputs and inputs of modules during one forward pass, and its result."""
    outputs, inputs, hooks = {}, {}, []

    def hook(path):
        def keep(module, args, given, output):
            outputs[path] = output[0] if isinstance(output, tuple) else output
            inputs[path] = {**given, **({"hidden_states": args[0]} if args else {})}

        return keep

    for path in paths:
        module = tiny.model.get_submodule(path)
        hooks.append(module.register_forward_hook(hook(path), with_kwargs=True))
    try:
        result = tiny.forward(batch, **kwargs)
    finally:
        for handle in hooks:
            handle.remove()
    return outputs, inputs, result


def test_paths_and_counts_are_those_of_the_modules(tiny):
    model, facts = tiny.model, tiny.anatomy
    layers = model.get_submodule(facts.layers)
    assert len(layers) == facts.n_layers == len(facts.layer_kinds) == 3
    assert len(model.get_submodule(facts.vision_layers)) == facts.n_vision_layers == 3
    for layer in layers:
        attn, mlp = layer.get_submodule(facts.attn), layer.get_submodule(facts.mlp)
        assert attn.get_submodule(facts.q).weight.shape == (facts.n_heads * facts.d_head, facts.d_model)
        assert attn.get_submodule(facts.k).weight.shape == (facts.n_kv_heads * facts.d_head, facts.d_model)
        assert attn.get_submodule(facts.v).weight.shape == (facts.n_kv_heads * facts.d_head, facts.d_model)
        assert attn.get_submodule(facts.o).weight.shape == (facts.d_model, facts.n_heads * facts.d_head)
        assert mlp.get_submodule(facts.down).weight.shape == (facts.d_model, facts.d_mlp)
        assert hasattr(attn, "q_norm") == (facts.q_norm is not None)
        assert attn.scaling == facts.scaling
    assert model.get_submodule(facts.head).weight.shape == (facts.d_vocab, facts.d_model)
    assert model.get_submodule(facts.final_norm).weight.shape == (facts.d_model,)
    vision = model.get_submodule(f"{facts.vision_layers}.0")
    assert next(weight for name, weight in vision.named_parameters() if "norm" in name).shape == (facts.d_vision,)
    assert model.config.image_token_id == facts.image_token_id
    assert facts.architecture == type(model).__name__
    assert facts.n_kv_heads < facts.n_heads, "the tiny models must exercise grouped-query attention"


def test_the_residual_stream_is_the_sum_of_the_named_parts(exact):
    facts = exact.anatomy
    # right: in double precision Hugging Face's eager attention gives NaN for padding rows that see nothing
    batch = exact.encode(noise(40, 30), ["is there a cat?", "how many dogs are there?"], padding="right")
    paths = [
        f"{facts.layers}.{i}{suffix}"
        for i in range(facts.n_layers)
        for suffix in ("", f".{facts.attn_out}", f".{facts.resid_mid}", f".{facts.mlp_out}")
    ]
    outputs, inputs, _ = watched(exact, batch, paths)
    for i in range(facts.n_layers):
        layer = f"{facts.layers}.{i}"
        before = inputs[layer]["hidden_states"]
        middle = inputs[f"{layer}.{facts.resid_mid}"]["hidden_states"]
        torch.testing.assert_close(before + outputs[f"{layer}.{facts.attn_out}"], middle, rtol=0, atol=1e-12)
        torch.testing.assert_close(middle + outputs[f"{layer}.{facts.mlp_out}"], outputs[layer], rtol=0, atol=1e-12)
        if i + 1 < facts.n_layers:
            after = inputs[f"{facts.layers}.{i + 1}"]["hidden_states"]
            assert torch.equal(outputs[layer], after) == (not (facts.between_layers and i < 2))


def rotated(states, cos, sin):
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    return states * cos[:, None] + turned * sin[:, None]


def test_attention_weights_can_be_rebuilt_from_the_stated_facts(exact):
    facts = exact.anatomy
    batch = exact.encode(
        [noise(40, 30), noise(24, 24)], ["is there a cat?", "how many big red dogs are there?"], padding="right"
    )
    attns = [f"{facts.layers}.{i}.{facts.attn}" for i in range(facts.n_layers)]
    names = [facts.q, facts.k, *filter(None, (facts.q_norm, facts.k_norm))]
    paths = [*attns, *(f"{attn}.{name}" for attn in attns for name in names)]
    outputs, inputs, result = watched(exact, batch, paths, output_attentions=True)
    for attn, found in zip(attns, result.attentions, strict=True):
        cos, sin = inputs[attn]["position_embeddings"]
        parts = {}
        for name, norm, heads in ((facts.q, facts.q_norm, facts.n_heads), (facts.k, facts.k_norm, facts.n_kv_heads)):
            states = outputs[f"{attn}.{name}"].unflatten(-1, (heads, facts.d_head))
            states = exact.model.get_submodule(f"{attn}.{norm}")(states) if norm else states
            states = rotated(states.transpose(1, 2), cos, sin)
            parts[name] = states.repeat_interleave(facts.n_heads // heads, dim=1)
        scores = parts[facts.q] @ parts[facts.k].mT * facts.scaling
        scores = facts.softcap * torch.tanh(scores / facts.softcap) if facts.softcap else scores
        mask = inputs[attn]["attention_mask"]
        rebuilt = torch.softmax(scores + mask, dim=-1)
        torch.testing.assert_close(rebuilt, found, rtol=0, atol=1e-6)  # Hugging Face: float32 softmax


def test_logits_are_the_head_of_the_final_norm_soft_capped(exact):
    facts = exact.anatomy
    batch = exact.encode(noise(40, 30), "is there a cat?")
    last = f"{facts.layers}.{facts.n_layers - 1}"
    outputs, _, result = watched(exact, batch, [last, facts.final_norm])
    norm = exact.model.get_submodule(facts.final_norm)
    stream = outputs[last]
    gain = norm.weight + 1 if facts.norm == "gemma_rms" else norm.weight
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    by_hand = gain * stream / (stream.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    # Hugging Face norms in float32 whatever the model's precision
    torch.testing.assert_close(outputs[facts.final_norm], by_hand, rtol=1e-5, atol=1e-5)
    logits = exact.model.get_submodule(facts.head)(outputs[facts.final_norm])
    logits = facts.final_softcap * torch.tanh(logits / facts.final_softcap) if facts.final_softcap else logits
    torch.testing.assert_close(logits, result.logits, rtol=0, atol=1e-12)


def test_the_projector_reads_the_stated_vision_layer_and_none_after_it(tiny):
    facts = tiny.anatomy
    batch = tiny.encode(noise(40, 30), "is there a cat?")
    clean = tiny.image_embeddings(batch)[0]
    for layer in range(facts.n_vision_layers):
        module = tiny.model.get_submodule(f"{facts.vision_layers}.{layer}")
        # first in line: Hugging Face records hidden states by hooks of its own
        hook = module.register_forward_hook(
            lambda _, args, out: (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5, prepend=True
        )
        try:
            changed = not torch.equal(tiny.image_embeddings(batch)[0], clean)
        finally:
            hook.remove()
        assert changed == (layer <= facts.vision_read), (layer, facts.vision_read)
    if tiny.name.startswith("llava") and tiny.name != "llava_onevision":
        assert facts.vision_read == facts.n_vision_layers - 2


def test_the_prefix_says_who_sees_whom(tiny):
    """A change at the last image token reaches the first one, at the question's end its beginning, as stated."""
    facts = tiny.anatomy
    batch = tiny.encode(noise(40, 30), "is there a cat on the left?")
    tokens = batch.tokens[0]
    image, question = tokens.image, tokens.question

    def reached(source: int, target: int) -> bool:
        def nudge(_, args, kwargs):
            moved = kwargs["inputs_embeds"].clone()
            moved[0, source] += 1.0
            return args, {**kwargs, "inputs_embeds": moved}

        path = f"{facts.layers}.{facts.n_layers - 1}"
        clean, _, _ = watched(tiny, batch, [path])
        decoder = tiny.model.get_submodule(facts.decoder)
        hook = decoder.register_forward_pre_hook(nudge, with_kwargs=True)
        try:
            moved, _, _ = watched(tiny, batch, [path])
        finally:
            hook.remove()
        return not torch.allclose(clean[path][0, target], moved[path][0, target], atol=1e-6)

    assert reached(int(image[0]), int(question[-1])), "late tokens see early ones in every family"
    assert reached(int(image[-1]), int(image[0])) == (facts.prefix in ("bidirectional", "image_blocks"))
    assert reached(int(question[-1]), int(question[0])) == (facts.prefix == "bidirectional")
    assert reached(int(question[-1]), int(image[0])) == (facts.prefix == "bidirectional")


def test_facts_that_differ_between_the_families():
    facts = {name: describe(build(name)[0]) for name in FAMILIES}
    assert {name for name, f in facts.items() if f.prefix != "causal"} == {"paligemma", "paligemma2", "gemma3"}
    assert {name for name, f in facts.items() if f.norm == "gemma_rms"} == {"paligemma", "paligemma2", "gemma3"}
    assert {name for name, f in facts.items() if f.rope == "multimodal"} == {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
    assert {name for name, f in facts.items() if f.between_layers} == {"qwen3_vl"}
    assert {name for name, f in facts.items() if f.softcap} == {"paligemma2"}
    assert {name for name, f in facts.items() if f.q_norm} == {"qwen3_vl", "gemma3"}
    assert {name for name, f in facts.items() if f.sliding_window} == {"paligemma2", "gemma3"}
    assert facts["llava_next"].text == "mistral"
    assert facts["paligemma"].family == facts["paligemma2"].family == "paligemma"
    late = {"llava", "llava_next", "llava_onevision", "idefics3", "smolvlm"}
    assert {name for name, f in facts.items() if f.fusion == "late"} == late


def test_facts_are_frozen(tiny):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.anatomy.n_layers = 1


def test_modules_that_contradict_the_configuration_are_refused():
    model = copy.deepcopy(build("llava")[0])
    del model.model.language_model.layers[-1]
    with pytest.raises(ModelError, match=r"n_layers is 2, not 3"):
        describe(model)


def test_another_layout_is_refused_by_the_missing_path():
    model = copy.deepcopy(build("llava")[0])
    model.model.connector = model.model.multi_modal_projector
    del model.model.multi_modal_projector
    with pytest.raises(ModelError, match=r"no module 'model.multi_modal_projector'"):
        describe(model)


def test_an_unknown_text_decoder_is_refused_with_the_known_ones():
    config = copy.deepcopy(build("llava")[0].config)
    text = config.text_config.to_dict()
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config.text_config = hf.GPTNeoXConfig(**{key: text[key] for key in keep})
    model = hf.LlavaForConditionalGeneration(config)
    with pytest.raises(ModelError, match=r"'gpt_neox' is not in the table.*gemma2.*llama.*`decoders`"):
        describe(model)
