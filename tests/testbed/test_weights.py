"""The shipped weights: they answer held-out questions, through the saved processor, as their cards say."""

import pytest
import torch

from interp_vlm import testbed
from interp_vlm.data.digits import digit_scenes
from interp_vlm.testbed.measure import CHECKED, Bench, interval

SUBSET = 300


@pytest.fixture(scope="module", params=testbed.NAMES)
def model(request):
    return request.param, Bench(testbed.path(request.param))


@pytest.fixture(scope="module")
def examples():
    return digit_scenes("test", n=SUBSET)


def _overlap(a, b):
    return a["low"] <= b["high"] and b["low"] <= a["high"]


def test_held_out_accuracy_is_that_of_the_card(model, examples):
    name, bench = model
    right = [bench.answer(bench.inputs(example)) == example.answer for example in examples]
    measured = interval(right, [example.group for example in examples])
    card = testbed.card(name)
    assert measured["value"] > 0.80
    assert _overlap(measured, card["figures"]["standard"]["all"])
    assert SUBSET == CHECKED  # the card counts the right answers of these very questions
    assert abs(sum(right) - card["measured"]["right_of_first"]) <= 2


def test_blind_and_masked_accuracy_is_that_of_the_card(model, examples):
    name, bench = model
    few = examples[:60]
    figures = testbed.card(name)["figures"]
    mean = bench.mean_features(digit_scenes("validation", n=180))
    groups = [example.group for example in few]
    blind, blocked, masked = [], [], []
    for example in few:
        inputs = bench.inputs(example)
        with bench.masked(torch.arange(len(mean)), mean):
            blind.append(bench.answer(inputs) == example.answer)
        blocked.append(bench.answer_without_sight(inputs) == example.answer)
        with bench.masked(bench.attention(inputs).argsort(descending=True)[:15], mean):
            masked.append(bench.answer(inputs) == example.answer)
    assert _overlap(interval(blind, groups), figures["interventions"]["image_mean_ablated"]["all"])
    assert _overlap(interval(blocked, groups), figures["interventions"]["text_to_image_blocked"]["all"])
    assert _overlap(interval(masked, groups), figures["patches_masked"]["top"]["accuracy"])


@pytest.mark.parametrize("name", testbed.NAMES)
def test_cards_carry_intervals_and_say_what_was_reached(name):
    card = testbed.card(name)
    assert card["family"] == name
    assert {"seed", "steps", "versions", "data"} <= card.keys()

    def figures(tree):
        if "value" in tree:
            yield tree
        else:
            for branch in tree.values():
                yield from figures(branch)

    found = list(figures(card["figures"]))
    assert len(found) > 30
    assert all(
        figure["low"] <= figure["value"] <= figure["high"] and figure["images"] <= figure["n"] for figure in found
    )
    assert card["figures"]["standard"]["all"]["n"] >= 2400
    assert card["needed"]["accuracy of at least 0.80"]


def test_the_interval_resamples_pictures_not_questions():
    alike = interval([1, 1, 0, 0] * 50, [str(k // 2) for k in range(200)])  # both questions of a picture go together
    apart = interval([1, 0, 1, 0] * 50, [str(k // 2) for k in range(200)])  # every picture has one of each
    assert alike["value"] == apart["value"] == 0.5
    assert apart["low"] == apart["high"] == 0.5
    assert 0.15 < alike["high"] - alike["low"] < 0.25
