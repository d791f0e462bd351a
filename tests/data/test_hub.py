"""Hugging Face data sets from disk, with the columns of lmms-lab/POPE; the hub itself is out of reach here."""

import io

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from interp_vlm.data import hub
from interp_vlm.errors import DataError
from tests.data.conftest import picture, write_lines


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def rows(n: int = 12) -> list[dict]:
    """As lmms-lab/POPE: question_id repeats between categories, id does not."""
    return [
        {
            "id": str(i),
            "question_id": str(i % 6 + 1),
            "question": f"Is there a thing {i} in the image?",
            "answer": ("yes", "no")[i % 2],
            "image_source": f"COCO_val2014_{i // 3}",
            "image": picture(i // 3),
            "category": ("adversarial", "popular")[i // 6 % 2],
        }
        for i in range(n)
    ]


def dataset(items: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(items).cast_column("image", datasets.Image())


def check(examples):
    assert [example.id for example in examples] == [str(i) for i in range(12)]
    assert [example.answer for example in examples] == ["yes", "no"] * 6
    assert len({example.group for example in examples}) == 4
    assert {example.kind for example in examples} == {"existence"}
    assert examples[0].meta == {"question_id": "1", "image_source": "COCO_val2014_0", "category": "adversarial"}
    for i in (0, 5, 11):
        assert np.array_equal(examples[i].image, picture(i // 3))


def test_saved_folder(tmp_path):
    dataset(rows()).save_to_disk(tmp_path / "saved")
    check(hub(tmp_path / "saved"))
    check(hub(str(tmp_path / "saved")))
    assert len(hub(tmp_path / "saved", limit=5)) == 5


def test_saved_folder_with_splits(tmp_path):
    both = datasets.DatasetDict({"train": dataset(rows(3)), "test": dataset(rows())})
    both.save_to_disk(tmp_path / "saved")
    check(hub(tmp_path / "saved"))
    assert len(hub(tmp_path / "saved", split="train")) == 3
    with pytest.raises(DataError, match="no split 'dev'; expected one of train, test"):
        hub(tmp_path / "saved", split="dev")
    datasets.DatasetDict({"a": dataset(rows(3)), "b": dataset(rows(3))}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="several splits; expected one of a, b"):
        hub(tmp_path / "two")


def test_parquet_with_and_without_the_librarys_own_schema(tmp_path):
    dataset(rows()).to_parquet(tmp_path / "own.parquet")
    check(hub(tmp_path / "own.parquet"))
    plain = []
    for row in rows():
        buffer = io.BytesIO()
        row["image"].save(buffer, "PNG")
        plain.append(row | {"image": {"bytes": buffer.getvalue(), "path": None}})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "plain.parquet")
    check(hub(tmp_path / "plain.parquet"))


def test_folder_of_parquet_splits(tmp_path):
    folder = tmp_path / "repo" / "data"
    folder.mkdir(parents=True)
    dataset(rows()).to_parquet(folder / "test-00000-of-00001.parquet")
    dataset(rows(3)).to_parquet(folder / "train-00000-of-00001.parquet")
    check(hub(tmp_path / "repo"))
    assert len(hub(tmp_path / "repo", split="train")) == 3


def test_image_folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    table = []
    for row in rows():
        name = f"{row['id']}.png"
        row["image"].save(folder / name)
        table.append({key: value for key, value in row.items() if key != "image"} | {"file_name": name})
    write_lines(folder / "metadata.jsonl", table)
    check(hub(folder))


def test_without_ids_or_identity_rows_are_numbered_and_pictures_told_apart_by_their_bytes(tmp_path):
    bare = [{key: row[key] for key in ("image", "question", "answer")} for row in rows()]
    dataset(bare).save_to_disk(tmp_path / "saved")
    examples = hub(tmp_path / "saved")
    assert [example.id for example in examples] == [str(i) for i in range(1, 13)]
    assert len({example.group for example in examples}) == 4
    assert {example.kind for example in examples} == {"question"}


def test_votes_of_vqa(tmp_path):
    items = [
        row | {"answers": [{"answer": "yes", "answer_id": 1}, {"answer": "no", "answer_id": 2}]} for row in rows(3)
    ]
    dataset(items).save_to_disk(tmp_path / "saved")
    assert hub(tmp_path / "saved")[0].answers == ("yes", "no")


def test_broken_pictures_are_listed_or_skipped(tmp_path):
    items = rows(6)
    good = io.BytesIO()
    picture(0).save(good, "PNG")
    stored = [good.getvalue(), good.getvalue()[:50], b"", b"no picture", good.getvalue(), good.getvalue()]
    items = [
        row | {"image": {"bytes": data, "path": f"{i}.png"}}
        for i, (row, data) in enumerate(zip(items, stored, strict=True))
    ]
    dataset(items).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"3 of 4 pictures .*1\.png \(.*2\.png \(no bytes\), 3\.png \(not a picture\)"):
        hub(tmp_path / "saved")
    examples = hub(tmp_path / "saved", on_error="skip")
    assert [example.id for example in examples] == ["0", "4", "5"]
    assert [skipped.path for skipped in examples.skipped] == ["1.png", "2.png", "3.png"]


def test_pictures_that_stay_files_in_their_folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("here.png", "gone.png"):
        picture(7).save(folder / name)
    table = [{"file_name": name, "question": "q", "answer": "yes"} for name in ("here.png", "gone.png")]
    write_lines(folder / "metadata.jsonl", table)
    (folder / "gone.png").write_bytes(b"")
    examples = hub(folder, on_error="skip")
    assert np.array_equal(examples[0].image, picture(7))
    assert examples.skipped[0].reason == "empty file"
    assert examples.skipped[0].path.endswith("gone.png")


def test_malformed_data_sets(tmp_path):
    def saved(items, name):
        datasets.Dataset.from_list(items).save_to_disk(tmp_path / name)
        return tmp_path / name

    plain = [{key: value for key, value in row.items() if key != "image"} for row in rows(4)]
    with pytest.raises(DataError, match=r"no column 'image' .it has id, question_id, question.*expected the columns"):
        hub(saved(plain, "no image"))
    with pytest.raises(DataError, match=r"column 'image' of .* expected pictures"):
        hub(saved([row | {"image": 3.5} for row in plain], "number"))
    with pytest.raises(DataError, match=r"row 3: answer is missing \(None\)"):
        hub(saved([row | {"image": "x", "answer": None if i == 2 else "yes"} for i, row in enumerate(plain)], "null"))
    with pytest.raises(DataError, match="row 2 repeats the id '0'"):
        hub(saved([row | {"image": "x", "id": "0"} for row in plain], "twice"))
    empty = datasets.Dataset.from_dict({"image": [], "question": [], "answer": []})
    empty.cast_column("image", datasets.Image()).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"holds no rows|cannot be loaded"):
        hub(tmp_path / "empty.parquet")


def test_what_cannot_be_loaded_is_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"\./nowhere does not exist"):
        hub("./nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        hub(tmp_path / "void")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"unknown format; expected a name ending in \.parquet"):
        hub(tmp_path / "notes.txt")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be loaded"):
        hub(tmp_path / "broken.parquet")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as error:
        hub("lmms-lab/POPE")
    assert "lmms-lab/POPE cannot be loaded (ConnectionError" in str(error.value)
    assert "save_to_disk" in str(error.value)
    assert "\n" not in str(error.value)
