"""Shards: files of activations that are written whole or not at all, and read one layer at a time.

A shard is `NUMBER.safetensors`, with one tensor (row, ...) per site and layer and the rows' positions, and
`NUMBER.parquet`, the index of its examples. The index is written last: a shard with an index is finished.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from interp_vlm.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Block", "finished", "read_indices", "read_rows", "replace_whole", "write_shard"]

POSITIONS = "positions"


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


def finished(folder: Path, number: int) -> bool:
    """Whether a shard is there, whole."""
    return _index(folder, number).is_file() and _values(folder, number).is_file()


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
    folder.mkdir(parents=True, exist_ok=True)
    replace_whole(_values(folder, number), lambda path: save_file(tensors, path))
    replace_whole(_index(folder, number), lambda path: pd.DataFrame(rows).to_parquet(path, index=False))


def read_rows(
    folder: Path, number: int, key: tuple[str, int] | None, spans: Sequence[tuple[int, int]] | None
) -> Shaped[Tensor, "row ..."]:
    """Rows of one site and layer of a shard; nothing else of the file is read.

    Args:
        folder: of the shards.
        number: of the shard.
        key: site and layer; None for the positions.
        spans: ranges [start, end) of rows, laid end to end; None for all rows.

    Raises:
        DataError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path, name = _values(folder, number), POSITIONS if key is None else _key(*key)
    try:
        with safe_open(path, framework="pt") as file:
            if spans is None:
                return file.get_tensor(name)
            rows = file.get_slice(name)
            return torch.cat([rows[start:end] for start, end in spans])
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the shard {path} cannot be read ({error})",
            expected="the file that the store's index names",
            remedy="delete the shard's .parquet and write the store again with the same arguments",
        ) from error


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: under another name first, then renamed.

    Raises:
        DataError: when the disk refuses.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        why = error.strerror or type(error).__name__
        raise DataError(f"cannot write {path} ({why})", remedy="make room or choose another folder") from error


def read_indices(folder: Path, count: int) -> list[pd.DataFrame]:
    """The indices of the first `count` shards."""
    import pandas as pd

    return [pd.read_parquet(_index(folder, number)) for number in range(count)]


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


def _index(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.parquet"
