"""Digit scenes: splits, determinism, right answers, negatives, pairs and pixels."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

from interp_vlm.data.digit_canvas import CANVAS, COLOURS, DIFFICULTIES, POPULAR, Bar, Placed, Scene, draw_scene, render
from interp_vlm.data.digit_glyphs import SPLITS, glyph_indices
from interp_vlm.data.digit_questions import KINDS, NUMBERS, ask
from interp_vlm.data.digits import digit_pairs, digit_scenes
from interp_vlm.errors import DataError


@pytest.fixture(scope="module")
def examples():
    return digit_scenes(n=3000, kinds=list(KINDS))


def test_splits_share_no_glyph_and_are_stratified():
    truth = load_digits().target
    parts = {name: np.concatenate(glyph_indices(name)) for name in SPLITS}
    assert {name: len(part) for name, part in parts.items()} == SPLITS
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(truth)))
    for name, part in parts.items():
        shares = np.bincount(truth[part], minlength=10) / len(part)
        assert np.abs(shares - np.bincount(truth) / len(truth)).max() < 0.01, name
        assert all((truth[of_digit] == digit).all() for digit, of_digit in enumerate(glyph_indices(name)))


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_and_pairs_draw_only_from_their_split(split):
    allowed = set(np.concatenate(glyph_indices(split)).tolist())
    pairs = digit_pairs(split, n=60)
    sides = [side for pair in pairs for side in (pair.clean, pair.corrupt)]
    used = {thing["glyph"] for e in [*digit_scenes(split, n=1200), *sides] for thing in e.meta["objects"]}
    assert used <= allowed
    assert len(used) > 0.5 * len(allowed) or split == "train"


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_an_example_does_not_depend_on_how_many_are_asked_for(difficulty):
    many, few = digit_scenes(n=40, seed=3, difficulty=difficulty), digit_scenes(n=7, seed=3, difficulty=difficulty)
    for one, same in zip(few, many, strict=False):
        assert (one.id, one.question, one.answer, one.meta) == (same.id, same.question, same.answer, same.meta)
        assert one.image.tobytes() == same.image.tobytes()
    other = digit_scenes(n=7, seed=4, difficulty=difficulty)
    assert all(a.image.tobytes() != b.image.tobytes() for a, b in zip(few, other, strict=True))


def _parsed(example):
    """Objects and words of a question, from its text alone."""
    words = example.question.split(" ")
    digits = [int(word) for word in words if word.isdigit()]
    colours = [word for word in words if word in COLOURS]
    pairs = [(thing["digit"], thing["colour"]) for thing in example.meta["objects"]]
    return digits, colours, pairs


def test_answers_are_right(examples):
    seen = Counter()
    for example in examples:
        digits, colours, pairs = _parsed(example)
        if example.kind == "existence":
            right = "yes" if (digits[0], colours[0]) in pairs else "no"
        elif example.kind == "count":
            right = NUMBERS[sum(digit == digits[0] for digit, _ in pairs)]
        elif example.kind == "colour":
            (right,) = (colour for digit, colour in pairs if digit == digits[0])
        elif example.kind == "digit":
            (right,) = (str(digit) for digit, colour in pairs if colour == colours[0])
        else:
            first, *rest = (
                next(thing["box"] for thing in example.meta["objects"] if thing["digit"] == digit) for digit in digits
            )
            centre = (first[0] + first[2]) / 2
            if example.kind == "left_of":
                right = "yes" if centre < (rest[0][0] + rest[0][2]) / 2 else "no"
            elif abs(abs(centre - CANVAS / 2) - 4) < 3:  # the box is no exact measure of the centre
                continue
            else:
                right = "middle" if abs(centre - CANVAS / 2) < 4 else "left" if centre < CANVAS / 2 else "right"
        assert example.answer == right, example
        seen[example.kind] += 1
    assert set(seen) == set(KINDS)


def test_where_changes_at_the_middle_column():
    rng = np.random.default_rng(0)
    for x, side in ((20.0, "left"), (23.9, "left"), (24.1, "middle"), (31.9, "middle"), (32.1, "right")):
        question = ask(Scene((Placed(7, "red", 7, x, 28.0),)), rng, "where")
        assert question is not None
        assert question.answer == side


def test_half_of_existence_is_yes_and_negatives_are_what_they_are_called(examples):
    existence = [example for example in examples if example.kind == "existence"]
    assert abs(np.mean([example.answer == "yes" for example in existence]) - 0.5) < 0.005
    sorts = Counter(example.meta["negative"] for example in existence if example.answer == "no")
    assert set(sorts) == {"random", "popular", "adversarial"}
    assert min(sorts.values()) / sum(sorts.values()) > 0.25
    for example in existence:
        (digit,), (colour,), pairs = _parsed(example)
        assert (example.meta["negative"] is None) == (example.answer == "yes")
        if example.meta["negative"] == "adversarial":
            assert digit in [d for d, _ in pairs]
            assert colour in [c for _, c in pairs]
        if example.meta["negative"] == "popular":
            assert POPULAR[digit] == colour


def test_popular_colours_are_popular():
    rng = np.random.default_rng(0)
    drawn = [o for _ in range(2000) for o in draw_scene(rng, "train", DIFFICULTIES["standard"]).objects]
    popular = np.mean([POPULAR[o.digit] == o.colour for o in drawn])
    assert 0.25 < popular < 0.42  # 3 of 8 where nothing repeats, 1 of 6 if all colours were alike


def test_questions_of_a_picture_differ_and_share_it(examples):
    groups = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    for members in groups.values():
        assert len({example.question for example in members}) == len(members)
        assert len({example.image.tobytes() for example in members}) == 1
    assert len({example.id for example in examples}) == len(examples)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_image", [1, 3, 6])
def test_every_kind_can_be_asked_alone(kind, per_image):
    drawn = digit_scenes(n=24, kinds=[kind], questions_per_image=per_image)
    assert len(drawn) == 24
    assert {example.kind for example in drawn} == {kind}


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_pairs_differ_in_exactly_one_object(difficulty):
    kinds = Counter()
    for pair in digit_pairs(n=90, difficulty=difficulty):
        a, b = pair.clean, pair.corrupt
        assert a.question == b.question
        assert a.answer != b.answer
        assert a.group == b.group
        different = [k for k, (x, y) in enumerate(zip(a.meta["objects"], b.meta["objects"], strict=True)) if x != y]
        assert different == [pair.changed["object"]]
        x, y = a.meta["objects"][different[0]], b.meta["objects"][different[0]]
        field, other = pair.changed["field"], {"digit": "colour", "colour": "digit"}[pair.changed["field"]]
        assert (x[field], y[field]) == (pair.changed["clean"], pair.changed["corrupt"])
        assert x[field] != y[field]
        assert x[other] == y[other]
        changed = np.argwhere((np.asarray(a.image) != np.asarray(b.image)).any(-1))
        x0, y0, x1, y1 = pair.changed["box"]
        assert (changed >= (y0, x0)).all()
        assert (changed < (y1, x1)).all()
        assert len(changed) > 10
        for side in (a, b):
            digits, colours, contents = _parsed(side)
            if side.kind == "existence":
                assert side.answer == ("yes" if (digits[0], colours[0]) in contents else "no")
            elif side.kind == "colour":
                assert side.answer == dict(contents)[digits[0]]
            else:
                assert side.answer in [str(digit) for digit, colour in contents if colour == colours[0]]
        kinds[a.kind, a.answer if a.kind == "existence" else ""] += 1
    assert kinds == {("existence", "yes"): 15, ("existence", "no"): 15, ("colour", ""): 30, ("digit", ""): 30}


def test_rendering_equals_a_slow_reference():
    glyphs = load_digits().images
    rng = np.random.default_rng(5)
    for scene in (draw_scene(rng, "train", DIFFICULTIES["hard"]) for _ in range(4)):
        picture = np.full((CANVAS, CANVAS, 3), scene.background)
        for bar in scene.bars:
            picture[bar.y : bar.y + bar.height, bar.x : bar.x + bar.width] = bar.grey
        rows, columns = np.mgrid[:CANVAS, :CANVAS] + 0.5
        for o in scene.objects:
            turn = np.array([[np.cos(o.rotation), -np.sin(o.rotation)], [np.sin(o.rotation), np.cos(o.rotation)]])
            stretch = np.diag([np.exp(o.aspect / 2), np.exp(-o.aspect / 2)])
            matrix = turn @ np.array([[1, o.shear], [0, 1]]) @ stretch * o.size / 8
            u, v = np.linalg.inv(matrix) @ np.stack([(columns - o.x).ravel(), (rows - o.y).ravel()])
            ink = map_coordinates(
                np.clip(1.3 * glyphs[o.glyph] / 16, 0, 1), [v + 3.5, u + 3.5], order=1, mode="grid-constant"
            )
            opacity = o.alpha * ink.reshape(CANVAS, CANVAS, 1)
            picture = (1 - opacity) * picture + opacity * np.array(COLOURS[o.colour])
        fast = render([replace(scene, noise=0.0)])[0]
        assert np.abs(fast - 255 * picture).max() <= 1


def test_a_digit_leaves_no_ink_outside_its_box():
    rng = np.random.default_rng(1)
    slack = []
    for _ in range(50):
        scene = draw_scene(rng, "train", replace(DIFFICULTIES["standard"], objects=(1, 1)))
        with_digit, without = render([scene, replace(scene, objects=())])
        rows, columns = np.nonzero((with_digit != without).any(-1))
        x0, y0, x1, y1 = scene.objects[0].box
        assert x0 <= columns.min() <= columns.max() < x1
        assert y0 <= rows.min() <= rows.max() < y1
        slack += [x1 - x0 - 1 - np.ptp(columns), y1 - y0 - 1 - np.ptp(rows)]
    assert np.mean(slack) < 3  # and the box is hardly larger than need be


def test_a_scene_is_all_that_its_picture_depends_on():
    scene = Scene((Placed(3, "cyan", 3, 20, 20),), (Bar(2, 40, 30, 2, 0.5),), noise=0.1, noise_seed=9)
    alone, repeated = render([scene]), render([Scene((), noise=0.2), scene])
    assert (alone[0] == repeated[1]).all()
    assert (render([replace(scene, noise_seed=10)]) != alone).any()


def test_hard_is_noisier_and_fainter():
    noise = {
        name: np.mean([np.asarray(e.image, float)[:6].std() for e in digit_scenes(n=300, difficulty=name)])
        for name in DIFFICULTIES
    }
    assert noise["hard"] > 1.3 * noise["standard"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"split": "dev"},
        {"difficulty": "easy"},
        {"kinds": ["shape"]},
        {"kinds": []},
        {"n": 0},
        {"seed": -1},
        {"questions_per_image": 0},
    ],
)
def test_senseless_arguments_are_refused(arguments):
    with pytest.raises(DataError, match="expected"):
        digit_scenes(**arguments)


def test_pairs_refuse_an_unknown_split():
    with pytest.raises(DataError, match="dev"):
        digit_pairs("dev")
