"""Disks that refuse, are full, are killed in the middle or used twice: one line, and nothing half written.

The tests hold for root too, whom no file mode stops: a file stands where a folder should be, nobody can make files in
/proc, /dev/full has no room, and a limit on the size of files stands for a full disk.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import interp_vlm as iv
from interp_vlm.errors import DataError, StudyError
from interp_vlm.study.folder import write_bytes
from interp_vlm.study.settings import Settings
from tests.corpus.conftest import content, one_line
from tests.corpus.images import colours

ROOT = Path(__file__).parents[2]
QUESTION = "is there a cat?"
CLAIM = """
id = "own"
statement = "Answers are right."
question = "How often?"
source = "ours"
data = "any"
models = "any"
parameters = "none"
table = "accuracy"
[[parts]]
pick = { quantity = "accuracy", kind = "all", category = "" }
region = [50, 100]
unit = "%"
reason = "more often than not"
"""


@contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """No file can grow beyond `room` bytes; writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def blocked(folder: Path) -> Path:
    (folder / "file").write_text("a file where a folder should be")
    return folder / "file"


OUTS = {
    "a-file-where-a-folder-should-be": (lambda folder: blocked(folder) / "out", "(Not a directory|File exists)"),
    "where-nobody-can-write": (lambda _: Path("/proc/nowhere/out"), "No such file or directory"),
    "endless-name": (lambda folder: folder / ("x" * 300), "File name too long"),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    """Two pictures and two questions about each."""
    folder = tmp_path_factory.mktemp("table")
    rows = []
    for number in range(4):
        colours(40, 30 + number).save(folder / f"{number // 2}.png")
        row = {"image": f"{number // 2}.png", "question": ["a cat?", "a dog?"][number % 2], "answer": "yes"}
        rows.append(json.dumps(row) + "\n")
    (folder / "t.jsonl").write_text("".join(rows))
    (folder / "own.toml").write_text(CLAIM)
    return str(folder / "t.jsonl")


@pytest.fixture
def study(model, table):
    """The words of a study of one experiment."""
    claims = Path(table).with_name("own.toml")
    return ["study", "--model", model, "--data", f"file:{table}", "--claims", claims, "--workers", "1"]


@pytest.fixture
def inspect(model, table):
    return ["inspect", model, "--image", Path(table).with_name("0.png"), "--question", QUESTION]


@pytest.mark.parametrize("place", OUTS)
@pytest.mark.parametrize("door", ["study", "inspect", "monitor fit", "testbed train"])
def test_a_place_that_cannot_be_written_is_one_line(place, door, study, inspect, tmp_path, command, untouched):
    make, says = OUTS[place]
    out = make(tmp_path)
    fit = ["monitor", "fit", "--model", "testbed:llava", "--data", "digits", "--limit", "24", "--layers", "2"]
    words = {
        "study": [*study, "--out", out],
        "inspect": [*inspect, "--out", out.with_name(out.name + ".png")],
        "monitor fit": [*fit, "--out", out],
        "testbed train": ["testbed", "train", "llava", "--out", out],
    }[door]
    with untouched(tmp_path):
        assert re.search(says, one_line(*command(*words)))


@pytest.mark.parametrize("room", [0, 3000])
@pytest.mark.parametrize("door", ["study", "inspect"])
def test_a_full_disk_is_one_line_and_nothing_is_half_written(door, room, study, inspect, tmp_path, command):
    out = tmp_path / "out"
    words = [*study, "--out", out] if door == "study" else [*inspect, "--out", out / "grid.png"]
    with full_disk(room):
        found = command(*words)
    assert re.search(r"cannot (write|use).*\(File too large\).*make room|File too large", one_line(*found))
    for path in out.rglob("*") if out.exists() else ():
        assert not path.name.endswith(".tmp")
        if path.is_file() and path.name != ".lock":
            assert 0 < path.stat().st_size <= room
            assert path.suffix != ".json" or json.loads(path.read_text())
    if door == "study":  # with room again, the study goes on
        code, said, _ = command(*words, *(["--resume"] if content(out) else []))
        assert (code, said.startswith("report: ")) == (0, True)


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    path = tmp_path / "table.csv"
    write_bytes(path, b"old")
    with full_disk(100), pytest.raises(StudyError, match=r"table\.csv \(File too large\)"):
        write_bytes(path, b"new" * 1000)
    assert content(tmp_path) == {"table.csv": content(tmp_path)["table.csv"]}
    assert path.read_bytes() == b"old"


def test_activations_that_do_not_fit_are_an_error_and_are_written_later(tmp_path, vlm):
    examples = iv.data.digit_scenes(n=4)
    with full_disk(2000), pytest.raises(DataError, match=r"cannot write .* \((File too large|.*)\)"):
        iv.store.write(tmp_path / "store", vlm, examples, "resid_post")
    assert not [name for name in content(tmp_path) if name.endswith(".tmp")]
    assert len(iv.store.write(tmp_path / "store", vlm, examples, "resid_post").layer("resid_post", 0)) == 4


@pytest.mark.parametrize("place", OUTS)
def test_activations_without_a_place_are_one_line(place, tmp_path, vlm):
    out = OUTS[place][0](tmp_path)
    with pytest.raises(DataError, match=OUTS[place][1]) as caught:
        iv.store.write(out, vlm, iv.data.digit_scenes(n=2), "resid_post")
    assert str(caught.value).isprintable()


WRITER = """
import sys
from pathlib import Path
from interp_vlm.study.folder import write_bytes
for number in range(10_000):
    write_bytes(Path(sys.argv[1]), bytes([number % 256]) * 20_000_000)
"""


def test_a_writer_killed_in_the_middle_leaves_a_whole_file(tmp_path):
    """SIGKILL, which nothing can catch, while the next content is being written."""
    path = tmp_path / "whole"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT) as process:
        deadline = time.monotonic() + 50
        # wait for a file that is half written beside a whole one
        while not (path.exists() and any(0 < size < 20_000_000 for size in sizes(tmp_path, ".tmp"))):
            assert time.monotonic() < deadline
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    found = path.read_bytes()
    assert len(found) == 20_000_000
    assert found == found[:1] * 20_000_000


