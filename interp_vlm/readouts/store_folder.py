"""A store's folder: begun by the first process that comes, joined by those that do the same, finished once.

`store.json` says what the store is to hold, `shards/` holds it, and `index.parquet` comes last: a store with an index
is finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from interp_vlm.errors import DataError
from interp_vlm.readouts.identity import ModelIdentity
from interp_vlm.readouts.shards import finished, held, read_indices, replace_whole

__all__ = ["alone", "begin", "finish", "saved_settings", "shard_count"]

FORMAT = 1
DECIDING = ("interp-vlm", "torch", "transformers", "pillow")  # packages whose versions show in the values


@contextmanager
def alone(path: Path, patience: float) -> Iterator[None]:
    """What only one process at a time may do: begin the store, and finish it.

    Raises:
        DataError: when another process took longer than `patience`, in seconds.
    """
    with held(path / ".lock", patience) as mine:
        if not mine:
            raise DataError(
                f"another process has been beginning or finishing the store {path} for {patience:g} s",
                remedy="end that process if it hangs, or wait longer (patience=)",
            )
        yield


def begin(path: Path, settings: dict[str, Any], size: int | None, fitting: Callable[[], int]) -> int:
    """Make a new folder a store, or make sure that the store in it is the same; the number of examples per shard.

    Args:
        path: the folder.
        settings: what the store is to hold, and how it is made.
        size: examples per shard, if the caller minds.
        fitting: gives that number where nobody minds.

    Raises:
        ModelError: the folder holds a store of another model.
        DataError: the folder holds something else, or a store that was begun differently.
    """
    known, versions = saved_settings(path), {name: version(name) for name in DECIDING}
    if known is None:
        others = sorted(entry.name for entry in path.iterdir() if entry.name != ".lock" and entry.suffix != ".tmp")
        if others:
            raise DataError(f"the folder {path} holds {others[0]} and no store", remedy="choose another folder")
        if size is not None and size < 1:
            raise DataError(f"shard_examples={size}", expected="at least 1")
        known = {"format": FORMAT, **settings, "shard_examples": size or fitting(), **versions}
        text = json.dumps(known, indent=1) + "\n"
        replace_whole(path / "store.json", lambda file: file.write_text(text, encoding="utf-8"))
    ModelIdentity.from_json(known["model"]).refuse(ModelIdentity(**settings["model"]), f"the store {path}")
    asked = settings if size is None else {**settings, "shard_examples": size}
    if not all(finished(path / "shards", number) for number in range(shard_count(known))):
        asked = {**asked, **versions}
    changed = [
        f"{name} was {known.get(name)} and is {value}" for name, value in asked.items() if known.get(name) != value
    ]
    if changed:
        raise DataError(
            f"the store {path} was begun differently: {'; '.join(changed)}",
            remedy="write it as it was begun, or choose another folder",
        )
    return known["shard_examples"]


def finish(path: Path, shards: int) -> None:
    """Write the index of a store whose shards are all there, if it is missing; clear away locks and what kills left."""
    import pandas as pd

    if not (path / "index.parquet").is_file():
        index = pd.concat(read_indices(path / "shards", shards), ignore_index=True)
        right = (index["score"] >= 0.5).astype("boolean").mask(index["score"].isna())
        index.insert(list(index.columns).index("score") + 1, "correct", right)
        replace_whole(path / "index.parquet", lambda file: index.to_parquet(file, index=False))
    for left in (*path.rglob("*.tmp"), *path.glob("shards/*.lock")):
        left.unlink(missing_ok=True)


def shard_count(settings: Mapping[str, Any]) -> int:
    """How many shards the store is to have."""
    return -(-settings["examples"] // settings["shard_examples"])


def saved_settings(path: Path) -> dict[str, Any] | None:
    """What the store in a folder is to hold; None where there is no store.

    Raises:
        DataError: when the file is damaged, or of another version of this library.
    """
    file = path / "store.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error})", expected="the file that iv.store.write made") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        other = found.get("format") if isinstance(found, dict) else None
        raise DataError(f"{file} has the format {other}", expected=f"{FORMAT}", remedy="write the store again")
    return found
