"""By which route, and at which depth, the picture reaches the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_vlm.interventions.knockout import AttentionKnockout
from interp_vlm.interventions.vary import vary, windows
from interp_vlm.readouts.metrics import MetricContext, answer_probability, flipped
from interp_vlm.stats import Estimate, difference, mean, paired_test
from interp_vlm.study.encoding import identity, measured
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import corrected, row, tidy
from interp_vlm.tokens import select

if TYPE_CHECKING:
    from interp_vlm.data.example import Example
    from interp_vlm.study.material import Shard
    from interp_vlm.tokens.batch import Batch

__all__ = ["ALL_LAYERS", "EDGES", "KNOCKOUT"]

EDGES = {
    "image to all text": ("text", "image"),
    "image to question": ("question", "image"),
    "image to last": ("last", "image"),
    "question to last": ("last", select.question - select.last),
}
"""Routes of information, and the attention edges (queries, keys) that carry them."""

ALL_LAYERS = "all"
_OWN = ("condition", "kind", "route", "window", "layer")


def knockouts(bench: Bench) -> dict[tuple[str, str, int], AttentionKnockout]:
    """Every knockout by (route, window, its central layer; -1 for all layers)."""
    vlm = bench.vlm
    over_depth = windows(vlm, bench.settings.window_of(vlm.anatomy.n_layers))
    made: dict[tuple[str, str, int], AttentionKnockout] = {}
    for route, (queries, keys) in EDGES.items():
        # In the last layer alone, nothing reads what the question's positions hold: that is a result here, no mistake.
        base = AttentionKnockout(queries, keys, allow_empty=True)
        made[route, ALL_LAYERS, -1] = base
        for layer, knockout in enumerate(vary(base, layers=over_depth)):
            window = over_depth[layer]
            label = str(window[0]) if len(window) == 1 else f"{window[0]}-{window[-1]}"
            made[route, label, layer] = knockout
    return made


def measure(bench: Bench, shard: Shard) -> pd.DataFrame:
    """One row per question and knockout: the probability of the answer that the model gave without it, and flips."""
    vlm = bench.vlm

    def rows_of(examples: Sequence[Example], batch: Batch) -> Iterator[dict[str, Any]]:
        clean = vlm.run(batch)
        context = MetricContext(clean.logits, batch, vlm.tokenizer)
        before = answer_probability(clean.logits, context)
        for (route, window, layer), knockout in knockouts(bench).items():
            run = vlm.run(batch, knockout)
            after, flips = answer_probability(run.logits, context), flipped(run.logits, context)
            for number, example in enumerate(examples):
                yield {
                    **identity(example, shard.condition),
                    "route": route,
                    "window": window,
                    "layer": layer,
                    "before": float(before[number]),
                    "after": float(after[number]),
                    "change": 100 * float((after[number] - before[number]) / before[number]),
                    "flipped": bool(flips[number]),
                    "mass_left": run.receipts[0].mass_left,
                }

    return pd.DataFrame(measured(vlm, shard.examples, bench.settings.batch_size, rows_of))


def summarise(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Mean relative change of the answer's probability and share of flips, by route and window, and by kind."""
    table = []
    for (route, window, layer), part in rows.groupby(["route", "window", "layer"], sort=False):
        kinds = ["all", *sorted(set(rows["kind"]))] if window == ALL_LAYERS else ["all"]
        for kind in kinds:
            some = part if kind == "all" else part[part["kind"] == kind]
            facts: dict[str, Any] = {
                "condition": some["condition"].iloc[0], "kind": kind, "route": route, "window": window, "layer": layer,
                "baseline": 0.0, "compared": "no knockout",
            }  # fmt: skip
            change = difference(some["change"], 0.0 * some["change"], some["group"], seed=settings.seed)
            test = paired_test(some["after"], some["before"], some["group"], seed=settings.seed)
            how = f"{change.method}; p: {test.method.split(', interval')[0]} on the probabilities"
            table.append(row(replace(change, p=test.p, method=how), "change of the answer's probability", "%", **facts))
            flips = mean(some["flipped"], some["group"], seed=settings.seed)
            table.append(row(flips, "answers that flip", "%", scale=100, **facts))
    table.append(row(_worst_leak(rows), "largest attention left on a blocked edge", "", baseline=0.0, kind="all"))
    return corrected(tidy(table, _OWN))


def _worst_leak(rows: pd.DataFrame) -> Estimate:
    """The receipts' proof: what attention any knockout left on the edges that it blocked."""
    nan, groups = float("nan"), rows["group"].nunique()
    n = rows["example"].nunique()
    return Estimate(
        float(rows["mass_left"].max()), nan, nan, n, groups, nan, "receipts of all runs", reason="a maximum"
    )


KNOCKOUT = Experiment("knockout", lambda material: material.interventions, measure, summarise, passes=21)
