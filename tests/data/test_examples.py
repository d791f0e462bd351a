"""Examples hold a picture or a way to decode one; lists of them remember what was left out."""

import dataclasses
import pickle
import weakref
from functools import partial

import numpy as np
import pytest
from PIL import Image

from interp_vlm.data import Example, Examples, Skipped
from interp_vlm.data.images import open_image
from tests.data.conftest import picture


def test_a_held_picture_is_given_back_itself():
    held = picture(0)
    example = Example("1", held, "q", "a")
    assert example.image is held
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.image = held  # type: ignore[misc]


def test_a_decoder_is_called_at_each_reading_and_nothing_is_kept(tmp_path):
    picture(1).save(tmp_path / "p.png")
    example = Example("1", partial(open_image, tmp_path / "p.png"), "q", "a")
    first = example.image
    assert np.array_equal(first, picture(1))
    gone = weakref.ref(first)
    del first
    assert gone() is None
    picture(2).save(tmp_path / "p.png")
    assert np.array_equal(example.image, picture(2))


def test_examples_copy_and_pickle(tmp_path):
    picture(1).save(tmp_path / "p.png")
    example = Example("1", partial(open_image, tmp_path / "p.png"), "q", "a", answers=("a", "b"))
    again = pickle.loads(pickle.dumps(example))
    assert (again.id, again.answers, again.group) == ("1", ("a", "b"), "1")
    assert np.array_equal(again.image, picture(1))
    assert isinstance(dataclasses.replace(example, kind="colour").image, Image.Image)


def test_the_list_counts_pictures_and_keeps_what_was_skipped_when_sliced():
    rows = [Example(str(i), picture(0), "q", "a", group=str(i // 2)) for i in range(4)]
    examples = Examples(rows, [Skipped("9", "lost.jpg", "missing")])
    assert repr(examples) == "Examples(4 questions about 2 pictures, 1 skipped)"
    assert examples[1] is rows[1]
    assert examples[:2].skipped == examples.skipped
    assert [example.id for example in examples[2:]] == ["2", "3"]
    assert isinstance(examples, list)
