"""`interp-vlm compare`, end to end on two models: one that was trained, and one that knows nothing."""

from __future__ import annotations

import json
import re
import sys

import pandas as pd
import pytest

from interp_vlm.cli import main
from interp_vlm.study.compare import side_by_side
from interp_vlm.study.tables import where


def _run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["interp-vlm", "compare", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


def test_compare(monkeypatch, capsys, tmp_path, random_model):
    folder = tmp_path / "run"
    words = ["testbed:llava", random_model, "--limit", "24", "--out", folder, "--workers", "1"]
    code, out, _ = _run(monkeypatch, capsys, *words)
    assert code == 0
    assert out.strip().endswith(str(folder / "report.html"))
    # only what the comparison needs was run
    assert {file.stem for file in (folder / "tables").glob("*.parquet")} - {"claims"} == {
        "accuracy",
        "neurons",
        "bypass",
    }
    assert json.loads((folder / "settings.json").read_text())["claims"][0] == "A14"
    assert (folder / "figures" / "neurons-curves.png").is_file()
    lines = {line.strip().split("  ")[0]: re.split(r"\s{2,}", line.strip())[1:] for line in out.splitlines() if line}
    tables = {name: pd.read_parquet(folder / "tables" / f"{name}.parquet") for name in ("accuracy", "neurons")}
    whole = where(tables["accuracy"], condition="standard", kind="all", quantity="accuracy", model="llava")
    assert lines["accuracy (%)"][0].startswith(f"{whole['value'].iloc[0]:.1f}")
    # the untrained model is never right: no probe, and no word about it
    assert lines["verdict on top 5"][1] == "not measured"
    assert lines["verdict on top 5"][0] in ("robust", "fragile", "not resolved")
    wanted = {"set": "top", "size": "50 %", "fill": "mean", "at": "depth", "quantity": "change of accuracy"}
    value = where(tables["neurons"], model="llava", **wanted)["value"].iloc[0]
    assert lines["top 50 %"][0].replace("−", "-").startswith(f"{value:.1f}")


def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path):
    for words, named in (
        (["testbed:gpt", "--workers", "1", "--out", tmp_path / "a"], "'gpt'"),
        (["testbed:llava", "testbed:llava", "--out", tmp_path / "b"], "named twice"),
        (["testbed:llava", "--resume"], "--out"),
        (["testbed:llava", "--workers", "0"], "workers is 0"),
    ):
        code, out, err = _run(monkeypatch, capsys, *words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert named in err


def test_a_table_without_neurons_says_so():
    """Data with too few pictures have no examples set aside."""
    table = side_by_side({}, ["a", "b"])
    names, *cells = (list(column.cells) for column in table.columns)
    for name, *found in zip(names, *cells, strict=True):
        assert set(found) == {"not measured" if str(name).startswith("verdict") else "–"}
