"""Token maps of every family, selectors and boxes, against slow rules that share no code with them."""

from __future__ import annotations

import math
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from interp_vlm.errors import DataError, SelectionError
from interp_vlm.tokens import select
from interp_vlm.tokens.geometry import Geometry
from interp_vlm.tokens.grid import grid_from_geometry
from tests.fuzz.cases import cases, one_line
from tests.tiny import FAMILIES, build
from tests.tokens.conftest import encoded
from tests.tokens.test_select import by_sets, chosen, maps, selectors

# Where annotations are checked, beartype looks at one item of a list by chance: Hypothesis takes that for ours.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")

SPELT = [
    "<image>",
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|image_pad|>",
    "USER:",
    "ASSISTANT:",
    "picture",
    "\n",
    "  ",
    "\u0301",
]
sides = st.one_of(st.integers(1, 9), st.integers(1, 150))
sizes = st.tuples(sides, sides)
questions = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.lists(st.sampled_from(["is", "there", "a", "red", "cat", "?", *SPELT]), max_size=8).map(" ".join),
)


def slow_boxes(family: str, size: tuple[int, int], inputs: dict[str, torch.Tensor]) -> list[tuple[float, ...]] | None:
    """Boxes by a loop over rows and columns, from the processor's published rule; None for families of tiles."""
    width, height = size
    if family == "llava":  # the shorter side to 24 pixels, then the middle square of 24 x 24, patches of 4
        wide, high = (24, int(24 * height / width)) if width <= height else (int(24 * width / height), 24)
        left, top = (wide - 24) // 2, (high - 24) // 2
        per_x, per_y, rows, cols, step = width / wide, height / high, 6, 6, 4
    elif family in ("paligemma", "paligemma2"):  # the picture stretched over 6 x 6 patches
        left, top, per_x, per_y, rows, cols, step = 0, 0, width / 6, height / 6, 6, 6, 1
    elif family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):  # stretched over a grid that the processor chooses
        _, high, wide = inputs["image_grid_thw"][0].tolist()
        rows, cols, step, left, top = high // 2, wide // 2, 1, 0, 0
        per_x, per_y = width / cols, height / rows
    else:
        return None
    boxes = []
    for row in range(rows):
        for col in range(cols):
            x = [min(max((left + step * (col + k)) * per_x, 0), width) for k in (0, 1)]
            y = [min(max((top + step * (row + k)) * per_y, 0), height) for k in (0, 1)]
            boxes.append((x[0], y[0], x[1], y[1]))
    return boxes


