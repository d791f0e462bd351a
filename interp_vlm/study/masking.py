"""Whether the patches that the model attends to are those that its answers rest on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_vlm.interventions.ablation import Ablation
from interp_vlm.readouts.metrics import MetricContext, answer_probability, flipped
from interp_vlm.readouts.spelling import normalised
from interp_vlm.stats import difference, mean, paired_test
from interp_vlm.study.encoding import batches, identity
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.judge import Judge
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import corrected, row, tidy
from interp_vlm.tokens import select
from interp_vlm.tokens.select import Selector

if TYPE_CHECKING:
    from interp_vlm.study.material import Shard
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["MASKING", "MASKS"]

MASKS = {
    "top": "most attended",
    "top without sinks": "most attended, sinks left out",
    "random": "as many at random",
    "bottom": "least attended",
    "all": "the whole picture",
}
"""Which image tokens are masked, in words."""

_OWN = ("condition", "kind", "mask", "draw")


def masks(settings: Settings) -> Iterator[tuple[str, int, Selector]]:
    """Every mask as (name, draw, selector)."""
    share = settings.fraction
    yield "top", 0, select.top(share, by="attention")
    yield "top without sinks", 0, select.top(share, among=select.image - select.sinks())
    yield "bottom", 0, select.bottom(share, by="attention")
    yield "all", 0, select.image
    for draw in range(settings.draws):
        yield "random", draw, select.random(share, seed=settings.seed * settings.draws + draw)


def measure(bench: Bench, shard: Shard) -> pd.DataFrame:
    """One row per question and mask: masked image tokens become the mean image token of other pictures."""
    rows = []
    for examples, batch in batches(bench.vlm, shard.examples, bench.settings.batch_size):
        # First what selectors measure: the run that it takes serves as the clean run as well.
        bench.vlm.positions(batch, select.top(bench.settings.fraction) | select.sinks())
        sinks = bench.vlm.positions(batch, select.sinks())
        judge = Judge(bench.vlm, batch, examples)
        known = [{**identity(e, shard.condition), "sinks": len(at)} for e, at in zip(examples, sinks, strict=True)]
        rows += _answered(bench.vlm, batch, judge, known, [], {"mask": "none", "draw": 0})
        for name, draw, selector in masks(bench.settings):
            masked = Ablation("projector_out", positions=selector, to=bench.image_mean)
            rows += _answered(bench.vlm, batch, judge, known, [masked], {"mask": name, "draw": draw})
    return pd.DataFrame(rows)


def _answered(
    vlm: VLM, batch: Batch, judge: Judge, known: list[dict[str, Any]], edits: list[Ablation], what: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    run = vlm.run(batch, edits)
    context = MetricContext(run.clean_logits, batch, vlm.tokenizer)
    probability, flips = answer_probability(run.logits, context), flipped(run.logits, context)
    counts = [len(at) for at in vlm.positions(batch, edits[0].positions)] if edits else [0] * len(batch)
    for number, answer in enumerate(run.answers):
        yield {
            **known[number],
            **what,
            "masked": counts[number],
            "answer": normalised(answer),
            "correct": judge.right(number, answer),
            "flipped": bool(flips[number]),
            "probability": float(probability[number]),
        }


def summarise(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Points of accuracy that each mask costs, and the attended patches against as many random ones."""
    table = []
    for kind in ["all", *sorted(set(rows["kind"]))]:
        part = rows if kind == "all" else rows[rows["kind"] == kind]
        wide = part.pivot_table(index="example", columns="mask", values="correct", aggfunc="mean", sort=False)
        groups = part.drop_duplicates("example").set_index("example")["group"].loc[wide.index]
        facts = {"condition": part["condition"].iloc[0], "kind": kind, "draw": ""}
        seed = settings.seed
        table.append(row(mean(wide["none"], groups, seed=seed), "accuracy", "%", scale=100, mask="none", **facts))
        for name in MASKS:
            table.append(_change(wide, name, "none", groups, {**facts, "mask": name}, seed))
        for name in ("top", "top without sinks", "bottom"):
            table.append(_change(wide, name, "random", groups, {**facts, "mask": name}, seed))
        if kind == "all":
            table.append(_sinks(part, {**facts, "mask": "top without sinks"}, seed))
            table += _draws(part, wide["none"], facts, seed)
    return corrected(tidy(table, _OWN))


def _change(
    wide: pd.DataFrame, name: str, against: str, groups: pd.Series, facts: dict[str, Any], seed: int
) -> dict[str, Any]:
    test = paired_test(wide[name], wide[against], groups, seed=seed)
    words = "no mask" if against == "none" else "as many random patches"
    baseline = {"baseline": 0.0 if against == "none" else 100 * float((wide[against] - wide["none"]).mean())}
    quantity = "change of accuracy" if against == "none" else "change beyond random"
    return row(test, quantity, "points", scale=100, compared=words, **facts, **baseline)


def _sinks(part: pd.DataFrame, facts: dict[str, Any], seed: int) -> dict[str, Any]:
    once = part.drop_duplicates("example")
    return row(mean(once["sinks"], once["group"], seed=seed), "attention sinks on the picture", "tokens", **facts)


def _draws(part: pd.DataFrame, clean: pd.Series, facts: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """Each random draw on its own, without a test: how far chance alone scatters."""
    for draw, one in part[part["mask"] == "random"].groupby("draw"):
        one = one.set_index("example").loc[clean.index]
        change = difference(one["correct"], clean, one["group"], seed=seed)
        own = {**facts, "mask": "random", "draw": str(draw), "compared": "no mask", "baseline": 0.0}
        yield row(change, "change of accuracy, one draw", "points", scale=100, **own)


MASKING = Experiment(
    "masking",
    lambda material: material.interventions,
    measure,
    summarise,
    passes=26,
    absent="it needs pictures that are set aside as reference, and the data hold a single one",
    needs=("reference",),
)
