"""POPE files: the published layout, gzip, the picture folder's rule, and every malformed line."""

import gzip
import json

import numpy as np
import pytest

from interp_vlm.data import pope
from interp_vlm.errors import DataError
from tests.data.conftest import picture, write_lines


def test_reads_the_published_layout(pope_file, pope_rows):
    examples = pope(pope_file)
    assert len(examples) == 18
    assert [example.id for example in examples] == [str(row["question_id"]) for row in pope_rows]
    assert [example.question for example in examples] == [row["text"] for row in pope_rows]
    assert [example.answer for example in examples] == ["yes", "no"] * 9
    assert len({example.group for example in examples}) == 3
    assert {example.kind for example in examples} == {"existence"}
    assert examples[0].meta == {"category": "adversarial"}
    assert examples[0].image.size == (40, 30)
    assert np.array_equal(examples[0].image, examples[5].image)
    assert not np.array_equal(examples[0].image, examples[6].image)
    assert examples.skipped == ()


def test_gzip_array_and_missing_final_newline_read_the_same(pope_file, pope_rows, tmp_path):
    plain = pope(pope_file)
    packed = tmp_path / "coco_pope_adversarial.jsonl.gz"
    packed.write_bytes(gzip.compress(pope_file.read_bytes().rstrip(b"\n")))
    array = tmp_path / "coco_pope_adversarial_array.json"
    array.write_text(json.dumps(pope_rows, indent=1))
    for path in (packed, array, str(packed)):
        again = pope(path)
        assert [vars(e) | {"image": None} for e in again] == [vars(e) | {"image": None} for e in plain]


def test_picture_folder_is_the_one_given_or_images_or_the_files_own(pope_file, pope_rows, tmp_path):
    beside = tmp_path / "beside"
    beside.mkdir()
    file = write_lines(beside / "pope.json", pope_rows)
    for seed, name in enumerate(sorted({row["image"] for row in pope_rows})):
        picture(seed + 50).save(beside / name)
    assert len(pope(file)) == 18
    assert pope(file)[0].meta == {}
    elsewhere = pope(file, images=tmp_path / "images")
    assert np.array_equal(elsewhere[0].image, pope(pope_file)[0].image)
    with pytest.raises(DataError, match=r"image folder .*nowhere does not exist"):
        pope(file, images=tmp_path / "nowhere")
    with pytest.raises(DataError, match="3 of 3 pictures"):
        pope(write_lines(tmp_path / "images" / "pope.json", pope_rows), images=beside.parent)


def test_limit_and_skip(pope_file, pope_rows, tmp_path):
    assert [example.id for example in pope(pope_file, limit=4)] == ["1", "2", "3", "4"]
    (tmp_path / "images" / pope_rows[0]["image"]).write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 3 pictures .*000000.jpg \(empty file\); .*on_error"):
        pope(pope_file)
    examples = pope(pope_file, on_error="skip")
    assert (len(examples), len(examples.skipped)) == (12, 6)
    assert [skipped.id for skipped in examples.skipped] == ["1", "2", "3", "4", "5", "6"]
    assert examples.skipped[0].reason == "empty file"


def changed(rows, index, **fields):
    return [row | fields if i == index else row for i, row in enumerate(rows)]


def without(rows, index, column):
    return [{k: v for k, v in row.items() if i != index or k != column} for i, row in enumerate(rows)]


MALFORMED = {
    "label": (lambda rows: changed(rows, 2, label="maybe"), "line 3: label is 'maybe'; expected yes or no"),
    "column": (
        lambda rows: without(rows, 4, "text"),
        "line 5 has no column 'text' (it has question_id, image, label); expected the columns question_id, image, text",
    ),
    "duplicate": (lambda rows: changed(rows, 7, question_id=1), "line 8 repeats the id '1' of"),
    "same id as text": (lambda rows: changed(rows, 7, question_id="1"), "column 'question_id' mixes types: int at"),
    "mixed": (lambda rows: changed(rows, 3, text=7), "column 'text' mixes types: str at"),
    "nan": (lambda rows: changed(rows, 3, label=float("nan")), "line 4: label is missing (nan)"),
    "null": (lambda rows: changed(rows, 3, image=None), "line 4: image is missing (None)"),
    "blank": (lambda rows: changed(rows, 3, text="  "), "line 4: text is missing ('  ')"),
    "all booleans": (lambda rows: [row | {"label": True} for row in rows], "line 1: label is True, a bool"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_name_file_line_and_remedy(pope_file, pope_rows, name):
    change, message = MALFORMED[name]
    write_lines(pope_file, change(pope_rows))
    for on_error in ("raise", "skip"):  # skipping is for pictures: a malformed table is always an error
        with pytest.raises(DataError) as error:
            pope(pope_file, on_error=on_error)
        assert message in str(error.value)
        assert str(pope_file) in str(error.value)
        assert "\n" not in str(error.value)


BROKEN_FILES = {
    "empty": (b"", "is empty"),
    "blank": (b"\n \n", "holds no rows"),
    "not json": (b'{"question_id": 1}\n{"question_id": 2,,}\n', "line 2 is not JSON (Expecting property name"),
    "a list": (b'{"question_id": 1}\n["yes"]\n', "line 2 is ['yes']; expected a JSON object"),
    "numbers": (b"[1, 2]", "item 1 is 1; expected a JSON object"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), "is not UTF-8 text (byte 10)"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files(tmp_path, name):
    content, message = BROKEN_FILES[name]
    path = tmp_path / "pope.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        pope(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_broken_gzip_and_absent_file(tmp_path, pope_file):
    packed = gzip.compress(pope_file.read_bytes())
    for name, content in {
        "cut": packed[:-40],
        "plain": b"{}",
        "noise": packed[:30] + b"\xff" * 40 + packed[70:],
    }.items():
        path = tmp_path / f"{name}.json.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a whole gzip file"):
            pope(path)
    with pytest.raises(DataError, match="does not exist"):
        pope(tmp_path / "absent.json")
    with pytest.raises(DataError, match="is a folder"):
        pope(tmp_path)
    other = tmp_path / "pope.xml"
    other.write_text("<pope/>")
    with pytest.raises(DataError, match=r"unknown format; expected a name ending in \.jsonl"):
        pope(other)
