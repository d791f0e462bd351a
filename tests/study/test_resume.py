"""A study killed at any moment goes on where it was and ends with the same bytes."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from interp_vlm.study.runner import run_study
from interp_vlm.study.settings import Settings

SETTINGS = Settings(models=("testbed:llava",), limit=18, seed=3)
MAIN = "from interp_vlm.cli import main; main()"
EXPERIMENTS = len(SETTINGS.experiments)
KILLS = 10


def _command(folder: Path, workers: int, resume: bool) -> list[str]:
    options = ["--model", "testbed:llava", "--limit", "18", "--seed", "3", "--out", str(folder)]
    return [sys.executable, "-c", MAIN, "study", *options, "--workers", str(workers), *(["--resume"] if resume else [])]


def _parts(folder: Path) -> dict[str, int]:
    """The finished parts and when they were written."""
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.glob("parts/*/*/*.parquet")}


def _further(folder: Path, done: int) -> bool:
    """Whether a part more than these is finished, or all of them."""
    return len(_parts(folder)) > done or (folder / "tables").exists()


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


def test_killed_at_ten_moments_and_resumed_it_ends_with_the_same_bytes(whole, tmp_path):
    chance = random.Random(5)
    folder = tmp_path / "run"
    known: list[dict[str, int]] = [{}]
    for number in range(KILLS):
        # after a further part, or in the middle of the next one; the last times while tables or the report are written
        late, done = number >= KILLS - 2, len(known[-1])
        until = (folder / "tables").exists if late else partial(_further, folder, done)
        workers = _kill(folder, 1 + number % 2, number > 0, until, chance.uniform(0, 0.4))
        deadline = time.monotonic() + 20
        while any(_alive(pid) for pid in workers):
            assert time.monotonic() < deadline, "workers outlive the study that started them"
            time.sleep(0.05)
        known.append(_parts(folder))
    assert 1 <= len(known[1]) < EXPERIMENTS
    subprocess.run(_command(folder, 1, True), check=True, capture_output=True)

    for before, after in itertools.pairwise([*known, _parts(folder)]):
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
