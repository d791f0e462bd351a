"""The question is found among the tokens of any kind of tokenizer, wherever the processor put them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from interp_vlm.tokens.locate import Located, locate

TEXT = (
    "is there a red cat on the left ? how many dogs are there ? what is the man holding ? a small umbrella",
    "USER: ASSISTANT: answer the question using a single word or phrase. You are a helpful assistant.",
)
SPECIAL = ["<pad>", "<s>", "<unk>", "<image>"]


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _fast(tokenizer)


def unigram() -> Any:
    """As Llama's: a blank is put before the first word, and words carry it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _fast(tokenizer)


def word_piece() -> Any:
    """As BERT's: lower case, accents dropped, unknown words lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    )
    return _fast(tokenizer)


def word_level() -> Any:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return _fast(tokenizer)


def slow() -> Any:
    """A tokenizer in pure Python, which knows no character offsets."""
    return ByT5Tokenizer(extra_ids=5, extra_special_tokens={"image_token": "<image>"})


TOKENIZERS = {make.__name__: make() for make in (byte_level, unigram, word_piece, word_level, slow)}
QUESTIONS = (
    "is there a red cat ?", "How Many DOGS ?", "a", "what is the zebra holding ?", "question", "?",
    "phrase. ASSISTANT:", "is there  a\tred cat ?",
)  # fmt: skip


def row_of(tokenizer: Any, prompt: str, n: int = 5) -> list[int]:
    """The row that a processor makes: each placeholder repeated before the text is tokenised."""
    return tokenizer(prompt.replace("<image>", "<image>" * n))["input_ids"]


def found_in(tokenizer: Any, prompt: str, question: str, row: Sequence[int] | None = None) -> Located | None:
    ids = row_of(tokenizer, prompt) if row is None else row
    return locate(tokenizer, ids, prompt, question, tokenizer.convert_tokens_to_ids("<image>"))


def carried_alone(tokenizer: Any, before: str, question: str, after: str) -> list[int]:
    """Slow reference by cutting: the tokens that the question adds to what stands before it and after it."""
    edges = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id} - {None}
    ends = tokenizer("a")["input_ids"][-1:] if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id else []
    head, whole = row_of(tokenizer, before), row_of(tokenizer, before + question + after)
    tail = [token for token in row_of(tokenizer, after) if token not in edges - set(ends)]
    return list(range(len(head) - len(ends), len(whole) - len(tail)))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_question_is_what_it_adds_to_the_template(kind: str, question: str) -> None:
    """Blanks around the question make its edges token borders in every one of these tokenizers."""
    tokenizer, before, after = TOKENIZERS[kind], "USER: <image>", " answer the question using a phrase. ASSISTANT:"
    prompt = f"{before} {question}{after}"
    found, ids = found_in(tokenizer, prompt, question), row_of(tokenizer, prompt)
    assert found is not None
    wanted = carried_alone(tokenizer, before, f" {question}", after)
    blank = [i for i in {*wanted} ^ {*found.tokens} if tokenizer.decode([ids[i]]).strip()]
    assert blank == [], [tokenizer.decode([ids[i]]) for i in blank]  # they may differ in a token of pure blanks
    ink = {i for i, char in enumerate(question) if not char.isspace()}
    assert ink <= {i for start, end in found.spans for i in range(start, end)}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_place_after_the_last_picture_is_the_question(kind: str) -> None:
    """The template may hold the same words before the picture and after the question."""
    tokenizer = TOKENIZERS[kind]
    prompt = "answer USER: <image> <image> answer answer the question ASSISTANT: answer"
    found, ids = found_in(tokenizer, prompt, "answer"), row_of(tokenizer, prompt)
    assert found is not None
    last_picture = max(i for i, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("<image>"))
    assert all(not tokenizer.decode([t]).strip() for t in ids[last_picture + 1 : found.tokens[0]])
    assert tokenizer.decode([ids[i] for i in found.tokens]).strip() == "answer"


def test_a_question_before_the_picture_or_without_one_is_found() -> None:
    tokenizer = TOKENIZERS["word_level"]
    for prompt in ("USER: red cat ? <image> ASSISTANT:", "USER: red cat ? ASSISTANT:"):
        found = found_in(tokenizer, prompt, "red cat ?")
        assert found is not None
        assert found.tokens == (1, 2, 3)
        assert found.spans == ((0, 3), (4, 7), (8, 9))


def test_what_the_processor_adds_may_fuse_with_the_question() -> None:
    """PaliGemma's way: bos and a line end are added after the prompt was handed over."""
    tokenizer = Tokenizer(
        models.BPE({"a": 0, "b": 1, "?": 2, "\n": 3, "?\n": 4, "<image>": 5, "<s>": 6}, [("?", "\n")])
    )
    tokenizer.add_special_tokens(["<image>", "<s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False)
    row = [5, 5, 6, 0, 1, 4]
    found = locate(fast, row, "<image>ab?", "ab?", 5)
    assert found == Located((3, 4, 5), ((0, 1), (1, 2), (2, 3)))


def test_an_absent_question_is_not_found_and_an_empty_one_is_nowhere() -> None:
    for tokenizer in TOKENIZERS.values():
        assert found_in(tokenizer, "USER: <image> red cat ? ASSISTANT:", "blue dog") is None
        assert found_in(tokenizer, "USER: <image> red cat ? ASSISTANT:", " \n") == Located((), ())


questions = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co"]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(questions.filter(lambda text: text.strip() and "<" not in text), st.sampled_from(["byte_level", "slow"]))
def test_any_unicode_question_is_carried_whole(question: str, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt = f"USER: <image>\n{question}\nASSISTANT:"
    found = found_in(tokenizer, prompt, question)
    assert found is not None
    ids = row_of(tokenizer, prompt)
    assert tokenizer.decode([ids[i] for i in found.tokens]).strip() == question.strip()
    ink = {i for i, char in enumerate(question) if not char.isspace()}
    assert ink <= {i for start, end in found.spans for i in range(start, end)}
    assert max(end for _, end in found.spans) <= len(question)
