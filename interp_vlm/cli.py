"""The command line: `interp-vlm study | inspect | testbed train`.

Every error that the library raises on purpose becomes one line on standard error and exit status 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from interp_vlm.errors import InterpVLMError
from interp_vlm.study.command import study

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
app.command()(study)


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
    from interp_vlm.study.inspect import inspect_model

    inspect_model(model, image, question, out)


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
        app()
    except InterpVLMError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
