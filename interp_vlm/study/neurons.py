"""Whether the answer rests on the neurons that a probe of correctness reads."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_vlm.data.example import Example
from interp_vlm.interventions.ablation import Ablation
from interp_vlm.interventions.base import Intervention
from interp_vlm.interventions.cache import Cache
from interp_vlm.interventions.patch import ActivationPatch
from interp_vlm.readouts.metrics import MetricContext, flipped
from interp_vlm.readouts.spelling import normalised
from interp_vlm.stats import Estimate, paired_test
from interp_vlm.study.changes import CHANGE, EQUIVALENCE, by_quantity, change_rows, unchanged
from interp_vlm.study.encoding import identity, measured
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.judge import Judge
from interp_vlm.study.neuron_sets import SITE, Chosen, chosen, count_of, equal_norm_sets, random_sets
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import row, tidy, where

if TYPE_CHECKING:
    from interp_vlm.study.material import Shard
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["BEYOND", "HEADLINE", "NEURONS", "NORM", "SIZES", "Edit", "edits", "verdict"]

SIZES = ("1", "5", "10", "25 %", "50 %", "90 %")
HEADLINE = ("5", "50 %")
"""The sizes at which families are compared."""
RANDOM = ("random", "random of equal norm")
BEYOND = {"random": "change beyond random", "random of equal norm": "change beyond random of equal norm"}
"""The quantity that sets the probe's neurons against random ones."""
NORM = "norm against the probe's neurons"
EVERYWHERE = "peak, all positions"
LEVEL = 0.05
_OWN = ("condition", "kind", "set", "size", "fill", "layer", "draw", "at")


@dataclass(frozen=True)
class Edit:
    """One ablation of the plan.

    Attributes:
        set: "top", "single" (the first of them) or a random set.
        size: see `SIZES`.
        fill: "zero", "mean", "resample" (another example's values) or "clamp" (the largest value of the reference).
        layer: after which the residual stream is edited.
        probe: the layer whose probe says which neurons come first.
        positions: "last", which is what the probe reads, or "all".
    """

    set: str
    size: str
    fill: str
    layer: int
    probe: int
    positions: str = "last"


def edits(peak: int, depth: int, n_layers: int) -> dict[Edit, list[str]]:
    """The plan: every ablation, with what it answers.

    "peak": at the layer where the probe is best; "depth": at two thirds of the depth, where families are compared;
    "each": the first neurons of the peak layer, at every layer; "peak, all positions": not at the last alone.
    """
    plan: dict[Edit, list[str]] = {}

    def add(at: str, layer: int, probe: int, sets: Sequence[str], sizes: Sequence[str], fills: Sequence[str]) -> None:
        for fill, size, name in product(fills, sizes, sets):
            name = "single" if (name, size) == ("top", "1") else name
            positions = "all" if at == EVERYWHERE else "last"
            plan.setdefault(Edit(name, size, fill, layer, probe, positions), []).append(at)

    add("peak", peak, peak, ["top"], SIZES, ["mean", "zero"])
    add("peak", peak, peak, ["top"], ["5", "10", "50 %"], ["resample"])
    add("peak", peak, peak, ["top"], ["1", "5"], ["clamp"])
    add("peak", peak, peak, RANDOM, ["5", "50 %"], ["mean", "zero"])
    add("peak", peak, peak, RANDOM, ["25 %", "90 %"], ["mean"])
    add("peak", peak, peak, ["random"], ["5", "50 %"], ["resample"])
    add("depth", depth, depth, ["top", *RANDOM], HEADLINE, ["mean"])
    for layer in range(n_layers):
        add("each", layer, peak, ["top"], ["5"], ["mean", "zero"])
    add(EVERYWHERE, peak, peak, ["top"], ["5", "50 %"], ["mean"])
    return plan


def measure(bench: Bench, shard: Shard) -> pd.DataFrame:
    """One row per question, ablation and what it answers; of the random sets each question meets one."""
    found = chosen(bench)
    bank = None if found.reason else _Bank(found, bench.settings)

    def rows_of(examples: Sequence[Example], batch: Batch) -> Iterator[dict[str, Any]]:
        judge = Judge(bench.vlm, batch, examples)
        known = [{**identity(example, shard.condition), "reason": found.reason} for example in examples]
        clean = {"set": "none", "size": "", "fill": "", "layer": -1, "draw": "", "at": ""}
        yield from _answered(bench.vlm, batch, judge, known, [], [clean] * len(batch))
        if bank is None:
            return
        cache = bench.vlm.capture(batch, SITE, positions="last")
        for edit, answers in edits(found.peak, found.depth, bench.vlm.anatomy.n_layers).items():
            ablation, facts = bank.ablation(edit, cache, examples)
            own = [{**fact, "at": at} for at in answers for fact in facts]
            yield from _answered(bench.vlm, batch, judge, known, [ablation], own)

    return pd.DataFrame(measured(bench.vlm, shard.examples, bench.settings.batch_size, rows_of))


