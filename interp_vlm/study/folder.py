"""The run folder: what a study leaves on disk, written so that a kill at any moment loses nothing that was finished."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from interp_vlm.errors import StudyError
from interp_vlm.study.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RunFolder", "free_folder", "parquet", "versions", "write_bytes", "write_frame"]

_PACKAGES = (
    *("interp-vlm", "torch", "transformers", "nnsight", "numpy", "scipy", "scikit-learn", "pandas", "pyarrow"),
    *("matplotlib", "pillow"),
)


@dataclass(frozen=True)
class RunFolder:
    """One study's folder.

    `settings.json` what was asked, `environment.json` with which versions, examples and weights,
    `parts/EXPERIMENT/MODEL/SHARD.parquet` the unit of work, `examples/`, `tables/`, `figures/` and `report.html` the
    results.
    """

    path: Path

    def part(self, experiment: str, model: str, shard: int) -> Path:
        """Where one shard's rows go."""
        return self.path / "parts" / experiment / model / f"{shard:04d}.parquet"

    @contextmanager
    def opened(self, settings: Settings, resume: bool) -> Iterator[None]:
        """Hold the folder for one study, new or resumed; nothing is written yet.

        Args:
            settings: what this study asks.
            resume: go on with a study that was stopped.

        Raises:
            StudyError: the folder is no folder, is in use, is not empty (without `resume`), or holds a study of other
                settings.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise StudyError(
                f"another study is running in {self.path}", remedy="wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise StudyError(
                f"cannot use the folder {self.path} ({_why(error)})", remedy="choose another --out"
            ) from error
        try:
            self._check(settings, resume)
            yield
        finally:
            lock.release()

    def begin(self, settings: Settings, facts: Mapping[str, str]) -> None:
        """Write what the study is, or check that the study in the folder is the same.

        Args:
            settings: what this study asks.
            facts: whatever else must not change before a study is resumed: fingerprints of examples and weights.

        Raises:
            StudyError: other versions, examples or weights than the study was started with.
        """
        now = {**versions(), **facts}
        file = self.path / "environment.json"
        if self._saved_settings is not None and file.is_file():
            before = _environment(file)
            changed = [
                f"{name} was {before.get(name)} and is {value}"
                for name, value in now.items()
                if before.get(name) != value
            ]
            if changed:
                raise _differently(self.path, changed)
            for left in self.path.rglob("*.tmp"):
                left.unlink(missing_ok=True)
        else:
            # The settings come last: a folder with settings holds a study.
            write_bytes(file, (json.dumps(now, indent=1) + "\n").encode())
            write_bytes(self.path / "settings.json", settings.as_json().encode())

    @property
    def _saved_settings(self) -> Settings | None:
        file = self.path / "settings.json"
        # bytes that are no UTF-8 stay visible, and are no JSON
        return Settings.from_json(file.read_text("utf-8", errors="backslashreplace")) if file.is_file() else None

    def _check(self, settings: Settings, resume: bool) -> None:
        found = sorted(entry.name for entry in self.path.iterdir() if entry.name != ".lock" and entry.suffix != ".tmp")
        if found and not resume:
            raise StudyError(
                f"the folder {self.path} is not empty (it holds {found[0]})",
                remedy="choose another --out, or pass --resume to go on with the study in it",
            )
        saved = self._saved_settings
        if saved is None and set(found) - {"environment.json"}:
            raise StudyError(
                f"the folder {self.path} holds no study (no settings.json, but {found[0]})",
                remedy="choose another --out",
            )
        if saved is not None and (changed := saved.differences(settings)):
            raise _differently(self.path, changed)


def versions() -> dict[str, str]:
    """The installed versions of everything that decides a study's numbers."""
    return {name: version(name) for name in _PACKAGES}


def free_folder(parent: Path) -> Path:
    """The first `study-N` in a folder that does not exist yet."""
    taken = {entry.name for entry in parent.iterdir()} if parent.is_dir() else set()
    return next(parent / f"study-{n}" for n in range(1, len(taken) + 2) if f"study-{n}" not in taken)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        StudyError: when the disk refuses.
    """
    if not path.name:
        raise StudyError(f"{path} is no file name", remedy="choose another --out")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StudyError(f"cannot write {path} ({_why(error)})", remedy="make room or choose another --out") from error


def parquet(frame: pd.DataFrame) -> bytes:
    """A table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as Parquet, whole or not at all."""
    write_bytes(path, parquet(frame))


def _environment(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise StudyError(f"{file} cannot be read ({error})", remedy="choose another --out") from error


def _differently(path: Path, changed: list[str]) -> StudyError:
    return StudyError(
        f"the study in {path} was started differently: {'; '.join(changed)}",
        remedy="resume it as it was started, or choose another --out",
    )


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__
