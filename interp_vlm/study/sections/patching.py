"""Activation patching in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from interp_vlm.study.patching import DIRECTIONS, PLACES
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import MARKERS, blank, colours, finish, layers_axis, line, reference
from interp_vlm.study.sections.words import grid, interval_fact, listed, one, sizes, span

__all__ = ["section"]

_NAMES = {"image": "image tokens", "question": "question tokens", "last": "last token"}


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on patching."""
    whole = table[table["kind"] == "all"]
    models = [model for model in models if model in set(whole["model"])]
    return Section(
        title="Where does the computation hold what the answer depends on?",
        question="Two pictures differ in one object, and so do the right answers. At which positions, entering which layer, "
        "does that difference sit?",
        answer=_answer(whole, models),
        points=tuple(_points(whole, models)),
        facts=(
            ("n", f"{sizes(whole, 'pair')}; {listed(_solved(whole, models))}"),
            ("interval", interval_fact(whole) + "; ratio of means"),
            ("compared with", "0: the run that is patched; 1: the run that the activations come from"),
            ("control", "all image tokens entering layer 0 carry 1, question and last token 0, as they must"),
        ),
        method="Residual stream entering a layer, taken from the run on the other picture at the same positions. LD is the "
        "score of the one picture's right answer minus that of the other's; restored (denoising: clean into corrupt) is "
        "(LD_patched − LD_corrupt) / (LD_clean − LD_corrupt), removed (noising: corrupt into clean) is one minus that. Paired "
        "pictures instead of noise and ratios of means: Zhang and Nanda, arXiv 2309.16042; for pictures: arXiv 2406.16320.",
        panels=tuple(_panel(whole[whole["model"] == model], model) for model in models),
        table=_table(table, models),
        summary=_summary(whole, models),
    )


def _handover(whole: pd.DataFrame, model: str) -> int | None:
    """The first layer at whose entry the last token carries more than the image tokens (denoising)."""
    own = whole[(whole["model"] == model) & (whole["direction"] == "denoising")]
    wide = own.pivot_table(index="layer", columns="positions", values="value", observed=True)
    later = wide.index[wide["last"] > wide["image"]] if {"last", "image"} <= set(wide) else []
    return int(later[0]) if len(later) else None


def _answer(whole: pd.DataFrame, models: Sequence[str]) -> str:
    parts = []
    for model in models:
        layer = _handover(whole, model)
        if layer is None:
            parts.append(f"in {model} it stays at the image tokens throughout")
        else:
            parts.append(f"in {model} the last token carries more of it than the image tokens from the entry of layer {layer} on")
    return f"The difference starts at the image tokens and moves to the last token: {listed(parts)}."


def _summary(whole: pd.DataFrame, models: Sequence[str]) -> str:
    layers = [layer for model in models if (layer := _handover(whole, model)) is not None]
    if not layers:
        return ""
    when = f"layer {layers[0]}" if len(set(layers)) == 1 else f"layers {min(layers)} to {max(layers)}"
    return f"What distinguishes two pictures has moved from the image tokens to the last token by the entry of {when}."


def _points(whole: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        own = whole[(whole["model"] == model) & (whole["direction"] == "denoising")]
        parts = []
        for positions in PLACES:
            rows = own[(own["positions"] == positions) & (own["layer"] > 0)]
            if len(rows):
                best = rows.loc[rows["value"].idxmax()]
                parts.append(f"{_NAMES[positions]} at most {span(best, 2)} (entering layer {best['layer']})")
        if parts:
            yield f"{model}, after layer 0: {listed(parts)}."


def _solved(whole: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        note = whole[whole["model"] == model]["note"].iloc[0]
        yield f"{model} {note.split(':')[0]}"


def _panel(rows: pd.DataFrame, model: str) -> Panel:
    figure, axes = blank(3.6)
    reference(axes, 0, "", vertical=False)
    reference(axes, 1, "", vertical=False)
    for number, (positions, colour) in enumerate(colours(PLACES).items()):
        for direction, style in zip(DIRECTIONS, ("-", ":"), strict=True):
            own = rows[(rows["positions"] == positions) & (rows["direction"] == direction)]
            verb = "restored" if direction == "denoising" else "removed"
            line(axes, own, colour, f"{_NAMES[positions]}, {verb}", MARKERS[number], style)
    layers_axis(axes, int(rows["layer"].max()) + 1, "entering decoder layer")
    axes.set_ylabel("share of the difference")
    caption = f"{model}: share of the logit difference that patching these positions restores (solid) or removes (dotted); 95 % intervals."
    return Panel(f"patching-{model}", caption, finish(figure, axes, columns=2))


def _table(table: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    shown = table[(table["kind"] == "all")]
    keys = {
        (_NAMES[positions], f"layer {layer}", quantity): (positions, layer, quantity)
        for quantity, positions, layer in shown[["quantity", "positions", "layer"]].drop_duplicates().itertuples(index=False, name=None)
    }

    def cell(lead: tuple[str, ...], model: str) -> str:
        positions, layer, quantity = keys[lead]
        row = one(shown, model=model, positions=positions, layer=layer, quantity=quantity)
        return "" if row is None else span(row, 2)

    return grid(list(keys), models, cell, ("patched", "entering", "quantity"))

