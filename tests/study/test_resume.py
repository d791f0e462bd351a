"""A study killed at any moment goes on where it was and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from interp_vlm.study.runner import run_study
from interp_vlm.study.settings import Settings

SETTINGS = Settings(models=("testbed:llava",), limit=18, seed=3)
MAIN = "from interp_vlm.cli import main; main()"
EXPERIMENTS = len(SETTINGS.experiments)


def _command(folder: Path, workers: int, resume: bool) -> list[str]:
    options = ["--model", "testbed:llava", "--limit", "18", "--seed", "3", "--out", str(folder)]
    return [sys.executable, "-c", MAIN, "study", *options, "--workers", str(workers), *(["--resume"] if resume else [])]


def _parts(folder: Path) -> dict[str, int]:
    """The finished parts and when they were written."""
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.glob("parts/*/*/*.parquet")}


def _kill(folder: Path, workers: int, resume: bool, until, after: float) -> list[int]:
    """Start a study, kill it `after` seconds after `until` is seen, and give the ids of its workers."""
    with subprocess.Popen(
        _command(folder, workers, resume), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while not until() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(after)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers_left = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()
    return workers_left


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quiet) -> Path:
    """The same study without any interruption, in this process."""
    folder = tmp_path_factory.mktemp("whole")
    run_study(SETTINGS, folder, workers=1, console=quiet)
    return folder


def test_killed_and_resumed_it_ends_with_the_same_bytes(whole, tmp_path):
    chance = random.Random(5)
    folder = tmp_path / "run"
    # in the middle of the parts, twice, with worker processes; then as soon as results are being written, without
    workers = _kill(folder, 2, False, lambda: len(_parts(folder)) >= 1, chance.uniform(0, 0.4))
    first = _parts(folder)
    assert 1 <= len(first) < EXPERIMENTS + 1
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the study that started them"
        time.sleep(0.05)
    first = _parts(folder)
    _kill(folder, 1, True, lambda: len(_parts(folder)) > len(first), chance.uniform(0, 0.4))
    second = _parts(folder)
    _kill(folder, 1, True, lambda: (folder / "tables").exists(), chance.uniform(0, 0.4))
    third = _parts(folder)
    subprocess.run(_command(folder, 1, True), check=True, capture_output=True)

    for before, after in ((first, second), (second, third), (third, _parts(folder))):
        assert before.items() <= after.items(), "a finished part was done again or lost"
    expected = {path.relative_to(whole).as_posix(): path.read_bytes() for path in whole.glob("tables/*")}
    expected |= {path.relative_to(whole).as_posix(): path.read_bytes() for path in whole.glob("examples/*")}
    assert len(expected) == 3 * EXPERIMENTS + 2  # and the claims, as two files
    for name, content in expected.items():
        assert (folder / name).read_bytes() == content, name
    assert (folder / "report.html").read_bytes() == (whole / "report.html").read_bytes()
    assert not list(folder.rglob("*.tmp"))


def test_a_finished_study_resumed_does_nothing_again(whole, quiet):
    before, report = _parts(whole), (whole / "report.html").read_bytes()
    assert run_study(SETTINGS, whole, resume=True, workers=1, console=quiet) == whole / "report.html"
    assert _parts(whole) == before
    assert (whole / "report.html").read_bytes() == report
