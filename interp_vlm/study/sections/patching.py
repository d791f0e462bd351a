"""Activation patching in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from interp_vlm.study.patching import DIRECTIONS, PLACES
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import MARKERS, PARTS, blank, finish, layers_axis, line, reference
from interp_vlm.study.sections.words import grid, interval_fact, listed, one, span

__all__ = ["section"]

_NAMES = {"image": "image tokens", "question": "question tokens", "last": "last token"}
_VERBS = {"denoising": "restored", "noising": "removed"}
_METHOD = """The residual stream entering a layer is taken from the run on the other picture, at the same positions.
LD is the score of the one picture's right answer minus that of the other's. Restored (denoising: clean into corrupt)
is (LD_patched − LD_corrupt) / (LD_clean − LD_corrupt), removed (noising: corrupt into clean) is one minus that; both
are ratios of means. Pairs of pictures instead of noise, both directions: Zhang and Nanda, arXiv 2309.16042; for
pictures: arXiv 2406.16320."""


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on patching."""
    whole = table[table["kind"] == "all"]
    models = [model for model in models if model in set(whole["model"])]
    return Section(
        title="Where does the computation hold what the answer depends on?",
        question="Two pictures differ in one object, and so do the right answers. Where does that difference sit, "
        "and up to which layer?",
        answer=_answer(whole, models),
        points=tuple(_points(whole, models)),
        facts=(
            ("n", f"pairs answered rightly on both pictures: {listed(_solved(whole, models))}"),
            ("interval", f"{interval_fact(whole)}; a pair is a group"),
            ("compared with", "0: the run that is patched; 1: the run that the activations come from"),
            (
                "control",
                f"entering layer 0, image tokens must carry 1 and the others 0: off by at most {_off(whole):.1g}",
            ),
        ),
        method=_METHOD,
        panels=tuple(_panel(whole[whole["model"] == model], model) for model in models),
        table=_table(whole, models),
        summary=_summary(whole, models),
    )


def _handover(whole: pd.DataFrame, model: str) -> int | None:
    """The first layer at whose entry the last token carries more than the image tokens, their intervals apart."""
    own = whole[(whole["model"] == model) & (whole["direction"] == "denoising")]
    wide = own.pivot_table(index="layer", columns="positions", values=["low", "high"], observed=True)
    if ("low", "last") not in wide or ("high", "image") not in wide:
        return None
    later = wide.index[wide["low", "last"] > wide["high", "image"]]
    return int(later[0]) if len(later) else None


def _handovers(whole: pd.DataFrame, models: Sequence[str]) -> dict[int | None, list[str]]:
    found: dict[int | None, list[str]] = {}
    for model in models:
        found.setdefault(_handover(whole, model), []).append(model)
    return found


def _answer(whole: pd.DataFrame, models: Sequence[str]) -> str:
    found = _handovers(whole, models)
    stays = listed(found.pop(None, [])) if None in found else ""
    tail = f"In {stays} there is no evidence that it leaves the image tokens before the last layer." if stays else ""
    if not found:
        return tail
    if len(found) == 1 and not stays:
        who = "" if len(models) == 1 else "In every model, the "
        start = f"{who}difference starts" if who else "The difference starts"
        return f"{start} at the image tokens and has moved to the last token when layer {next(iter(found))} begins."
    moved = listed(f"layer {layer} begins ({', '.join(who)})" for layer, who in sorted(found.items()))  # type: ignore[type-var]
    return f"The difference starts at the image tokens and has moved to the last token when {moved}. {tail}".strip()


def _summary(whole: pd.DataFrame, models: Sequence[str]) -> str:
    layers = sorted(layer for layer in _handovers(whole, models) if layer is not None)
    if not layers:
        return ""
    when = f"layer {layers[0]} begins" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]} begin"
    return f"What tells two pictures apart has moved from the image tokens to the last token when {when}."


def _points(whole: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        own = whole[(whole["model"] == model) & (whole["direction"] == "denoising") & (whole["layer"] > 0)]
        peaks = [rows.sort_values("value").iloc[-1] for _, rows in own.groupby("positions", sort=False)]
        shown = [f"{_NAMES[row['positions']]} at most {span(row, 2)}, entering layer {row['layer']}" for row in peaks]
        if shown:
            yield f"{model}, share restored after layer 0: {'; '.join(shown)}."


def _solved(whole: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        note = whole[whole["model"] == model]["note"].iloc[0]
        yield f"{note.split(' pairs')[0]} ({model})"


def _off(whole: pd.DataFrame) -> float:
    """How far the control is from what algebra says."""
    first = whole[whole["layer"] == 0]
    return float((first["value"] - (first["positions"] == "image").astype(float)).abs().max())


def _panel(rows: pd.DataFrame, model: str) -> Panel:
    figure, axes = blank(3.6)
    reference(axes, 0, vertical=False)
    reference(axes, 1, vertical=False)
    for number, positions in enumerate(PLACES):
        for direction, style in zip(DIRECTIONS, ("-", ":"), strict=True):
            own = rows[(rows["positions"] == positions) & (rows["direction"] == direction)]
            line(axes, own, PARTS[number], f"{_NAMES[positions]}, {_VERBS[direction]}", MARKERS[number], style)
    layers_axis(axes, int(rows["layer"].max()) + 1, "entering decoder layer")
    axes.set_ylabel("share of the difference")
    caption = (
        f"{model}: share of the difference that patching these positions restores (solid) or removes (dotted); bands: "
    )
    return Panel(f"patching-{model}", caption + "95 % intervals.", finish(figure, axes, columns=2))


def _table(whole: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    leads = whole[["quantity", "positions", "layer"]].drop_duplicates().itertuples(index=False, name=None)
    keys = {
        (_NAMES[positions], f"layer {layer}", quantity): (positions, layer, quantity)
        for quantity, positions, layer in leads
    }

    def cell(lead: tuple[str, ...], model: str) -> str:
        positions, layer, quantity = keys[lead[0], lead[1], lead[2]]
        row = one(whole, model=model, positions=positions, layer=layer, quantity=quantity)
        return "" if row is None else span(row, 2)

    return grid(list(keys), models, cell, ("patched", "entering", "quantity"))
