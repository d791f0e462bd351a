"""Selectors against Python sets, and what each kind promises."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from interp_vlm.errors import SelectionError
from interp_vlm.tokens import select
from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.select import Selector
from interp_vlm.tokens.selector import Complement, Difference, Intersection, Union
from interp_vlm.tokens.token_map import ROLES, TokenMap
from tests.tokens.conftest import QUESTIONS, encoded, picture

BATCHES = {
    padding: encoded("llava", [picture(60, 40, 1), picture(33, 70, 2), picture(24, 24, 3)], list(QUESTIONS), padding)
    for padding in ("left", "right")
}
MAPS = [tokens for batch in BATCHES.values() for tokens in batch.tokens]
WORDS = ["red", "cat", "How many", "the", "zebra", "?"]

# Where annotations are checked, beartype looks at one item of a list by chance: Hypothesis takes that for ours.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")

relaxed = settings(deadline=None, max_examples=60)
maps = st.sampled_from(MAPS)
shares = st.one_of(st.integers(1, 36), st.floats(0.01, 1.0))
corner = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 30), st.integers(1, 30))
leaves = st.one_of(
    st.sampled_from(ROLES).map(select.of),
    st.builds(lambda c, b: select.box(c[0], c[1], c[0] + c[2], c[1] + c[3], buffer=b), corner, st.integers(0, 2)),
    st.sampled_from(WORDS).map(select.words),
    st.builds(select.random, shares, st.integers(0, 5)),
    st.builds(select.top, shares, st.sampled_from(["attention", "sinks"])),
    st.builds(select.bottom, shares),
    st.builds(select.sinks, st.floats(0.1, 30)),
    st.lists(st.integers(-5, -1), max_size=4).map(select.positions),
)
selectors = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        inner.map(lambda a: ~a),
    ),
    max_leaves=6,
)


def evidence(tokens: TokenMap) -> dict[str, torch.Tensor]:
    """Scores with many ties."""
    generator = torch.Generator().manual_seed(len(tokens.question_text))
    return {
        name: torch.randint(0, 6, (len(tokens.ids),), generator=generator).float() * 5
        for name in ("attention", "sinks")
    }


def chosen(selector: Selector, tokens: TokenMap) -> set[int]:
    """What a selector chooses, having checked what every choice promises."""
    found = selector.positions(tokens, evidence(tokens))
    assert found.dtype == torch.long
    listed = found.tolist()
    assert listed == sorted(set(listed))
    assert set(listed) <= set(tokens.all.tolist())
    return set(listed)


def by_sets(selector: Selector, tokens: TokenMap) -> set[int]:
    """The algebra by Python's own sets; the leaves by themselves."""
    match selector:
        case Intersection(left=a, right=b):
            return by_sets(a, tokens) & by_sets(b, tokens)
        case Union(left=a, right=b):
            return by_sets(a, tokens) | by_sets(b, tokens)
        case Difference(left=a, right=b):
            return by_sets(a, tokens) - by_sets(b, tokens)
        case Complement(of=a):
            return set(tokens.all.tolist()) - by_sets(a, tokens)
        case _:
            return chosen(selector, tokens)


@relaxed
@given(selectors, maps)
def test_the_algebra_is_that_of_sets(selector: Selector, tokens: TokenMap) -> None:
    assert chosen(selector, tokens) == by_sets(selector, tokens)


@relaxed
@given(selectors, selectors, maps)
def test_the_laws_of_boolean_algebra(a: Selector, b: Selector, tokens: TokenMap) -> None:
    for one, other in [
        (~(a & b), ~a | ~b), (~(a | b), ~a & ~b), (a - b, a & ~b), (~~a, a), (a & a, a), (a | a, a),
        (a | (a & b), a), (a & b, b & a), (a | b, b | a), (a & select.all, a), (a - select.all, a - a),
    ]:  # fmt: skip
        assert chosen(one, tokens) == chosen(other, tokens)