def ink(text: str) -> str:
    """Text without white space, and without what differs between forms of one character."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if not c.isspace())


@cases(0.25)
@given(st.sampled_from(FAMILIES), st.lists(st.tuples(sizes, questions), min_size=1, max_size=2), st.booleans())
def test_any_picture_and_any_question(family, asked, right):
    with one_line(DataError):
        batch = encoded(
            family, [Image.new("RGB", size, (200, 30, 10)) for size, _ in asked], [text for _, text in asked],
            "right" if right else "left",
        )  # fmt: skip
        model, processor = build(family)
        placeholder, bos = model.config.image_token_id, processor.tokenizer.bos_token_id
        for number, ((size, question), tokens) in enumerate(zip(asked, batch.tokens, strict=True)):
            ids = batch.inputs["input_ids"][number].tolist()
            real = [i for i, keep in enumerate(batch.inputs["attention_mask"][number].tolist()) if keep]
            pictured = [i for i in real if ids[i] == placeholder]
            said = tokens.question.tolist()
            assert tokens.image.tolist() == pictured
            assert tokens.bos.tolist() == [i for i in real if bos is not None and ids[i] == bos]
            assert tokens.last.tolist() == real[-1:]
            parts = [*pictured, *said, *tokens.bos.tolist(), *tokens.template.tolist()]
            assert sorted(parts) == real
            assert len(tokens.image) == tokens.grid.n
            assert tokens.grid.size == size
            special = set(processor.tokenizer.all_special_tokens)
            if not any(token in question for token in special):
                spelt = processor.tokenizer.decode([ids[i] for i in said], clean_up_tokenization_spaces=False)
                assert ink(question) in ink(spelt)
                if said:  # and no token too many: without its first or last one, it is not whole
                    for fewer in (said[1:], said[:-1]):
                        left = ink(processor.tokenizer.decode([ids[i] for i in fewer]))
                        edge = processor.tokenizer.decode([ids[(set(said) - set(fewer)).pop()]])
                        assert ink(question) not in left or not ink(edge)
            wanted = slow_boxes(family, size, {"image_grid_thw": picture_grid(batch.inputs, number)})
            if wanted is not None:
                for found, box in zip(tokens.grid.boxes, wanted, strict=True):
                    empty = min(box[2] - box[0], box[3] - box[1]) <= 1e-6
                    assert np.isnan(found).all() if empty else np.allclose(found, box, atol=1e-6)


def picture_grid(inputs: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    return inputs["image_grid_thw"][number : number + 1] if "image_grid_thw" in inputs else torch.empty(0)


@cases(0.08)
@given(selectors, maps)
def test_the_algebra_of_selectors_is_that_of_sets(selector, tokens):
    assert chosen(selector, tokens) == by_sets(selector, tokens)
    assert eval(repr(selector), vars(select)) == selector  # the text is ours


numbers = st.one_of(st.integers(), st.floats(), st.booleans())
made = st.one_of(
    st.tuples(st.just(select.box), st.tuples(numbers, numbers, numbers, numbers)),
    st.tuples(st.just(select.top), st.tuples(numbers)),
    st.tuples(st.just(select.bottom), st.tuples(numbers, st.text(max_size=12))),
    st.tuples(st.just(select.top), st.tuples(numbers, st.integers().map("attention@{}".format))),
    st.tuples(st.just(select.random), st.tuples(numbers, st.integers())),
    st.tuples(st.just(select.sinks), st.tuples(numbers)),
    st.tuples(st.just(select.words), st.lists(st.text(max_size=6), max_size=3).map(tuple)),
    st.tuples(st.just(select.positions), st.tuples(st.lists(st.integers(), max_size=4))),
    st.tuples(st.just(select.of), st.tuples(st.one_of(st.text(max_size=8), st.integers()))),
)


@cases(0.08)
@given(made, maps)
def test_any_arguments_of_a_selector(call, tokens):
    make, arguments = call
    with one_line(SelectionError):
        chosen(make(*arguments), tokens)


@cases(0.08)
@given(
    sizes, st.tuples(st.integers(1, 7), st.integers(1, 7)), st.sampled_from(["stretch", "crop", "pad"]),
    st.tuples(*[st.floats(-20, 170, allow_nan=False)] * 4), st.integers(0, 2),
)  # fmt: skip
def test_boxes_find_the_patches_that_a_loop_finds(size, cells, kind, corners, buffer):
    rows, cols = cells
    canvas = (cols * 4, rows * 4)
    geometry = Geometry.resize(size, canvas)
    if kind == "crop":
        geometry = Geometry.resize_crop(size, (canvas[0] + 5, canvas[1] + 3), canvas)
    elif kind == "pad":
        inner = (max(1, canvas[0] - 3), max(1, canvas[1] - 2))
        geometry = Geometry.resize_pad(size, inner, canvas)
    grid = grid_from_geometry(geometry, rows, cols, 4)
    x0, x1 = sorted(corners[:2])
    y0, y1 = sorted(corners[2:])
    hit = set()
    for token in range(rows * cols):
        left, top, right, bottom = grid.box_of(token)
        if not math.isnan(left) and left < x1 and right > x0 and top < y1 and bottom > y0:
            hit.add(divmod(token, cols))
    around = {
        (row + down, col + across)
        for row, col in hit for down in range(-buffer, buffer + 1) for across in range(-buffer, buffer + 1)
    }  # fmt: skip
    placed = {divmod(token, cols) for token in range(rows * cols) if not math.isnan(grid.box_of(token)[0])}
    # the buffer grows the rectangle of what was hit, which a rectangle of pixels always hits whole
    assert {divmod(int(token), cols) for token in grid.tokens_in(x0, y0, x1, y1, buffer)} == around & placed
