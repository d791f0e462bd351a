"""The command line: `interp-vlm study | compare | inspect | monitor fit, score, evaluate | testbed train`.

Every error that the library raises on purpose becomes one line on standard error and exit status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from interp_vlm.errors import InterpVLMError, StudyError
from interp_vlm.study.command import study
from interp_vlm.study.compare import compare
from interp_vlm.study.monitor_command import monitor

if TYPE_CHECKING:
    from interp_vlm.tokens.token_map import TokenMap

__all__ = ["app", "main"]

app = typer.Typer(
    name="interp-vlm",
    help="Mechanistic interpretability of vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
testbed = typer.Typer(help="The embedded tiny models.", no_args_is_help=True)
app.add_typer(testbed, name="testbed")
app.add_typer(monitor, name="monitor")
app.command()(study)
app.command()(compare)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or testbed:llava|paligemma|qwen2_vl.")],
    image: Annotated[Path, typer.Option(help="A picture.")],
    question: Annotated[str, typer.Option(help="A question about it.")],
    out: Annotated[Path, typer.Option(help="Where the picture of the patch grid goes (PNG).")] = Path("tokens.png"),
) -> None:
    """Print a model's anatomy, its sites with shapes, and the token map of one example; draw the patch grid.

    Example: interp-vlm inspect testbed:llava --image scene.png --question "is there a red 7 ?"
    """
    import io
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from interp_vlm.sites import SITES
    from interp_vlm.study.folder import write_bytes
    from interp_vlm.vlm import load

    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise StudyError(
            f"--out {out}", expected="a .png, .svg or .pdf file", remedy=f"use --out {out.stem or 'tokens'}.png"
        )
    vlm = load(model)
    tokens = vlm.encode(image, question).tokens[0]
    console = Console()
    console.print(f"[bold]{vlm!r}[/bold]", highlight=False)
    facts = Table("fact", "value", title="anatomy", title_justify="left")
    for name, value in asdict(vlm.anatomy).items():
        facts.add_row(name, str(value))
    sites = Table("site", "shape of one example", "where", title="sites", title_justify="left")
    for name, shape in vlm.site_shapes().items():
        sites.add_row(name, shape, SITES[name].where)
    roles = Table("position", "token", "role", title=repr(tokens), title_justify="left")
    for row in _token_rows(tokens):
        roles.add_row(*row)
    for table in (facts, sites, roles):
        console.print(table, highlight=False)
    drawn = io.BytesIO()
    tokens.plot().savefig(drawn, dpi=150, format=out.suffix.lower().removeprefix("."))
    write_bytes(out, drawn.getvalue())
    console.print(f"patch grid: {out}", highlight=False)


def _token_rows(tokens: TokenMap) -> Iterator[tuple[str, str, str]]:
    """Positions, text and role of each token; the tokens of a picture in one row."""
    role_of = {int(index): name for name in ("image", "question", "template", "bos") for index in tokens.role(name)}
    pictures: set[int] = set()
    for position in tokens.all.tolist():
        number = int(tokens.image_index[position])
        if number < 0:
            last = ", last" if position == int(tokens.last) else ""
            yield str(position), repr(tokens.pieces[position]), role_of[position] + last
        elif number not in pictures:
            pictures.add(number)
            own, grid = tokens.picture_tokens(number), tokens.grids[number]
            width, height = grid.size
            said = f"picture {number}: {len(own)} tokens, {grid.rows} x {grid.cols}, of {width} x {height} pixels"
            yield f"{int(own[0])}-{int(own[-1])}", said, "image"


@testbed.command()
def train(
    family: Annotated[str, typer.Argument(help="llava, paligemma or qwen2_vl.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights, the processor and the card.")],
    seed: Annotated[int, typer.Option(help="Seed of the data and the weights.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
) -> None:
    """Train an embedded model again, from nothing, on digit scenes.

    Example: interp-vlm testbed train llava --out runs/llava
    """
    from interp_vlm.testbed.train import train as train_family

    train_family(family, out, seed=seed, resume=resume)


def main() -> None:
    """Entry point of the `interp-vlm` command."""
    try:
        status = app(standalone_mode=False)
    except InterpVLMError as error:
        _refuse(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except OSError as error:
        _refuse(f"{error.filename or 'the output'} cannot be read or written ({error.strerror or error})")
    except Exception as error:
        # A mistyped command or option: typer's own errors say in words what they expected.
        if not hasattr(error, "format_message"):
            raise
        _refuse(error.format_message())  # type: ignore[attr-defined]
    sys.exit(status or 0)


def _refuse(message: str) -> NoReturn:
    """One line on standard error; none where typer has shown the help instead."""
    if message.strip():
        print(f"error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(2)
