"""The strongest honest attempt to tell right answers from wrong ones by attention: heads, features, whole maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import exp
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp_vlm.readouts.attention_features import attention_features, attention_map
from interp_vlm.readouts.head_contribution import READ, heads_of
from interp_vlm.readouts.spelling import normalised
from interp_vlm.stats import auroc, mean, point_biserial
from interp_vlm.study.attention_classifiers import CLASSIFIERS, OutOfFold, judged, out_of_fold
from interp_vlm.study.encoding import identity, measured
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.judge import Judge
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import corrected, row, tidy
from interp_vlm.study.top_heads import squared, strongest, top_heads

if TYPE_CHECKING:
    from interp_vlm.data.example import Example
    from interp_vlm.study.material import Shard
    from interp_vlm.tokens.batch import Batch

__all__ = ["HEADS"]

_OWN = ("condition", "kind", "what", "layer", "head")
_NO_HEAD = {"layer": -1, "head": -1}


def measure(bench: Bench, shard: Shard) -> pd.DataFrame:
    """One row per question: its attention features, and of every head the mass on the picture, the map and its part.

    All of the attention is the last prompt token's. Lists run over layers, then heads, then rows and columns of the
    picture; `layers`, `heads`, `map_rows` and `map_cols` say how many.
    """

    def rows_of(examples: Sequence[Example], batch: Batch) -> Iterator[dict[str, Any]]:
        answers = bench.vlm.run(batch).answers
        cache = bench.vlm.capture(batch, [*READ, "pattern"], positions="last")
        parts = heads_of(bench.vlm, batch, cache).heads[..., 0].float().cpu().numpy()
        judge = Judge(bench.vlm, batch, examples)
        for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
            pattern, tokens = cache["pattern"][number], batch.tokens[number]
            attended = attention_map(pattern, tokens).astype(np.float32)
            layers, heads, map_rows, map_cols = attended.shape
            yield {
                **identity(example, shard.condition),
                "answer": str(answer),
                "correct": judge.right(number, answer),
                "confidence": exp(answer.scores[normalised(answer)]),
                **attention_features(pattern, tokens),
                "layers": layers,
                "heads": heads,
                "map_rows": map_rows,
                "map_cols": map_cols,
                "mass": attended.sum(axis=(2, 3)).ravel(),
                "contribution": parts[number].ravel(),
                "map": attended.ravel(),
            }

    return pd.DataFrame(measured(bench.vlm, shard.examples, bench.settings.batch_size, rows_of))


def summarise(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """R2 of single heads, of the strongest ones, and what classifiers make of all of the attention."""
    found = out_of_fold(rows, settings.seed)
    table: list[dict[str, Any]] = []
    for kind, inside in _scopes(rows):
        facts = {"condition": rows["condition"].iloc[0], "kind": kind}
        part = rows[inside]
        table += _single(part, facts, settings)
        table += _strongest(part, facts, settings)
        table += _classified(part, found, inside, facts, settings)
    return _numbered(corrected(tidy(table, _OWN)))


def _scopes(rows: pd.DataFrame) -> Iterator[tuple[str, np.ndarray]]:
    """All questions, each kind, and all but yes-or-no ones; those alone that differ from all."""
    kinds = rows["kind"].astype(str)
    yield "all", np.ones(len(rows), dtype=bool)
    named = [kind for kind in dict.fromkeys(kinds) if kind]
    if kinds.nunique() > 1:
        for kind in named:
            yield kind, (kinds == kind).to_numpy()
        if "existence" in named:
            yield "open", (kinds != "existence").to_numpy()


def _columns(part: pd.DataFrame, name: str) -> np.ndarray:
    """(question, layer x head) of a list column."""
    return np.stack(part[name].to_list()).astype(np.float64)


def _single(part: pd.DataFrame, facts: dict[str, Any], settings: Settings) -> Iterator[dict[str, Any]]:
    masses, added, heads = _columns(part, "mass"), _columns(part, "contribution"), int(part["heads"].iloc[0])
    for place, (mass, contribution) in enumerate(zip(masses.T, added.T, strict=True)):
        own = {**facts, "what": "all heads", "layer": place // heads, "head": place % heads}
        r2 = squared(point_biserial(mass, part["correct"], part["group"], seed=settings.seed))
        compared = {"baseline": 0.0, "compared": "no relation"}
        yield row(r2, "R2 of attention with correctness", "", **own, **compared)
        if facts["kind"] == "all":
            estimate = mean(contribution, part["group"], seed=settings.seed)
            yield row(estimate, "contribution", "nats", baseline=0.0, compared="no contribution", **own)
            size = mean(np.abs(contribution), part["group"], seed=settings.seed)
            yield row(size, "size of the contribution", "nats", **own)


def _strongest(part: pd.DataFrame, facts: dict[str, Any], settings: Settings) -> Iterator[dict[str, Any]]:
    heads = int(part["heads"].iloc[0])
    estimate = top_heads(
        _columns(part, "mass"), _columns(part, "contribution"), part["correct"], part["group"], heads, settings.seed
    )
    own = {**facts, "what": "top heads", **_NO_HEAD}
    compared = {"baseline": 0.0, "compared": "no relation"}
    yield row(estimate, "largest R2 of attention with correctness", "", **own, **compared)
    if facts["kind"] == "all":
        for layer, head in strongest(_columns(part, "contribution"), heads):
            own = {**facts, "what": "top heads", "layer": layer, "head": head}
            column = _columns(part, "mass")[:, layer * heads + head]
            r2 = squared(point_biserial(column, part["correct"], part["group"], seed=settings.seed))
            yield row(r2, "R2 of attention with correctness", "", **own, **compared)


def _classified(
    part: pd.DataFrame, found: dict[str, OutOfFold], inside: np.ndarray, facts: dict[str, Any], settings: Settings
) -> Iterator[dict[str, Any]]:
    scope: Callable[..., Any] = judged(part, inside, settings.seed)
    for what in CLASSIFIERS:
        own = {**facts, "what": what, **_NO_HEAD}
        yield row(scope(found[what], "AUROC"), "AUROC", "", baseline=0.5, compared="chance", **own)
        if found[what].cut:
            estimate = scope(found[what], "balanced accuracy")
            yield row(estimate, "balanced accuracy", "%", scale=100, baseline=50.0, compared="chance", **own)
        less = scope(found[what], "AUROC minus confidence's")
        yield row(less, "AUROC minus confidence's", "", baseline=0.0, compared="confidence in the answer", **own)
    own = {**facts, "what": "confidence", **_NO_HEAD}
    sure = auroc(part["confidence"], part["correct"], part["group"], seed=settings.seed)
    yield row(sure, "AUROC", "", baseline=0.5, compared="chance", **own)


def _numbered(table: pd.DataFrame) -> pd.DataFrame:
    table["head"] = table["head"].astype("Int64")
    return table


HEADS = Experiment("heads", lambda material: material.errors, measure, summarise, passes=3, closing=4)
