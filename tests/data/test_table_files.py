"""Tables of (image, question, answer): every format reads the same, and every malformed one says where."""

import csv
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from interp_vlm.data import files
from interp_vlm.errors import DataError
from tests.data.conftest import picture, write_lines


def write_table(path, rows):
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith((".csv", ".tsv")):
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="," if name.endswith("csv") else "\t")
            table.writeheader()
            table.writerows(rows)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        write_lines(path, rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


FORMATS = ["t.jsonl", "t.json", "t.csv", "t.tsv", "t.parquet", "t.csv.gz", "t.jsonl.gz"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_the_same(tmp_path, table_rows, name):
    examples = files(write_table(tmp_path / name, table_rows))
    assert [(e.id, e.question, e.answer, e.group, e.kind) for e in examples] == [
        ("1", "what animal is it?", "cat", "cat.png", "question"),
        ("2", "how many legs, or “feet”?", "4", "cat.png", "question"),
        ("3", "what animal is it?", "dog", "dog.png", "question"),
    ]
    assert np.array_equal(examples[2].image, Image.open(tmp_path / "dog.png"))


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_optional_columns_and_meta(tmp_path, table_rows, name):
    votes = ["cat"] * 7 + ["kitten"] * 3
    listed = votes if name != "t.csv" else json.dumps(votes)
    rows = [
        row | {"id": f"q{i}", "kind": "animal", "group": "room 1", "answers": listed, "source": "mine"}
        for i, row in enumerate(table_rows)
    ]
    example = files(write_table(tmp_path / name, rows))[0]
    assert (example.id, example.kind, example.group) == ("q0", "animal", "room 1")
    assert example.answers == tuple(votes)
    assert example.meta == {"source": "mine"}


def test_answers_as_vqa_annotations(tmp_path, table_rows):
    rows = [row | {"answers": [{"answer": "cat", "answer_id": 1}, {"answer": " a cat "}]} for row in table_rows]
    assert files(write_lines(tmp_path / "t.jsonl", rows))[0].answers == ("cat", "a cat")
    for wrong in ([], "cat", 3, [None], [1]):
        write_lines(tmp_path / "t.jsonl", [row | {"answers": wrong} for row in table_rows])
        with pytest.raises(DataError, match=r"line 1: answers is .*expected a list of texts"):
            files(tmp_path / "t.jsonl")


def test_whole_numbers_are_answers_when_all_are(tmp_path, table_rows):
    rows = [row | {"answer": i} for i, row in enumerate(table_rows)]
    assert [example.answer for example in files(write_lines(tmp_path / "t.jsonl", rows))] == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"'answer' mixes types: str at .*line 1, int at .*line 2"):
        files(write_lines(tmp_path / "t.jsonl", [rows[0] | {"answer": "none"}, *rows[1:]]))
    with pytest.raises(DataError, match=r"line 1: answer is 0\.5, a float"):
        files(write_lines(tmp_path / "t.jsonl", [row | {"answer": 0.5} for row in rows]))


def test_a_folder_with_one_table_or_one_called_metadata(tmp_path, table_rows):
    write_table(tmp_path / "questions.csv", table_rows)
    assert len(files(tmp_path)) == 3
    write_table(tmp_path / "metadata.jsonl", table_rows[:2])
    assert len(files(tmp_path)) == 2
    write_table(tmp_path / "metadata.csv", table_rows[:1])
    with pytest.raises(DataError, match=r"no single table \(metadata.csv, metadata.jsonl, questions.csv\)"):
        files(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no single table \(none\)"):
        files(tmp_path / "none")


def test_pictures_elsewhere_and_broken(tmp_path, table_rows):
    table = tmp_path / "tables" / "t.csv"
    table.parent.mkdir()
    write_table(table, table_rows)
    assert len(files(table, images=tmp_path)) == 3
    with pytest.raises(DataError, match=r"2 of 2 pictures of .*t.csv cannot be read: cat.png \(missing\), dog.png"):
        files(table)
    with pytest.raises(DataError, match=r"image folder .* is a file"):
        files(table, images=table)
    (tmp_path / "dog.png").write_bytes((tmp_path / "dog.png").read_bytes()[:60])
    examples = files(table, images=tmp_path, on_error="skip")
    assert [skipped.id for skipped in examples.skipped] == ["3"]
    assert len(examples) == 2


def test_a_picture_that_vanishes_later_is_a_typed_error(tmp_path, table_rows):
    examples = files(write_table(tmp_path / "t.csv", table_rows))
    (tmp_path / "cat.png").unlink()
    with pytest.raises(DataError, match=r"cat\.png cannot be read: missing"):
        _ = examples[0].image


def test_thousands_of_rows_hold_no_picture(tmp_path):
    for i in range(40):
        picture(i, (64, 64)).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i % 40}.png", "question": f"q {i}", "answer": "yes"} for i in range(9000)]
    examples = files(write_lines(tmp_path / "t.jsonl", rows))
    assert len(examples) == 9000
    assert sum(example.image.width for example in examples[:80]) == 80 * 64
    assert not any(isinstance(value, Image.Image) for example in examples for value in vars(example).values())


TEXTS = {
    "ragged": ("image,question,answer\ncat.png,what?\n", "line 2 has 2 cells; expected 3"),
    "unquoted comma": ("image,question,answer\ncat.png,what, then?,cat\n", "line 2 has 4 cells"),
    "quote": ('image,question,answer\ncat.png,"what?,cat\n', "is not a table row"),
    "column": ("image,question\ncat.png,what?\n", "line 2 has no column 'answer' (it has image, question)"),
    "twice": ("image,image,answer\na,b,c\n", "names a column twice"),
    "header only": ("image,question,answer\n", "holds no rows"),
    "empty cell": ("image,question,answer\ncat.png,what?,\n", "line 2: answer is missing ('')"),
    "nan cell": ("image,question,answer\ncat.png,what?,nan\n", "line 2: answer is missing ('nan')"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_malformed_csv(tmp_path, table_rows, name):
    text, message = TEXTS[name]
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        files(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_csv_as_spreadsheets_write_it(tmp_path, table_rows):
    """A byte-order mark, Windows line ends, a quoted line break, and "none" as a real answer."""
    text = '\ufeffimage,question,answer\r\ncat.png,"what\nanimal?",none\r\n'
    (tmp_path / "t.csv").write_bytes(text.encode("utf-8"))
    example = files(tmp_path / "t.csv")[0]
    assert (example.question, example.answer) == ("what\nanimal?", "none")


def test_malformed_parquet(tmp_path, table_rows):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="is not a Parquet file"):
        files(path)
    write_table(path, [*table_rows, table_rows[0] | {"answer": None}])
    with pytest.raises(DataError, match=r"row 4: answer is missing \(None\)"):
        files(path)
    write_table(path, [row | {"image": {"bytes": b"x", "path": "cat.png"}} for row in table_rows])
    with pytest.raises(DataError, match=r"image holds an encoded picture.*hf:"):
        files(path)


def test_optional_column_in_some_rows_only(tmp_path, table_rows):
    for index in (0, 2):
        rows = [row | ({"kind": "animal"} if i == index else {}) for i, row in enumerate(table_rows)]
        with pytest.raises(DataError, match="has no column 'kind'"):
            files(write_lines(tmp_path / "t.jsonl", rows))
    with pytest.raises(DataError, match="repeats the id 'a'"):
        files(write_lines(tmp_path / "t.jsonl", [row | {"id": "a"} for row in table_rows]))
