"""Find the tokens of the bare question inside the tokens that the processor made of the whole prompt."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

__all__ = ["NOWHERE", "Located", "locate"]


class Located(NamedTuple):
    """Where a question lies in a row of tokens.

    Attributes:
        tokens: indices into the row, increasing.
        spans: for each token the characters [start, end) of the question that it carries.
    """

    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


NOWHERE = Located((), ())


def locate(tokenizer: Any, ids: Sequence[int], prompt: str, question: str, image_token_id: int) -> Located | None:
    """The tokens of `question` in the unpadded row `ids`, or None when they cannot be found.

    First by the tokenizer's own character offsets, which survive unknown words, lower-casing and split characters:
    the prompt is tokenised as it was handed to the processor and aligned to the row, which differs from it in the
    expanded image tokens and in what the processor adds. Where the tokenizer has no offsets, or the processor's
    additions fused with the question's edge, by comparing decoded text.
    """
    if not question.strip():
        return NOWHERE
    found = _by_offsets(tokenizer, ids, prompt, question, image_token_id)
    found = found or _by_text(tokenizer, ids, question, image_token_id)
    return _best(found, ids, image_token_id)


def _best(found: list[Located], ids: Sequence[int], image_token_id: int) -> Located | None:
    """The first place after the last picture, where every template puts the question; else the last place."""
    pictures = [i for i, token in enumerate(ids) if token == image_token_id]
    after = [place for place in found if not pictures or place.tokens[0] > pictures[-1]]
    if pictures and after:
        return after[0]
    return found[-1] if found else None


def _by_offsets(tokenizer: Any, ids: Sequence[int], prompt: str, question: str, image_token_id: int) -> list[Located]:
    if not getattr(tokenizer, "is_fast", False):
        return []
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    given, offsets = encoded["input_ids"], encoded["offset_mapping"]
    row_of = _align(given, ids, image_token_id)
    places = []
    for start, end in _occurrences(prompt, question):
        inside = [i for i, (left, right) in enumerate(offsets) if left < end and right > start]
        if inside and all(i in row_of for i in inside):
            spans = tuple((max(offsets[i][0], start) - start, min(offsets[i][1], end) - start) for i in inside)
            places.append(Located(tuple(row_of[i] for i in inside), _in_question(spans, prompt[start:end], question)))
    return places


def _align(given: Sequence[int], ids: Sequence[int], image_token_id: int) -> dict[int, int]:
    """Index in the tokenised prompt -> index in the processor's row, image tokens apart."""
    prompt_text = [i for i, token in enumerate(given) if token != image_token_id]
    row_text = [i for i, token in enumerate(ids) if token != image_token_id]
    matcher = SequenceMatcher(None, [given[i] for i in prompt_text], [ids[i] for i in row_text], autojunk=False)
    return {
        prompt_text[block.a + k]: row_text[block.b + k]
        for block in matcher.get_matching_blocks()
        for k in range(block.size)
    }


def _occurrences(prompt: str, question: str) -> list[tuple[int, int]]:
    """Where the question stands in the prompt; templates may trim it or change its white space."""
    pattern = r"\s+".join(re.escape(word) for word in question.split())
    whole = rf"(?<!\w){pattern}(?!\w)"
    found = [match.span() for match in re.finditer(whole, prompt)]
    return found or [match.span() for match in re.finditer(pattern, prompt)]


def _in_question(spans: Sequence[tuple[int, int]], written: str, question: str) -> tuple[tuple[int, int], ...]:
    """Offsets into the prompt's spelling of the question -> offsets into the question itself."""
    if written == question:
        return tuple(spans)
    origin = _ink_positions(question)
    ink_before = [0]
    for char in written:
        ink_before.append(ink_before[-1] + (not char.isspace()))
    return tuple(_ink_span(origin, ink_before[left], ink_before[right]) for left, right in spans)


def _ink_positions(text: str) -> list[int]:
    return [i for i, char in enumerate(text) if not char.isspace()]


def _ink_span(origin: Sequence[int], first: int, past: int) -> tuple[int, int]:
    """Characters of the question that carry its ink characters first..past - 1."""
    if past <= first:
        place = origin[first] if first < len(origin) else origin[-1] + 1
        return place, place
    return origin[first], origin[past - 1] + 1


def _by_text(tokenizer: Any, ids: Sequence[int], question: str, image_token_id: int) -> list[Located]:
    """Match decoded characters, blind to white space, letter case and compatibility forms."""
    wanted, origin = _plain(question)
    chars: list[str] = []
    owners: list[range] = []
    for group, text in _decoded_groups(tokenizer, ids, image_token_id):
        plain = _plain(text)[0]
        chars.extend(plain)
        owners.extend([group] * len(plain))
    written = "".join(chars)
    places = []
    for match in re.finditer(rf"(?={re.escape(wanted)})", written):
        carried: dict[int, tuple[int, int]] = {}
        for k in range(len(wanted)):
            char = origin[k]
            for token in owners[match.start() + k]:
                start, end = carried.get(token, (char, char + 1))
                carried[token] = min(start, char), max(end, char + 1)
        places.append(_with_blanks(carried))
    return places


def _with_blanks(carried: dict[int, tuple[int, int]]) -> Located:
    """The tokens of pure white space between the others, too; each carries what lies between its neighbours."""
    first, last = min(carried), max(carried)
    for token in range(first, last + 1):
        if token not in carried:
            following = next(k for k in range(token, last + 1) if k in carried)
            carried[token] = carried[token - 1][1], carried[following][0]
    tokens = range(first, last + 1)
    return Located(tuple(tokens), tuple(carried[token] for token in tokens))


def _plain(text: str) -> tuple[str, list[int]]:
    """Text without white space, case-folded and in NFKC form, and for each character where it came from."""
    chars, origin = [], []
    for i, char in enumerate(text):
        for plain in unicodedata.normalize("NFKC", char).casefold():
            if not plain.isspace():
                chars.append(plain)
                origin.append(i)
    return "".join(chars), origin


def _decoded_groups(tokenizer: Any, ids: Sequence[int], image_token_id: int) -> list[tuple[range, str]]:
    """Consecutive tokens that decode to whole characters together (a character may be split over byte tokens)."""
    groups, start = [], 0
    while start < len(ids):
        stop = start + _whole_characters(tokenizer, ids[start : start + 4], image_token_id)
        image = ids[start] == image_token_id
        groups.append((range(start, stop), "\0" if image else _decode(tokenizer, ids[start:stop])))
        start = stop
    return groups


def _whole_characters(tokenizer: Any, ids: Sequence[int], image_token_id: int) -> int:
    """How many of these tokens it takes until the first decodes completely (UTF-8 has at most four bytes)."""
    alone = _decode(tokenizer, ids[:1])
    if ids[0] == image_token_id or (alone and not alone.endswith("\ufffd")):
        return 1
    for count in range(2, len(ids) + 1):
        if ids[count - 1] == image_token_id:
            return 1
        text = _decode(tokenizer, ids[:count])
        if text and not text.endswith("\ufffd"):
            # decoders either mark a torn character or leave it out; a token that adds nothing stands by itself
            return 1 if text == alone + _decode(tokenizer, ids[1:count]) else count
    return 1


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
