"""Whether the patches that the model attends to are those that its answers rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_vlm.interventions.ablation import Ablation
from interp_vlm.interventions.base import CellIntervention
from interp_vlm.interventions.cache import Cache
from interp_vlm.interventions.patch import ActivationPatch
from interp_vlm.readouts.metrics import MetricContext, answer_probability, flipped
from interp_vlm.readouts.spelling import normalised
from interp_vlm.stats import difference, mean, paired_test
from interp_vlm.study.encoding import identity, measured
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.judge import Judge
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import corrected, row, tidy, where
from interp_vlm.tokens import select
from interp_vlm.tokens.select import Selector

if TYPE_CHECKING:
    from interp_vlm.data.example import Example
    from interp_vlm.study.material import Shard
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["ALTERNATIVES", "ALTERNATIVE_DRAWS", "FILLS", "MAIN", "MASKING", "MASKS", "SOURCES"]

MASKS = {
    "top": "most attended",
    "top without sinks": "most attended, sinks left out",
    "random": "as many at random",
    "bottom": "least attended",
    "all": "the whole picture",
}
"""Which image tokens are masked, in words."""

FILLS = {
    "mean": "the mean image token of other pictures",
    "own mean": "the mean image token of the same picture",
    "zero": "zeros",
}
"""What a masked token becomes, in words."""

SOURCES = {"all layers": "attention averaged over all layers", "last layer": "attention of the last layer"}
"""Whose attention says which tokens are attended most, in words."""

MAIN = {"fill": "mean", "source": "all layers"}
"""The choices with which everything is measured."""

ALTERNATIVES = (
    {"fill": "own mean", "source": "all layers"},
    {"fill": "zero", "source": "all layers"},
    {"fill": "mean", "source": "last layer"},
)
"""What a publication may leave open: with these, the most attended tokens are held against random ones once more."""

ALTERNATIVE_DRAWS = 5
"""Random masks for each other fill."""

_OWN = ("condition", "kind", "mask", "draw", "fill", "source")


@dataclass(frozen=True, eq=False)
class Mask:
    """Which tokens are masked, and by what.

    Attributes:
        name: one of `MASKS`.
        draw: number of a random draw, else 0.
        selector: the tokens.
        fill: one of `FILLS`.
        source: one of `SOURCES`.
    """

    name: str
    draw: int
    selector: Selector
    fill: str = MAIN["fill"]
    source: str = MAIN["source"]

    @property
    def facts(self) -> dict[str, Any]:
        """Its columns in the rows."""
        return {"mask": self.name, "draw": self.draw, "fill": self.fill, "source": self.source}


def masks(settings: Settings) -> Iterator[Mask]:
    """Every mask of a study."""
    share = settings.fraction
    attended = select.top(share, by="attention")
    drawn = [select.random(share, seed=settings.seed * settings.draws + draw) for draw in range(settings.draws)]
    yield Mask("top", 0, attended)
    yield Mask("top without sinks", 0, select.top(share, among=select.image - select.sinks()))
    yield Mask("bottom", 0, select.bottom(share, by="attention"))
    yield Mask("all", 0, select.image)
    yield from (Mask("random", draw, selector) for draw, selector in enumerate(drawn))
    for fill in ("own mean", "zero"):
        yield Mask("top", 0, attended, fill=fill)
        yield from (
            Mask("random", draw, selector, fill=fill) for draw, selector in enumerate(drawn[:ALTERNATIVE_DRAWS])
        )
    # Random tokens have no source of attention: those of the main fill serve.
    yield Mask("top", 0, select.top(share, by="attention@-1"), source="last layer")


def measure(bench: Bench, shard: Shard) -> pd.DataFrame:
    """One row per question and mask: masked image tokens become the mean image token of other pictures."""
    vlm = bench.vlm

    def rows_of(examples: Sequence[Example], batch: Batch) -> Iterator[dict[str, Any]]:
        every = list(masks(bench.settings))
        # First what selectors measure: the run that it takes serves as the clean run as well.
        needy = [mask.selector for mask in every if mask.selector.needs]
        vlm.positions(batch, reduce(or_, needy))
        sinks = vlm.positions(batch, select.sinks())
        judge = Judge(vlm, batch, examples)
        own_mean = _own_mean(vlm, batch)
        known = [{**identity(e, shard.condition), "sinks": len(at)} for e, at in zip(examples, sinks, strict=True)]
        yield from _answered(vlm, batch, judge, known, [], {"mask": "none", "draw": 0, **MAIN})
        for mask in every:
            to: Any = {"mean": bench.image_mean, "zero": "zero"}.get(mask.fill)
            edit: CellIntervention = (
                ActivationPatch("projector_out", positions=mask.selector, source=own_mean)
                if mask.fill == "own mean"
                else Ablation("projector_out", positions=mask.selector, to=to)
            )
            yield from _answered(vlm, batch, judge, known, [edit], mask.facts)

    return pd.DataFrame(measured(vlm, shard.examples, bench.settings.batch_size, rows_of))


def _own_mean(vlm: VLM, batch: Batch) -> Cache:
    """The projected image tokens of each example, all of them replaced by their mean."""
    cache = vlm.capture(batch, "projector_out", positions="image")
    tokens, real = cache["projector_out"], cache.mask[:, None, :, None]
    mean_token = (tokens.double() * real).sum(dim=2, keepdim=True) / real.sum(dim=2, keepdim=True)
    return replace(cache, activations={"projector_out": mean_token.to(tokens.dtype).expand_as(tokens)})


def _answered(
    vlm: VLM,
    batch: Batch,
    judge: Judge,
    known: list[dict[str, Any]],
    edits: list[CellIntervention],
    what: dict[str, Any],
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
    """Points of accuracy that each mask costs, and the attended patches against as many random ones.

    P-values are corrected among the main choices and, apart from these, among the alternatives.
    """
    table = []
    main = where(rows, **MAIN)
    for kind in ["all", *sorted(set(main["kind"]))]:
        part = main if kind == "all" else main[main["kind"] == kind]
        wide, groups = _wide(part)
        facts = {"condition": part["condition"].iloc[0], "kind": kind, "draw": "", **MAIN}
        seed = settings.seed
        table.append(row(mean(wide["none"], groups, seed=seed), "accuracy", "%", scale=100, mask="none", **facts))
        for name in MASKS:
            table.append(_change(wide, name, "none", groups, {**facts, "mask": name}, seed))
        for name in ("top", "top without sinks", "bottom"):
            table.append(_change(wide, name, "random", groups, {**facts, "mask": name}, seed))
        if kind == "all":
            table.append(_sinks(part, {**facts, "mask": "top without sinks"}, seed))
            table += _draws(part, wide["none"], facts, seed)
    others = [found for choice in ALTERNATIVES for found in _alternative(rows, choice, settings.seed)]
    return pd.concat([corrected(tidy(table, _OWN)), corrected(tidy(others, _OWN))], ignore_index=True)


def _wide(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """How often each question is answered rightly under each mask, and the picture that it is about."""
    wide = part.pivot_table(index="example", columns="mask", values="correct", aggfunc="mean", sort=False)
    return wide, part.drop_duplicates("example").set_index("example")["group"].loc[wide.index]


def _alternative(rows: pd.DataFrame, choice: dict[str, str], seed: int) -> Iterator[dict[str, Any]]:
    """The most attended tokens against random ones, with another fill or another source of attention."""
    wide, groups = _wide(where(rows, **MAIN))
    own = where(rows, **choice).pivot_table(index="example", columns="mask", values="correct", aggfunc="mean")
    wide[own.columns] = own.loc[wide.index]
    facts = {"condition": rows["condition"].iloc[0], "kind": "all", "draw": "", **choice}
    for name in own:
        yield _change(wide, str(name), "none", groups, {**facts, "mask": name}, seed)
    yield _change(wide, "top", "random", groups, {**facts, "mask": "top"}, seed)


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
    passes=39,
    closing=3,
    absent="it needs pictures that are set aside as reference, and the data hold a single one",
    needs=("reference",),
)
