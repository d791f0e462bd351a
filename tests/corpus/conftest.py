"""What the corpus' tests share: a small model on disk and in memory, the command line, and a watch on a folder."""

from __future__ import annotations

import hashlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import interp_vlm as iv
from interp_vlm.cli import main
from tests.corpus.row import Bad
from tests.tiny import build

SECONDS = 60
"""Longer than anything here takes on a busy machine: what takes longer hangs."""


class Hangs(BaseException):
    """Not an `Exception`, so that no handler of the library takes it for its own."""


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hangs(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random LLaVA."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    for part in build("llava"):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vlm() -> iv.VLM:
    return iv.VLM(*build("llava"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """command(*words): exit status, standard output and standard error of `interp-vlm` in this process."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["interp-vlm", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err  # type: ignore[return-value]

    return run


@pytest.fixture
def untouched() -> Callable[[Path], object]:
    """`with untouched(folder):` nothing in it is made, changed or removed, but for empty folders and their lock."""

    @contextmanager
    def watch(folder: Path) -> Iterator[None]:
        before = content(folder)
        yield
        assert content(folder) == before

    return watch


def content(folder: Path) -> dict[str, str]:
    """Every file, link and pipe in a folder, by what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file() and path.name != ".lock":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not path.is_dir() and path.name != ".lock":
            found[name] = "pipe"
    return found


def one_line(code: int, out: str, err: str) -> str:
    """The line of a command that refused its input."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2, (code, err)
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    assert "Traceback" not in err + out
    return lines[0]


def refused(bad: Bad, call: Callable[[], object]) -> None:
    """The call ends with the row's error: its type, one line of readable length, and what was found in it."""
    with pytest.raises(bad.raises) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is bad.raises
    assert re.search(bad.says, message), message
    assert message.isprintable()
    assert len(message) < 5000
    assert caught.value.expected or caught.value.remedy, message
