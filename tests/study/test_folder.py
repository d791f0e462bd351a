"""The run folder: refused when in use, started differently or holding something else; written whole or not at all."""

import json
import pickle

import pytest

from interp_vlm.errors import DataError, StudyError
from interp_vlm.study.folder import RunFolder, free_folder, write_bytes
from interp_vlm.study.settings import Settings
from interp_vlm.study.work import joined

SETTINGS = Settings(models=("a",))
FACTS = {"examples": "1", "a": "2"}


def _start(path, settings=SETTINGS, facts=FACTS, resume=False):
    folder = RunFolder(path)
    with folder.opened(settings, resume):
        folder.begin(settings, facts)
    return folder


def test_a_new_folder_holds_settings_and_environment(tmp_path):
    _start(tmp_path / "new" / "deep")
    saved = Settings.from_json((tmp_path / "new/deep/settings.json").read_text())
    assert saved == SETTINGS
    environment = json.loads((tmp_path / "new/deep/environment.json").read_text())
    assert environment["examples"] == "1"
    assert {"torch", "transformers", "nnsight", "interp-vlm"} <= set(environment)


def test_a_folder_that_is_not_empty_needs_resume(tmp_path):
    _start(tmp_path)
    with pytest.raises(StudyError, match=r"is not empty \(it holds environment.json\)"):
        _start(tmp_path)
    _start(tmp_path, resume=True)


def test_resume_with_something_else_names_what_differs(tmp_path):
    _start(tmp_path)
    with pytest.raises(StudyError, match="seed was 0 and is 5"):
        _start(tmp_path, Settings(models=("a",), seed=5), resume=True)
    with pytest.raises(StudyError, match="examples was 1 and is 9"):
        _start(tmp_path, facts={**FACTS, "examples": "9"}, resume=True)
    old = json.loads((tmp_path / "environment.json").read_text())
    (tmp_path / "environment.json").write_text(json.dumps({**old, "torch": "1.0"}))
    with pytest.raises(StudyError, match=r"torch was 1\.0 and is"):
        _start(tmp_path, resume=True)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(StudyError, match=r"thesis\.tex"):
            _start(tmp_path, resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot use the folder"):
        _start(tmp_path / "file")


def test_a_study_stopped_before_its_settings_were_written_can_be_resumed(tmp_path):
    (tmp_path / "environment.json").write_text("{}")
    _start(tmp_path, resume=True)
    assert (tmp_path / "settings.json").is_file()


def test_two_studies_cannot_share_a_folder(tmp_path):
    with RunFolder(tmp_path).opened(SETTINGS, False), pytest.raises(StudyError, match="another study is running"):
        _start(tmp_path)
    _start(tmp_path)


def test_leftovers_of_a_kill_are_swept_away(tmp_path):
    folder = _start(tmp_path)
    left = folder.part("masking", "a", 3).with_name("0003.parquet.77.tmp")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    _start(tmp_path, resume=True)
    assert not left.exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    write_bytes(path, b"old")
    (tmp_path / "blocked").write_text("a file where a folder should be")
    with pytest.raises(StudyError, match="cannot write"):
        write_bytes(tmp_path / "blocked" / "table.csv", b"new")
    assert path.read_bytes() == b"old"


def test_the_next_free_folder(tmp_path):
    assert free_folder(tmp_path / "runs") == tmp_path / "runs" / "study-1"
    for name in ("study-1", "study-3", "notes"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert free_folder(tmp_path / "runs") == tmp_path / "runs" / "study-2"


@pytest.mark.parametrize("text", ["", "[1, 2]", "not JSON"])
def test_a_spoilt_environment_is_a_clear_error(tmp_path, text):
    _start(tmp_path)
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(StudyError, match=r"environment\.json cannot be read"):
        _start(tmp_path, resume=True)


def test_a_spoilt_part_is_named(tmp_path):
    part = RunFolder(tmp_path).part("masking", "a", 0)
    write_bytes(part, b"not Parquet")
    with pytest.raises(StudyError, match=r"0000\.parquet cannot be read"):
        joined([part])


def test_errors_reach_the_caller_from_a_worker_process():
    error = DataError("3 pictures", expected="4", remedy="add one")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "3 pictures; expected 4; add one"
