"""What an example encodes to in a batch is what it encodes to alone, for every picture, padding side and family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from interp_vlm.errors import DataError
from interp_vlm.models import render
from tests.models.tiny_model import Tiny, noise

QUESTIONS = ("is there a red cat?", "how many big blue dogs are there on the left?", "what?", "where is the circle?")


def rotated_jpeg(folder) -> str:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(50, 20).save(folder / "rotated.jpg", exif=exif)
    return str(folder / "rotated.jpg")


def gallery(folder) -> dict[str, object]:
    """Pictures of every mode and shape, as callers give them."""
    sixteen = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    palette = noise(33, 21).convert("P")
    palette.info["transparency"] = 3
    noise(40, 30).save(folder / "plain.png")
    return {
        "path": folder / "plain.png",
        "rotated": rotated_jpeg(folder),
        "grey": noise(31, 29).convert("L"),
        "bits": noise(20, 20).convert("1"),
        "alpha": noise(24, 36).convert("RGBA"),
        "palette": palette,
        "cmyk": noise(28, 28).convert("CMYK"),
        "sixteen": Image.fromarray(sixteen),
        "dot": Image.new("RGB", (1, 1), (10, 200, 30)),
        "three": noise(3, 3),
        "wide": noise(4000, 30),
        "tall": noise(30, 4000),
        "large": noise(301, 217),
    }


def same_but_for_padding(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal, where tensors of pictures may have further entries of zeros for other examples' tiles."""
    shape = [max(sides) for sides in zip(one.shape, other.shape, strict=True)]
    full = []
    for tensor in (one, other):
        grown = torch.zeros(shape, dtype=tensor.dtype)
        grown[tuple(slice(side) for side in tensor.shape)] = tensor
        full.append(grown)
    return torch.equal(*full)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_in_a_batch_as_alone(tiny, padding, tmp_path):
    pictures = gallery(tmp_path)
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(len(pictures))]
    batch = tiny.encode(list(pictures.values()), questions, padding=padding)
    assert len(batch) == len(pictures)
    length = batch.inputs["input_ids"].shape[1]
    logits = tiny.forward(batch).logits
    assert torch.isfinite(logits).all()
    for i, (name, picture) in enumerate(pictures.items()):
        alone, kept = tiny.encode(picture, questions[i]), batch.inputs["attention_mask"][i].bool()
        row, map_ = batch[i], batch.tokens[i]
        assert set(alone.inputs) == set(row.inputs)
        for key, tensor in alone.inputs.items():
            if tensor.shape == alone.inputs["input_ids"].shape:
                assert torch.equal(row.inputs[key][0][kept], tensor[0]), (name, key)
            else:
                assert same_but_for_padding(row.inputs[key], tensor), (name, key)
        single = alone.tokens[0]
        shift = length - map_.length if padding == "left" else 0
        for role in ("image", "question", "last", "text", "template", "bos", "all"):
            assert torch.equal(map_.role(role), single.role(role) + shift), (name, role)
        assert map_.key == single.key
        assert map_.grids == single.grids
        assert "".join(map_.pieces[p] for p in map_.question.tolist()).strip() == questions[i]
        found = tiny.forward(alone).logits[0, single.last]
        torch.testing.assert_close(logits[i, map_.last], found, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_several_pictures_one_and_none(tiny, padding):
    pictures = [[noise(40, 30), noise(20, 50)], [noise(30, 30)], [noise(60, 20), noise(24, 24), noise(31, 17)]]
    batch = tiny.encode(pictures, QUESTIONS[:3], padding=padding)
    assert [len(tokens.grids) for tokens in batch.tokens] == [2, 1, 3]
    logits = tiny.forward(batch).logits
    for i, own in enumerate(pictures):
        alone = tiny.encode([own], QUESTIONS[i])
        assert alone.tokens[0].grids == batch.tokens[i].grids
        assert alone.tokens[0].key == batch.tokens[i].key
        for number, grid in enumerate(batch.tokens[i].grids):
            assert grid.size == own[number].size
            assert len(batch.tokens[i].picture_tokens(number)) == grid.n
        for found in (
            tiny.forward(alone).logits[0, alone.last],
            tiny.forward(batch[i]).logits[0, batch.last[i : i + 1]],
        ):
            torch.testing.assert_close(logits[i, batch.last[i : i + 1]], found, rtol=1e-4, atol=2e-4)


def test_an_example_without_pictures_among_others(tiny):
    if tiny.family.name == "paligemma":
        with pytest.raises(DataError, match=r"PaliGemmaProcessor refuses example 0 \(pictures: none\)"):
            tiny.encode([[], []], QUESTIONS[:2])
        return
    pictures = [[], [noise(40, 30)], []]
    batch = tiny.encode(pictures, QUESTIONS[:3])
    assert [len(tokens.image) > 0 for tokens in batch.tokens] == [False, True, False]
    logits = tiny.forward(batch).logits
    for i, own in enumerate(pictures):
        alone = tiny.encode([own], QUESTIONS[i])
        found = tiny.forward(alone).logits[0, alone.last]
        torch.testing.assert_close(logits[i, batch.last[i : i + 1]], found, rtol=1e-4, atol=2e-4)


def test_one_picture_serves_all_questions_and_one_question_all_pictures(tiny):
    shared = tiny.encode(noise(40, 30), QUESTIONS)
    assert [own[0].size for own in shared.images] == [(40, 30)] * 4
    listed = tiny.encode([noise(40, 30)] * 4, list(QUESTIONS))
    assert all(torch.equal(shared.inputs[key], listed.inputs[key]) for key in shared.inputs)
    assert shared.questions == listed.questions == QUESTIONS
    asked = tiny.encode([noise(40, 30), noise(30, 40)], QUESTIONS[0])
    assert asked.questions == (QUESTIONS[0],) * 2


def test_keys_depend_on_the_question_and_on_every_pixel(tiny):
    picture = noise(40, 30)
    changed = picture.copy()
    changed.putpixel((39, 29), (0, 0, 0) if picture.getpixel((39, 29)) != (0, 0, 0) else (1, 1, 1))
    batch = tiny.encode(
        [picture, changed, picture, picture.convert("RGBA")], [*QUESTIONS[:1] * 2, QUESTIONS[1], QUESTIONS[0]]
    )
    keys = [tokens.key for tokens in batch.tokens]
    assert keys[0] == keys[3]
    assert len(set(keys)) == 3


def test_the_prompt_is_the_chat_template_else_the_family_s_own(tiny):
    question = "is there a cat?"
    with_template = tiny.encode(noise(40, 30), question)
    template, tiny.processor.chat_template = tiny.processor.chat_template, None
    try:
        own = tiny.encode(noise(40, 30), question)
    finally:
        tiny.processor.chat_template = template
    for batch in (with_template, own):
        tokens = batch.tokens[0]
        assert "".join(tokens.pieces[p] for p in tokens.question.tolist()).strip() == question
        assert len(tokens.bos) == (0 if tiny.processor.tokenizer.bos_token is None else len(tokens.bos))
        assert len(tokens.bos) <= 1, "a template that writes <bos> must not get a second one"
        assert torch.isfinite(tiny.forward(batch).logits).all()
    assert len(own.tokens[0].image) == len(with_template.tokens[0].image)
    if template:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        direct = tiny.processor.apply_chat_template(messages, add_generation_prompt=True)
        assert with_template.prompts == (direct,)
        # what Hugging Face's own one-step call gives
        messages[0]["content"][0]["image"] = noise(40, 30)
        ids = tiny.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        assert torch.equal(with_template.inputs["input_ids"], ids)


def test_given_prompts_replace_the_template(tiny):
    question = "is there a cat?"
    usual = render(tiny.family, tiny.processor, question)
    assert question in usual
    prompt = usual.replace(question, f"Look well: {question}")
    batch = tiny.encode(noise(40, 30), question, prompts=prompt)
    tokens = batch.tokens[0]
    assert batch.prompts == (prompt,)
    assert "".join(tokens.pieces[p] for p in tokens.question.tolist()).strip() == question
    assert len(tokens.template) > len(tiny.encode(noise(40, 30), question).tokens[0].template)


def test_paligemma_keeps_its_token_types_and_drops_the_labels():
    inputs = Tiny("paligemma").encode(noise(40, 30), list(QUESTIONS)).inputs
    assert "labels" not in inputs
    assert not inputs["token_type_ids"].any()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_marks_its_image_tokens(name):
    batch = Tiny(name).encode(noise(40, 30), list(QUESTIONS))
    for row, tokens in zip(batch.inputs["mm_token_type_ids"], batch.tokens, strict=True):
        assert torch.equal(row.nonzero().flatten(), tokens.image)


@pytest.mark.parametrize(
    ("images", "questions", "message"),
    [
        ([noise(8, 8)] * 2, ["a cat?"] * 3, "2 pictures for 3 questions"),
        ([[noise(8, 8)]] * 2, ["a cat?"], "2 lists of pictures for 1 questions"),
        ([], [], "0 pictures and 0 questions; expected at least one of each"),
        ("absent.png", "a cat?", "absent.png does not exist"),
        ([noise(8, 8), "absent.png"], ["a cat?"] * 2, "absent.png does not exist"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(images, questions, message):
    with pytest.raises(DataError, match=message) as refused:
        Tiny("llava").encode(images, questions)
    assert "\n" not in str(refused.value)


def test_a_picture_that_the_processor_refuses_is_named():
    with pytest.raises(DataError, match=r"Qwen2VLProcessor refuses example 1 \(pictures: 2000x4\).*aspect ratio"):
        Tiny("qwen2_vl").encode([noise(8, 8), noise(2000, 4)], ["a cat?"] * 2)


def test_a_wrong_padding_side_and_prompt_count_are_refused():
    with pytest.raises(DataError, match="padding 'middle'"):
        Tiny("llava").encode(noise(8, 8), "a cat?", padding="middle")
    with pytest.raises(DataError, match="2 prompts for 1 examples"):
        Tiny("llava").encode(noise(8, 8), "a cat?", prompts=["a", "b"])
    with pytest.raises(DataError, match="is not in the prompt"):
        Tiny("llava").encode(noise(8, 8), "a cat?", prompts="USER: <image> a dog?")
    with pytest.raises(DataError, match="refuses example 0"):
        Tiny("llava").encode(noise(8, 8), "a cat?", prompts="USER: a cat?")
