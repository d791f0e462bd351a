"""The report's first screen: four questions, each with a sentence and a figure made from the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import MARKERS, blank, colours, dots, finish, line, reference
from interp_vlm.study.sections.words import each, span
from interp_vlm.study.tables import where

__all__ = ["Card", "front"]

_SIGNALS = {
    ("probe", ""): "probe of the\nhidden state",
    ("confidence", ""): "confidence in\nthe answer",
    ("agreement", "greedy"): "agreement of\nsampled answers",
    ("attention_peak", ""): "largest attention\non a patch",
    ("attention_entropy", ""): "narrowness of\nattention",
    ("shuffled_labels", ""): "probe of shuffled\nlabels (control)",
}
_MASKS = {
    "all": "the whole picture",
    "top": "the most attended\npatches",
    "random": "as many patches\nat random",
    "bottom": "the least attended\npatches",
}
_SIZES = ("5", "25 %", "50 %", "90 %")


@dataclass(frozen=True)
class Card:
    """One question of the first screen.

    Attributes:
        heading: the question.
        answer: a sentence made from the numbers.
        panel: its figure.
        section: name of the section that has the details.
    """

    heading: str
    answer: str
    panel: Panel
    section: str


def front(tables: Mapping[str, pd.DataFrame], sections: Mapping[str, Section], models: Sequence[str]) -> list[Card]:
    """The cards whose experiments were done."""
    cards = []
    if "reliability" in sections:
        found = where(tables["reliability"], kind="all")
        answer = sections["reliability"].summary
        cards.append(Card("Which signals predict a right answer?", answer, _signals(found, models), "reliability"))
    if "masking" in sections:
        found = where(tables["masking"], kind="all", draw="", fill="mean", source="all layers")
        cards.append(Card("What is causally needed?", sections["masking"].summary, _needed(found, models), "masking"))
    if "reliability" in sections:
        found = where(tables["reliability"], kind="all", signal="probe")
        cards.append(Card("Where in depth does it live?", _depth_answer(found), _depth(found, models), "reliability"))
    if "neurons" in sections:
        found = where(tables["neurons"], fill="mean", draw="", at="peak")
        cards.append(
            Card("How do the models differ?", sections["neurons"].summary, _fragility(found, models), "neurons")
        )
    return cards


def _signals(found: pd.DataFrame, models: Sequence[str]) -> Panel:
    named = [_SIGNALS.get(key, "") for key in zip(found["signal"], found["judged"], strict=True)]
    rows = found.assign(label=named)[(found["quantity"] == "AUROC") & (found["layer"] == -1)]
    figure, axes = blank(3.3)
    reference(axes, 0.5, "chance")
    dots(axes, rows, list(_SIGNALS.values()), models, by="label")
    axes.set(xlim=(0.2, 1), xlabel="AUROC for a right answer")
    return Panel("front-signals", "95 % intervals; to the right of chance: predicts.", finish(figure, axes))


def _needed(found: pd.DataFrame, models: Sequence[str]) -> Panel:
    rows = where(found, quantity="change of accuracy")
    figure, axes = blank(3.3)
    reference(axes, 0, "nothing masked")
    dots(axes, rows.assign(label=rows["mask"].map(_MASKS)), list(_MASKS.values()), models, by="label")
    axes.set_xlabel("change of accuracy when masked (points)")
    return Panel("front-needed", "95 % intervals; to the left: needed.", finish(figure, axes))


def _depth(found: pd.DataFrame, models: Sequence[str]) -> Panel:
    rows = found[(found["quantity"] == "AUROC") & (found["layer"] >= 0)]
    figure, axes = blank(3.3)
    reference(axes, 0.5, "chance", vertical=False)
    for number, (model, colour) in enumerate(colours(models).items()):
        own = where(rows, model=model)
        depth = own["layer"].astype(float) / max(1.0, float(own["layer"].max() if len(own) else 1))
        line(axes, own.assign(layer=depth), colour, model, MARKERS[number % len(MARKERS)])
    axes.set(xlim=(-0.04, 1.04), xlabel="depth (0: first layer, 1: last)", ylabel="AUROC of the probe")
    caption = "Probe of the last prompt token's hidden state after each layer; bands: 95 % intervals."
    return Panel("front-depth", caption, finish(figure, axes))


def _depth_answer(found: pd.DataFrame) -> str:
    peaks = [row for _, row in where(found, quantity="peak layer").iterrows()]
    return f"The probe reads best after layer {each(peaks, lambda row: span(row, 0))}." if peaks else ""


def _fragility(found: pd.DataFrame, models: Sequence[str]) -> Panel:
    rows = found[(found["quantity"] == "change of accuracy") & found["set"].isin(["top", "random"])]
    sizes = [size for size in _SIZES if size in set(rows["size"])]
    labels = {(size, which): f"{size}, {words}" for size in sizes for which, words in _SETS.items()}
    figure, axes = blank(3.3)
    reference(axes, 0, "nothing ablated")
    named = [labels.get(key, "") for key in zip(rows["size"], rows["set"], strict=True)]
    dots(axes, rows.assign(label=named), list(labels.values()), models, by="label")
    axes.set_xlabel("change of accuracy when ablated (points)")
    caption = "Dimensions of the hidden state at the probe's best layer, set to their mean; 95 % intervals."
    return Panel("front-models", caption, finish(figure, axes))


_SETS = {"top": "the probe's", "random": "random"}
