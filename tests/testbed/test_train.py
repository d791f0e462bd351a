"""The training feeds what the processors feed, packs questions exactly, and resumes to the same bytes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from interp_vlm.data.digit_canvas import render
from interp_vlm.errors import ModelError
from interp_vlm.testbed import NAMES
from interp_vlm.testbed.build import build, prompt, question_inputs
from interp_vlm.testbed.feed import MIX, pictures, questions, rendering, scenes
from interp_vlm.testbed.initial import balance_gemma, match_content
from interp_vlm.testbed.objectives import answer_logits, image_features
from interp_vlm.testbed.train import RECIPES, train


@pytest.mark.parametrize("family", NAMES)
def test_packed_questions_equal_the_models_own_single_call(family):
    model, processor = build(family, seed=1)
    rng = np.random.default_rng(0)
    drawn = scenes(rng, 3, rendering(0))
    images = [Image.fromarray(pixels) for pixels in render(drawn)]
    shown = pictures(processor, drawn)
    expected = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(shown.pixels, expected)
    around = prompt(model, processor)
    asked = questions(processor.tokenizer, around.after, drawn, rng, 4, MIX)
    with torch.no_grad():
        features = image_features(model, shown.pixels)
        logits, _ = answer_logits(model, around, features, asked, separate=family == "paligemma")
        for i, image in enumerate(images):
            for j in range(4):
                ids = asked.ids[i, j, : asked.lengths[i, j] - len(around.after)]
                text = " ".join(processor.tokenizer.convert_ids_to_tokens(ids.tolist()))
                alone = model(**question_inputs(processor, image, text)).logits[0, -1]
                torch.testing.assert_close(logits[i, j], alone, rtol=1e-4, atol=1e-5)


def test_hidden_background_is_out_of_the_texts_sight():
    model, processor = build("llava")
    rng = np.random.default_rng(0)
    drawn = scenes(rng, 2, rendering(0))
    shown = pictures(processor, drawn)
    around = prompt(model, processor)
    asked = questions(processor.tokenizer, around.after, drawn, rng, 2, MIX)
    with torch.no_grad():
        features = image_features(model, shown.pixels)
        none = torch.zeros(2, 49, dtype=torch.bool)
        blind = [answer_logits(model, around, f, asked, none)[0] for f in (features, features.flip(1))]
        seeing = [answer_logits(model, around, f, asked)[0] for f in (features, features.flip(1))]
    torch.testing.assert_close(*blind, rtol=0, atol=1e-5)
    assert (seeing[0] - seeing[1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", NAMES)
def test_resumed_training_ends_with_the_same_bytes(family, tmp_path):
    tiny = replace(
        RECIPES[family], align=2, joint=3, align_images=4, images=4, per_image=2, dense=1, exact_from=0.6, validate=2
    )
    whole = train(family, tmp_path / "whole", recipe=tiny, progress=False, measure=0)
    for until in (1, 2, 4, None):  # cuts within stage A, between the stages, within stage B
        parts = train(family, tmp_path / "parts", recipe=tiny, progress=False, measure=0, resume=True, until=until)
        assert (parts / "config.json").exists() == (until is None)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(file.name for file in parts.iterdir()) == sorted(file.name for file in whole.iterdir())
    again = train(family, tmp_path / "parts", recipe=tiny, progress=False, measure=0, resume=True)
    assert again == parts
    other = train(family, tmp_path / "other", seed=1, recipe=tiny, progress=False, measure=0)
    assert (other / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


def test_training_refuses_unknown_families_and_taken_folders(tmp_path):
    with pytest.raises(ModelError, match="llava or paligemma or qwen2_vl"):
        train("gpt", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="exists already"):
        train("llava", tmp_path)


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    tiny = replace(RECIPES["llava"], align=2, joint=2, align_images=2)
    train("llava", tmp_path, recipe=tiny, progress=False, until=1)
    with pytest.raises(ModelError, match="llava with seed 0"):
        train("llava", tmp_path, seed=1, recipe=tiny, progress=False, resume=True)


def test_half_of_the_heads_start_by_matching_content():
    model, _ = build("qwen2_vl")
    match_content(model)
    attention = model.model.language_model.layers[1].self_attn
    size = attention.head_dim
    q, k, v = (getattr(attention, name).weight.split(size) for name in ("q_proj", "k_proj", "v_proj"))
    o = attention.o_proj.weight.split(size, dim=1)
    assert [torch.equal(q[head], k[head // 2]) for head in range(4)] == [True, False, True, False]
    assert torch.equal(o[2], 0.5 * v[1].T)


def test_gemma_is_balanced_without_changing_its_answers_from_text():
    model, processor = build("paligemma")
    shown = pictures(processor, scenes(np.random.default_rng(0), 8, rendering(0)))
    ids = processor.tokenizer("is there a red 7 ?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model.model.language_model(input_ids=ids).last_hidden_state
        balance_gemma(model, shown.pixels)
        after = model.model.language_model(input_ids=ids).last_hidden_state
        assert image_features(model, shown.pixels).pow(2).mean().sqrt().item() == pytest.approx(20, rel=1e-4)
    width = model.config.text_config.hidden_size
    embedding = model.get_input_embeddings()
    # what the layers see no longer grows with the width, and the final norm makes up for the smaller head
    assert embedding(ids).detach().std().item() == pytest.approx(0.04, rel=0.1)
    assert after.std().item() == pytest.approx(before.std().item() * width**0.5, rel=0.2)
