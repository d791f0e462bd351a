"""Captured activations of whole data sets on disk: safetensors shards read by layer, and a Parquet index.

store = iv.store.write("runs/pope", vlm, examples, ["resid_post"])      # goes on where it was stopped
store = iv.store.open("runs/pope")
hidden, right = store.layer("resid_post", 12), store.index["correct"]   # (example, pos, d), per example
"""

from __future__ import annotations

import hashlib
import itertools
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
from interp_vlm.engine.place import layers_of
from interp_vlm.errors import DataError, InterventionError
from interp_vlm.readouts.identity import ModelIdentity, identity_of
from interp_vlm.readouts.lens import output_confidence
from interp_vlm.readouts.shards import Block, finished, read_indices, read_rows, replace_whole, write_shard
from interp_vlm.sites import SITES
from interp_vlm.sites import site as site_named
from interp_vlm.tokens import select

if TYPE_CHECKING:
    import pandas as pd

    from interp_vlm.vlm import VLM

__all__ = ["Store", "open", "write"]

FORMAT = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES, SHARD_EXAMPLES = 2**26, 256
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
        return self._read(None, examples, fill=-1).long()

    def layer(self, site: str, layer: int, examples: Any = None) -> Shaped[Tensor, "example pos ..."]:
        """One site at one layer; zeros where `mask` is False.

        Args:
            site: a site that was kept.
            layer: a layer that was kept, by its number in the model.
            examples: rows of the index (numbers, a slice or a boolean mask); all of them by default.

        Raises:
            InterventionError: a site or layer that was not kept.
            DataError: an example that does not exist, or a damaged file.
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
        return self._read((site, layer), examples, fill=0)

    def check(self, vlm: VLM) -> None:
        """Raise a ModelError unless this very model wrote the store."""
        self.model.refuse(identity_of(vlm), f"the store {self.folder}")

    def _read(self, key: tuple[str, int] | None, examples: Any, fill: float) -> Tensor:
        wanted = self._rows(examples)
        own, mask = self.index.iloc[wanted.tolist()], self.mask[wanted]
        numbers = torch.tensor(own["shard"].to_numpy())
        starts, counts = own["row"].to_numpy(), own["positions"].to_numpy()
        whole = self.index.groupby("shard").size()
        out: Tensor | None = None
        for number in numbers.unique().tolist():
            rows = (numbers == number).nonzero().flatten()
            spans = [(int(starts[row]), int(starts[row] + counts[row])) for row in rows.tolist()]
            consecutive = all(left[1] == right[0] for left, right in itertools.pairwise(spans))
            everything = consecutive and len(spans) == whole[number]
            values = read_rows(self.folder / "shards", number, key, None if everything else spans)
            if out is None:
                out = torch.full((*mask.shape, *values.shape[1:]), fill, dtype=values.dtype)
            part = torch.full((len(rows), *out.shape[1:]), fill, dtype=values.dtype)
            part[mask[rows]] = values
            out[rows] = part
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
) -> Store:
    """Capture activations of a data set into a folder; if it was stopped before, go on after the last finished shard.

    One shard at a time is in memory.

    Args:
        folder: where the store goes; a new or empty folder, or this very store, unfinished or finished.
        vlm: the model.
        examples: questions with their answers.
        sites: names of the site table whose values belong to positions.
        positions: a role, a selector or positions.
        layers: an int, a range, a list or "all".
        dtype: on disk, "float16", "bfloat16" or "float32".
        batch_size: examples in one forward pass.
        shard_examples: examples in one file; by default as many as make 64 MiB, at most 256.
        scorer: score of an answer, from 0 to 1 (`interp_vlm.data.scorers` has more).
        choices: closed answers, as for `vlm.run`.
        progress: called with the number of examples done.

    Raises:
        ModelError: the folder holds a store of another model.
        DataError: the folder holds something else or another selection, an example's id is not unique, or a number is
            too large for the dtype.
        InterventionError: a site without positions, or a layer that does not exist.

    Example:
        >>> import interp_vlm as iv, tempfile
        >>> vlm, examples = iv.load("testbed:llava"), iv.data.digit_scenes(n=3)
        >>> store = iv.store.write(tempfile.mkdtemp(), vlm, examples, "resid_post", layers=[1, 3])
        >>> store.layer("resid_post", 3).shape
        torch.Size([3, 1, 128])
    """
    from filelock import FileLock, Timeout

    names = [sites] if isinstance(sites, str) else list(sites)
    _refuse(names, dtype, examples)
    kept = {name: layers_of(site_named(name), layers, vlm.anatomy) for name in names}
    path, capture = Path(folder), _Capture(vlm, examples, names, positions, layers, scorer, choices)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {path} ({error.strerror})", remedy="choose another") from error
    lock = FileLock(path / ".lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"the store {path} is being written by another process", remedy="wait for it") from None
    with held:
        settings = {
            "format": FORMAT,
            "model": asdict(identity_of(vlm)),
            "sites": {name: list(found) for name, found in kept.items()},
            "positions": repr(select.of(positions)),
            "dtype": dtype,
            "examples": len(examples),
            "fingerprint": _fingerprint(examples),
            "scorer": getattr(scorer, "__name__", getattr(scorer, "name", repr(scorer))),
            "choices": None if choices is None else list(choices),
        }
        size = _begin(path, settings, shard_examples, lambda: _fitting(capture, DTYPES[dtype]))
        spans = [(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]
        for number, (start, stop) in enumerate(spans):
            if not finished(path / "shards", number):
                write_shard(path / "shards", number, capture.blocks(start, stop, batch_size), DTYPES[dtype])
            if progress is not None:
                progress(stop - start)
        _finish(path, len(spans))
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
    import pandas as pd

    path = Path(folder)
    settings = _settings(path)
    if settings is None:
        raise DataError(f"{path} holds no store", expected="a folder that iv.store.write made", remedy="check the path")
    if not (path / "index.parquet").is_file():
        done = len(list((path / "shards").glob("*.parquet")))
        raise DataError(
            f"the store {path} is unfinished ({done} shards so far)",
            expected="all of its examples",
            remedy="call iv.store.write again with the same arguments: it goes on where it was stopped",
        )
    store = Store(
        path,
        pd.read_parquet(path / "index.parquet"),
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
        for first in range(start, stop, batch_size):
            yield self.block(self.examples[first : min(first + batch_size, stop)])

    def block(self, examples: Sequence[Example]) -> Block:
        batch = self.vlm.encode([example.image for example in examples], [example.question for example in examples])
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
    block = capture.block(capture.examples[:1])
    size = sum(values.numel() for values in block.values.values()) * dtype.itemsize
    return max(1, min(SHARD_EXAMPLES, SHARD_BYTES // size))


def _begin(path: Path, settings: dict[str, Any], size: int | None, fitting: Callable[[], int]) -> int:
    """Make a new folder a store, or make sure that this store is the one begun; the number of examples per shard."""
    known = _settings(path)
    if known is None:
        others = sorted(entry.name for entry in path.iterdir() if entry.name != ".lock" and entry.suffix != ".tmp")
        if others:
            raise DataError(f"the folder {path} holds {others[0]} and no store", remedy="choose another folder")
        if size is not None and size < 1:
            raise DataError(f"shard_examples={size}", expected="at least 1")
        known = {**settings, "shard_examples": size or fitting()}
        text = json.dumps(known, indent=1) + "\n"
        replace_whole(path / "store.json", lambda file: file.write_text(text, encoding="utf-8"))
    ModelIdentity.from_json(known["model"]).refuse(ModelIdentity(**settings["model"]), f"the store {path}")
    asked = settings if size is None else {**settings, "shard_examples": size}
    changed = [
        f"{name} was {known.get(name)} and is {value}" for name, value in asked.items() if known.get(name) != value
    ]
    if changed:
        raise DataError(
            f"the store {path} was begun differently: {'; '.join(changed)}",
            remedy="write it as it was begun, or choose another folder",
        )
    for left in path.rglob("*.tmp"):
        left.unlink(missing_ok=True)
    return known["shard_examples"]


def _finish(path: Path, shards: int) -> None:
    import pandas as pd

    if not (path / "index.parquet").is_file():
        index = pd.concat(read_indices(path / "shards", shards), ignore_index=True)
        right = (index["score"] >= 0.5).astype("boolean").mask(index["score"].isna())
        index.insert(list(index.columns).index("score") + 1, "correct", right)
        replace_whole(path / "index.parquet", lambda file: index.to_parquet(file, index=False))


def _settings(path: Path) -> dict[str, Any] | None:
    file = path / "store.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error})", expected="the file that iv.store.write made") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        version = found.get("format") if isinstance(found, dict) else None
        raise DataError(f"{file} has the format {version}", expected=f"{FORMAT}", remedy="write the store again")
    return found
