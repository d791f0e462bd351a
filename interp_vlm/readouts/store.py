"""Captured activations of whole data sets on disk: safetensors shards read by layer, and a Parquet index.

store = iv.store.write("runs/pope", vlm, examples, ["resid_post"])      # in as many processes as you like
store = iv.store.open("runs/pope")
hidden, right = store.layer("resid_post", 12), store.index["correct"]   # (example, pos, d), per example
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from interp_vlm.data.example import Example
from interp_vlm.data.scorers import vqa
from interp_vlm.engine.batches import batches
from interp_vlm.engine.place import layers_of
from interp_vlm.errors import DataError, InterventionError
from interp_vlm.readouts.identity import ModelIdentity, identity_of
from interp_vlm.readouts.lens import output_confidence
from interp_vlm.readouts.shards import Block, fill, finished, read_rows, read_table, write_shard
from interp_vlm.readouts.store_folder import alone, begin, finish, saved_settings, shard_count
from interp_vlm.sites import SITES
from interp_vlm.sites import site as site_named
from interp_vlm.tokens import select

if TYPE_CHECKING:
    import pandas as pd

    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["Store", "open", "write"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES, SHARD_EXAMPLES = 2**26, 256
PLACE = ("shard", "row", "positions")  # columns that say where an example's rows are
# `attn_mask` and `pattern` grow with the square of the prompt, the vision tower's rows belong to no position.
KEPT = tuple(name for name, row in SITES.items() if row.axes[0] == "pos" or row.part == "projector")


@dataclass(frozen=True, eq=False)
class Store:
    """Activations of a data set, read from disk when asked for.

    Attributes:
        folder: where it lies.
        index: one row per example: id, group, kind, question, expected, answer (the model's), score, correct (score of
            at least 0.5; missing where the rule has no score), confidence (largest probability), shard, row, positions.
        model: which model wrote it.
        sites: the layers kept of each site.
        selection: the positions kept, as a selector reads.
        dtype: of the values on disk.
    """

    folder: Path
    index: pd.DataFrame
    model: ModelIdentity
    sites: Mapping[str, tuple[int, ...]]
    selection: str
    dtype: str

    def __len__(self) -> int:
        return len(self.index)

    @property
    def mask(self) -> Bool[Tensor, "example pos"]:
        """(example, pos) False where an example has fewer positions than the longest."""
        counts = torch.tensor(self.index["positions"].to_numpy())
        return torch.arange(int(counts.max()))[None] < counts[:, None]

    def positions(self, examples: Any = None) -> Int[Tensor, "example pos"]:
        """Positions in the rows without padding, -1 where `mask` is False."""
        return self._read(None, examples, None, fill=-1).long()

    def layer(
        self, site: str, layer: int, examples: Any = None, position: int | None = None
    ) -> Shaped[Tensor, "example ..."]:
        """One site at one layer, (example, pos, ...), zeros where `mask` is False; nothing else is read from disk.

        Args:
            site: a site that was kept.
            layer: a layer that was kept, by its number in the model.
            examples: rows of the index (numbers, a slice or a boolean mask); all of them by default.
            position: one of the positions kept of each example, by its place among them (negative ones count from the
                example's last); then (example, ...).

        Raises:
            InterventionError: a site or layer that was not kept.
            DataError: an example or a position that does not exist, or a damaged file.
        """
        if site not in self.sites:
            raise InterventionError(f"the store holds no {site!r}", expected=f"one of {', '.join(self.sites)}")
        kept = self.sites[site]
        if layer not in kept:
            raise InterventionError(
                f"the store holds no layer {layer} of {site!r}",
                expected=f"one of {', '.join(map(str, kept))}",
                remedy="write a store with that layer",
            )
        values = self._read((site, layer), examples, position, fill=0)
        return values if position is None else values[:, 0]

    def check(self, vlm: VLM) -> None:
        """Raise a ModelError unless this very model wrote the store."""
        self.model.refuse(identity_of(vlm), f"the store {self.folder}")

    def _read(self, key: tuple[str, int] | None, examples: Any, position: int | None, fill: float) -> Tensor:
        chosen = self._rows(examples).numpy()
        shards, starts, counts = (torch.tensor(self.index[name].to_numpy()[chosen]) for name in PLACE)
        longest = int(self.index["positions"].max())
        if position is not None:
            fewest = int(counts.min())
            if not -fewest <= position < fewest:
                raise DataError(
                    f"position {position}, an example of the store holds {fewest} positions",
                    expected=f"{-fewest} to {fewest - 1}",
                )
            starts, counts, longest = starts + position + (counts if position < 0 else 0), torch.ones_like(counts), 1
        mask = torch.arange(longest)[None] < counts[:, None]
        out: Tensor | None = None
        for number in shards.unique().tolist():
            here = shards == number
            spans = torch.stack([starts[here], starts[here] + counts[here]], dim=1).tolist()
            values = read_rows(self.folder / "shards", number, key, spans)
            if out is None:
                out = torch.full((*mask.shape, *values.shape[1:]), fill, dtype=values.dtype)
            out[mask & here[:, None]] = values
        assert out is not None
        return out

    def _rows(self, examples: Any) -> Int[Tensor, " chosen"]:
        everything = torch.arange(len(self))
        try:
            chosen = everything if examples is None else everything[examples].reshape(-1)
        except (IndexError, TypeError) as error:
            raise DataError(f"examples {examples!r} of a store of {len(self)}: {error}", expected="its rows") from error
        if not len(chosen):
            raise DataError(f"no example of {len(self)} was chosen", expected="at least one")
        return chosen

    def __repr__(self) -> str:
        sites = ", ".join(f"{name} x {len(layers)} layers" for name, layers in self.sites.items())
        return f"Store({len(self)} examples of {self.model.name}: {sites} at {self.selection}, {self.dtype})"


def write(
    folder: str | Path,
    vlm: VLM,
    examples: Sequence[Example],
    sites: Sequence[str] | str,
    positions: Any = "last",
    layers: Any = "all",
    *,
    dtype: str = "float16",
    batch_size: int = 16,
    shard_examples: int | None = None,
    scorer: Callable[[str, Example], float] = vqa,
    choices: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
    patience: float = 3600.0,
) -> Store:
    """Capture activations of a data set into a folder, alone or beside any other processes that call this too.

    Every process takes the next shard that nobody holds, and returns the finished store when all shards are there. What
    a killed process held is done by another, or by the next call. Each shard is written whole or not at all, and one
    that is there stays as it is. One shard at a time is in memory.

    Args:
        folder: where the store goes; a new or empty folder, or this very store, unfinished or finished. Processes on
            several machines need it on a disk in common.
        vlm: the model.
        examples: questions with their answers.
        sites: names of the site table whose values belong to positions.
        positions: a role, a selector or positions.
        layers: an int, a range, a list or "all".
        dtype: on disk, "float16", "bfloat16" or "float32".
        batch_size: examples in one forward pass; with the same one everywhere (and the same kind of device and number
            of threads), the files are the same bytes whoever writes them.
        shard_examples: examples in one file; by default as many as make 64 MiB, at most 256.
        scorer: score of an answer, from 0 to 1 (`interp_vlm.data.scorers` has more).
        choices: closed answers, as for `vlm.run`.
        progress: called with the number of examples done, here or by another process.
        patience: seconds to wait for shards that other processes hold while none of them is finished.

    Raises:
        ModelError: the folder holds a store of another model.
        DataError: the folder holds something else, another selection, or an unfinished store of other versions of
            torch, transformers or this library; an example's id is not unique; a number is too large for the dtype;
            or another process held a shard for too long.
        InterventionError: a site without positions, or a layer that does not exist.

    Example:
        >>> import interp_vlm as iv, tempfile
        >>> vlm, examples = iv.load("testbed:llava"), iv.data.digit_scenes(n=3)
        >>> store = iv.store.write(tempfile.mkdtemp(), vlm, examples, "resid_post", layers=[1, 3])
        >>> store.layer("resid_post", 3).shape
        torch.Size([3, 1, 128])
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    _refuse(names, dtype, examples)
    kept = {name: layers_of(site_named(name), layers, vlm.anatomy) for name in names}
    path, capture = Path(folder), _Capture(vlm, examples, names, positions, layers, scorer, choices)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {path} ({error.strerror})", remedy="choose another") from error
    settings = {
        "model": asdict(identity_of(vlm)),
        "sites": {name: list(found) for name, found in kept.items()},
        "positions": repr(select.of(positions)),
        "dtype": dtype,
        "precision": str(vlm.dtype).removeprefix("torch."),
        "examples": len(examples),
        "fingerprint": _fingerprint(examples),
        "scorer": getattr(scorer, "__name__", getattr(scorer, "name", repr(scorer))),
        "choices": None if choices is None else list(choices),
    }
    with alone(path, patience):
        size = begin(path, settings, shard_examples, lambda: _fitting(capture, DTYPES[dtype]))
    spans = [(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]

    def write_one(number: int) -> None:
        write_shard(path / "shards", number, capture.blocks(*spans[number], batch_size), DTYPES[dtype])

    def done(number: int) -> None:
        if progress is not None:
            progress(spans[number][1] - spans[number][0])

    fill(path / "shards", len(spans), write_one, patience, done)
    with alone(path, patience):
        finish(path, len(spans))
    return open(path)


def open(folder: str | Path, vlm: VLM | None = None) -> Store:
    """A finished store; its values are read when asked for.

    Args:
        folder: where it lies.
        vlm: if given, the model that must have written it.

    Raises:
        DataError: there is no finished store.
        ModelError: it was written by another model than `vlm`.
    """
    path = Path(folder)
    settings = saved_settings(path)
    if settings is None:
        raise DataError(f"{path} holds no store", expected="a folder that iv.store.write made", remedy="check the path")
    if not (path / "index.parquet").is_file():
        count = shard_count(settings)
        done = sum(finished(path / "shards", number) for number in range(count))
        raise DataError(
            f"the store {path} is unfinished ({done} of {count} shards so far)",
            expected="all of its examples",
            remedy="wait for the processes that write it, or call iv.store.write again with the same arguments: it "
            "goes on where it was stopped",
        )
    store = Store(
        path,
        read_table(path / "index.parquet"),
        ModelIdentity.from_json(settings["model"]),
        {name: tuple(layers) for name, layers in settings["sites"].items()},
        settings["positions"],
        settings["dtype"],
    )
    if vlm is not None:
        store.check(vlm)
    return store


class _Capture:
    """Runs examples through the model, a few at a time."""

    def __init__(
        self,
        vlm: VLM,
        examples: Sequence[Example],
        sites: list[str],
        positions: Any,
        layers: Any,
        scorer: Any,
        choices: Any,
    ) -> None:
        self.vlm, self.examples, self.scorer, self.choices = vlm, examples, scorer, choices
        self.what = (sites, positions, layers)

    def blocks(self, start: int, stop: int, batch_size: int) -> Iterator[Block]:
        examples = self.examples[start:stop]
        yield from batches(self.vlm, examples, batch_size).each(
            lambda numbers, batch: self.block([examples[number] for number in numbers], batch).alone()
        )

    def block(self, examples: Sequence[Example], batch: Batch) -> Block:
        cache, run = self.vlm.capture(batch, *self.what), self.vlm.run(batch, choices=self.choices)
        numbered = batch.inputs["attention_mask"].long().cumsum(dim=1) - 1
        confidence = output_confidence(run.logits).tolist()
        rows = [
            _row(example, str(answer), self.scorer(str(answer), example), sure)
            for example, answer, sure in zip(examples, run.answers, confidence, strict=True)
        ]
        positions = numbered.gather(1, cache.positions.clamp(min=0))
        return Block(cache.activations, cache.layers, positions, cache.mask, rows)


def _row(example: Example, answer: str, score: float, confidence: float) -> dict[str, Any]:
    return {
        "id": example.id, "group": example.group, "kind": example.kind, "question": example.question,
        "expected": example.answer, "answer": answer, "score": float(score),
        "confidence": confidence,
    }  # fmt: skip


def _refuse(sites: Sequence[str], dtype: str, examples: Sequence[Example]) -> None:
    for name in sites:
        if site_named(name).name not in KEPT:
            raise InterventionError(f"site {name!r} cannot be stored", expected=f"one of {', '.join(KEPT)}")
    if dtype not in DTYPES:
        raise DataError(f"dtype {dtype!r}", expected=f"one of {', '.join(DTYPES)}")
    if not sites or not len(examples):
        raise DataError(f"{len(sites)} sites of {len(examples)} examples", expected="at least one of each")
    ids = [example.id for example in examples]
    if len(set(ids)) < len(ids):
        twice = next(each for each in ids if ids.count(each) > 1)
        raise DataError(f"the id {twice!r} stands for several examples", expected="ids that are unique")


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        facts = [example.id, example.group, example.kind, example.question, *example.answers]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:16]


def _fitting(capture: _Capture, dtype: torch.dtype) -> int:
    """How many examples like the first make a shard of 64 MiB."""
    (block,) = capture.blocks(0, 1, 1)
    size = sum(values.numel() for values in block.values.values()) * dtype.itemsize
    return max(1, min(SHARD_EXAMPLES, SHARD_BYTES // size))
