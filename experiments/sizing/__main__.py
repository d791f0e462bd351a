"""The tables of docs/scale.md: the memory of plans on the published models, and what a study of them computes.

    python -m experiments.sizing                                  # both tables, some five minutes
    python -m experiments.sizing --models paligemma --only memory # half a minute
    python -m experiments.sizing --write                          # both tables, put into docs/scale.md

No weights are needed: memory is worked out on models in their published sizes whose weights take no memory, and passes
are counted on narrow models that are as deep and have as long prompts.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from experiments.sizing import cost, memory
from experiments.sizing.shapes import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def main(
    models: Annotated[str, typer.Option(help="Families, with commas between them.")] = ",".join(MODELS),
    only: Annotated[str, typer.Option(help="One of the tables: memory or cost.", show_default="both")] = "",
    write_page: Annotated[bool, typer.Option("--write", help="Put the tables into docs/scale.md.")] = False,
) -> None:
    """Print how much memory the plans take on the published models, and what a study of them computes.

    Example: python -m experiments.sizing --models paligemma --only memory
    """
    torch.set_num_threads(1)
    wanted = [name.strip() for name in models.split(",")]
    if unknown := sorted(set(wanted) - set(MODELS)):
        raise typer.BadParameter(f"{', '.join(unknown)}; expected some of {', '.join(MODELS)}", param_hint="--models")
    if only not in ("", "memory", "cost"):
        raise typer.BadParameter(f"{only!r}; expected memory or cost", param_hint="--only")
    if write_page and wanted != list(MODELS):
        raise typer.BadParameter("the page has all models", param_hint="--models")
    tables = {}
    if only != "cost":
        tables["memory"] = memory.table([row for name in _told(wanted) for row in memory.needed(name, measure=True)])
    if only != "memory":
        tables["cost"] = cost.table([row for name in _told(wanted) for row in cost.costs(name)], cost.material())
    if write_page:
        _write(PAGE, filled(PAGE.read_text(), tables))
        print(PAGE)
    else:
        print(*tables.values(), sep="\n\n")


def _told(names: Sequence[str]) -> Iterator[str]:
    """The names, each shown when its turn comes."""
    for name in names:
        typer.echo(name, err=True)
        yield name


def filled(text: str, tables: Mapping[str, str]) -> str:
    """The page with these tables between their marks.

    Raises:
        ValueError: for a page without the marks of a table.
    """
    for name, made in tables.items():
        start, end = f"<!-- {name}: made by python -m experiments.sizing --write -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the page has no table between {start!r} and {end!r}")
        text = f"{before}{start}\n{made}\n{end}{after}"
    return text


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}")
    os.close(handle)
    Path(name).write_text(text)
    Path(name).chmod(0o644)
    Path(name).replace(path)


if __name__ == "__main__":
    typer.run(main)
