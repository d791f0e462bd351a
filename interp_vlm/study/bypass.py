"""What bypassing the MLP or the attention of one layer costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_vlm.interventions.ablation import Ablation
from interp_vlm.readouts.metrics import MetricContext, flipped
from interp_vlm.readouts.spelling import normalised
from interp_vlm.study.changes import by_quantity, change_rows
from interp_vlm.study.encoding import identity, measured
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.judge import Judge
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import tidy

if TYPE_CHECKING:
    from interp_vlm.data.example import Example
    from interp_vlm.study.material import Shard
    from interp_vlm.tokens.batch import Batch

__all__ = ["BYPASS", "PARTS", "matched"]

PARTS = {"mlp": "mlp_out", "attention": "attn_out"}
"""What is bypassed, and the site whose values become zero: the residual stream passes by unchanged."""
_OWN = ("condition", "kind", "part", "layer", "at")


def matched(n_layers: int) -> int:
    """The layer at the relative depth of the published bypass, layer 25 of Qwen2-VL's 28 (counted from 0).

    Example:
        >>> matched(28), matched(32), matched(4)
        (25, 29, 3)
    """
    return round((n_layers - 1) * 25 / 27)


def measure(bench: Bench, shard: Shard) -> pd.DataFrame:
    """One row per question, part and layer, and one without a bypass (layer -1)."""
    vlm = bench.vlm
    count = vlm.anatomy.n_layers
    plan: list[tuple[dict[str, Any], list[Ablation]]] = [({"part": "none", "layer": -1, "matched": False}, [])]
    for part, site in PARTS.items():
        for layer in range(count):
            facts = {"part": part, "layer": layer, "matched": layer == matched(count)}
            plan.append((facts, [Ablation(site, layers=[layer], to="zero")]))

    def rows_of(examples: Sequence[Example], batch: Batch) -> Iterator[dict[str, Any]]:
        judge = Judge(vlm, batch, examples)
        for facts, edits in plan:
            run = vlm.run(batch, edits)
            flips = flipped(run.logits, MetricContext(run.clean_logits, batch, vlm.tokenizer))
            for number, (example, answer) in enumerate(zip(examples, run.answers, strict=True)):
                yield {
                    **identity(example, shard.condition),
                    **facts,
                    "answer": normalised(answer),
                    "correct": judge.right(number, answer),
                    "flipped": bool(flips[number]),
                }

    return pd.DataFrame(measured(vlm, shard.examples, bench.settings.batch_size, rows_of))


def summarise(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """What each bypass changes; the layer at the published relative depth a second time, as "matched"."""
    clean = rows[rows["part"] == "none"].set_index("example")
    common = {"condition": clean["condition"].iloc[0], "kind": "all"}
    table: list[dict[str, Any]] = []
    done = rows[rows["part"] != "none"]
    for (part, layer), own in done.groupby(["part", "layer"], sort=False):
        own = own.set_index("example").loc[clean.index]
        facts = {**common, "part": part, "layer": layer, "at": "each"}
        table += change_rows(own["correct"], clean["correct"], own["flipped"], clean["group"], settings.seed, facts)
    each = by_quantity(tidy(table, _OWN))
    again = each[each["layer"].isin(set(done.loc[done["matched"], "layer"]))]
    return pd.concat([each, again.assign(at=again["at"].replace("each", "matched"))], ignore_index=True)


BYPASS = Experiment("bypass", lambda material: material.interventions, measure, summarise, passes=9)
