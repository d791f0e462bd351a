"""`interp-vlm monitor fit | score | evaluate` on real files and real models."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import interp_vlm as iv
from interp_vlm.cli import main
from interp_vlm.study.monitor_stream import score_lines
from interp_vlm.study.monitoring import measure, set_aside

ROOT = Path(__file__).parent.parent
FIT = ["monitor", "fit", "--model", "testbed:llava", "--layers", "2,3"]


def _run(words):
    """Exit status of the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["interp-vlm", *map(str, words)])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
    return stop.value.code


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A table with pictures on disk: 240 hard questions about 40 scenes."""
    folder = tmp_path_factory.mktemp("data")
    pictures, rows = {}, []
    for example in iv.data.load("digits?difficulty=hard", limit=240, seed=7):
        name = pictures.setdefault(example.group, f"{len(pictures)}.png")
        if not (folder / name).exists():
            example.image.save(folder / name)
        row = {"id": example.id, "image": name, "question": example.question, "answer": example.answer}
        rows.append({**row, "kind": example.kind})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    """The folder of a monitor that the command fitted."""
    out = tmp_path_factory.mktemp("fitted") / "monitor"
    words = [*FIT, "--data", f"file:{data}/questions.jsonl", "--out", out, "--recall", 0.8, "--held-out", 0.3]
    assert _run(words) == 0
    return out


@pytest.fixture(scope="module")
def vlm():
    return iv.load("testbed:llava")


def test_fit_saves_a_monitor_and_its_report(fitted, data):
    monitor = iv.ReliabilityMonitor.load(fitted)
    assert monitor.layer in (2, 3)
    assert monitor.model.name == "testbed:llava"
    assert (monitor.n, monitor.pictures) == (168, 28)  # 12 of 40 pictures chose the threshold
    assert monitor.threshold.n == 12
    assert monitor.threshold.wanted == 0.8
    assert "not fitted on" in monitor.threshold.assumes
    assert "digit" in monitor.kinds
    layers = pd.read_csv(fitted / "report" / "layers.csv")
    assert list(layers["layer"]) == [2, 3]
    assert "output confidence" in set(pd.read_csv(fitted / "report" / "signals.csv")["signal"])
    assert (fitted / "report" / "layers.png").stat().st_size > 1000
    pictures = (fitted / "report" / "pictures.txt").read_text().split()
    assert sorted(pictures) == sorted(path.name for path in data.glob("*.png"))


def test_a_threshold_out_of_reach_is_said_and_the_monitor_kept(data, tmp_path, capsys):
    words = [*FIT, "--data", f"file:{data}/questions.jsonl", "--out", tmp_path / "m", "--precision", 0.99]
    assert _run(words) == 2
    said = capsys.readouterr().err
    assert "saved without a threshold: no threshold promises a precision of 0.99" in said
    assert said.count("\n") == 1
    assert iv.ReliabilityMonitor.load(tmp_path / "m").threshold is None


def test_score_gives_a_line_for_each_line(fitted, data, tmp_path, vlm):
    questions, out = tmp_path / "questions.jsonl", tmp_path / "scored.jsonl"
    lines = (data / "questions.jsonl").read_text().splitlines()[:40]
    questions.write_text("\n".join(lines))
    words = ["monitor", "score", "--monitor", fitted, "--in", questions, "--images", data, "--out", out]
    assert _run(words) == 0
    asked = [json.loads(line) for line in lines]
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in scored] == [line["id"] for line in asked]
    assert [line["line"] for line in scored] == list(range(1, 41))
    monitor = iv.ReliabilityMonitor.load(fitted)
    for number in (0, 17, 39):
        found = monitor.score(vlm, data / asked[number]["image"], asked[number]["question"])[0]
        assert scored[number]["answer"] == str(found.answer)
        assert scored[number]["score"] == pytest.approx(found.score, abs=1e-6)
        assert scored[number]["confidence"] == pytest.approx(found.confidence, abs=1e-6)
        assert scored[number]["reliable"] is found.reliable


BAD = {
    "blank": (b"\n", "line 2 is blank"),
    "not json": (b"{image: 1}\n", "line 2 is not JSON"),
    "cut": (b'{"image": "0.png", "ques\n', "line 2 is not JSON"),
    "not utf-8": (b'{"image": "\xff.png", "question": "what ?"}\n', "line 2 is not JSON"),
    "deep": (b"[" * 200_000 + b"\n", "line 2 is not JSON"),
    "list": (b"[1, 2]\n", "line 2 is a list"),
    "no picture": (b'{"question": "what ?"}\n', "line 2 has no 'image'"),
    "no question": (b'{"image": "0.png"}\n', "line 2 has no 'question'"),
    "null": (b'{"image": "0.png", "question": null}\n', "question is missing"),
    "number": (b'{"image": 1.5, "question": "what ?"}\n', "image is 1.5"),
    "missing": (b'{"image": "absent.png", "question": "what ?"}\n', "absent.png"),
    "no image": (b'{"image": "questions.jsonl", "question": "what ?"}\n', "questions.jsonl"),
    "folder": (b'{"image": ".", "question": "what ?"}\n', "cannot be read"),
    "null byte": (b'{"image": "a\\u0000b", "question": "what ?"}\n', "cannot be read"),
    "placeholder": (b'{"image": "0.png", "question": "what <image> ?"}\n', ""),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_line_takes_its_own_place_only(fault, fitted, data, vlm):
    line, said = BAD[fault]
    good = (data / "questions.jsonl").read_bytes().splitlines(keepends=True)[:2]
    monitor = iv.ReliabilityMonitor.load(fitted)
    lines = [json.loads(out) for out in score_lines(monitor, vlm, [good[0], line, good[1]], data)]
    assert [out["line"] for out in lines] == [1, 2, 3]
    assert "score" in lines[0]
    assert "score" in lines[2]
    assert set(lines[1]) == {"line", "error"}
    assert said in lines[1]["error"]
    with pytest.raises(iv.InterpVLMError, match="line 2"):
        list(score_lines(monitor, vlm, [good[0], line, good[1]], data, on_error="raise"))


def test_ids_come_back_as_they_went_in(fitted, data, vlm):
    monitor = iv.ReliabilityMonitor.load(fitted)
    for name in ('"\\ud800"', "7", "null", '{"a": [1]}', '"é"'):
        line = b'{"id": ' + name.encode() + b', "image": "0.png", "question": "is there a 7 ?"}'
        (out,) = score_lines(monitor, vlm, [b"\xef\xbb\xbf" + line], data)
        assert json.loads(out)["id"] == json.loads(name)


def test_lines_are_read_as_they_are_needed(fitted, data, vlm):
    """An endless stream: nothing is read ahead."""
    line, read = (data / "questions.jsonl").read_bytes().splitlines()[0], []

    def endless():
        while True:
            read.append(1)
            yield line

    stream = score_lines(iv.ReliabilityMonitor.load(fitted), vlm, endless(), data)
    for number in range(1, 6):
        next(stream)
        assert len(read) == number


def _started(*words, **options):
    code = "from interp_vlm.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], env=environment, **options)


def test_a_pipe_answers_line_by_line_and_a_kill_leaves_whole_lines(fitted, data, tmp_path):
    """Standard input and output while both stay open; then a file, killed in the middle."""
    line = (data / "questions.jsonl").read_bytes().splitlines(keepends=True)[0]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = ["monitor", "score", "--monitor", fitted, "--in", "-", "--images", data]
    with _started(*words, **pipes) as process:
        for number in (1, 2):  # an answer comes before the next question is asked
            process.stdin.write(line)
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["line"] == number
        process.stdout.close()  # the reader leaves: no traceback
        process.stdin.write(line)
        process.stdin.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""

    many, out = tmp_path / "many.jsonl", tmp_path / "out.jsonl"
    many.write_bytes(line * 20_000)
    with _started(*words[:5], many, *words[6:], "--out", out, **pipes) as process:
        limit = time.monotonic() + 60
        while (not out.exists() or out.stat().st_size < 5000) and time.monotonic() < limit:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    written = out.read_bytes()
    assert written.endswith(b"\n")
    assert [json.loads(each)["line"] for each in written.splitlines()] == list(range(1, written.count(b"\n") + 1))
    assert 10 < written.count(b"\n") < 20_000


def test_evaluate_leaves_known_pictures_out_and_names_the_baseline(fitted, tmp_path, capsys):
    out = tmp_path / "table.csv"
    words = ["monitor", "evaluate", "--monitor", fitted, "--data", "digits?difficulty=hard", "--limit", 120]
    assert _run([*words, "--out", out]) == 0
    said = capsys.readouterr().out
    table = pd.read_csv(out, keep_default_na=False, na_values=[""])
    for signal_, quantity in (
        ("monitor", "AUROC"), ("confidence", "AUROC"), ("monitor", "Brier score"),
        ("monitor", "area under risk-coverage"), ("monitor", "precision at the threshold, one question a picture"),
        ("confidence", "precision at the same coverage"), ("monitor", "AUROC minus that of confidence"),
    ):  # fmt: skip
        row = table[(table["signal"] == signal_) & (table["quantity"] == quantity)]
        assert len(row) == 1
        assert quantity in said
    assert "left out" not in said
    assert set(table.loc[table["quantity"] == "risk", "coverage"]) >= {0.1, 1.0}


def test_a_monitor_is_not_measured_on_what_it_was_fitted_on(fitted, data, capsys):
    words = ["monitor", "evaluate", "--monitor", fitted, "--data", f"file:{data}/questions.jsonl"]
    assert _run(words) == 2
    assert "fitted on all pictures" in capsys.readouterr().err


def test_the_numbers_of_an_evaluation():
    import numpy as np
    from scipy.stats import binomtest
    from sklearn.metrics import brier_score_loss, roc_auc_score

    rng = np.random.default_rng(0)
    scores, confidence = rng.random(300), rng.random(300)
    right = rng.random(300) < scores
    groups = [f"picture {number}" for number in range(300)]
    table = measure(scores, confidence, right, groups, 0.7).set_index(["signal", "quantity"])["value"]
    assert table["monitor", "AUROC"] == pytest.approx(roc_auc_score(right, scores))
    assert table["confidence", "AUROC"] == pytest.approx(roc_auc_score(right, confidence))
    assert table["monitor", "Brier score"] == pytest.approx(brier_score_loss(right, scores))
    reliable = scores >= 0.7
    assert table["monitor", "share called reliable"] == pytest.approx(100 * reliable.mean())
    assert table["monitor", "precision at the threshold"] == pytest.approx(100 * right[reliable].mean())
    assert table["monitor", "right answers called reliable"] == pytest.approx(100 * reliable[right].mean())
    assert table["monitor", "wrong answers not called reliable"] == pytest.approx(100 * (~reliable)[~right].mean())
    surest = np.argsort(-confidence)[: reliable.sum()]
    assert table["confidence", "precision at the same coverage"] == pytest.approx(100 * right[surest].mean())
    whole = measure(scores, confidence, right, groups, 0.7)
    exact = whole[whole["quantity"] == "precision at the threshold, one question a picture"].iloc[0]
    limits = binomtest(int(right[reliable].sum()), int(reliable.sum())).proportion_ci(method="exact")
    assert (exact["low"], exact["high"]) == pytest.approx((100 * limits.low, 100 * limits.high))
    nothing = measure(scores, confidence, right, groups, 2.0)
    empty = nothing[nothing["quantity"].str.startswith("precision at the threshold, one")].iloc[0]
    assert np.isnan(empty["value"])
    assert empty["note"] == "nothing is called reliable"
    assert not measure(scores, confidence, right, groups)["quantity"].str.contains("threshold").any()


def test_pictures_are_set_aside_whole():
    groups = [f"p{number // 3}" for number in range(60)]
    aside = set_aside(groups, 0.25, seed=1)
    assert aside.sum() == 15
    assert len({group for group, held in zip(groups, aside, strict=True) if held}) == 5
    assert (set_aside(groups, 0.25, seed=1) == aside).all()
    assert not set_aside(groups, 0.0, seed=1).any()
    with pytest.raises(iv.DataError, match="cannot be parted"):
        set_aside(["a", "a"], 0.3, seed=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["score", "--in", "QUESTIONS", "--monitor", "absent"], "holds no monitor"),
        (["score", "--in", "absent.jsonl", "--monitor", "FITTED"], "absent.jsonl is no file"),
        (["score", "--in", "QUESTIONS", "--out", "QUESTIONS", "--monitor", "FITTED"], "is the file of --in"),
        (["score", "--in", "QUESTIONS", "--images", "absent", "--monitor", "FITTED"], "image folder absent"),
        (["score", "--in", "QUESTIONS", "--on-error", "stop", "--monitor", "FITTED"], "--on-error stop"),
        (["score", "--in", "QUESTIONS", "--out", "absent/out.jsonl", "--monitor", "FITTED"], "cannot write"),
        (["score", "--in", "QUESTIONS", "--model", "testbed:paligemma", "--monitor", "FITTED"], "testbed:paligemma"),
        (["evaluate", "--data", "digits", "--out", "table.doc", "--monitor", "FITTED"], ".csv, .json or .parquet"),
        (["evaluate", "--data", "coco:val", "--monitor", "FITTED"], "names no data source"),
        (["fit", "--model", "testbed:llava", "--data", "digits", "--out", "m", "--layers", "two"], "--layers two"),
        (["fit", "--model", "testbed:llava", "--data", "digits", "--out", "m", "--limit", "12", "--layers", "9"], "9"),
        (
            [
                "fit",
                "--model",
                "testbed:llava",
                "--data",
                "digits",
                "--out",
                "m",
                "--recall",
                ".9",
                "--precision",
                ".9",
            ],
            "both --precision and --recall",
        ),
    ],
)
def test_bad_input_is_one_line(words, said, fitted, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"QUESTIONS": data / "questions.jsonl", "FITTED": fitted}
    before = (data / "questions.jsonl").read_bytes()
    assert _run(["monitor", *(places.get(word, word) for word in words)]) == 2
    out = capsys.readouterr()
    lines = [line for line in out.err.splitlines() if line.strip()]
    assert len(lines) == 1, out.err
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert out.out == ""
    assert (data / "questions.jsonl").read_bytes() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["fit", "score", "evaluate"])
def test_help_has_an_example(command, capsys):
    assert _run(["monitor", command, "--help"]) == 0
    assert f"interp-vlm monitor {command} --" in capsys.readouterr().out
