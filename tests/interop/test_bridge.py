"""`to_bridge`: the model's own weights and nothing of the model changed."""

import copy

import pytest
import torch
from torch import nn

import interp_vlm as iv
from interp_vlm.errors import ModelError
from interp_vlm.interop.transformer_lens import to_bridge
from tests.engine.settings import Setting
from tests.interop.bridges import logits
from tests.tiny import FAMILIES, build

every_family = pytest.mark.parametrize("family", FAMILIES)


def fresh(family: str) -> iv.VLM:
    """A model of this test's own, in the attention implementation that users have."""
    return iv.VLM(*build.__wrapped__(family), family)


def tensors(module: nn.Module) -> set[int]:
    """Where the memory of every weight and buffer begins, and of every tensor that is kept as an attribute."""
    # Except where the Qwen models note the positions of their last batch: that is each one's own.
    attributes = [item for part in module.modules() for item in vars(part).items() if item[0] != "rope_deltas"]
    kept = [value for _, value in attributes if isinstance(value, torch.Tensor)]
    return {each.data_ptr() for each in (*module.parameters(), *module.buffers(), *kept)}


@every_family
def test_every_weight_is_the_models_own_and_the_model_is_left_as_it_was(family):
    vlm, batch = fresh(family), Setting(family, bits=32).batch
    knockout = iv.AttentionKnockout(queries="last", keys="image", layers=[1])
    before = vlm.run(batch, knockout)
    modules = dict(vlm.model.named_modules())
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    config, padding = vlm.model.config.to_dict(), vlm.tokenizer.padding_side
    ways = {name: part._attn_implementation for name, part in configurations(vlm.model).items()}

    over = to_bridge(vlm)
    logits(over, batch, [("blocks.1.hook_resid_mid", lambda value, hook: value * 0)])

    assert_same_memory(over, vlm)
    assert dict(vlm.model.named_modules()) == modules
    assert {name: set(vars(module)) for name, module in modules.items()} == attributes
    assert {name: part._attn_implementation for name, part in configurations(vlm.model).items()} == ways
    assert (vlm.model.config.to_dict(), vlm.tokenizer.padding_side) == (config, padding)
    after = vlm.run(batch, knockout)
    assert torch.equal(after.logits, before.logits)
    assert after.receipts == before.receipts


def assert_same_memory(over, vlm):
    # TransformerLens gives every unembedding a bias, of zeros: one number for each word of the vocabulary.
    bias = over.unembed.original_component.bias
    assert bias.shape == (vlm.anatomy.d_vocab,)
    assert not bias.any()
    assert tensors(over) == tensors(over.original_model) == tensors(vlm.model) | {bias.data_ptr()}
    assert not {id(weight) for weight in over.parameters()} & {id(weight) for weight in vlm.model.parameters()}


def configurations(model: nn.Module) -> dict:
    return {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}


def test_a_bridge_can_be_had_after_traces_and_again():
    vlm, batch = fresh("qwen2_vl"), Setting("qwen2_vl", bits=32).batch
    with vlm.trace(batch):
        kept = vlm.site("resid_post", 1).save()
    first, second = to_bridge(vlm), to_bridge(vlm)
    seen = []
    again = logits(first, batch, [("blocks.1.hook_resid_post", lambda value, hook: seen.append(value))])
    rows = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(seen[0][rows], kept[rows], rtol=0, atol=1e-4)  # eager attention against sdpa
    assert torch.equal(logits(second, batch), again)


def test_new_weights_of_the_model_are_the_bridges_too():
    vlm, batch = fresh("paligemma"), Setting("paligemma", bits=32).batch
    over = to_bridge(vlm)
    before = logits(over, batch)
    other = {name: weight * 1.1 for name, weight in vlm.model.state_dict().items()}
    vlm.model.load_state_dict(other)
    after = logits(over, batch)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(after, logits(to_bridge(vlm), batch))


# One of each kind of decoder layer: plain, gains of 1 + w, four norms, biases, norms of queries and keys.
@pytest.mark.parametrize("family", ["llava", "paligemma", "paligemma2", "qwen2_vl", "qwen3_vl"])
def test_processed_weights_are_the_bridges_alone(family):
    vlm, batch = fresh(family), Setting(family, bits=32).batch
    weights = {name: weight.clone() for name, weight in vlm.model.named_parameters()}
    over = to_bridge(vlm)
    raw = logits(over, batch)
    over.enable_compatibility_mode(disable_warnings=True)
    folded = logits(over, batch)
    # Centring the unembedding moves all logits of a position by the same amount.
    rows = batch.inputs["attention_mask"].bool()
    difference = (folded - raw)[rows]
    difference = difference - difference.mean(-1, keepdim=True)
    assert difference.abs().max() < 1e-4 * raw.abs().max()
    gain = over.blocks[0].ln1.weight
    assert torch.equal(gain, torch.full_like(gain, 0.0 if vlm.anatomy.norm == "gemma_rms" else 1.0))
    assert all(torch.equal(weight, weights[name]) for name, weight in vlm.model.named_parameters())


def test_a_copy_of_a_bridge_runs():
    setting = Setting("paligemma2", bits=32)
    over = to_bridge(setting.vlm)
    assert torch.equal(logits(copy.deepcopy(over), setting.batch), logits(over, setting.batch))


def test_a_family_without_an_adapter_is_an_error():
    vlm = fresh("llava")
    vlm.model.__class__ = type("MoonForConditionalGeneration", (type(vlm.model),), {})
    with pytest.raises(
        ModelError, match=r"no TransformerLens adapter for Moon.*; expected .*PaliGemma.*; use vlm\.run"
    ):
        to_bridge(vlm)
