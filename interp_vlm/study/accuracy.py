"""How often each model is right, by kind of question."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import exp
from typing import TYPE_CHECKING, Any

import pandas as pd

from interp_vlm.data.scorers import SCORERS
from interp_vlm.readouts.spelling import normalised
from interp_vlm.stats import mean, paired_test
from interp_vlm.study.encoding import identity, measured
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.judge import Judge
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import corrected, row, tidy

if TYPE_CHECKING:
    from interp_vlm.data.example import Example
    from interp_vlm.study.material import Shard
    from interp_vlm.tokens.batch import Batch

__all__ = ["ACCURACY"]

_OWN = ("condition", "kind", "category")


def measure(bench: Bench, shard: Shard) -> pd.DataFrame:
    """One row per question: the answer, its scores, and whether it is right."""

    def rows_of(examples: Sequence[Example], batch: Batch) -> Iterator[dict[str, Any]]:
        answers = bench.vlm.run(batch).answers
        judge = Judge(bench.vlm, batch, examples)
        for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
            yield {
                **identity(example, shard.condition),
                "answer": str(answer),
                "correct": judge.right(number, answer),
                "confidence": exp(answer.scores[normalised(answer)]),
                "scores": json.dumps({text: round(score, 6) for text, score in answer.scores.items()}),
                "first_token_only": judge.first_token_only[number],
                **{f"by_{name}": scorer(str(answer), example) for name, scorer in SCORERS.items()},
            }

    return pd.DataFrame(measured(bench.vlm, shard.examples, bench.settings.batch_size, rows_of))


def summarise(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Accuracy by condition and kind, against always giving a kind's most common answer."""
    table = []
    expected = rows["expected"].map(normalised)
    constant = expected.groupby([rows["condition"], rows["kind"]], sort=False).transform(_most_common) == expected
    for kind, category, part in _parts(rows):
        facts = {"condition": part["condition"].iloc[0], "kind": kind, "category": category}
        groups, right, always = part["group"], part["correct"], constant[part.index]
        accuracy = mean(right, groups, seed=settings.seed)
        if category:  # all answers of a sort may be the same, so that a constant answer says nothing
            table.append(row(accuracy, "accuracy", "%", scale=100, **facts))
            continue
        test = paired_test(right, always, groups, seed=settings.seed)
        found = replace(accuracy, p=test.p, method=f"{accuracy.method}; p: {test.method.split(', interval')[0]}")
        baseline = {"baseline": 100 * float(always.mean()), "compared": "the kind's most common answer, always given"}
        table.append(row(found, "accuracy", "%", scale=100, **facts, **baseline))
        table += _other_rules(part, facts, settings)
    return corrected(tidy(table, _OWN))


def _parts(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """All questions of a condition, then each kind, then the named sorts of a kind."""
    for _, condition in rows.groupby("condition", sort=False):
        yield "all", "", condition
        for kind, part in condition.groupby("kind", sort=True):
            yield str(kind), "", part
            named = part[part["category"] != ""]
            for category, few in named.groupby("category", sort=True):
                if len(few) < len(part):
                    yield str(kind), str(category), few


def _most_common(answers: pd.Series) -> str:
    counts = answers.value_counts()
    return min(str(answer) for answer in counts[counts == counts.max()].index)


def _other_rules(part: pd.DataFrame, facts: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Accuracy by the published scoring rules that disagree with this study's."""
    rows = []
    for name in SCORERS:
        known = part[part[f"by_{name}"].notna()]
        if len(known) == len(part) and (known[f"by_{name}"] != known["correct"]).any():
            estimate = mean(known[f"by_{name}"], known["group"], seed=settings.seed)
            rows.append(row(estimate, f"accuracy by the rule {name}", "%", scale=100, **facts))
    return rows


ACCURACY = Experiment("accuracy", lambda material: material.conditions, measure, summarise, passes=1)
