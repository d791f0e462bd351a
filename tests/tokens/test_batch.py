"""Batches slice with their pictures, and move with their dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from interp_vlm.errors import DataError
from interp_vlm.tokens.batch import Batch
from tests import tiny
from tests.tokens.conftest import QUESTIONS, encoded, picture


def logits(family: str, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return tiny.build(family)[0](**batch.inputs).logits[torch.arange(len(batch)), batch.last]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_take_their_own_pictures_with_them(family: str, padding: str, three: Callable[..., Batch]) -> None:
    batch = three(family, padding)
    whole = logits(family, batch)
    assert not torch.allclose(whole[0], whole[1], atol=1e-3)
    for index in (0, -1, slice(1, None), slice(None, None, -1), slice(0, 0, 1)):
        part = batch[index]
        rows = [range(3)[index]] if isinstance(index, int) else list(range(3))[index]
        assert len(part) == len(rows)
        assert part.questions == tuple(QUESTIONS[i] for i in rows)
        assert [tokens.key for tokens in part.tokens] == [batch.tokens[i].key for i in rows]
        assert [own[0].size for own in part.images] == [batch.images[i][0].size for i in rows]
        if rows:
            torch.testing.assert_close(logits(family, part), whole[rows], atol=2e-5, rtol=1e-4)
            again = part[len(rows) - 1]
            torch.testing.assert_close(logits(family, again), whole[rows[-1:]], atol=2e-5, rtol=1e-4)


def test_several_pictures_stay_with_their_example() -> None:
    images = [[picture(60, 40, 1), picture(33, 70, 2)], [picture(24, 24, 3)], [picture(50, 30, 4)]]
    batch = encoded("qwen2_vl", images, ["which is larger?", "a cat?", "a dog?"])
    whole = logits("qwen2_vl", batch)
    assert len(batch[1].inputs["image_grid_thw"]) == 1
    for i in range(3):
        torch.testing.assert_close(logits("qwen2_vl", batch[i]), whole[i : i + 1], atol=2e-5, rtol=1e-4)


def test_iteration_ends() -> None:
    batch = encoded("paligemma", [picture(30, 30)] * 2, ["a cat?", "how many dogs?"])
    assert [one.questions[0] for one in batch] == ["a cat?", "how many dogs?"]
    with pytest.raises(IndexError, match="row 2 of a batch of 2"):
        batch[2]


def test_moving_converts_pixels_alone() -> None:
    batch = encoded("qwen2_vl", [picture(30, 30)], ["a cat?"])
    moved = batch.to("cpu", torch.float64)
    for name, tensor in batch.inputs.items():
        wanted = torch.float64 if tensor.is_floating_point() else tensor.dtype
        assert moved.inputs[name].dtype == wanted
        torch.testing.assert_close(moved.inputs[name].double(), tensor.double())
    assert batch.inputs["pixel_values"].dtype == torch.float32
    assert moved.to("meta").inputs["input_ids"].device.type == "meta"
    assert moved.tokens[0].ids.device.type == "cpu"


def test_what_does_not_fit_together_is_refused() -> None:
    batch = encoded("paligemma", [picture(30, 30)], ["a cat?"])
    parts = (batch.inputs, batch.tokens, batch.images, batch.questions, batch.prompts)
    with pytest.raises(DataError, match="padding 'both'; expected 'left' or 'right'"):
        Batch(*parts, padding="both")
    with pytest.raises(DataError, match="one entry per example"):
        Batch(*parts[:3], ("a", "b"), batch.prompts)


def test_the_brief_text() -> None:
    batch = encoded("paligemma", [picture(30, 30)] * 2, ["a cat?", "a dog?"])
    width = batch.inputs["input_ids"].shape[1]
    assert repr(batch) == f"Batch(2 examples, 2 pictures, {width} positions, left padding)"
    assert repr(batch[0]) == f"Batch(1 example, 1 picture, {width} positions, left padding)"