def _answered(
    vlm: VLM,
    batch: Batch,
    judge: Judge,
    known: Sequence[dict[str, Any]],
    ablations: Sequence[Intervention],
    facts: Sequence[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Rows of one run; `facts` are those of the batch's examples, once or several times over."""
    run = vlm.run(batch, ablations)
    flips = flipped(run.logits, MetricContext(run.clean_logits, batch, vlm.tokenizer))
    for number, fact in enumerate(facts):
        row_of_batch = number % len(batch)
        answer = run.answers[row_of_batch]
        yield {
            **known[row_of_batch],
            **fact,
            "answer": normalised(answer),
            "correct": judge.right(row_of_batch, answer),
            "flipped": bool(flips[row_of_batch]),
        }


class _Bank:
    """The sets and fills of one model, and how they become interventions.

    What is edited at the last position alone differs from example to example (each meets another random set and another
    donor), so it is put together here and written by one patch.
    """

    def __init__(self, found: Chosen, settings: Settings) -> None:
        self._found, self._settings = found, settings
        self._sets: dict[tuple[str, int, int], Bool[np.ndarray, "draw unit"]] = {}

    def ablation(
        self, edit: Edit, cache: Cache, examples: Sequence[Example]
    ) -> tuple[Intervention, list[dict[str, Any]]]:
        """The intervention, and what to write beside each example."""
        found, sets = self._found, self._masks(edit)
        norms = found.norm[edit.layer]
        share = (sets @ norms) / norms[self._masks(replace(edit, set="top"))[0]].sum()
        draws = [self._chance(example)[0] % len(sets) for example in examples]
        common = {name: getattr(edit, name) for name in ("set", "size", "fill", "layer", "probe")}
        common |= {"units": int(sets[0].sum()), **self._evidence(edit.layer)}
        facts = [
            {**common, "draw": str(draw) if edit.set in RANDOM else "", "norm": float(share[draw])} for draw in draws
        ]
        return self._made(edit, cache, examples, torch.from_numpy(sets[draws])), facts

    def _made(
        self, edit: Edit, cache: Cache, examples: Sequence[Example], mask: Bool[Tensor, "example unit"]
    ) -> Intervention:
        if edit.positions == "all":
            units = mask[0].nonzero().flatten().tolist()
            return Ablation(SITE, layers=[edit.layer], units=units, to=self._found.everywhere)
        clean = cache.layer(SITE, edit.layer)[:, 0]
        fill = self._fill(edit, examples).to(clean)
        edited = torch.where(mask.to(clean.device), fill, clean)[:, None, None]
        source = replace(cache, activations={SITE: edited}, layers={SITE: (edit.layer,)})
        return ActivationPatch(SITE, layers=[edit.layer], positions="last", source=source)

    def _fill(self, edit: Edit, examples: Sequence[Example]) -> Float[Tensor, "_ unit"]:
        found = self._found
        if edit.fill == "resample":
            return found.values[edit.layer][[self._chance(example)[1] for example in examples]]
        known = {"zero": torch.zeros_like(found.mean), "mean": found.mean, "clamp": found.largest}
        return known[edit.fill][edit.layer][None]

    def _chance(self, example: Example) -> tuple[int, int]:
        """The random set that an example meets, and its donor: by its id, so that no cut of the data matters."""
        rng = np.random.default_rng([self._settings.seed, zlib.crc32(example.id.encode())])
        return int(rng.integers(self._settings.draws)), int(rng.integers(self._found.examples))

    def _masks(self, edit: Edit) -> Bool[np.ndarray, "draw unit"]:
        order, seed = self._found.order[edit.probe], self._settings.seed
        count = count_of(edit.size, len(order))
        key = edit.set, count, edit.probe
        if key not in self._sets:
            if edit.set == "random":
                made = random_sets(len(order), count, self._settings.draws, seed)
            elif edit.set == "random of equal norm":
                made = equal_norm_sets(self._found.norm[edit.probe], order[:count], self._settings.draws, seed)
            else:
                made = np.zeros((1, len(order)), dtype=bool)
                made[0, order[:count]] = True
            self._sets[key] = made
        return self._sets[key]

    def _evidence(self, layer: int) -> dict[str, Any]:
        auroc = self._found.aurocs[layer]
        return {
            "auroc": auroc.value, "auroc_low": auroc.low, "auroc_high": auroc.high,
            "fitted": auroc.n, "fitted_groups": auroc.groups, "stable": self._found.stable.get(layer, -1),
        }  # fmt: skip


def summarise(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """What each ablation changes, what the probe's neurons cost beyond random ones, and what the probe can tell."""
    clean = rows[rows["set"] == "none"].drop_duplicates("example").set_index("example")
    common = {"condition": clean["condition"].iloc[0], "kind": "all", "draw": ""}
    groups, seed = clean["group"], settings.seed
    if (reason := str(clean["reason"].iloc[0])) != "":
        return tidy(_unmeasured(reason, len(clean), groups.nunique(), common), _OWN)
    right: dict[tuple[Any, ...], pd.Series] = {}
    table: list[dict[str, Any]] = []
    done = rows[rows["set"] != "none"]
    for key, part in done.groupby(["set", "size", "fill", "layer", "at"], sort=False):
        each = part.set_index("example")[["correct", "flipped"]].loc[clean.index]
        right[key] = each["correct"].astype(float)
        facts = {**common, **dict(zip(("set", "size", "fill", "layer", "at"), key, strict=True))}
        table += change_rows(each["correct"], clean["correct"], each["flipped"], groups, seed, facts)
        if key[0] in RANDOM:
            table.append(_match(part, groups, facts))
    for (name, *rest), share in right.items():
        for against, quantity in BEYOND.items():
            if name == "top" and (against, *rest) in right:
                facts = {**common, **dict(zip(("set", "size", "fill", "layer", "at"), (name, *rest), strict=True))}
                table.append(_beyond(share, right[against, *rest], clean, against, quantity, facts, seed))
    table += _probes(done, common, seed)
    return by_quantity(tidy(table, _OWN))


def _beyond(
    top: pd.Series, other: pd.Series, clean: pd.DataFrame, against: str, quantity: str, facts: dict[str, Any], seed: int
) -> dict[str, Any]:
    words = {"random": "random sets of equal size", "random of equal norm": "random sets of equal size and norm"}
    baseline = 100 * float((other - clean["correct"].astype(float)).mean())
    test = unchanged(paired_test(top, other, clean["group"], seed=seed), (top - other).to_numpy())
    return row(test, quantity, "points", scale=100, **facts, baseline=baseline, compared=words[against])


def _match(part: pd.DataFrame, groups: pd.Series, facts: dict[str, Any]) -> dict[str, Any]:
    """How well random sets match the probe's neurons in norm."""
    norms = part.drop_duplicates("draw")["norm"]
    note = f"{len(norms)} sets, from {norms.min():.2f} to {norms.max():.2f}"
    method = "summed mean absolute activation on the examples set aside"
    found = Estimate(float(norms.mean()), float("nan"), float("nan"), len(groups), groups.nunique(), 0.95, method)
    return {**row(found, NORM, "", **facts, baseline=1.0), "note": note}


def _probes(done: pd.DataFrame, common: dict[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    for layer, part in where(done, at="each").groupby("layer"):
        first = part.iloc[0]
        method = "L2 probe, cross-validated by picture on the examples set aside; group bootstrap"
        value, low, high = (float(first[name]) for name in ("auroc", "auroc_low", "auroc_high"))
        n, groups = (int(first[name]) for name in ("fitted", "fitted_groups"))
        found = Estimate(value, low, high, n, groups, 0.95, method, seed)
        facts = {**common, "set": "all", "size": "", "fill": "", "layer": layer, "at": "fitting"}
        note = f"stability selection is sure of {int(first['stable'])} neurons" if first["stable"] >= 0 else ""
        yield {**row(found, "AUROC of the probe that chooses", "", **facts, baseline=0.5), "note": note}


def _unmeasured(reason: str, n: int, groups: int, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of the plan without numbers, and why."""
    nothing = Estimate(float("nan"), float("nan"), float("nan"), n, groups, 0.95, "not measured", reason=reason)
    quantities = {CHANGE: "top", EQUIVALENCE: "top", **BEYOND}
    for edit, answers in edits(-1, -1, 0).items():
        facts = {**common, "set": edit.set, "size": edit.size, "fill": edit.fill, "layer": None}
        for at in answers:
            for quantity in quantities:
                if quantity not in BEYOND.values() or edit.set == "top":
                    yield row(nothing, quantity, "points", **facts, at=at)


def verdict(table: pd.DataFrame, size: str) -> str:
    """What the table of one model says about its probe's neurons at two thirds of the depth, in a word or two.

    "robust" where ablating them changes accuracy by less than 5 points either way (two one-sided tests, Holm), else
    "fragile" where it costs more than ablating random neurons of the same size and norm (Holm), else "not resolved".

    Args:
        table: of the neurons, rows of one model.
        size: how many of them, see `SIZES`.
    """
    own = where(table, set="top", size=size, fill="mean", at="depth")
    same, beyond = (where(own, quantity=name) for name in (EQUIVALENCE, BEYOND["random of equal norm"]))
    if not len(same) or same["value"].isna().all():
        return "not measured"
    if same["p_holm"].iloc[0] < LEVEL:
        return "robust"
    costs = len(beyond) and beyond["p_holm"].iloc[0] < LEVEL and beyond["value"].iloc[0] < 0
    return "fragile" if costs else "not resolved"


NEURONS = Experiment(
    "neurons",
    lambda material: material.interventions,
    measure,
    summarise,
    passes=47,
    closing=6,
    absent="it needs pictures that are set aside to choose neurons on, and the data hold too few",
    needs=("fitting",),
    prepare=lambda bench: {"chosen": chosen(bench)},
)
