"""Bad models: through the Python API and the command line, a typed error of one line or a recovery."""

from __future__ import annotations

import re

import pytest
import torch

import interp_vlm as iv
from interp_vlm.errors import ModelError
from tests.corpus.conftest import one_line, refused
from tests.corpus.images import colours
from tests.corpus.models import MODELS
from tests.tiny import build

QUESTION = "is there a cat?"


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    """No progress bars: the tests write the models."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "p.png"
    colours().save(path)
    return path


def answered(name, picture):
    vlm = iv.load(name)
    return vlm.run(vlm.encode(picture, QUESTION)).answers


@pytest.mark.parametrize("bad", [bad for bad in MODELS if not bad.recovers], ids=repr)
def test_a_bad_model_is_one_line(bad, tmp_path, picture, command, untouched):
    name = bad.make(tmp_path / "model")
    with untouched(tmp_path):
        refused(bad, lambda: answered(str(name), picture))
        words = [name, "--image", picture, "--question", QUESTION, "--out", tmp_path / "grid.png"]
        assert re.search(bad.says, one_line(*command("inspect", *words)))


@pytest.mark.parametrize("bad", [bad for bad in MODELS if bad.recovers], ids=repr)
def test_an_odd_model_answers(bad, tmp_path, picture):
    name = bad.make(tmp_path / "model")
    bad.recovers(answered(str(name), picture))
    assert (
        answered(str(name), picture)
        == iv.VLM(*build("llava")).run(iv.VLM(*build("llava")).encode(picture, QUESTION)).answers
    )


@pytest.mark.parametrize("part", ["", "model.language_model.layers.1", "model.vision_tower"])
def test_a_model_that_lies_in_two_places_is_refused(part):
    """The meta device stands for the second one, which this machine may lack."""
    import copy

    model, processor = build("llava")
    model = copy.deepcopy(model)
    model.get_submodule(part).to("meta")
    with pytest.raises(ModelError, match=r"meta") as caught:
        iv.VLM(model, processor)
    assert str(caught.value).isprintable()
    assert torch.get_default_device().type == "cpu"