def sizes(folder: Path, ending: str) -> list[int]:
    found = []
    for path in folder.iterdir():
        try:
            found += [path.stat().st_size] if path.name.endswith(ending) else []
        except FileNotFoundError:
            continue  # renamed meanwhile
    return found


HOLDER = """
import sys
from pathlib import Path
from interp_vlm.study.folder import RunFolder
from interp_vlm.study.settings import Settings
with RunFolder(Path(sys.argv[1])).opened(Settings(models=("a",)), False):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_studies_in_one_folder(study, tmp_path, command, untouched):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with untouched(tmp_path):
            assert "another study is running" in one_line(*command(*study, "--out", tmp_path / "run"))
        process.stdin.close()
    assert command(*study, "--out", tmp_path / "run")[0] == 0  # the other one has left


@pytest.fixture(scope="module")
def finished(model, table, tmp_path_factory) -> Path:
    """A finished study of one experiment."""
    from rich.console import Console

    from interp_vlm.study.runner import run_study

    folder = tmp_path_factory.mktemp("finished") / "run"
    claims = (str(Path(table).with_name("own.toml")),)
    settings = Settings(models=(str(model),), data=f"file:{table}", claims=claims)
    run_study(settings, folder, workers=1, console=Console(quiet=True))
    return folder


SPOILT = {
    "corrupted-shard": ("parts/*/*/0000.parquet", b"PAR1 no rows", r"0000\.parquet cannot be read .*delete it"),
    "empty-shard": ("parts/*/*/0000.parquet", b"", r"0000\.parquet cannot be read"),
    "settings-cut": ("settings.json", b'{"models": ["a"', r"settings\.json cannot be read"),
    "settings-of-another-study": ("settings.json", b'{"models": ["a"], "seed": 5}', r"was started differently: models"),
    "settings-of-an-unknown-field": (
        "settings.json",
        b'{"models": ["a"], "wind": 5}',
        r"settings\.json cannot be read",
    ),
    "settings-of-wrong-types": ("settings.json", b'{"models": 5}', r"settings\.json cannot be read"),
    "settings-no-text": ("settings.json", b"\xff\xfe\xfa", r"settings\.json cannot be read"),
    "settings-deep": ("settings.json", b"[" * 200_000, r"settings\.json cannot be read"),
    "environment-cut": ("environment.json", b'{"torch": ', r"environment\.json cannot be read"),
    "environment-of-other-versions": ("environment.json", b'{"torch": "1.0"}', r"torch was 1\.0 and is"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_run_folder_is_one_line(what, finished, study, tmp_path, command, untouched):
    pattern, spoilt, says = SPOILT[what]
    shutil.copytree(finished, tmp_path / "run")
    next((tmp_path / "run").glob(pattern)).write_bytes(spoilt)
    with untouched(tmp_path):
        assert re.search(says, one_line(*command(*study, "--out", tmp_path / "run", "--resume")))


def test_a_lost_shard_is_measured_again(finished, study, tmp_path, command):
    shutil.copytree(finished, tmp_path / "run")
    part = next((tmp_path / "run").glob("parts/*/*/0000.parquet"))
    before = part.read_bytes()
    part.unlink()
    assert command(*study, "--out", tmp_path / "run", "--resume")[0] == 0
    assert part.read_bytes() == before
    assert (tmp_path / "run" / "report.html").read_bytes() == (finished / "report.html").read_bytes()


def test_standard_output_without_room_is_one_line():
    words = [sys.executable, "-c", "from interp_vlm.cli import main; main()", "study", "--help"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert "No space left on device" in one_line(done.returncode, "", done.stderr)
