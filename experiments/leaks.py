"""Leaks on planted circuits, for docs/leaks.md: is the true detour named, and what is left once it is closed.

python experiments/leaks.py [--models 20] writes the table and the picture of the page.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

import interp_vlm as iv
from interp_vlm.testbed.planted import Planted, plant

PAGE = Path(__file__).parents[1] / "docs" / "leaks.md"
CASES = (
    ("llava", None), ("paligemma", None), ("qwen2_vl", None), ("llava", "question"), ("paligemma", "question"),
    ("qwen2_vl", "question"), ("paligemma", "prefix"),
)  # fmt: skip
HEADER = (
    "| model | the planted route | knockout | true route named (95 % interval) | routes listed | colour left: knockout "
    "| closed | nobody reads the patch |\n|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Measured:
    """One planted model: whether leaks names its route, among how many, and the share of the answer's colour that each
    run leaves."""

    named: bool
    routes: float
    knockout: float
    closed: float
    unreadable: float


def measure(family: str, detour: str | None, seed: int, pairs: int = 4) -> Measured:
    """Block the direct route of a planted model, look for leaks, and close them."""
    made = plant(family, seed, detour=detour)
    clean, corrupt, _, _ = made.pairs(pairs)
    patch = iv.select.positions(made.signal)
    layers = [layer for layer in range(made.vlm.anatomy.n_layers) if detour or layer != made.route.edges[0].layer]
    direct = iv.AttentionKnockout("last", patch, layers=layers)
    unread = iv.AttentionKnockout(iv.select.all - patch, patch)
    found = made.vlm.leaks(clean, direct)
    runs = ([], [direct], direct.closing(made.vlm, clean), [unread])
    base, *left = (_colour(made, clean, corrupt, run) for run in runs)
    named = all(any(_follows(route, made) for route in routes) for routes in found.routes)
    return Measured(named, float(np.mean(list(map(len, found.routes)))), *(value / base for value in left))


def _colour(made: Planted, clean: iv.Batch, corrupt: iv.Batch, interventions: Sequence[Any]) -> float:
    """The mean over pairs of what the colour of the patch does to the logit difference of the two answers."""
    red, blue = made.vlm.tokenizer.convert_tokens_to_ids(list(made.answers))
    runs = [made.vlm.run(batch, list(interventions)).logits for batch in (clean, corrupt)]
    here, there = (logits[:, red] - logits[:, blue] for logits in runs)
    return float((here - there).abs().mean())


def _follows(route: Any, made: Planted) -> bool:
    """Whether the planted edges lie on a route, each at its layer and its positions."""
    edges = made.route.edges
    return len(route.layers) == len(edges) and all(
        edge.layer in layers and {*edge.keys} <= {*start.positions} and {*edge.queries} <= {*stop.positions}
        for edge, start, stop, layers in zip(edges, route.stops[:-1], route.stops[1:], route.layers, strict=True)
    )


def row(family: str, detour: str | None, found: Sequence[Measured]) -> str:
    """One line of the page's table."""
    named = binomtest(sum(each.named for each in found), len(found))
    low, high = named.proportion_ci(0.95)
    shares = ([getattr(each, name) for each in found] for name in ("knockout", "closed", "unreadable"))
    cells = (
        family,
        {None: "straight, one layer", "question": "by a question token", "prefix": "by an earlier patch"}[detour],
        "last to patch, all layers" if detour else "last to patch, all layers but that one",
        f"{named.k} of {named.n} ({low:.2f} to {high:.2f})",
        f"{np.median([each.routes for each in found]):.0f}",
        *(f"{np.median(own):.1%} ({min(own):.1%} to {max(own):.1%})" for own in shares),
    )
    return f"| {' | '.join(cells)} |"


def table(models: int) -> Iterator[str]:
    yield HEADER
    for family, detour in CASES:
        yield row(family, detour, [measure(family, detour, seed) for seed in range(models)])


def draw() -> Any:
    """The picture: a window's leaks in an embedded model."""
    vlm = iv.load("testbed:paligemma")
    scene = iv.data.digit_scenes(n=1)[0]
    batch = vlm.encode(scene.image, scene.question)
    patches = iv.select.image & iv.select.box(0, 0, 24, 24)
    return vlm.leaks(batch, iv.AttentionKnockout("last", patches, layers=[1, 2])).plot()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=20, help="planted models in each row")
    lines = "\n".join(table(parser.parse_args().models))
    text = PAGE.read_text()
    PAGE.write_text(re.sub(r"(<!-- table -->\n).*?(\n<!-- end -->)", lambda found: found[1] + lines + found[2], text,
                           flags=re.DOTALL))  # fmt: skip
    draw().savefig(PAGE.with_suffix(".png"), dpi=110, metadata={"Software": None})
    print(lines)


if __name__ == "__main__":
    main()
