"""The `--data` argument: each scheme reaches its reader, and what is no source is refused in one line."""

import datasets
import pytest

import interp_vlm.data as data
from interp_vlm.errors import DataError
from tests.data.conftest import picture, write_lines


def test_digits():
    examples = data.load("digits", limit=12, seed=3)
    assert len(examples) == 12
    assert [example.id for example in examples] == [e.id for e in data.digit_scenes(split="test", n=12, seed=3)]
    hard = data.load("digits?difficulty=hard", limit=6)
    assert {example.meta["difficulty"] for example in hard} == {"hard"}
    assert examples.skipped == ()
    with pytest.raises(DataError, match="difficulty 'mild'"):
        data.load("digits?difficulty=mild")


def test_pope(pope_file, tmp_path):
    assert len(data.load(f"pope:{pope_file}")) == 18
    assert len(data.load(f"pope:{pope_file}", limit=7)) == 7
    moved = tmp_path / "my pictures"
    (tmp_path / "images").rename(moved)
    assert len(data.load(f"pope:{pope_file}?images={moved}")) == 18
    with pytest.raises(DataError, match="3 of 3 pictures"):
        data.load(f"pope:{pope_file}")
    next(moved.iterdir()).unlink()
    assert len(data.load(f"pope:{pope_file}?images={moved}", on_error="skip").skipped) == 6


def test_file(tmp_path, table_rows):
    write_lines(tmp_path / "metadata.jsonl", table_rows)
    assert len(data.load(f"file:{tmp_path}")) == 3
    assert len(data.load(f"file:{tmp_path / 'metadata.jsonl'}?images={tmp_path}", limit=2)) == 2


def test_hf(tmp_path):
    items = [{"image": picture(i), "question": "q", "answer": "yes"} for i in range(3)]
    one = datasets.Dataset.from_list(items).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": one, "dev": one.select([0])}).save_to_disk(tmp_path / "saved")
    assert len(data.load(f"hf:{tmp_path / 'saved'}", split="dev")) == 1


REFUSED = {
    "coco:val": "'coco:val' names no data source; expected digits, pope:PATH, file:PATH or hf:ID",
    "": "'' names no data source",
    "pope": "'pope' names no data source",
    "pope:": "'pope:' names no data source",
    "digits:hard": "'digits:hard' names no data source",
    "pope:x.json?folder=y": "'pope:x.json?folder=y' has the option 'folder'; expected only images",
    "pope:x.json?images": "has malformed options",
    "pope:x.json?images=": "has malformed options",
    "file:x.csv?images=a&images=b": "has malformed options",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_refused(spec):
    with pytest.raises(DataError) as error:
        data.load(spec)
    assert REFUSED[spec] in str(error.value)


def test_options_that_mean_nothing_are_refused(pope_file):
    with pytest.raises(DataError, match="has no splits, but split='test'"):
        data.load(f"pope:{pope_file}", split="test")
    with pytest.raises(DataError, match="limit is -1"):
        data.load("digits", limit=-1)
    with pytest.raises(DataError, match="on_error is 'warn'"):
        data.load("digits", on_error="warn")


def test_public_names_are_functions_whatever_was_imported_first():
    import interp_vlm.data.files
    import interp_vlm.data.hub
    import interp_vlm.data.pope  # noqa: F401

    for name in data.__all__:
        assert getattr(data, name) is not None
    assert all(callable(reader) for reader in (data.pope, data.files, data.hub, data.load, data.digit_scenes))
    with pytest.raises(AttributeError, match="no attribute 'coco'"):
        _ = data.coco
