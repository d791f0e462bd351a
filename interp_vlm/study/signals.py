"""Whether the shape of attention tells right answers from wrong ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from interp_vlm.readouts.attention import structure
from interp_vlm.readouts.spelling import normalised
from interp_vlm.stats import auroc, mean, point_biserial
from interp_vlm.study.encoding import identity, measured
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.judge import Judge
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import corrected, row, tidy
from interp_vlm.tokens import select

if TYPE_CHECKING:
    from interp_vlm.data.example import Example
    from interp_vlm.study.material import Shard
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.tokens.token_map import TokenMap

__all__ = ["CORRECTED", "LAST", "MEAN_LAYER", "MEASURES", "QUARTER", "SHAPE", "SIGNALS", "STEP"]

MEAN_LAYER = -1
"""The layer number of the attention averaged over all layers."""

MEASURES = {
    "entropy": "spatial entropy H_s",
    "entropy_normalised": "spatial entropy H_s / ln n",
    "clusters": "number of clusters C_k",
    "max_attention": "largest attention on a patch",
    "confidence": "confidence in the answer (baseline)",
}
"""What is asked to predict correctness, in words."""

SHAPE = ("entropy_normalised", "clusters", "max_attention")
"""The measures of attention's shape on which the answer rests, so that it allows for three chances to be wrong."""

CORRECTED = "AUROC, interval corrected for three measures"

QUARTER = "change of H_s over the first quarter of layers"
LAST = "change of H_s at the last layer"
STEP = "change of H_s from the layer before"
"""How the entropy runs over the layers."""

_OWN = ("condition", "kind", "measure", "sinks", "layer")


def measure(bench: Bench, shard: Shard) -> pd.DataFrame:
    """One row per question, layer (-1: their mean) and treatment of sinks, with the measures of attention.

    The attention is that of the last prompt token on the image tokens, averaged over heads.
    """

    def rows_of(examples: Sequence[Example], batch: Batch) -> Iterator[dict[str, Any]]:
        # First what selectors measure: the run that it takes serves as the clean run as well.
        sinks = bench.vlm.positions(batch, select.sinks())
        answers = bench.vlm.run(batch).answers
        patterns = bench.vlm.capture(batch, "pattern", positions="last")["pattern"]
        judge = Judge(bench.vlm, batch, examples)
        for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
            known = {
                **identity(example, shard.condition),
                "answer": str(answer),
                "correct": judge.right(number, answer),
                "confidence": exp(answer.scores[normalised(answer)]),
                "sink_tokens": len(sinks[number]),
            }
            yield from ({**known, **shape} for shape in _shapes(patterns[number], batch.tokens[number], sinks[number]))

    return pd.DataFrame(measured(bench.vlm, shard.examples, bench.settings.batch_size, rows_of))


def _shapes(pattern: Tensor, tokens: TokenMap, sinks: Tensor) -> list[dict[Any, Any]]:
    """The measures of one example, layer by layer and for the mean over layers, with and without its sinks."""
    pattern = torch.cat([pattern.mean(dim=0, keepdim=True), pattern])
    layers = [MEAN_LAYER, *range(len(pattern) - 1)]
    kept = without = structure(pattern, tokens, layers=layers).to_dict("records")
    if len(sinks):
        exclude = torch.isin(tokens.picture_tokens(0).cpu(), sinks.cpu()).to(pattern.device)
        without = structure(pattern, tokens, layers=layers, exclude=exclude).to_dict("records")
    return [{"sinks": which, **row} for which, rows in (("with", kept), ("without", without)) for row in rows]


