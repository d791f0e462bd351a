"""Whether an answer is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from interp_vlm.data.example import Example
from interp_vlm.readouts.answers import Answer, prompt_ends
from interp_vlm.readouts.spelling import answer_vocabulary, normalised

if TYPE_CHECKING:
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["Judge", "accepted"]

VOTES = 3  # as in VQA's own measure, an answer that three of ten annotators gave is fully right


def accepted(example: Example) -> set[str]:
    """The right answers, normalised: all that are listed, or of VQA's ten those with three votes, else the most common.

    Example:
        >>> from PIL import Image
        >>> votes = ("cat",) * 6 + ("dog",) * 3 + ("cow",)
        >>> sorted(accepted(Example("1", Image.new("RGB", (8, 8)), "what ?", "cat", answers=votes)))
        ['cat', 'dog']
    """
    votes = Counter(normalised(answer) for answer in example.answers)
    if sum(votes.values()) < 10:
        return set(votes)
    most = max(votes.values())
    return {answer for answer, count in votes.items() if count >= min(VOTES, most)}


class Judge:
    """Whether an answer is right, for one encoded batch.

    The answer that a model gives is the most probable token after the prompt. A right answer that is one token must be
    that token in any spelling; of a longer one the first token must be met, and the question is marked as such.

    Args:
        vlm: the model.
        batch: the encoded questions.
        examples: the same questions, with their answers.
    """

    def __init__(self, vlm: VLM, batch: Batch, examples: Sequence[Example]) -> None:
        self._tokenizer = vlm.tokenizer
        single = answer_vocabulary(vlm.tokenizer).ids
        self._accepted = [accepted(example) for example in examples]
        long = [[answer for answer in words if answer not in single] for words in self._accepted]
        self.first_token_only = [bool(words) for words in long]
        ends = prompt_ends(batch, vlm.tokenizer) if any(long) else [""] * len(examples)
        self._firsts = [
            self._first_tokens(end, [a for a in example.answers if normalised(a) in words]) if words else frozenset()
            for end, words, example in zip(ends, long, examples, strict=True)
        ]

    def right(self, row: int, answer: Answer) -> bool:
        """Whether `answer` is a right one for the question in this row of the batch."""
        return normalised(answer) in self._accepted[row] or answer.token in self._firsts[row]

    def _first_tokens(self, end: str, answers: Sequence[str]) -> frozenset[int]:
        """The first token of each way to write the answers after a prompt."""
        words = {word for answer in answers for word in (answer, answer.lower(), answer.capitalize())}
        texts = [end, *(f"{end}{blank}{word}" for word in sorted(words) for blank in ("", " "))]
        head, *rest = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        found = {ids[len(head)] for ids in rest if len(ids) > len(head) and ids[: len(head)] == head}
        return frozenset(token for token in found if self._tokenizer.decode([token]).strip())
