"""Bad pictures and data files: through the Python API and the command line, a typed error of one line or a recovery."""

from __future__ import annotations

import json
import re

import pytest

import interp_vlm as iv
from tests.corpus.conftest import one_line, refused
from tests.corpus.images import IMAGES
from tests.corpus.tables import TABLES

QUESTION = "is there a cat?"


def names(rows):
    return pytest.mark.parametrize("bad", rows, ids=repr)


def as_table(picture, folder):
    """A table that names the picture, beside it."""
    table = folder / "questions.jsonl"
    table.write_text(json.dumps({"image": str(picture), "question": QUESTION, "answer": "yes"}) + "\n")
    return table


@names([bad for bad in IMAGES if not bad.recovers])
def test_a_bad_picture_is_one_line(bad, tmp_path, vlm, model, command, untouched):
    picture = bad.make(tmp_path)
    table = as_table(picture, tmp_path)
    with untouched(tmp_path):
        refused(bad, lambda: vlm.encode(picture, QUESTION))
        refused(bad, lambda: iv.data.files(table))
        if "\0" in str(picture):  # no command line can hold it
            return
        words = ["--image", picture, "--question", QUESTION, "--out", tmp_path / "grid.png"]
        assert re.search(bad.says, one_line(*command("inspect", model, *words)))


@names([bad for bad in IMAGES if bad.recovers])
def test_an_odd_picture_is_read_as_a_person_sees_it(bad, tmp_path, vlm, model, command):
    picture = bad.make(tmp_path)
    batch = vlm.encode(picture, QUESTION)
    bad.recovers(batch.images[0][0])
    example = iv.data.files(as_table(picture, tmp_path))[0]
    assert vlm.encode(example.image, QUESTION).images[0][0].tobytes() == batch.images[0][0].tobytes()
    code, _, err = command("inspect", model, "--image", picture, "--question", QUESTION, "--out", tmp_path / "grid.png")
    assert (code, err) == (0, "")
    assert (tmp_path / "grid.png").stat().st_size > 1000


@names([bad for bad in TABLES if not bad.recovers])
def test_a_bad_table_is_one_line(bad, tmp_path, model, command, untouched):
    spec = bad.make(tmp_path)
    with untouched(tmp_path):
        refused(bad, lambda: iv.data.load(spec))
        words = ["--model", model, "--data", spec, "--workers", "1", "--out", tmp_path / "run"]
        assert re.search(bad.says, one_line(*command("study", *words)))


@names([bad for bad in TABLES if bad.recovers])
def test_an_odd_table_is_read_whole(bad, tmp_path):
    bad.recovers(iv.data.load(bad.make(tmp_path)))


def test_broken_pictures_are_counted_when_they_are_left_out(tmp_path):
    """The documented recovery: nothing is skipped silently."""
    rows = [bad for bad in IMAGES if not bad.recovers and "nul" not in bad.id]
    lines = []
    for number, bad in enumerate(rows):
        (tmp_path / str(number)).mkdir()
        lines.append({"image": str(bad.make(tmp_path / str(number))), "question": QUESTION, "answer": "yes"})
    good = next(bad for bad in IMAGES if bad.id == "no-extension").make(tmp_path)
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {**lines[0], "image": str(good)}])
    )
    found = iv.data.load(f"file:{tmp_path / 't.jsonl'}", on_error="skip")
    assert len(found) == 1
    assert len(found.skipped) == len(rows)
    assert all(one.reason for one in found.skipped)
