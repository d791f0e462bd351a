"""Token maps of every family: roles partition the row, and padding shifts positions only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from interp_vlm.errors import DataError, SelectionError
from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.token_map import ROLES, build_maps
from tests import tiny
from tests.tokens.conftest import QUESTIONS, encoded, picture

families = pytest.mark.parametrize("family", tiny.FAMILIES)
paddings = pytest.mark.parametrize("padding", ["left", "right"])


@families
@paddings
def test_roles_partition_the_row(family: str, padding: str, three: Callable[..., Batch]) -> None:
    batch = three(family, padding)
    model, processor = tiny.build(family)
    for row, tokens in enumerate(batch.tokens):
        parts = [set(tokens.role(name).tolist()) for name in ("image", "question", "template", "bos")]
        real = set(batch.inputs["attention_mask"][row].nonzero().flatten().tolist())
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert set.union(*parts) == real == set(tokens.all.tolist())
        assert set(tokens.text.tolist()) == real - parts[0]
        assert tokens.last.tolist() == [max(real)] == [int(batch.last[row])]
        assert tokens.length == len(real)
        ids = batch.inputs["input_ids"][row]
        assert torch.equal(tokens.ids, ids)
        assert parts[0] == {p for p in real if ids[p] == model.config.image_token_id}
        assert parts[3] == {p for p in real if ids[p] == processor.tokenizer.bos_token_id}
        assert len(tokens.image) == sum(grid.n for grid in tokens.grids) > 0
        for name in ROLES:
            assert tokens.role(name).dtype == torch.long


@families
@paddings
def test_the_question_tokens_spell_the_question(family: str, padding: str, three: Callable[..., Batch]) -> None:
    tokenizer = tiny.build(family)[1].tokenizer
    for tokens, question in zip(three(family, padding).tokens, QUESTIONS, strict=True):
        assert tokenizer.decode(tokens.ids[tokens.question]).strip() == question
        assert question not in tokenizer.decode(tokens.ids[tokens.template])
        assert "".join(tokens.pieces[p] for p in tokens.question).strip() == question


@families
def test_padding_shifts_positions_and_changes_nothing_else(family: str, three: Callable[..., Batch]) -> None:
    left, right = three(family, "left"), three(family, "right")
    assert any(tokens.length < len(tokens.ids) for tokens in left.tokens)
    for i, (a, b) in enumerate(zip(left.tokens, right.tokens, strict=True)):
        alone = encoded(family, [list(left.images[i])], [QUESTIONS[i]]).tokens[0]
        assert alone.length == len(alone.ids)
        for other in (a, b):
            shift = int(other.all[0])
            assert (a.key, a.grids, a.found) == (other.key, other.grids, other.found)
            assert (alone.key, alone.grids, alone.found) == (other.key, other.grids, other.found)
            for name in ROLES:
                assert torch.equal(alone.role(name) + shift, other.role(name)), name
            assert torch.equal(alone.image_index, other.image_index[other.all])
        assert int(b.all[0]) == 0
        assert int(a.all[-1]) == len(a.ids) - 1


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_image_tokens_are_dealt_to_their_pictures_in_order(family: str) -> None:
    images = [[picture(60, 40, 1), picture(33, 70, 2)], [picture(24, 24, 3)]]
    batch = encoded(family, images, ["which is larger?", "a cat?"])
    two, one = batch.tokens
    places = [two.picture_tokens(number) for number in (0, 1)]
    assert [len(p) for p in places] == [grid.n for grid in two.grids]
    assert torch.equal(torch.cat(places), two.image)
    assert int(places[0].max()) < int(places[1].min())
    assert one.grid == one.grids[0]
    with pytest.raises(SelectionError, match=r"the example has 2 pictures; expected one picture; use \.grids"):
        _ = two.grid
    with pytest.raises(SelectionError, match="picture 1 does not exist"):
        one.picture_tokens(1)


def test_spans_of_the_question() -> None:
    tokens = encoded("qwen2_vl", [picture(30, 30)], ["is there a red cat on the left of the picture?"]).tokens[0]
    assert tokens.span("red").tolist() == tokens.span("RED").tolist()
    assert "red" in "".join(tokens.pieces[p] for p in tokens.span("red"))
    assert set(tokens.span("e").tolist()) > set(tokens.span("there").tolist()) & set(tokens.span("e").tolist())
    assert tokens.span("zebra").tolist() == []
    with pytest.raises(SelectionError, match="names nothing"):
        tokens.span("  ")


def test_an_empty_question_has_no_tokens() -> None:
    tokens = encoded("paligemma", [picture(30, 30)], [""]).tokens[0]
    assert tokens.question.tolist() == []
    assert len(tokens.template) == tokens.length - len(tokens.image) - len(tokens.bos)


def test_a_question_that_spells_out_bos_leaves_roles_disjoint() -> None:
    tokens = encoded("llava", [picture(30, 30)], ["what is <s> here?"]).tokens[0]
    assert len(tokens.bos) == 2
    assert not set(tokens.bos.tolist()) & set(tokens.question.tolist())


def test_unknown_roles_and_mismatches_are_refused(three: Callable[..., Batch]) -> None:
    batch = three("llava", "left")
    model, processor = tiny.build("llava")
    good = {
        "tokenizer": processor.tokenizer, "inputs": batch.inputs, "prompts": batch.prompts,
        "questions": batch.questions, "image_token_id": model.config.image_token_id,
        "grids": [tokens.grids for tokens in batch.tokens], "keys": ["a", "b", "c"],
    }  # fmt: skip
    assert len(build_maps(**good)) == 3
    with pytest.raises(SelectionError, match="role 'picture' does not exist; expected one of image, question"):
        batch.tokens[0].role("picture")
    with pytest.raises(DataError, match="2 keys for 3 rows"):
        build_maps(**{**good, "keys": ["a", "b"]})
    with pytest.raises(DataError, match="example 1 has 36 image tokens; expected 0 from its pictures' grids"):
        build_maps(**{**good, "grids": [batch.tokens[0].grids, (), batch.tokens[2].grids]})
    with pytest.raises(DataError, match="the question 'blue zebra' is not in the prompt"):
        build_maps(**{**good, "questions": ["blue zebra", *QUESTIONS[1:]]})


def test_the_brief_text_says_how_many_of_each_role() -> None:
    tokens = encoded("paligemma", [picture(30, 30)], ["a cat?"]).tokens[0]
    assert repr(tokens).startswith("TokenMap(")
    assert f"image 36, question {len(tokens.question)}, template 1, bos 1; padding 0; 'a cat?'" in repr(tokens)
