"""Which answers are right."""

import pytest
from PIL import Image

from interp_vlm.data.example import Example
from interp_vlm.readouts.answers import Answer
from interp_vlm.study.judge import Judge, accepted
from interp_vlm.vlm import VLM
from tests.tiny import build

PICTURE = Image.new("RGB", (24, 24))


def _example(*answers, question="is there a red cat on the left of the picture?"):
    return Example("1", PICTURE, question, answers[0], answers=answers)


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        (("Yes",), {"yes"}),
        (("red", " crimson "), {"red", "crimson"}),
        (("cat",) * 7 + ("dog",) * 3, {"cat", "dog"}),
        (("cat",) * 8 + ("dog",) * 2, {"cat"}),
        (("a", "a", "b", "b", "c", "d", "e", "f", "g", "h"), {"a", "b"}),
    ],
)
def test_accepted_answers(answers, right):
    assert accepted(_example(*answers)) == right


@pytest.fixture(scope="module")
def vlm():
    return VLM(*build("llava"), name="tiny")


def _judge(vlm, *answers):
    example = _example(*answers)
    return Judge(vlm, vlm.encode(example.image, example.question), [example])


def test_a_word_of_one_token_has_to_be_met_in_any_spelling(vlm):
    judge = _judge(vlm, "yes")
    assert judge.right(0, Answer("Yes"))
    assert judge.right(0, Answer(" yes "))
    assert not judge.right(0, Answer("no"))
    assert judge.first_token_only == [False]


def test_of_a_longer_answer_the_first_token_has_to_be_met(vlm):
    judge = _judge(vlm, "red cat")
    assert judge.first_token_only == [True]
    end = "picture? ASSISTANT:"
    ids = vlm.tokenizer(f"{end} red cat", add_special_tokens=False)["input_ids"]
    head = vlm.tokenizer(end, add_special_tokens=False)["input_ids"]
    assert ids[: len(head)] == head
    first = ids[len(head)]
    assert judge.right(0, Answer(vlm.tokenizer.decode([first]), token=first))
    other = vlm.tokenizer("blue", add_special_tokens=False)["input_ids"][-1]
    assert not judge.right(0, Answer("blue", token=other))
