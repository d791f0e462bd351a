"""Which tokens write the same answer: found by reading the tokenizer's whole vocabulary, never listed by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from interp_vlm.errors import SelectionError
from interp_vlm.tokens.batch import Batch

__all__ = ["AnswerVocabulary", "answer_vocabulary", "normalised", "prompt_ends", "spellings", "spellings_of"]

# A tokenizer shows a piece of a multi-byte character as this character: no text of its own.
HALF_CHARACTER = "\ufffd"


def normalised(text: str) -> str:
    """The text by which answers are compared: without surrounding blanks, and without case.

    Example:
        >>> normalised(" Yes")
        'yes'
    """
    return text.strip().casefold()


@dataclass(frozen=True, eq=False)
class AnswerVocabulary:
    """A tokenizer's vocabulary, read as answers: ids with the same normalised text are one answer.

    Attributes:
        texts: decoded and stripped text of each id; `<id 7>` where an id is no whole text (a piece of a multi-byte
            character, or an id without a token).
        labels: normalised text of each answer.
        answer_of: (ids,) number of the answer that each id writes.
        ids: the ids of each normalised text, special tokens left out.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    answer_of: Int[Tensor, " ids"]
    ids: dict[str, tuple[int, ...]]
    _raw: dict[int, str] = field(repr=False)
    _known: dict[tuple[bytes, str], tuple[int, ...]] = field(default_factory=dict, repr=False)
    _answers: dict[tuple[int, Any], Tensor] = field(default_factory=dict, repr=False)

    def answers(self, width: int, device: torch.device | str = "cpu") -> Int[Tensor, " width"]:
        """Number of the answer of each of `width` logits; those beyond the tokenizer's ids are their own."""
        if (width, device) not in self._answers:
            beyond = torch.arange(max(0, width - len(self.texts)))
            self._answers[width, device] = torch.cat([self.answer_of[:width], len(self.labels) + beyond]).to(device)
        return self._answers[width, device]

    def text(self, token: int) -> str:
        """The text of a token as an answer."""
        return self.texts[token] if token < len(self.texts) else _unnamed(token)

    def label(self, answer: int) -> str:
        """The normalised text of an answer by its number."""
        return (
            self.labels[answer] if answer < len(self.labels) else _unnamed(len(self.texts) + answer - len(self.labels))
        )

    def spelt_after(self, tokenizer: Any, prompt: str, words: Sequence[str]) -> list[tuple[int, ...]]:
        """`spellings` of several words after one prompt, with one call of the tokenizer."""
        place = hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=16).digest()
        new = [word for word in words if (place, normalised(word)) not in self._known]
        if new:
            written = {word: self._variants(word) for word in new}
            variants = [variant for word in new for variant in written[word]]
            head, *encoded = _encode(tokenizer, [prompt, *(prompt + variant for variant in variants)])
            ends = {v: e[-1] for v, e in zip(variants, encoded, strict=True) if len(e) > len(head) and e[:-1] == head}
            for word in new:
                found = {ends[variant] for variant in written[word] if variant in ends}
                kept = found.intersection(self.ids.get(normalised(word), ()))
                self._known[place, normalised(word)] = tuple(sorted(kept))
        return [self._known[place, normalised(word)] for word in words]

    def _variants(self, word: str) -> list[str]:
        raw = [self._raw[token] for token in self.ids.get(normalised(word), ())]
        bare = [text.strip() for text in raw]
        return sorted({*raw, *bare, *(f" {text}" for text in bare)})


_READ: WeakKeyDictionary[Any, tuple[int, AnswerVocabulary]] = WeakKeyDictionary()


def answer_vocabulary(tokenizer: Any) -> AnswerVocabulary:
    """The tokenizer's vocabulary as answers, read once per tokenizer (and again when tokens were added to it)."""
    size, known = _READ.get(tokenizer, (-1, None))
    if known is None or size != len(tokenizer):
        known = _read(tokenizer)
        _READ[tokenizer] = len(tokenizer), known
    return known


def spellings(tokenizer: Any, prompt: str, word: str) -> tuple[int, ...]:
    """Every token that the tokenizer emits for some spelling of a word right after a prompt, sorted.

    The candidates are the tokens whose decoded text is the word when blanks around it and case are disregarded. One is
    kept if tokenising the prompt followed by a spelling gives the prompt's own tokens and then this token: a token the
    tokenizer never writes there (a byte fallback, or `▁7` where it writes `▁`, `7`) does not count.

    Args:
        prompt: the text before the answer as the model reads it (`prompt_ends`).
        word: an answer; case and blanks around it do not matter.

    Raises:
        SelectionError: the word has no spelling of one token there.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> vocabulary = {word: number for number, word in enumerate("? is it yes Yes no".split())}
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> spellings(PreTrainedTokenizerFast(tokenizer_object=words), "is it", "yes")
        (3, 4)
    """
    (found,) = spellings_of(tokenizer, prompt, [word])
    return found


def spellings_of(tokenizer: Any, prompt: str, words: Sequence[str]) -> list[tuple[int, ...]]:
    """`spellings` of several words after one prompt."""
    found = answer_vocabulary(tokenizer).spelt_after(tokenizer, prompt, words)
    for word, ids in zip(words, found, strict=True):
        if not ids:
            tail = prompt if len(prompt) <= 40 else f"...{prompt[-40:]}"
            raise SelectionError(
                f"the answer {word!r} is no single token after the prompt {tail!r}",
                expected="a word that the tokenizer writes as one token there",
                remedy="choose another word, or give token ids",
            )
    return found


def prompt_ends(batch: Batch, tokenizer: Any) -> tuple[str, ...]:
    """The text before the answer of each example as the model reads it: all that follows the last picture.

    Read off the token ids, because a processor may add to the prompt it is handed: PaliGemma's line break at the end
    decides whether an answer is written with a leading blank.
    """
    ends = []
    for tokens in batch.tokens:
        row, pictures = tokens.ids[tokens.attention_mask], tokens.image_index[tokens.attention_mask] >= 0
        start = int(pictures.nonzero().max()) + 1 if pictures.any() else 0
        ends.append(
            tokenizer.decode(row[start:].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
    return tuple(ends)


def _read(tokenizer: Any) -> AnswerVocabulary:
    tokens = sorted(set(tokenizer.get_vocab().values()))
    decoded = tokenizer.batch_decode(
        [[token] for token in tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    raw = {token: text for token, text in zip(tokens, decoded, strict=True) if HALF_CHARACTER not in text}
    texts = tuple(
        raw[token].strip() if token in raw else _unnamed(token) for token in range(max(tokens, default=-1) + 1)
    )
    number: dict[str, int] = {}
    answer_of = torch.tensor([number.setdefault(normalised(text), len(number)) for text in texts], dtype=torch.long)
    special, ids = set(tokenizer.all_special_ids), {}
    for token in raw:
        if token not in special and texts[token]:
            ids.setdefault(normalised(texts[token]), []).append(token)
    return AnswerVocabulary(texts, tuple(number), answer_of, {word: tuple(found) for word, found in ids.items()}, raw)


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    plain = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, **plain)["input_ids"]


def _unnamed(token: int) -> str:
    return f"<id {token}>"