@relaxed
@given(selectors)
def test_the_repr_is_the_python_text_that_makes_the_selector(selector: Selector) -> None:
    again = eval(repr(selector), vars(select))  # the text is ours
    assert again == selector
    assert hash(again) == hash(selector)
    assert again.needs == selector.needs


def test_reprs_read_as_they_are_written() -> None:
    s = select
    for selector, text in [
        (s.image & s.box(0, 0, 20, 20), "image & box(0, 0, 20, 20)"),
        ((s.image | s.last) & ~s.top(0.3), "(image | last) & ~top(0.3, by='attention')"),
        (s.image - (s.last - s.bos), "image - (last - bos)"),
        (s.image - s.last - s.bos, "image - last - bos"),
        (s.image & (s.text & s.all), "image & (text & all)"),
        (s.box(0, 1.5, 2, 3, buffer=1, image=2), "box(0, 1.5, 2, 3, buffer=1, image=2)"),
        (s.random(5, seed=3, among="text"), "random(5, seed=3, among=text)"),
        (s.sinks(), "sinks()"),
        (s.sinks(30, among=s.image | s.bos), "sinks(threshold=30, among=image | bos)"),
        (s.words("red", "the 7"), "words('red', 'the 7')"),
        (s.of(range(2, 4)), "positions([2, 3])"),
    ]:
        assert repr(selector) == text


@relaxed
@given(maps, shares, st.integers(0, 99))
def test_random_choices_have_the_exact_size_and_repeat(tokens: TokenMap, share: float, seed: int) -> None:
    selector = select.random(share, seed)
    found = chosen(selector, tokens)
    assert found <= set(tokens.image.tolist())
    assert len(found) == (share if isinstance(share, int) else math.ceil(round(share * 36, 9)))
    assert chosen(selector, tokens) == found


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_vl"])
def test_random_choices_do_not_depend_on_the_batch(family: str, three: Callable[..., Batch]) -> None:
    alone = [encoded(family, [list(three(family).images[i])], [QUESTIONS[i]]).tokens[0] for i in range(3)]
    for padding in ("left", "right"):
        for single, batched in zip(alone, three(family, padding).tokens, strict=True):
            for among in ("image", "all"):
                selector = select.random(0.4, seed=7, among=among)
                shift = int(batched.all[0]) - int(single.all[0])
                assert {p + shift for p in chosen(selector, single)} == chosen(selector, batched)


def test_random_choices_differ_between_examples_and_seeds() -> None:
    first, second = BATCHES["left"].tokens[:2]
    offsets = [
        tuple(p - int(tokens.image[0]) for p in sorted(chosen(select.random(12, seed), tokens)))
        for tokens in (first, second) for seed in range(3)
    ]  # fmt: skip
    assert len(set(offsets)) == 6


def test_random_choices_are_uniform() -> None:
    tokens = MAPS[0]
    counts = np.zeros(36)
    for seed in range(600):
        counts[[p - int(tokens.image[0]) for p in chosen(select.random(9, seed), tokens)]] += 1
    assert np.abs(counts / 600 - 0.25).max() < 0.08  # 4.5 standard errors


@relaxed
@given(maps, shares, st.sampled_from(["image", "text", "all"]))
def test_top_and_bottom_take_the_extremes_and_ties_go_to_the_first(tokens: TokenMap, share: float, among: str) -> None:
    scores = evidence(tokens)["attention"]
    places = tokens.role(among).tolist()
    if isinstance(share, int) and share > len(places):
        with pytest.raises(SelectionError, match=f"finds {len(places)} positions; expected at least {share}"):
            chosen(select.top(share, among=among), tokens)
        return
    count = share if isinstance(share, int) else math.ceil(round(share * len(places), 9))
    highest = sorted(places, key=lambda p: (-float(scores[p]), p))[:count]
    lowest = sorted(places, key=lambda p: (float(scores[p]), p))[:count]
    assert chosen(select.top(share, among=among), tokens) == set(highest)
    assert chosen(select.bottom(share, among=among), tokens) == set(lowest)


