"""Processors and folders of the embedded models."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from interp_vlm import testbed
from interp_vlm.data.digit_questions import KINDS
from interp_vlm.data.digits import digit_scenes
from interp_vlm.errors import ModelError
from interp_vlm.testbed.build import WORDS, build_processor, load, question_inputs

BLANK = Image.new("RGB", (56, 56))


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("llava", "<s> user: <image> \n", "assistant:"),
        ("paligemma", "<image> <bos>", "\n"),
        (
            "qwen2_vl",
            "<|im_start|> user \n <|vision_start|> <|image_pad|> <|vision_end|>",
            "<|im_end|> \n <|im_start|> assistant \n",
        ),
    ],
)
def test_prompts_are_the_families_own(family, before, after):
    processor = build_processor(family)
    ids = question_inputs(processor, BLANK, "Is there a RED 7?")["input_ids"][0].tolist()
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    assert words.count(processor.image_token) == 49
    kept = [word for k, word in enumerate(words) if word != processor.image_token or words[k - 1] != word]
    assert " ".join(kept) == f"{before} is there a red 7 ? {after}"


@pytest.mark.parametrize("family", testbed.NAMES)
def test_every_word_of_every_question_and_answer_is_one_token(family):
    tokenizer = build_processor(family).tokenizer
    for example in digit_scenes("validation", n=600, kinds=list(KINDS)):
        for text, words in ((example.question, len(example.question.split(" "))), (example.answer, 1)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(ids) == words
            assert tokenizer.unk_token_id not in ids
    assert len(set(tokenizer.convert_tokens_to_ids(list(WORDS)))) == len(WORDS)


@pytest.mark.parametrize("name", testbed.NAMES)
def test_the_folder_looks_like_one_from_the_hub(name):
    folder = testbed.path(f"testbed:{name}")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6
    model, processor = load(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(model).__name__]
    settings = json.loads((folder / "processor_config.json").read_text())
    assert settings["processor_class"] == type(processor).__name__
    assert (folder / "generation_config.json").is_file()
    fresh = build_processor(name)
    for image in (BLANK, Image.effect_noise((80, 50), 60).convert("RGB")):
        saved, new = (question_inputs(p, image, "where is the 7 ?") for p in (processor, fresh))
        assert saved.keys() == new.keys()
        assert all((saved[key] == new[key]).all() for key in saved)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ModelError, match="llava or paligemma or qwen2_vl"):
        testbed.path("testbed:gpt")
    with pytest.raises(ModelError, match="no family 'gpt'"):
        build_processor("gpt")


def test_names_and_paths_need_nothing_heavy():
    heavy = "{'torch', 'transformers', 'sklearn'}"
    code = f"import sys, interp_vlm.testbed as t; t.card('llava'); print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
