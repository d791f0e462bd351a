"""Each scorer on hand-written answers, one case for every difference that its source documents."""

import math

import pytest

from interp_vlm.data import Example, scorers
from interp_vlm.errors import DataError
from tests.data.conftest import picture


def asked(*answers: str, name: str = "1") -> Example:
    return Example(name, picture(0, (2, 2)), "q", answers[0], answers=tuple(answers))


YES, NO = asked("yes"), asked("no")

# prediction: read as yes or no by (POPE's evaluate.py, lmms-eval, big_vision); None: by neither
POPE = {
    "yes": ("yes", "yes", "yes"),
    "no": ("no", "no", "no"),
    "Yes": ("yes", "yes", "yes"),
    "No": ("no", "no", "no"),
    "NO": ("yes", "no", "no"),  # official knows No and no only
    " yes": ("yes", "yes", None),  # big_vision does not strip
    "no\n": ("yes", "no", None),  # official splits at blanks alone: the word is "no\n"
    "Yes.": ("yes", None, None),
    "No.": ("no", None, None),
    "No, there is none": ("no", None, None),  # commas go before the words are looked at
    "There is not a dog": ("no", None, None),
    "There isn't a dog": ("yes", None, None),  # neither "no" nor "not" is a word of it
    "There is a dog. It does not bark": ("yes", None, None),  # the first sentence alone
    "I see nothing": ("yes", None, None),
    "dog": ("yes", None, None),  # else is yes
    "": ("yes", None, None),
    "no!": ("yes", None, None),
}


@pytest.mark.parametrize("predicted", POPE)
def test_the_three_pope_rules(predicted):
    for name, read in zip(("pope_official", "lmms_eval", "big_vision"), POPE[predicted], strict=True):
        scorer = scorers.SCORERS[name]
        assert scorer(predicted, YES) == float(read == "yes"), name
        assert scorer(predicted, NO) == float(read == "no"), name
        assert scorer.valid(predicted) == (read is not None), name


def test_pope_rules_have_nothing_to_say_about_other_questions():
    for rule in (scorers.pope_official, scorers.lmms_eval, scorers.big_vision):
        assert math.isnan(rule("red", asked("red")))
        assert rule("yes", asked(" Yes ")) == 1.0


def test_exact_keeps_case_and_takes_any_accepted_answer():
    assert scorers.exact(" yes\n", YES) == 1.0
    assert scorers.exact("Yes", YES) == 0.0
    assert scorers.exact("a cat", asked("cat", "a cat")) == 1.0
    assert scorers.exact("cats", asked("cat", "a cat")) == 0.0


# worked by hand from vqaEval.py
NORMALISED = {
    "The Two Cats": "2 cats",  # lower case, article, number word
    "none": "0",
    "ten": "10",
    "eleven": "eleven",
    "an apple a day": "apple day",
    "theatre": "theatre",
    "dont": "don't",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "couldntve": "couldntve",  # two lost at once are not restored
    "Im": "im",  # the official entry has a capital and can never match
    "somebody'd": "somebodyd",  # the official entry stands the wrong way round
    "yes.": "yes",
    "3.5": "3.5",
    "3.": "3",
    "1,000": "1000",  # a comma between digits drops every mark
    "well-known": "well known",  # a mark inside a word becomes a blank
    "well- known": "well known",  # touching a blank it goes
    "red/blue - green": "red blue green",
    "red-blue -green": "redblue green",  # one hyphen at a blank drops them all
    "what?!": "what",
    "dog's": "dog's",  # the apostrophe is no mark
    "black and white": "black and white",
    "it is 5 o'clock.": "it is 5 o'clock",
    "." * 33: ".",  # re.sub's fourth argument: 32 stops at most
}


@pytest.mark.parametrize("text", NORMALISED)
def test_vqa_normalisation(text):
    assert scorers.vqa_normalise(text) == NORMALISED[text]


