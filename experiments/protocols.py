"""Draw docs/protocols.png and print its numbers: two published protocols on the three embedded models.

python experiments/protocols.py [PATH]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import interp_vlm as iv

MODELS = ("testbed:llava", "testbed:paligemma", "testbed:qwen2_vl")
QUESTIONS, PAIRS, BATCH = 120, 150, 40


def flow(vlm: iv.VLM) -> iv.protocols.InformationFlow:
    """Colour and digit questions, each with the box of the digit that it asks about; windows of one layer of four."""
    scenes = iv.data.digit_scenes(n=QUESTIONS, kinds=["colour", "digit"], questions_per_image=2)
    return iv.protocols.information_flow(
        vlm, [encoded(vlm, scenes[start : start + BATCH]) for start in range(0, QUESTIONS, BATCH)],
        answers=[scene.answer for scene in scenes],
        objects=[[scene.meta["objects"][number]["box"] for number in scene.meta["asked"]] for scene in scenes],
        window=1, max_new_tokens=1,
    )  # fmt: skip


def effect(vlm: iv.VLM) -> iv.protocols.PatchingEffect:
    """Pictures in which the digit asked for is another one."""
    pairs = [pair for pair in iv.data.digit_pairs(n=PAIRS) if pair.clean.kind == "digit"]
    return iv.protocols.notice(
        vlm, encoded(vlm, [pair.clean for pair in pairs]), encoded(vlm, [pair.corrupt for pair in pairs]),
        [pair.clean.answer for pair in pairs], [pair.corrupt.answer for pair in pairs], site="attn_out",
    )  # fmt: skip


def encoded(vlm: iv.VLM, examples: Any) -> iv.Batch:
    return vlm.encode([example.image for example in examples], [example.question for example in examples])


def main() -> None:
    from matplotlib.figure import Figure

    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "protocols.png")
    figure = Figure(figsize=(12.6, 8.2), layout="constrained")
    panels = figure.subplots(2, len(MODELS), height_ratios=(3, 2))
    for column, name in enumerate(MODELS):
        vlm = iv.load(name)
        for row, measured in enumerate((flow(vlm), effect(vlm))):
            axes = panels[row, column]
            measured.plot(axes)
            table = measured.summary()
            n, groups = (int(table[count].iloc[0]) for count in ("n", "groups"))
            sizes = f"{n} questions answered rightly, {groups} pictures" if row == 0 else f"{n} pairs of pictures"
            axes.set_title(f"{name}\n{sizes}", fontsize="medium")
            if row == 0:
                handles, labels = axes.get_legend_handles_labels()
                axes.get_legend().remove()
            print(measured, table.to_string(float_format="{:.3f}".format), sep="\n")
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
