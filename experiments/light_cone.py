"""Draw docs/light-cone.png: what each plan computes, from real plans of two embedded models.

python experiments/light_cone.py [PATH]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import interp_vlm as iv

NOTHING, ATTENDED, COMPUTED = range(3)
COLOURS = ("#f1f1f1", "#9cc3e6", "#d9541e")
NAMES = ("not needed", "keys and values kept of the clean run", "computed")
START = "#1b4f72"

PANELS: tuple[tuple[str, Any], ...] = (
    ("testbed:llava", iv.AttentionKnockout("last", "image", layers=[2])),
    ("testbed:llava", iv.AttentionKnockout("question", "image", layers=[1])),
    ("testbed:paligemma", iv.AttentionKnockout("last", "image", layers=[1])),
)


def cells(vlm: iv.VLM, batch: Any, intervention: Any) -> tuple[np.ndarray, Any]:
    """What the plan does with each cell, (layer, position), and the plan."""
    plan = vlm.plan(batch, intervention)
    trunk: Any = vlm._engine.clean.of(batch).trunk
    found = np.full((vlm.anatomy.n_layers, trunk.length), NOTHING)
    rows = range(plan.start, plan.start + plan.rows)
    for layer in range(plan.layer, plan.layer + plan.layers):
        seen = trunk.attended([layer])[0, rows].any(dim=0).cpu().numpy()
        found[layer, seen] = ATTENDED
        found[layer, rows] = COMPUTED
    return found, plan


def draw() -> Any:
    """The figure."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    scene = iv.data.digit_scenes(n=1)[0]
    figure = Figure(figsize=(8.6, 6.2), layout="constrained")
    for axes, (name, intervention) in zip(figure.subplots(len(PANELS)), PANELS, strict=True):
        vlm = iv.load(name)
        batch = vlm.encode(scene.image, scene.question)
        found, plan = cells(vlm, batch, intervention)
        layers, length = found.shape
        axes.pcolormesh(
            np.arange(length + 1) - 0.5, np.arange(layers + 1) - 0.5, found, cmap=ListedColormap(COLOURS),
            vmin=NOTHING, vmax=COMPUTED, edgecolors="white", linewidth=0.6,
        )  # fmt: skip
        axes.plot(
            [plan.start - 0.5, plan.start + plan.rows - 0.5], [plan.layer - 0.5] * 2, color=START, linewidth=4,
            solid_capstyle="butt",
        )  # fmt: skip
        share = (found == COMPUTED).mean()
        what = f"queries {intervention.queries}, keys {intervention.keys}, layer {intervention.layers[0]}"
        axes.set_title(f"{plan.name}   {name}, knockout: {what}   ({share:.0%} of the cells computed)", fontsize=9)
        _name_spans(axes, batch.tokens[0], layers)
        axes.set_yticks(range(layers))
        axes.set_ylabel("layer")
        axes.set_ylim(-1.6, layers - 0.5)
        axes.set_xticks(range(0, length, 10))
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("position in the prompt")
    handles = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in (COMPUTED, ATTENDED, NOTHING)]
    handles.append(Patch(color=START, label="residual stream that it starts from"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _name_spans(axes: Any, tokens: Any, layers: int) -> None:
    """Below the cells: where picture, question and the answer's position lie."""
    spans = [("picture", tokens.image), ("question", tokens.question)]
    for word, where in spans:
        low, high = int(where.min()), int(where.max())
        axes.plot([low - 0.4, high + 0.4], [-0.8, -0.8], color="0.4", linewidth=1)
        axes.text((low + high) / 2, -0.95, word, ha="center", va="top", fontsize=8, color="0.3")


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "light-cone.png")
    draw().savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
