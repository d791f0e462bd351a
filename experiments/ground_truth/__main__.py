"""Score every localisation method of the library against planted circuits, and write the page that says so.

    python -m experiments.ground_truth                       # 20 seeds of three families, some ten minutes
    python -m experiments.ground_truth --seeds 1 --families llava --out runs/validation

Each seed plants other routes: a straight one, one with a backup, detours, and a null model whose answer does not depend
on the picture. Rows go to OUT/validation.parquet; the tables of OUT/validation.md and the figure are made from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.ground_truth.bench import NOTHING, Bench, Found, truth_of
from experiments.ground_truth.methods import METHODS, PAIRS, UNPAIRED, cuts, pairs
from experiments.ground_truth.page import write
from experiments.ground_truth.scores import integrated, score
from interp_vlm.testbed import NAMES
from interp_vlm.testbed.planted import plant


@dataclass(frozen=True)
class Case:
    """A sort of planted model.

    Attributes:
        plant: what `plant` is told.
        share: of the seeds that it is run on.
        differ: whether the two pictures of a pair have different answers.
        families: whose it is.
    """

    plant: dict[str, Any]
    share: float = 1.0
    differ: bool = True
    families: tuple[str, ...] = NAMES

    @property
    def empty(self) -> bool:
        """There is nothing to find."""
        return bool(self.plant.get("null")) or not self.differ


CASES = {
    "straight": Case({}),
    "null model": Case({"null": True}),
    "same answer": Case({}, share=0.25, differ=False),
    "backup": Case({"backup": True}, share=0.25),
    "question detour": Case({"detour": "question"}, share=0.25),
    "prefix detour": Case({"detour": "prefix"}, share=0.25, families=("paligemma",)),
}
PICTURES = 6
"""Pairs of pictures for each model."""
DOCS = Path(__file__).parents[2] / "docs"


def models(seeds: int, families: Sequence[str]) -> list[tuple[str, str, int]]:
    """(family, case, seed) of everything that is planted."""
    return [
        (family, name, seed)
        for seed in range(seeds)
        for name, case in CASES.items()
        for family in families
        if family in case.families and seed < max(1, round(case.share * seeds))
    ]


def measure(family: str, name: str, seed: int, pictures: int = PICTURES) -> Iterator[dict[str, Any]]:
    """The scores of every method on one planted model, one row for each thing that a method names."""
    case = CASES[name]
    planted = plant(family, seed, **case.plant)
    bench = Bench(planted, pictures, case.differ)
    methods = dict(METHODS) if case.differ else {key: METHODS[key] for key in METHODS if key not in UNPAIRED}
    if planted.backups:
        methods[PAIRS] = pairs
    found = {key: method(bench) for key, method in methods.items()}
    truth = NOTHING if case.empty else truth_of(planted)
    also = {
        "whole": truth_of(planted, backups=True) if planted.backups else None,
        "route": None if case.differ else truth_of(planted),
    }
    where = {"family": family, "case": name, "seed": seed}
    for key, each in found.items():
        for row in score(each, truth, planted.decoys, **also):
            yield {**where, "method": key, **row}
    if not case.empty:
        for key, value in cuts(bench).items():
            yield {**where, "method": key, "what": "cut", "effect": value}
    if name == "straight":
        for row in _faithful(bench, found, seed):
            yield {**where, **row}


def _faithful(bench: Bench, found: dict[str, Found], seed: int) -> Iterator[dict[str, Any]]:
    rankings = {name: each.ranking for name, each in found.items() if each.ranking is not None}
    true = truth_of(bench.planted).heads or ()
    rankings["the truth"] = {head: float(head in true) for head in bench.heads}
    chance = np.random.default_rng(seed).permutation(len(bench.heads)) + 1.0
    rankings["random"] = dict(zip(bench.heads, chance.tolist(), strict=True))
    for name, (cpr, cmd) in integrated(bench, rankings).items():
        yield {"method": name, "what": "faithfulness", "cpr": cpr, "cmd": cmd}


def main(
    seeds: Annotated[
        int, typer.Option(min=1, help="Straight routes and null models for each family; of others, 1 in 4.")
    ] = 20,
    families: Annotated[str, typer.Option(help="Families, with commas between them.")] = ",".join(NAMES),
    pictures: Annotated[int, typer.Option(min=3, help="Pairs of pictures for each model.")] = PICTURES,
    out: Annotated[Path, typer.Option(help="Folder of the rows, the page and its figure.", show_default="docs")] = DOCS,
) -> None:
    """Score every localisation method of the library against planted circuits.

    Example: python -m experiments.ground_truth --seeds 2 --families llava,paligemma --out runs/validation
    """
    torch.set_num_threads(1)
    wanted = [name.strip() for name in families.split(",")]
    if unknown := sorted(set(wanted) - set(NAMES)):
        raise typer.BadParameter(f"{', '.join(unknown)}; expected some of {', '.join(NAMES)}", param_hint="--families")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[dict[str, Any]] = []
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=len(models(seeds, wanted)))
        for family, case, seed in models(seeds, wanted):
            bar.update(task, description=f"{family}, {case}, seed {seed}")
            rows += measure(family, case, seed, pictures)
            bar.advance(task)
    for path in write(pd.DataFrame(rows), out):
        print(path)


if __name__ == "__main__":
    typer.run(main)
