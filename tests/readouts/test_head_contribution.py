"""What each head adds to the margin, against the layers' own attention part and against a model without the head."""

import dataclasses

import numpy as np
import pytest
import torch

import interp_vlm as iv
from interp_vlm.readouts.head_contribution import head_contributions
from tests.models.tiny_model import noise
from tests.tiny import FAMILIES, build

QUESTIONS = ["is there a red cat on the left of the picture?", "how many dogs?", "what colour is the square?"]


@pytest.fixture(scope="module")
def made():
    """`made(family)`: a tiny model in double precision and a left-padded batch of three."""
    known = {}

    def made(family: str) -> tuple[iv.VLM, iv.Batch]:
        if family not in known:
            vlm = iv.VLM(*build(family, dtype=torch.float64), name=family)
            known[family] = vlm, vlm.encode([noise(24, 24, seed) for seed in range(3)], QUESTIONS)
        return known[family]

    return made


def test_weights_that_are_being_trained_give_plain_numbers(made):
    vlm, batch = made("llava")
    vlm.model.requires_grad_(True)
    try:
        assert not head_contributions(vlm, batch, correct="yes").heads.requires_grad
        assert not iv.truth_margin(vlm, batch, correct="yes").attention.requires_grad
    finally:
        vlm.model.requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_add_up_to_the_attention_part_of_the_margin(made, family):
    vlm, batch = made(family)
    split = head_contributions(vlm, batch, iv.select.text, correct="yes")
    whole = iv.truth_margin(vlm, batch, iv.select.text, correct="yes")
    assert split.heads.shape[1:3] == (vlm.anatomy.n_layers, vlm.anatomy.n_heads)
    # the second norm of Gemma 2 and 3 computes in single precision whatever the model's dtype
    allowed = 1e-10 if vlm.anatomy.attn_out == vlm.anatomy.attn else 1e-5
    summed = split.heads.sum(dim=2) + split.bias
    torch.testing.assert_close(summed, whole.attention, rtol=0, atol=allowed, equal_nan=True)
    assert split.given
    assert split.answers == ("yes",) * 3
    assert float(split.heads[split.heads.isfinite()].abs().min(dim=0).values.max()) > 0


@pytest.mark.parametrize("family", ["llava", "paligemma", "paligemma2", "qwen3_vl", "gemma3"])
def test_a_head_is_what_its_own_hook_says(made, family):
    """Each head alone through the projection, from hooks and the norms' formulas, one example and head at a time."""
    vlm, batch = made(family)
    split = head_contributions(vlm, batch, correct=11, wrong=12)
    layer = 1
    block = vlm.model.get_submodule(vlm.anatomy.layers)[layer]
    final = vlm.model.get_submodule(vlm.anatomy.final_norm)
    seen = {}
    hooks = [
        block.self_attn.o_proj.register_forward_hook(lambda *a: seen.update(mix=a[1][0], raw=a[2])),
        final.register_forward_hook(lambda *a: seen.update(final=a[1][0])),
    ]
    try:
        with torch.no_grad():
            vlm.model(**batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    head_weights = vlm.model.get_submodule(vlm.anatomy.head).weight
    weight, size = block.self_attn.o_proj.weight, vlm.anatomy.d_head

    def scaled(norm, stream):
        gain = norm.weight + 1 if "gemma" in vlm.anatomy.norm else norm.weight
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        return gain / (stream.square().mean() + eps).sqrt()

    for row, last in enumerate(batch.last.tolist()):
        direction = scaled(final, seen["final"][row, last]) * (head_weights[11] - head_weights[12])
        if vlm.anatomy.attn_out != "self_attn":
            direction = direction * scaled(block.post_attention_layernorm, seen["raw"][row, last])
        for head in range(vlm.anatomy.n_heads):
            own = slice(head * size, (head + 1) * size)
            expected = float((weight[:, own] @ seen["mix"][row, last, own]) @ direction)
            assert float(split.heads[row, layer, head, 0]) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_bias_of_the_projection_is_its_own_part():
    model, processor = build("llava", seed=3, dtype=torch.float64)
    vlm = iv.VLM(model, processor)
    projection = model.model.language_model.layers[1].self_attn.o_proj
    batch = vlm.encode([noise(24, 24, seed) for seed in range(2)], QUESTIONS[:2])
    assert bool((head_contributions(vlm, batch).bias == 0).all())
    projection.bias = torch.nn.Parameter(torch.linspace(-1, 1, projection.out_features, dtype=torch.float64))
    try:
        split, whole = head_contributions(vlm, batch), iv.truth_margin(vlm, batch)
    finally:
        projection.bias = None
    assert bool((split.bias[:, 1] != 0).all())
    assert bool((split.bias[:, [0, 2]] == 0).all())
    torch.testing.assert_close(split.heads.sum(dim=2) + split.bias, whole.attention, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llava", "paligemma2", "qwen3_vl"])
def test_half_precision_stays_within_its_rounding(family, dtype):
    vlm = iv.VLM(*build(family, dtype=dtype), name=family)
    batch = vlm.encode([noise(24, 24, seed) for seed in range(3)], QUESTIONS)
    split = head_contributions(vlm, batch, "all", correct="yes")
    unexplained = split.unexplained.movedim(1, 2)[split.mask]
    assert float(unexplained.abs().max()) < 40 * torch.finfo(dtype).eps


def test_a_row_that_misses_a_norm_is_noticed():
    """Gemma 2's attention read before its second norm is not what is added to the stream."""
    vlm = iv.VLM(*build("paligemma2", seed=1, dtype=torch.float64), name="wrong row")
    true = vlm.anatomy
    batch = vlm.encode(noise(24, 24), QUESTIONS[0])
    vlm.anatomy = dataclasses.replace(true, attn_out="self_attn")
    with pytest.raises(iv.ModelError, match=r"the heads of wrong row miss what attention adds"):
        head_contributions(vlm, batch)


def test_frame_strength_top_and_plot(made):
    vlm, batch = made("qwen2_vl")
    split = head_contributions(vlm, batch, "question", correct="yes")
    frame = split.frame()
    assert len(frame) == int(split.mask.sum()) * vlm.anatomy.n_layers * vlm.anatomy.n_heads
    assert not frame.isna().any(axis=None)
    line = frame[(frame["example"] == 1) & (frame["layer"] == 2) & (frame["head"] == 3)].iloc[0]
    assert line["value"] == pytest.approx(float(split.heads[1, 2, 3][split.mask[1]][0]))
    assert line["position"] == int(batch.tokens[1].question[0])
    means = frame.assign(value=frame["value"].abs()).groupby(["layer", "head"])["value"].mean()
    assert split.top(4) == tuple(means.sort_values(ascending=False).index[:4])
    assert float(split.strength[1, 2]) == pytest.approx(means[1, 2])
    image = np.asarray(split.plot().axes[0].images[0].get_array())
    assert float(image[1, 2]) == pytest.approx(frame.groupby(["layer", "head"])["value"].mean()[1, 2])
    assert "strongest: layer" in repr(split)
