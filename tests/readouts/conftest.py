"""Real tokenizers of the three kinds that vision-language models use, trained here on a small corpus."""

import itertools

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.token_map import build_maps

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
NOUNS = ["red", "Red", "green", "blue", "one", "two", "Two", "seven", "cat", "Cat", "left", "right"]
WORDS = ["yes", "no", "Yes", "No", "YES", "NO", *NOUNS]
CORPUS = [f"is there a {a} {b} in the picture? answer: {c}" for a, b, c in itertools.product(WORDS, repeat=3)] + [
    f"({a}) answer:{a}\n{b}: {a} {n}" for a, b in itertools.product(WORDS, repeat=2) for n in range(10)
]


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=False))
    image = {"image_token": "<image>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, extra_special_tokens=image, padding_side="left")


def byte_level() -> PreTrainedTokenizerFast:
    """As of GPT-2 and Qwen: blanks belong to the word after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """As SentencePiece's unigram models: `▁` before a word, the text's first word too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrapped(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As of Llama and Gemma: single digits, and a token for every byte that decodes to that byte."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Trained as special tokens so that they are there; now the same model with the bytes as plain vocabulary.
    plain = Tokenizer(tokenizer.model)
    plain.normalizer, plain.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    plain.decoder = tokenizer.decoder
    plain.add_special_tokens(SPECIAL)
    return _wrapped(plain)


def word_level() -> PreTrainedTokenizerFast:
    """As of the embedded models, but with case: whole words between blanks."""
    words = sorted({word for line in CORPUS for word in line.replace("?", " ?").split()})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, "\n", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n|\?"), "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    return _wrapped(tokenizer)


KINDS = {"bytes": byte_level, "unigram": unigram, "fallback": byte_fallback, "words": word_level}


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Every kind of tokenizer, trained once."""
    return {name: make() for name, make in KINDS.items()}


@pytest.fixture(scope="session")
def train():
    """`train(kind)`: a new tokenizer, for tests that change theirs."""
    return lambda kind: KINDS[kind]()


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers) -> PreTrainedTokenizerFast:
    """One tokenizer of each kind."""
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def encode():
    """`encode(tokenizer, prompts)`: a left-padded `Batch` without pictures."""

    def encode(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> Batch:
        inputs = dict(tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False))
        nothing = [""] * len(prompts)
        image = tokenizer.convert_tokens_to_ids("<image>")
        maps = build_maps(tokenizer, inputs, prompts, nothing, image, [()] * len(prompts), prompts)
        return Batch(inputs, maps, ((),) * len(prompts), tuple(nothing), tuple(prompts))

    return encode


@pytest.fixture
def logits_for():
    """`logits_for(tokenizer, rows, seed=0, extra=0)`: random logits, as wide as the vocabulary plus `extra`."""

    def logits_for(tokenizer, rows: int, seed: int = 0, extra: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return 3 * torch.randn(rows, len(tokenizer) + extra, generator=generator, dtype=torch.float64)

    return logits_for
