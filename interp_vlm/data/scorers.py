"""What counts as a right answer, by the rules that published figures rest on, side by side.

The rules disagree: on POPE's own evaluation any text without "no" or "not" is a yes, lmms-eval wants exactly yes or no,
and big_vision does not even forgive a blank. A difference of a few points between two papers can be the rule alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from interp_vlm.data.example import Example
from interp_vlm.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SCORERS",
    "Scorer",
    "big_vision",
    "exact",
    "lmms_eval",
    "lmms_eval_vqa",
    "pope_official",
    "score_table",
    "side_by_side",
    "vqa",
    "vqa_normalise",
]

ANNOTATORS = 10  # VQA's; with fewer answers they are alternatives, not votes


def exact(predicted: str, example: Example) -> float:
    """1 if the text is one of the accepted answers, case and all; blanks around it do not count."""
    return float(predicted.strip() in [answer.strip() for answer in example.answers])


def vqa(predicted: str, example: Example) -> float:
    """VQA accuracy of the official vqaEval.py (Antol et al. 2015, arXiv 1505.00468).

    With ten answers: the mean over the ten sets of nine of min(1, matches / 3), where prediction and answers are
    normalised only if the annotators disagree; so against ten "yes", "Yes" scores 0, as it does officially. With fewer
    answers there is no vote: 1 if the prediction equals any of them, all normalised.
    """
    answers = [_blanks(answer) for answer in example.answers]
    predicted = _blanks(predicted)
    if len(set(answers)) > 1 or len(answers) < ANNOTATORS:
        answers = [vqa_normalise(answer) for answer in answers]
        predicted = vqa_normalise(predicted)
    return _consensus(predicted, answers)


def lmms_eval_vqa(predicted: str, example: Example) -> float:
    """VQA accuracy as lmms-eval computes it: the prediction is always normalised, commas and `?` dropped first."""
    answers = [_blanks(answer) for answer in example.answers]
    predicted = predicted.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    predicted = vqa_normalise(_blanks(predicted))
    if len(set(answers)) > 1 or len(answers) < ANNOTATORS:
        answers = [vqa_normalise(answer) for answer in answers]
        predicted = vqa_normalise(predicted)
    return _consensus(predicted, answers)


def pope_official(predicted: str, example: Example) -> float:
    """POPE's evaluate.py: "no" if a word of the first sentence is No, no or not; anything else is "yes".

    NaN where the right answer is neither yes nor no, as for the other two rules of yes/no questions.
    """
    words = predicted.split(".")[0].replace(",", "").split(" ")
    read = "no" if {"No", "no", "not"} & set(words) else "yes"
    return _yes_no(example, read)


def lmms_eval(predicted: str, example: Example) -> float:
    """lmms-eval's rule for POPE: the whole text, lower case and stripped, equals the answer."""
    return _yes_no(example, predicted.lower().strip())


def big_vision(predicted: str, example: Example) -> float:
    """big_vision's rule for POPE: the whole text, lower case and not stripped, equals the answer."""
    return _yes_no(example, predicted.lower())


def vqa_normalise(text: str) -> str:
    """An answer as vqaEval.py compares it: no punctuation or articles, digits for number words, apostrophes restored.

    Two quirks of the official code are kept because figures rest on them: a mark is dropped if it touches a blank
    anywhere in the text, or if the text has a comma between digits, and otherwise becomes a blank; and of the full
    stops that no digit follows only the first 32 go.

    Example:
        >>> vqa_normalise("The two cats, dont run.")
        "2 cats don't run"
    """
    digits_apart = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _MARKS:
        drop = digits_apart or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if drop else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    numbered = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in ("a", "an", "the"))


@dataclass(frozen=True)
class Scorer:
    """A rule and what it can read.

    Attributes:
        name: its key in `SCORERS`.
        rule: the function, (predicted, example) to a score from 0 to 1, NaN where the rule has nothing to say.
        valid: whether the rule recognises a text as an answer at all.
    """

    name: str
    rule: Callable[[str, Example], float]
    valid: Callable[[str], bool]

    def __call__(self, predicted: str, example: Example) -> float:
        """The score of one answer."""
        return self.rule(predicted, example)


SCORERS = MappingProxyType(
    {
        scorer.name: scorer
        for scorer in (
            Scorer("exact", exact, lambda text: bool(text.strip())),
            Scorer("vqa", vqa, lambda text: bool(vqa_normalise(text))),
            Scorer("lmms_eval_vqa", lmms_eval_vqa, lambda text: bool(vqa_normalise(text))),
            Scorer("pope_official", pope_official, lambda text: True),
            Scorer("lmms_eval", lmms_eval, lambda text: text.lower().strip() in ("yes", "no")),
            Scorer("big_vision", big_vision, lambda text: text.lower() in ("yes", "no")),
        )
    }
)


def score_table(predictions: Sequence[Any], examples: Sequence[Example]) -> pd.DataFrame:
    """One row an example: its id, the prediction as text, and a column of scores for each rule."""
    import pandas as pd

    if len(predictions) != len(examples):
        raise DataError(f"{len(predictions)} predictions for {len(examples)} examples", expected="one for each")
    texts = [str(prediction) for prediction in predictions]
    columns = {"id": [example.id for example in examples], "predicted": texts}
    scores = {
        name: [scorer(text, example) for text, example in zip(texts, examples, strict=True)]
        for name, scorer in SCORERS.items()
    }
    return pd.DataFrame({**columns, **scores})


def side_by_side(predictions: Sequence[Any], examples: Sequence[Example]) -> pd.DataFrame:
    """One row a rule: how many examples it applies to, their mean score, and where it differs from `exact`.

    Columns: `scorer`; `n`, examples with a score; `mean`; `valid`, share of their predictions that the rule recognises
    as an answer; `differs`, on how many its score is not that of `exact`; `where`, the ids of those.
    """
    import pandas as pd

    table = score_table(predictions, examples)
    rows = []
    for name, scorer in SCORERS.items():
        known = table[table[name].notna()]
        apart = known[known[name] != known["exact"]]
        valid = [scorer.valid(text) for text in known["predicted"]]
        share = sum(valid) / len(valid) if valid else math.nan
        rows.append((name, len(known), known[name].mean(), share, len(apart), tuple(apart["id"])))
    return pd.DataFrame(rows, columns=["scorer", "n", "mean", "valid", "differs", "where"])


def _yes_no(example: Example, read: str) -> float:
    answer = example.answer.strip().lower()
    return float(read == answer) if answer in ("yes", "no") else math.nan


def _blanks(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _consensus(predicted: str, answers: Sequence[str]) -> float:
    matches = [answer == predicted for answer in answers]
    if len(answers) < ANNOTATORS:
        return float(any(matches))
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(_DIGITS)}

_CORRECT = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspellings() -> dict[str, str]:
    """The official table: a contraction without one of its apostrophes, to the contraction.

    Its entries with capitals (Im, Ive) can never match, as the text is lower case by then; one entry stands the wrong
    way round, and is kept.
    """
    table = {"somebody'd": "somebodyd"}
    for word in _CORRECT.split():
        for i, letter in enumerate(word):
            if letter == "'":
                table[word[:i] + word[i + 1 :]] = word
    return table


_CONTRACTIONS = _misspellings()
