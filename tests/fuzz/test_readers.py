"""Whatever a file holds, its reader gives examples or a typed error of one line, and never anything else."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

import interp_vlm as iv
from interp_vlm.data import Examples, pope
from interp_vlm.data.images import image_fault
from interp_vlm.errors import DataError, ModelError, StudyError
from interp_vlm.models.loading import resolve
from interp_vlm.models.pictures import read_picture
from interp_vlm.study.monitor_stream import _object
from interp_vlm.study.settings import Settings
from tests.corpus.images import colours, encoded, turned
from tests.fuzz.cases import cases, one_line

NAMES = ("t.jsonl", "t.json", "t.csv", "t.tsv", "t.parquet", "t.csv.gz", "t.jsonl.gz")
COLUMNS = ("image", "question", "answer", "answers", "id", "kind", "group", "text", "label", "question_id", "more")

texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["ok.png", "other.png", "absent.png", "..", "yes", "no", "nan", "", " ", "1", '["a"]', "[", "\ud800"]
    ),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
good = st.fixed_dictionaries(
    {"image": st.just("ok.png"), "question": st.just("is there a cat?"), "answer": st.sampled_from(["yes", "no"])}
)
changes = st.dictionaries(st.sampled_from(COLUMNS), st.one_of(texts, values), max_size=3)
rows = st.lists(st.builds(lambda whole, changed: {**whole, **changed}, good, changes), max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("fuzz")
    colours().save(place / "ok.png")
    colours(9, 7).save(place / "other.png")
    return place


def damaged(draw: Any, whole: bytes) -> bytes:
    """A file with a few bytes changed, some put in or taken out, or its end cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["change", "insert", "remove", "cut"])):
            case "change" if content:
                content[place] = draw(st.integers(0, 255))
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=4))
            case "remove":
                del content[place : place + draw(st.integers(1, 8))]
            case "cut":
                del content[place:]
    return bytes(content)


def examples_or_error(path: Path, on_error: str) -> None:
    """Both readers of tables; every example that comes out is whole."""
    for read in (iv.data.files, pope):
        with one_line(DataError):
            found = read(path, on_error=on_error)
            assert isinstance(found, Examples)
            assert len(found) > 0
            assert len({example.id for example in found}) == len(found)
            for example in found:
                assert example.question
                assert example.answer
                assert all(example.answers)
                assert min(example.image.size) > 0


@cases(0.12)
@given(st.binary(max_size=200), st.sampled_from(NAMES))
def test_any_bytes(folder, content, name):
    (folder / name).write_bytes(content)
    examples_or_error(folder / name, "raise")


@cases(0.16)
@given(rows, st.sampled_from(["t.jsonl", "t.json", "t.csv", "t.jsonl.gz"]), st.data())
def test_tables_that_are_nearly_right(folder, rows, name, data):
    if name == "t.csv":
        head = list(dict.fromkeys(column for row in rows for column in row))
        quoted = [[f'"{row[column]}"' if column in row else "" for column in head] for row in rows]
        text = "\n".join(",".join(cells) for cells in [head, *quoted])
    elif name == "t.json":
        text = json.dumps(rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    whole = text.encode(errors="surrogatepass")
    if name.endswith(".gz"):
        whole = gzip.compress(whole)
    (folder / name).write_bytes(damaged(data.draw, whole))
    examples_or_error(folder / name, data.draw(st.sampled_from(["raise", "skip"])))


@cases(0.08)
@given(rows, st.data())
def test_parquet_that_is_nearly_right(folder, rows, data):
    buffer = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
        return  # a list of mixed values is no Arrow column
    path = folder / "t.parquet"
    path.write_bytes(damaged(data.draw, buffer.getvalue()))
    examples_or_error(path, "skip")


PICTURES = [
    *(encoded(colours(), form) for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA")),
    encoded(colours().convert("P"), "PNG", transparency=1),
    encoded(colours().convert("CMYK"), "JPEG"),
    turned(),
]


@cases(0.12)
@given(st.sampled_from(PICTURES), st.data())
def test_pictures_that_are_nearly_right(folder, whole, data):
    path = folder / "x.png"
    path.write_bytes(damaged(data.draw, whole))
    image_fault(path)
    with one_line(DataError):
        found = read_picture(path)
        assert found.mode == "RGB"
        assert len(found.tobytes()) == 3 * found.width * found.height


@cases(0.06)
@given(st.sampled_from(["file:", "pope:", "digits", "", "coco:"]), st.text(max_size=40), st.booleans())
def test_any_name_of_data(folder, scheme, rest, asked):
    spec = scheme + rest + ("?images=" + rest if asked else "")
    with one_line(DataError):
        assert isinstance(iv.data.load(spec, limit=1), Examples)


@cases(0.06)
@given(st.text(max_size=40), st.sampled_from(["", "/", "~", "./", "testbed:", "hub:", "a/"]))
def test_any_name_of_a_model(name, before):
    with one_line(ModelError):
        assert isinstance(resolve(before + name), str)


settings_fields = st.dictionaries(
    st.sampled_from([*Settings.__dataclass_fields__, "more"]), st.one_of(values, st.just(["a"])), max_size=4
)


@cases(0.05)
@given(st.one_of(settings_fields.map(lambda found: json.dumps({"models": ["a"], **found})), st.text(max_size=30)))
def test_any_settings(text):
    with one_line(StudyError):
        assert isinstance(Settings.from_json(text), Settings)


@cases(0.05)
@given(st.one_of(st.binary(max_size=60), values.map(lambda value: json.dumps(value).encode())), st.integers(1, 9))
def test_any_line_to_score(line, number):
    with one_line(DataError):
        row = _object(line, number)
        for column in row.fields:
            assert isinstance(row.text(column), str)
