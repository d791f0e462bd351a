"""Where, layer by layer, the computation holds what the answer depends on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_vlm.data.digits import Pair
from interp_vlm.engine.batches import batches
from interp_vlm.errors import SelectionError
from interp_vlm.interventions.patch import ActivationPatch
from interp_vlm.readouts.metrics import MetricContext, logit_difference
from interp_vlm.readouts.spelling import prompt_ends, spellings_of
from interp_vlm.stats import ratio_of_means
from interp_vlm.study.encoding import identity
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.judge import Judge
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import corrected, row, tidy

if TYPE_CHECKING:
    from interp_vlm.study.material import Shard
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["DIRECTIONS", "PATCHING", "PLACES"]

SITE = "resid_pre"
PLACES = ("image", "question", "last")
DIRECTIONS = ("denoising", "noising")
_OWN = ("condition", "kind", "direction", "positions", "layer")


def measure(bench: Bench, shard: Shard) -> pd.DataFrame:
    """One row per pair, direction, positions and layer, with the logit differences of the three runs.

    A difference is the score of the clean picture's right answer minus that of the corrupt picture's.
    """
    vlm, size = bench.vlm, bench.settings.batch_size
    pairs = _with_logits(vlm, shard.pairs, size)

    def rows_of(numbers: Sequence[int], clean: Batch) -> list[dict[str, Any]]:
        some = [pairs[number] for number in numbers]
        cleans, corrupts = [pair.clean for pair in some], [pair.corrupt for pair in some]
        corrupt = vlm.encode([example.image for example in corrupts], [example.question for example in corrupts])
        metric = logit_difference([e.answer for e in cleans], [e.answer for e in corrupts])
        ends = {}
        for side, (batch, examples) in {"clean": (clean, cleans), "corrupt": (corrupt, corrupts)}.items():
            run = vlm.run(batch)
            judge = Judge(vlm, batch, examples)
            ends[f"ld_{side}"] = _values(metric, run.logits, batch, vlm)
            ends[f"{side}_right"] = [judge.right(number, answer) for number, answer in enumerate(run.answers)]
        rows = []
        for what, patched in _patched(vlm, clean, corrupt, metric):
            for number, pair in enumerate(some):
                own = {name: values[number] for name, values in ends.items()}
                changed = {"other_expected": pair.corrupt.answer, "changed": pair.changed["field"]}
                rows.append(
                    {**identity(pair.clean, shard.condition), **changed, **what, **own, "ld_patched": patched[number]}
                )
        return rows

    found = batches(vlm, [pair.clean for pair in pairs], size).map(rows_of)
    return pd.DataFrame([row for _, rows in found for row in rows])


def _patched(vlm: VLM, clean: Batch, corrupt: Batch, metric: Any) -> Iterator[tuple[dict[str, Any], list[float]]]:
    """The logit differences under every patch, in both directions."""
    for direction, target, source in (("denoising", corrupt, clean), ("noising", clean, corrupt)):
        cache = vlm.capture(source, SITE)
        for positions in PLACES:
            for layer in range(vlm.anatomy.n_layers):
                patch = ActivationPatch(SITE, layers=[layer], positions=positions, source=cache)
                values = _values(metric, vlm.run(target, patch).logits, target, vlm)
                yield {"direction": direction, "positions": positions, "layer": layer}, values


def _values(metric: Any, logits: Any, batch: Batch, vlm: VLM) -> list[float]:
    return [float(value) for value in metric(logits, MetricContext(logits, batch, vlm.tokenizer))]


def _with_logits(vlm: VLM, pairs: Sequence[Pair], size: int) -> list[Pair]:
    """The pairs whose two answers are one token each after the prompt; the others have no logit difference."""
    kept = []
    encoded = batches(vlm, [pair.clean for pair in pairs], size)
    for pair, end in zip(pairs, encoded.each(lambda _, batch: prompt_ends(batch, vlm.tokenizer)), strict=True):
        try:
            spellings_of(vlm.tokenizer, end, [pair.clean.answer, pair.corrupt.answer])
        except SelectionError:
            continue
        kept.append(pair)
    return kept


def summarise(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Share of the difference that a patch restores or removes, over the pairs answered rightly on both sides."""
    table = []
    if not len(rows):
        return tidy(table, _OWN)
    solved = rows[rows["clean_right"] & rows["corrupt_right"]]
    note = f"{solved['example'].nunique()} of {rows['example'].nunique()} pairs: those answered rightly on both sides"
    for kind in ["all", *sorted(set(solved["kind"]))]:
        part = solved if kind == "all" else solved[solved["kind"] == kind]
        for (direction, positions, layer), some in part.groupby(["direction", "positions", "layer"], sort=False):
            facts = {
                "condition": some["condition"].iloc[0], "kind": kind, "direction": direction, "positions": positions,
                "layer": layer, "baseline": 0.0, "compared": "no patch",
            }  # fmt: skip
            whole = some["ld_clean"] - some["ld_corrupt"]
            moved = (
                some["ld_patched"] - some["ld_corrupt"]
                if direction == "denoising"
                else some["ld_clean"] - some["ld_patched"]
            )
            estimate = ratio_of_means(moved, whole, some["group"], seed=settings.seed)
            quantity = "share restored" if direction == "denoising" else "share removed"
            found = row(estimate, quantity, "", **facts)
            table.append({**found, "note": "; ".join(filter(None, (note, found["note"])))})
    return corrected(tidy(table, _OWN))


PATCHING = Experiment(
    "patching",
    lambda material: {next(iter(material.conditions)): material.pairs} if material.pairs else {},
    measure,
    summarise,
    passes=28,
    absent="it needs pairs of pictures that differ in one object, and only digit scenes come in pairs",
)