def summarise(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """AUROC and point-biserial correlation of each measure with correctness, and how the entropy runs over layers."""
    table = []
    for kind, part in _scopes(rows):
        facts = {"condition": part["condition"].iloc[0], "kind": kind}
        whole = part[part["layer"] == MEAN_LAYER]
        for sinks in ("with", "without") if (part["sink_tokens"] > 0).any() else ("with",):
            for name in MEASURES:
                if name == "confidence" and sinks == "without":
                    continue
                own = {**facts, "measure": name, "sinks": "" if name == "confidence" else sinks, "layer": MEAN_LAYER}
                table += _relations(whole[whole["sinks"] == sinks], name, own, settings, correlation=True)
        if kind == "all":
            table += _changes(part, {**facts, "measure": "entropy", "sinks": "with"}, settings)
        table.append(_sinks(whole, {**facts, "measure": "sinks", "sinks": "with", "layer": MEAN_LAYER}, settings))
        for layer, at in part[(part["layer"] >= 0) & (part["sinks"] == "with")].groupby("layer"):
            for name in SHAPE:
                own = {**facts, "measure": name, "sinks": "with", "layer": layer}
                table += _relations(at, name, own, settings, correlation=False)
            table += _levels(at, {**facts, "measure": "entropy_normalised", "sinks": "with", "layer": layer}, settings)
    return corrected(tidy(table, _OWN))


def _scopes(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Within one kind where there is one to look into, and over all questions."""
    if rows["kind"].nunique() > 1 and (rows["kind"] == "existence").any():
        yield "existence", rows[rows["kind"] == "existence"]
    yield "all", rows


def _relations(
    part: pd.DataFrame, name: str, own: dict[str, Any], settings: Settings, correlation: bool
) -> list[dict[str, Any]]:
    known = part[part[name].notna()]
    left_out = f"{len(part) - len(known)} without a value left out" if len(known) < len(part) else ""
    args = (known[name], known["correct"], known["group"])
    found = [row(auroc(*args, seed=settings.seed), "AUROC", "", baseline=0.5, compared="chance", **own)]
    if correlation:
        r = point_biserial(*args, seed=settings.seed)
        found.append(row(r, "point-biserial correlation", "", baseline=0.0, compared="no correlation", **own))
    if correlation and name in SHAPE:
        wide = auroc(*args, level=1 - 0.05 / len(SHAPE), seed=settings.seed)
        found.append(row(wide, CORRECTED, "", baseline=0.5, compared="chance", **own))
    return [{**each, "note": "; ".join(filter(None, (each["note"], left_out)))} for each in found]


def _sinks(part: pd.DataFrame, own: dict[str, Any], settings: Settings) -> dict[str, Any]:
    once = part[part["sinks"] == "with"]
    return row(
        mean(once["sink_tokens"], once["group"], seed=settings.seed), "attention sinks on the picture", "tokens", **own
    )


def _changes(part: pd.DataFrame, own: dict[str, Any], settings: Settings) -> Iterator[dict[str, Any]]:
    """How H_s changes with depth: over the first quarter of the layers, at the last one, and from layer to layer."""
    layers = part[(part["layer"] >= 0) & (part["sinks"] == "with")]
    by_layer = layers.pivot(index="example", columns="layer", values="entropy")
    groups = layers.drop_duplicates("example").set_index("example")["group"].reindex(by_layer.index)
    depth = len(by_layer.columns)
    quarter = max(1, round(depth / 4))
    steps = [(QUARTER, 0, quarter), (LAST, depth - 2, depth - 1)]
    steps += [(STEP, layer - 1, layer) for layer in range(1, depth)]
    for quantity, before, layer in steps if depth > 1 else ():
        change = by_layer[layer] - by_layer[before]
        known = change.notna()
        estimate = mean(change[known], groups[known], seed=settings.seed)
        compared = {"baseline": 0.0, "compared": f"H_s in layer {before}"}
        found = row(estimate, quantity, "nats", layer=layer, **own, **compared)
        left_out = "" if known.all() else f"{int((~known).sum())} without a value left out"
        yield {**found, "note": "; ".join(filter(None, (found["note"], left_out)))}


def _levels(part: pd.DataFrame, own: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    found = []
    for right, words in ((True, "mean where right"), (False, "mean where wrong")):
        some = part[(part["correct"] == right) & part["entropy_normalised"].notna()]
        estimate = mean(some["entropy_normalised"], some["group"], seed=settings.seed)
        found.append(row(estimate, words, "", **own))
    return found


SIGNALS = Experiment("signals", lambda material: material.errors, measure, summarise, passes=3)
