"""Shards: files of activations that are written whole or not at all, and read one layer at a time.

A shard is `NUMBER.safetensors`, with one tensor (row, ...) per site and layer and the rows' positions, and
`NUMBER.parquet`, the index of its examples. The index is written last: a shard with an index is finished.

Any number of processes may fill a folder. Whoever writes a shard holds `NUMBER.lock`, which the system frees when the
process ends, however it ends: what a killed process held is done by another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from interp_vlm.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Block",
    "fill",
    "finished",
    "held",
    "read_indices",
    "read_rows",
    "read_table",
    "replace_whole",
    "write_shard",
]

POSITIONS = "positions"
POLL = 0.1  # seconds between looks at the shards that others hold


@dataclass(frozen=True, eq=False)
class Block:
    """Activations of a few examples, and what the index says of them.

    Attributes:
        values: per site (batch, layer, pos, ...).
        layers: per site, the numbers of the layer axis.
        positions: (batch, pos) positions in the rows without padding.
        mask: (batch, pos) False for padding.
        rows: one entry per example, column to value.
    """

    values: Mapping[str, Shaped[Tensor, "batch _ _ ..."]]
    layers: Mapping[str, Sequence[int]]
    positions: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    rows: Sequence[Mapping[str, Any]]

    def alone(self) -> list[Block]:
        """Each example by itself, in the memory of the CPU."""
        values = {site: found.cpu() for site, found in self.values.items()}
        positions, mask = self.positions.cpu(), self.mask.cpu()
        ones = [slice(number, number + 1) for number in range(len(self.rows))]
        return [
            Block({site: found[one] for site, found in values.items()}, self.layers, positions[one], mask[one], [row])
            for one, row in zip(ones, self.rows, strict=True)
        ]


def finished(folder: Path, number: int) -> bool:
    """Whether a shard is there, whole."""
    return _index(folder, number).is_file() and _values(folder, number).is_file()


@contextmanager
def held(lock: Path, patience: float = 0.0) -> Iterator[bool]:
    """Hold a lock file, which the system frees when this process ends; says whether it was free in time (seconds).

    Raises:
        DataError: when the disk refuses.
    """
    from filelock import FileLock, Timeout

    own = FileLock(lock)
    try:
        own.acquire(timeout=patience)
    except Timeout:
        pass
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise DataError(
            f"cannot lock {lock} ({why})", remedy="make room, or choose a folder on a disk that knows file locks"
        ) from error
    try:
        yield own.is_locked
    finally:
        own.release()


def fill(
    folder: Path, count: int, write: Callable[[int], object], patience: float, done: Callable[[int], object]
) -> None:
    """Write the shards that are missing, beside any other processes that do so; end when all are there.

    Args:
        folder: of the shards.
        count: how many there are to be.
        write: writes one, by its number.
        patience: seconds to wait for what other processes hold while no shard is finished.
        done: called once for each shard that is there, whoever wrote it.

    Raises:
        DataError: another process holds a shard for too long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left, since = list(range(count)), time.monotonic()
    while left:
        for number in left.copy():
            if not finished(folder, number):
                with held(_lock(folder, number)) as mine:
                    if mine and not finished(folder, number):  # not by its last holder either
                        write(number)
            if finished(folder, number):
                left.remove(number)
                done(number)
                since = time.monotonic()
        if left and time.monotonic() - since > patience:
            raise DataError(
                f"another process holds the shard {_values(folder, left[0])}, and for {patience:g} s none was finished",
                expected="all shards in the end",
                remedy="end that process if it hangs, or wait longer (patience=); what is finished stays",
            )
        if left:
            time.sleep(POLL)


def write_shard(folder: Path, number: int, blocks: Iterable[Block], dtype: torch.dtype) -> None:
    """Write the blocks' activations and index as one shard.

    Raises:
        DataError: a number that the dtype cannot hold.
    """
    import pandas as pd
    from safetensors.torch import save_file

    kept: dict[str, list[Tensor]] = {}
    rows: list[dict[str, Any]] = []
    filled = 0
    for block in blocks:
        for site, values in block.values.items():
            for column, layer in enumerate(block.layers[site]):
                key = _key(site, layer)
                kept.setdefault(key, []).append(_narrowed(values[:, column][block.mask], dtype, key))
        kept.setdefault(POSITIONS, []).append(block.positions[block.mask].to("cpu", torch.int32))
        for row, count in zip(block.rows, block.mask.sum(dim=1).tolist(), strict=True):
            rows.append({**row, "shard": number, "row": filled, "positions": count})
            filled += count
    tensors: dict[str, Tensor] = {}
    for key in list(kept):
        tensors[key] = torch.cat(kept.pop(key)).contiguous()
    replace_whole(_values(folder, number), lambda path: save_file(tensors, path))
    replace_whole(_index(folder, number), lambda path: pd.DataFrame(rows).to_parquet(path, index=False))


def read_rows(
    folder: Path, number: int, key: tuple[str, int] | None, spans: Sequence[Sequence[int]]
) -> Shaped[Tensor, "row ..."]:
    """Rows of one site and layer of a shard; nothing else of the file is read.

    Args:
        folder: of the shards.
        number: of the shard.
        key: site and layer; None for the positions.
        spans: ranges [start, end) of rows, laid end to end.

    Raises:
        DataError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path, name = _values(folder, number), POSITIONS if key is None else _key(*key)
    try:
        with safe_open(path, framework="pt") as file:
            rows = file.get_slice(name)
            return torch.cat([rows[start:end] for start, end in _joined(spans)])
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the shard {path} cannot be read ({error})",
            expected="the file that the store's index names",
            remedy="delete the shard's .parquet and write the store again with the same arguments",
        ) from error


def _joined(spans: Sequence[Sequence[int]]) -> list[list[int]]:
    """Spans that follow one another as one, which is read at once."""
    joined: list[list[int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return joined


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: under another name first, then renamed.

    Raises:
        DataError: when the disk refuses.
    """
    # processes of several machines may write here: their numbers are no names
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        why = error.strerror or type(error).__name__
        raise DataError(f"cannot write {path} ({why})", remedy="make room or choose another folder") from error


def read_indices(folder: Path, count: int) -> list[pd.DataFrame]:
    """The indices of the first `count` shards."""
    return [read_table(_index(folder, number)) for number in range(count)]


def read_table(path: Path) -> pd.DataFrame:
    """A Parquet file of a store.

    Raises:
        DataError: when it is damaged.
    """
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        why = str(error).splitlines()[0]
        raise DataError(
            f"{path} cannot be read ({why})",
            expected="a table that iv.store.write made",
            remedy="delete it and write the store again with the same arguments",
        ) from error


def _narrowed(values: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    found = values.detach().to("cpu", dtype)
    if bool((found.isinf() & values.isfinite().cpu()).any()):
        largest = float(values.abs().max())
        raise DataError(
            f"{key} reaches {largest:.4g}, more than {dtype} holds".replace("torch.", ""),
            expected=f"at most {torch.finfo(dtype).max:.4g}",
            remedy="write the store with dtype='bfloat16' or 'float32'",
        )
    return found


def _key(site: str, layer: int) -> str:
    return f"{site}/{layer}"


def _values(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _lock(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.lock"


def _index(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"
