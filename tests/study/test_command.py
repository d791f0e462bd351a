"""The command line: one clear line for bad input, and the path of the report at the end."""

import json
import sys

import pytest

from interp_vlm.cli import main
from interp_vlm.study.folder import RunFolder
from interp_vlm.study.settings import Settings


def _run(monkeypatch, capsys, *words):
    """Exit status, standard output and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["interp-vlm", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


@pytest.fixture
def used(tmp_path):
    folder = tmp_path / "used"
    settings = Settings(models=("testbed:llava",), limit=12)
    with RunFolder(folder).opened(settings, False):
        RunFolder(folder).begin(settings, {})
    return folder


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--model", "testbed:gpt"], "'gpt'"),
        (["--model", "no/such-model-anywhere"], "no/such-model-anywhere"),
        (["--model", "testbed:llava", "--model", "testbed:llava"], "named twice"),
        (["--data", "coco:val"], "coco:val"),
        (["--data", "pope:missing.json"], "missing.json"),
        (["--data", "file:missing.csv"], "missing.csv"),
        (["--limit", "0"], "limit is 0"),
        (["--workers", "0"], "workers is 0"),
        (["--batch-size", "-1"], "batch_size is -1"),
        (["--seed", "-1"], "seed is -1"),
        (["--claims", "A99"], "no claim 'A99'"),
        (["--claims", "all,A1"], "claims are 'all,A1'"),
        (["--claims", "missing.toml"], "missing.toml cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(monkeypatch, capsys, tmp_path, words, named):
    monkeypatch.chdir(tmp_path)
    if "--workers" not in words:
        words = [*words, "--workers", "1"]
    code, out, err = _run(monkeypatch, capsys, "study", *words, "--out", tmp_path / "run")
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert named in lines[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_folder_in_use_needs_resume_and_the_same_settings(monkeypatch, capsys, used):
    words = ["study", "--model", "testbed:llava", "--out", used, "--workers", "1"]
    code, _, err = _run(monkeypatch, capsys, *words, "--limit", "12")
    assert (code, err.count("\n")) == (2, 1)
    assert "--resume" in err
    code, _, err = _run(monkeypatch, capsys, *words, "--limit", "13", "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "limit was 12 and is 13" in err
    code, _, err = _run(monkeypatch, capsys, *words, "--limit", "12", "--claims", "A1,A9", "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "claims was all and is A1, A9" in err
    code, _, err = _run(monkeypatch, capsys, "study", "--resume")
    assert code == 2
    assert "--out" in err


def test_an_option_of_the_wrong_type(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    code, _, err = _run(monkeypatch, capsys, "study", "--limit", "many")
    assert code == 2
    assert "Traceback" not in err
    assert "--limit" in err
    assert "integer" in err


def test_help_has_an_example(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = _run(monkeypatch, capsys, "study", "--help")
    assert code == 0
    assert "interp-vlm study --model testbed:llava --limit 60 --out runs/first" in out


def test_a_study_ends_with_the_path_of_its_report(monkeypatch, capsys, tmp_path, random_model):
    monkeypatch.chdir(tmp_path)
    code, out, _ = _run(monkeypatch, capsys, "study", "--model", random_model, "--limit", "2", "--workers", "1")
    assert code == 0
    report = tmp_path / "runs" / "study-1" / "report.html"
    assert out.strip().endswith(str(report))
    assert report.is_file()
    settings = json.loads((tmp_path / "runs/study-1/settings.json").read_text())
    assert (settings["limit"], settings["models"]) == (2, [random_model])