@relaxed
@example(100, 7)  # 0.07 * 100 is 7.000000000000001
@given(st.integers(1, 3000), st.integers(1, 100))
def test_a_fraction_is_rounded_up_as_exact_arithmetic_rounds(available: int, percent: int) -> None:
    assert select.random(percent / 100)._count(available) == -(-percent * available // 100)


def test_boxes_choose_what_the_grid_says() -> None:
    for tokens in MAPS:
        width, height = tokens.grid.size
        everything = select.box(0, 0, width, height)
        assert chosen(everything, tokens) == set(tokens.image.tolist())
        for token, place in enumerate(tokens.image.tolist()):
            x0, y0, x1, y1 = tokens.grid.box_of(token)
            middle = select.box((x0 + x1) / 2 - 0.1, (y0 + y1) / 2 - 0.1, (x0 + x1) / 2 + 0.1, (y0 + y1) / 2 + 0.1)
            assert chosen(middle, tokens) == {place}
        assert chosen(select.box(width + 1, 0, width + 5, 5), tokens) == set()


def test_a_box_lies_in_the_picture_that_it_names() -> None:
    batch = encoded("qwen2_vl", [[picture(60, 40, 1), picture(33, 70, 2)]], ["which is larger?"])
    tokens = batch.tokens[0]
    for number, grid in enumerate(tokens.grids):
        found = select.box(0, 0, *grid.size, image=number).positions(tokens)
        assert torch.equal(found, tokens.picture_tokens(number))
    with pytest.raises(SelectionError, match=r"picture 2 does not exist; expected 0 to 1"):
        select.box(0, 0, 5, 5, image=2).positions(tokens)


def words_of(tokens: TokenMap, *texts: str) -> str:
    return "".join(tokens.pieces[p] for p in select.words(*texts).positions(tokens))


def test_words_are_whole_words_of_the_question() -> None:
    question = "Is the red cat near a covered box, or redder than RED?"
    tokens = encoded("qwen2_vl", [picture(30, 30)], [question]).tokens[0]
    inside = tokens.question.tolist()
    text = "".join(tokens.pieces[p] for p in inside)
    assert text.strip() == question
    starts = np.cumsum([0] + [len(tokens.pieces[p]) for p in inside])
    for wanted, spans in {
        "red": [(7, 10), (50, 53)], "RED": [(7, 10), (50, 53)], "covered": [(22, 29)],
        "red cat": [(7, 14)], "ed": [], "?": [(53, 54)], "zebra": [],
    }.items():  # fmt: skip
        expected = {
            p for k, p in enumerate(inside) if any(starts[k] < stop and starts[k + 1] > start for start, stop in spans)
        }
        assert set(select.words(wanted).positions(tokens).tolist()) == expected, wanted
    both = set(select.words("red", "covered").positions(tokens).tolist())
    assert both == set((select.words("red") | select.words("covered")).positions(tokens).tolist())


def test_words_in_a_script_without_blanks() -> None:
    tokens = encoded("qwen2_vl", [picture(30, 30)], ["图中有红色的猫吗?"]).tokens[0]
    found = select.words("红色").positions(tokens)
    spans = [tokens.found.spans[tokens.question.tolist().index(p)] for p in found.tolist()]
    assert (min(s for s, _ in spans), max(e for _, e in spans)) == (3, 5)


def test_positions_count_from_the_padded_row_or_from_the_end_of_the_prompt() -> None:
    left, right = (BATCHES[side].tokens[1] for side in ("left", "right"))
    assert int(left.all[0]) > 0
    assert int(right.last) < len(right.ids) - 1
    for tokens in (left, right):
        assert torch.equal(select.of(-1).positions(tokens), tokens.last)
        assert torch.equal(select.of(tokens.image.flip(0)).positions(tokens), tokens.image)
        assert torch.equal(select.of(tokens.image.numpy()).positions(tokens), tokens.image)
        assert chosen(select.of([-1, int(tokens.last), -1]), tokens) == {int(tokens.last)}
    with pytest.raises(SelectionError, match="position 0 is padding"):
        select.of(0).positions(left)
    with pytest.raises(SelectionError, match=f"position {len(left.ids)} does not exist"):
        select.of(len(left.ids)).positions(left)
    with pytest.raises(SelectionError, match="does not exist"):
        select.of(-left.length - 1).positions(left)


def test_a_threshold_beyond_every_float_is_refused() -> None:
    with pytest.raises(SelectionError, match="expected a positive number"):
        select.sinks(10**400)


def test_sinks_are_above_the_threshold() -> None:
    for tokens in MAPS:
        scores = evidence(tokens)["sinks"]
        wanted = {p for p in tokens.image.tolist() if scores[p] > 20}
        assert chosen(select.sinks(), tokens) == wanted
        assert chosen(select.sinks(1e9), tokens) == set()
        assert chosen(select.sinks(2**70), tokens) == set()  # more than an integer tensor holds


def test_needs_are_the_union_over_the_tree() -> None:
    assert (select.image | ~select.random(3)).needs == frozenset()
    tree = (select.top(0.3, among=select.image - select.sinks()) | select.last) & select.bottom(2, by="sinks")
    assert tree.needs == {"attention", "sinks"}
    assert (select.top(2, by="attention@-1") | tree).needs == {"attention", "attention@-1", "sinks"}
    assert select.random(0.5, among=select.image - select.sinks()).needs == {"sinks"}


@pytest.mark.parametrize("role", ROLES)
def test_roles_are_ready_made_values(role: str) -> None:
    assert getattr(select, role) == select.of(role)
    for tokens in MAPS:
        assert torch.equal(select.of(role).positions(tokens), getattr(tokens, role))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: select.of("images"), "role 'images' does not exist; expected one of image, question"),
        (lambda: select.of([True]), "whole numbers"),
        (lambda: select.of(torch.tensor([0.5])), "whole numbers"),
        (lambda: select.box(5, 0, 5, 9), "has no area"),
        (lambda: select.box(0, 0, float("nan"), 9), "no number"),
        (lambda: select.box(0, 0, 5, 9, buffer=-1), "buffer is -1"),
        (lambda: select.words(), "names nothing"),
        (lambda: select.words("red", " "), "names nothing"),
        (lambda: select.top(0), "a share of 0"),
        (lambda: select.top(1.01), "a share of 1.01"),
        (lambda: select.random(True), "a share of True"),
        (lambda: select.top(float("nan")), "a share of nan"),
        (lambda: select.top(0.3, by="gradient"), "by='gradient'; expected one of attention, sinks"),
        (lambda: select.top(0.3, by="attention@last"), r"expected one of attention, sinks, attention@LAYER"),
        (lambda: select.top(0.3, by="attention@-1").positions(MAPS[0]), "needs 'attention@-1' scores"),
        (lambda: select.random(0.3, seed=-1), "seed=-1"),
        (lambda: select.sinks(0), "positive"),
        (lambda: select.top(0.3).positions(MAPS[0]), "needs 'attention' scores"),
        (lambda: select.top(0.3).positions(MAPS[0], {"attention": torch.ones(3)}), r"shape \(3,\)"),
        (lambda: select.sinks().positions(MAPS[0], {"sinks": MAPS[0].ids * float("nan")}), "NaN"),
        (lambda: select.random(37).positions(MAPS[0]), "finds 36 positions; expected at least 37"),
    ],
)
def test_nonsense_is_refused_in_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SelectionError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: select.of(1.5),
        lambda: select.of([0.5, 1.5]),
        lambda: select.box(0, 0, 5, 9, image=0.5),
        lambda: select.bottom("half"),
        lambda: select.random(0.3, seed=0.5),
        lambda: select.sinks("many"),
    ],
)
def test_wrong_types_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises((SelectionError, TypeCheckError)):  # the second where the tests check annotations
        make()


@pytest.mark.parametrize("other", ["image", 3, None])
def test_only_selectors_combine_with_selectors(other: object) -> None:
    for operation in (lambda: select.image & other, lambda: select.image | other, lambda: select.image - other):
        with pytest.raises(TypeError):
            operation()