def test_vqa_consensus_over_the_ten_sets_of_nine():
    """Of ten votes, k agree: k of the sets hold k - 1 of them, the others k."""
    for k, expected in {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0, 9: 1.0}.items():
        votes = ["cat"] * k + [f"other {i}" for i in range(10 - k)]
        slow = sum(min(1, (votes[:i] + votes[i + 1 :]).count("cat") / 3) for i in range(10)) / 10
        assert slow == pytest.approx(expected)
        assert scorers.vqa("cat", asked(*votes)) == pytest.approx(expected)
        assert scorers.lmms_eval_vqa("Cat.", asked(*votes)) == pytest.approx(expected)


def test_vqa_normalises_only_where_annotators_disagree():
    unanimous, divided = asked(*["yes"] * 10), asked(*["yes"] * 9, "no")
    assert scorers.vqa("Yes", divided) == 1.0
    assert scorers.vqa("Yes", unanimous) == 0.0  # the official code compares them raw
    assert scorers.vqa(" yes\n", unanimous) == 1.0
    assert scorers.lmms_eval_vqa("Yes", unanimous) == 1.0  # lmms-eval normalises the prediction always
    # but not the answers: the article that unanimous annotators wrote is then missed
    assert scorers.lmms_eval_vqa("the bank", asked(*["the bank"] * 10)) == 0.0
    assert scorers.vqa("the bank", asked(*["the bank"] * 10)) == 1.0


def test_lmms_eval_splits_the_genitive_and_drops_commas_first():
    votes = ["dog's bed"] * 9 + ["bed"]
    assert scorers.vqa("dog's bed", asked(*votes)) == 1.0
    assert scorers.lmms_eval_vqa("dog's bed", asked(*votes)) == 0.0
    votes = ["red blue"] * 9 + ["red"]
    assert scorers.vqa("red,blue", asked(*votes)) == 1.0
    assert scorers.lmms_eval_vqa("red,blue", asked(*votes)) == 0.0


def test_fewer_than_ten_answers_are_alternatives():
    assert scorers.vqa("The cat.", asked("cat")) == 1.0
    assert scorers.vqa("two", asked("2", "a pair")) == 1.0
    assert scorers.vqa("three", asked("2", "a pair")) == 0.0


def test_side_by_side_shows_where_the_rules_part():
    examples = [asked("yes", name="a"), asked("no", name="b"), asked("no", name="c"), asked("red", name="d")]
    predictions = ["yes", "No.", "maybe", "Red"]
    table = scorers.side_by_side(predictions, examples).set_index("scorer")
    assert list(table.index) == list(scorers.SCORERS)
    assert table["n"].to_dict() == {
        "exact": 4, "vqa": 4, "lmms_eval_vqa": 4, "pope_official": 3, "lmms_eval": 3, "big_vision": 3
    }  # fmt: skip
    assert table.loc["exact", "mean"] == 0.25
    assert table.loc["vqa", "mean"] == 0.75
    assert table.loc["pope_official", "mean"] == pytest.approx(2 / 3)
    assert table.loc["lmms_eval", "mean"] == pytest.approx(1 / 3)
    assert table["valid"].to_dict() == pytest.approx(
        {"exact": 1, "vqa": 1, "lmms_eval_vqa": 1, "pope_official": 1, "lmms_eval": 1 / 3, "big_vision": 1 / 3}
    )
    assert table.loc["exact", "differs"] == 0
    assert table.loc["vqa", "where"] == ("b", "d")
    assert table.loc["pope_official", "where"] == ("b",)
    assert table.loc["lmms_eval", "where"] == ()


def test_score_table_has_every_score_of_every_example():
    examples = [asked("yes", name="a"), asked("red", name="b")]
    table = scorers.score_table(["Yes", "red"], examples)
    assert list(table["id"]) == ["a", "b"]
    for name, scorer in scorers.SCORERS.items():
        expected = [scorer("Yes", examples[0]), scorer("red", examples[1])]
        assert list(table[name]) == pytest.approx(expected, nan_ok=True)


def test_predictions_must_match_examples():
    with pytest.raises(DataError, match="1 predictions for 2 examples"):
        scorers.side_by_side(["yes"], [YES, NO])
    assert math.isnan(scorers.side_by_side([], [])["mean"].iloc[0])
