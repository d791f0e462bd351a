"""Spellings against trying every way to write a word; what the tokenizer never writes must not count."""

import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PaliGemmaProcessor, SiglipImageProcessorPil

from interp_vlm.errors import SelectionError
from interp_vlm.readouts.answers import prompt_ends, spellings
from interp_vlm.readouts.spelling import answer_vocabulary, normalised, spellings_of
from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.grid import Geometry, grid_from_geometry
from interp_vlm.tokens.token_map import build_maps

BLANKS = ("", " ", "\n")
PROMPTS = [
    "is there a red cat in the picture? answer:",
    "is there a red cat in the picture? answer:\n",
    "is there a red cat in the picture? answer: ",
    "<bos>is there a red cat<image>",
    "is there a red cat",
    "left: 7",
    "\n",
]


def every_way(word: str) -> set[str]:
    """All mixtures of upper and lower case, with and without a blank or line break on either side."""
    cases = list(itertools.product(*({letter.lower(), letter.upper()} for letter in word)))
    return {f"{before}{''.join(case)}{after}" for case in cases for before in BLANKS for after in BLANKS}


def by_trying(tokenizer, prompt: str, word: str) -> set[int]:
    """Slow and obvious: write the word in every way and look at what the tokenizer makes of it."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    found = set()
    for written in every_way(word):
        after = tokenizer(prompt + written, add_special_tokens=False)["input_ids"]
        # an unknown word may swallow the answer: then a blank is all that is new
        if len(after) == len(before) + 1 and after[:-1] == before and tokenizer.decode(after[-1:]).strip():
            found.add(after[-1])
    return found - {tokenizer.convert_tokens_to_ids("<unk>")}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_spellings_are_all_that_trying_finds(tokenizer, prompt):
    words = ["yes", "no", "red", "two", "cat", "7", "a", ":", "?"]
    for word in words:
        expected = by_trying(tokenizer, prompt, word)
        if expected:
            assert spellings(tokenizer, prompt, word) == tuple(sorted(expected))
        else:
            with pytest.raises(SelectionError, match="no single token"):
                spellings(tokenizer, prompt, word)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_spellings_of_any_prompt(tokenizers, data):
    tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    prompt = data.draw(st.text(alphabet="isredcat?:\n YN7é", max_size=12))
    word = data.draw(st.sampled_from(["yes", "no", "red", "one", "7", "s"]))
    expected = by_trying(tokenizer, prompt, word)
    assert set(answer_vocabulary(tokenizer).spelt_after(tokenizer, prompt, [word])[0]) == expected


def test_several_spellings_are_found(tokenizers):
    prompt = "is there a red cat in the picture?"
    for kind in ("bytes", "unigram", "fallback"):
        found = tokenizers[kind].convert_ids_to_tokens(list(spellings(tokenizers[kind], prompt, "yes")))
        assert len(found) == 6, (kind, found)  # yes, Yes and YES, with and without a blank
        assert {piece.strip("Ġ▁\n") for piece in found} == {"yes", "Yes", "YES"}


def test_what_the_tokenizer_never_writes_does_not_count(tokenizers):
    tokenizer = tokenizers["fallback"]
    byte = tokenizer.convert_tokens_to_ids("<0x37>")
    assert byte in answer_vocabulary(tokenizer).ids["7"]
    assert spellings(tokenizer, "answer:", "7") == (tokenizer.convert_tokens_to_ids("7"),)


def test_case_and_blanks_of_the_asked_word_do_not_matter(tokenizer):
    prompt = "is there a red cat in the picture? answer:"
    assert spellings(tokenizer, prompt, " YES ") == spellings(tokenizer, prompt, "yes")


def test_special_tokens_are_no_answers(tokenizer):
    for word in ("<eos>", "<image>", ""):
        with pytest.raises(SelectionError):
            spellings(tokenizer, "answer:", word)


def test_the_error_names_the_word_the_place_and_the_remedy(tokenizer):
    with pytest.raises(SelectionError, match=r"'hippopotamus' is no single token after the prompt '.*answer:'.*choose"):
        spellings(tokenizer, "x" * 100 + " answer:", "hippopotamus")


def test_several_words_at_once_are_each_alone(tokenizer):
    prompt = "is there a red cat in the picture? answer:"
    assert spellings_of(tokenizer, prompt, ["no", "yes", "no"]) == [
        spellings(tokenizer, prompt, word) for word in ("no", "yes", "no")
    ]


def test_every_id_belongs_to_the_answer_of_its_text(tokenizer):
    vocabulary = answer_vocabulary(tokenizer)
    answers = vocabulary.answers(len(tokenizer) + 3).tolist()
    assert len(answers) == len(tokenizer) + 3
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if "\ufffd" in text:
            assert vocabulary.text(token) == f"<id {token}>"
        else:
            assert vocabulary.text(token) == text.strip()
            assert vocabulary.label(answers[token]) == normalised(text)
    beyond = range(len(tokenizer), len(tokenizer) + 3)
    assert [vocabulary.label(answers[token]) for token in beyond] == [f"<id {token}>" for token in beyond]
    assert len(set(answers)) == len({vocabulary.label(answer) for answer in answers})


def test_the_vocabulary_is_read_once_kept_weakly_and_read_again_when_it_grew(train):
    tokenizer = train("bytes")
    first = answer_vocabulary(tokenizer)
    assert answer_vocabulary(tokenizer) is first
    with pytest.raises(SelectionError):
        spellings(tokenizer, "answer:", "hippopotamus")
    tokenizer.add_tokens(["hippopotamus"])
    assert len(spellings(tokenizer, "answer:", "hippopotamus")) == 1
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None


def test_prompt_ends_say_what_the_model_reads(tokenizer, encode):
    prompts = ["is there a red cat ? answer:", "left right : 7\n"]
    batch = encode(tokenizer, prompts)
    ends = prompt_ends(batch, tokenizer)
    for end, tokens in zip(ends, batch.tokens, strict=True):
        row = tokens.ids[tokens.attention_mask].tolist()
        assert tokenizer(end, add_special_tokens=False)["input_ids"] == row


def test_paligemmas_own_line_break_is_seen(train):
    tokenizer = train("fallback")  # one of its own: the processor adds tokens to it
    images = SiglipImageProcessorPil(size={"height": 8, "width": 8})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tokenizer)
    prompts = ["<image>is there a red cat answer:", "<image>left"]
    pictures = [[Image.new("RGB", (9, 7))], [Image.new("RGB", (9, 7))]]
    encoded = processor(text=prompts, images=pictures, return_tensors="np", padding=True)
    inputs = {name: torch.from_numpy(encoded[name]) for name in ("input_ids", "attention_mask", "pixel_values")}
    token = tokenizer.convert_tokens_to_ids("<image>")
    grid = grid_from_geometry(Geometry.resize((9, 7), (8, 8)), 2, 2, 4.0)
    maps = build_maps(tokenizer, inputs, prompts, ["", ""], token, [(grid,)] * 2, prompts)
    batch = Batch(inputs, maps, tuple(map(tuple, pictures)), ("", ""), tuple(prompts))
    assert prompt_ends(batch, tokenizer) == ("<bos>is there a red cat answer:\n", "<bos>left\n")
    # After the line break "yes" is written without a mark; after the bare question the two would melt together.
    bare = tokenizer.convert_tokens_to_ids("yes")
    assert bare in spellings(tokenizer, prompt_ends(batch, tokenizer)[0], "yes")
    assert bare not in spellings(tokenizer, prompts[0], "yes")
