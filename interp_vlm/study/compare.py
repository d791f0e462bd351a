"""The command `interp-vlm compare`: how fragile several models are, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

__all__ = ["CLAIMS", "compare", "side_by_side"]

CLAIMS = ("A14", "A15", "A16", "A17", "A18", "A19")
"""The published claims about ablated neurons and bypassed layers: what they need is what is run."""


def compare(
    model: Annotated[list[str], typer.Argument(help="Hub ids, local folders or testbed:NAME.")],
    data: Annotated[
        str,
        typer.Option(help="digits, pope:FILE, file:PATH or hf:ID, options after '?': pope:FILE?images=FOLDER."),
    ] = "digits",
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder, new or empty.", show_default="runs/study-1, or the next free number"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions at most.", show_default="300 digit questions; all of other data")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was stopped in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of scenes, random sets and resampling.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="Where the models go: cuda, auto, ...", show_default="the CPU")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes, or workers on Ray.",
            show_default="one a core for the embedded models, else 1; all that the Ray cluster has room for",
        ),
    ] = None,
    ray: Annotated[str | None, typer.Option(help="Work on Ray, as study does: local, auto or HOST:PORT.")] = None,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs of each worker on Ray.")] = 0.0,
    memory_per_worker: Annotated[
        str | None, typer.Option(help="Main memory of each worker on Ray, such as 2GiB.", show_default="no bound")
    ] = None,
) -> None:
    """Compare how fragile models are: what ablating neurons and bypassing layers costs each of them.

    Prints a table side by side and writes a report with the fragility curves of all models. Neurons are
    ablated at two thirds of each model's depth and an MLP is left out at 25/27 of it, so that the comparison is fair.

    Example: interp-vlm compare testbed:llava testbed:paligemma --limit 60 --out runs/fragility
    """
    import pandas as pd
    from rich.console import Console

    from interp_vlm.errors import StudyError
    from interp_vlm.study.command import crew_on_ray
    from interp_vlm.study.folder import free_folder
    from interp_vlm.study.runner import run_study
    from interp_vlm.study.settings import Settings, short_names

    if resume and out is None:
        raise StudyError("--resume without --out", expected="the folder of the comparison to go on with")
    if workers is not None and workers < 1:
        raise StudyError(f"workers is {workers}", expected="a whole number from 1")
    settings = Settings(models=tuple(model), data=data, limit=limit, seed=seed, device=device, claims=CLAIMS)
    crew = crew_on_ray(settings, ray, workers, gpus_per_worker, memory_per_worker)
    folder = free_folder(Path("runs")) if out is None else out
    try:
        report = run_study(settings, folder, resume=resume, workers=workers, crew=crew)
    except KeyboardInterrupt:
        typer.echo(f"stopped; go on with --resume --out {folder}", err=True)
        raise
    if crew is not None:
        typer.echo(crew.summary, err=True)
    files = {name: folder / "tables" / f"{name}.parquet" for name in ("accuracy", "neurons", "bypass")}
    tables = {name: pd.read_parquet(file) for name, file in files.items() if file.is_file()}
    Console().print(side_by_side(tables, list(short_names(settings.models).values())), highlight=False)
    typer.echo(f"report: {report.resolve()}")


def side_by_side(tables: Mapping[str, pd.DataFrame], models: Sequence[str]) -> Table:
    """The comparison as a table for the terminal, a column for each model.

    Args:
        tables: the tidy tables of the experiments that were done, among "accuracy", "neurons" and "bypass".
        models: their names, in order.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("", *models, title="Fragility", box=SIMPLE_HEAD, title_justify="left")
    for what, cell in _lines(tables).items():
        table.add_row(what, *map(cell, models))
    table.caption = (
        "points of accuracy with 95 % intervals, neurons set to their mean at two thirds of the depth; robust: within "
        "5 points (two one-sided tests); fragile: worse than random neurons of equal norm; Holm-corrected"
    )
    table.caption_justify = "left"
    return table


def _lines(tables: Mapping[str, pd.DataFrame]) -> dict[str, Callable[[str], str]]:
    """What each line of the comparison says, and its cell for a model."""
    from interp_vlm.study.changes import CHANGE, SMALLEST
    from interp_vlm.study.neurons import BEYOND, HEADLINE, verdict
    from interp_vlm.study.sections.words import one, span

    def number(name: str, wanted: Mapping[str, Any]) -> Callable[[str], str]:
        def cell(model: str) -> str:
            row = one(tables[name], model=model, **wanted) if name in tables else None
            return "–" if row is None else span(row)

        return cell

    def word(size: str) -> Callable[[str], str]:
        def cell(model: str) -> str:
            found = tables.get("neurons")
            return "not measured" if found is None else verdict(found[found["model"] == model], size)

        return cell

    norm = "random of equal norm"
    accuracy = tables.get("accuracy")
    first = "" if accuracy is None else accuracy["condition"].iloc[0]
    whole = {"quantity": "accuracy", "kind": "all", "category": "", "condition": first}
    lines = {"accuracy (%)": number("accuracy", whole)}
    for size in HEADLINE:
        at = {"size": size, "fill": "mean", "at": "depth"}
        lines |= {
            f"top {size}": number("neurons", {"quantity": CHANGE, "set": "top", **at}),
            f"random {size}, equal norm": number("neurons", {"quantity": CHANGE, "set": norm, **at}),
            f"top beyond random, {size}": number("neurons", {"quantity": BEYOND[norm], "set": "top", **at}),
            f"verdict on top {size}": word(size),
            f"smallest detectable effect, top {size}": number("neurons", {"quantity": SMALLEST, "set": "top", **at}),
        }
    late = {"quantity": CHANGE, "part": "mlp", "at": "matched"}
    return lines | {"without the MLP at 25/27 of the depth": number("bypass", late)}
