"""The truth margin, its parts and the update of the image tokens in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from interp_vlm.study.margin import PARTS
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import MARKERS, colours, finish, line, reference
from interp_vlm.study.sections.words import each, excludes, grid, interval_fact, listed, one, sizes, span, text
from interp_vlm.study.tables import where

__all__ = ["section"]

_METHOD = """The truth margin is the logit of the right answer minus that of the best wrong one, all spellings of an
answer together, read at the last prompt token. After each layer the residual stream is read as if that layer were the
last: final norm, then output head (logit lens). The margin of the last layer is a sum over what attention and MLP
layers add, at the scale of the final norm and before a soft-cap (direct logit attribution; the sum is checked). The
peak is the largest of the layers' means, with the interval of that layer. Updates: the length of what a layer adds to
the image tokens, mean over tokens, and that as a share of the length before it. Middle and last layers:
arXiv 2605.08200."""
_MARGIN = """Mean margin of the right answer over the best wrong one after each layer, with 95 % intervals; above 0 the
right answer leads."""
_PARTS = """What the attention and the MLP of each layer add to the margin of the last layer, with 95 % intervals."""
_UPDATE = """How much each layer changes the image tokens, with 95 % intervals: as a share of their length (left), and
as it is (right, logarithmic)."""
_DEPTH = "depth (0: first layer, 1: last)"
_UPDATES = {
    "relative update of image tokens": "share of the length",
    "absolute update of image tokens": "length of the update",
}


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on the margin."""
    whole = where(table, kind="all")
    scored = whole[whole["quantity"] == "truth margin"]
    models = [model for model in models if model in set(whole["model"])]
    shown = [_by_update(whole, models)]
    if len(scored):
        shown = [_by_depth(scored, models), _by_part(whole, models), *shown]
    return Section(
        title="Where in depth does the answer form, and by which parts?",
        question="After which layer does the right answer lead the best wrong one, what adds to that lead, and where "
        "do the image tokens still change?",
        answer=_answer(whole, models),
        points=tuple(_points(whole, models)),
        facts=(
            ("n", f"{sizes(scored if len(scored) else whole)} ({whole['condition'].iloc[0]}){_left_out(scored)}"),
            ("interval", interval_fact(whole)),
            ("interval of the peak's layer", "the middle 95 % of the peaks of resampled pictures"),
            ("compared with", "0: the right answer and the best wrong one score alike"),
            ("read at", "the last prompt token; updates at all image tokens"),
        ),
        method=_METHOD,
        panels=tuple(shown),
        table=_table(whole, models),
        summary=_summary(whole, models),
    )


def _left_out(scored: pd.DataFrame) -> str:
    notes = scored[scored["note"].str.contains("left out")].drop_duplicates("model")
    found = each((row for _, row in notes.iterrows()), lambda row: row["note"].split("; ")[0]) if len(notes) else ""
    return f"; {found}" if found else ""


def _lead(whole: pd.DataFrame, model: str) -> int | None:
    """The first layer after which the right answer leads, its interval above 0."""
    own = where(whole, model=model, quantity="truth margin").sort_values("layer")
    ahead = [int(row["layer"]) for _, row in own.iterrows() if excludes(row, 0) and row["value"] > 0]
    return ahead[0] if ahead else None


def _answer(whole: pd.DataFrame, models: Sequence[str]) -> str:
    leads = {model: _lead(whole, model) for model in models}
    never = [model for model, layer in leads.items() if layer is None]
    tail = f"There is no evidence that the right answer leads after any layer in {listed(never)}." if never else ""
    known = [model for model in models if model not in never]
    if not known:
        return tail
    same = len({leads[model] for model in known}) == 1 and len(known) == len(models) > 1
    first = f"{leads[known[0]]} in every model" if same else listed(f"{leads[model]} ({model})" for model in known)
    peaks = each(_of(whole, known, quantity="peak layer"), lambda row: span(row, 0))
    start = f"The right answer takes the lead after layer {first}; its lead is largest after layer {peaks}."
    shares = each(_of(whole, known, quantity="share of the margin", part="mlp"), lambda row: span(row, 0, "%"))
    return f"{start} Of what attention and MLP layers add, MLP layers add {shares}. {tail}".strip()


def _of(whole: pd.DataFrame, models: Sequence[str], **wanted: str) -> list[pd.Series]:
    found = (one(whole, model=model, **wanted) for model in models)
    return [row for row in found if row is not None]


def _summary(whole: pd.DataFrame, models: Sequence[str]) -> str:
    depths = [row["value"] for row in _of(whole, models, quantity="relative depth of the peak")]
    if not depths or any(_lead(whole, model) is None for model in models):
        return ""
    low, high = text(100 * min(depths), 0), text(100 * max(depths), 0)
    return f"The right answer's lead is largest at {low if low == high else f'{low} to {high}'}\u00a0% of depth."


def _points(whole: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        own = where(whole, model=model)
        found = []
        if (peak := one(own, quantity="peak truth margin")) is not None:
            found.append(f"margin at its peak {span(peak, 2)} logits")
            shares = _of(own, [model], quantity="share of the margin", part="mlp")
            found += [f"MLP share {span(row, 0, '%')}" for row in shares]
        if (jump := one(own, quantity="last layers against the middle")) is not None:
            found.append(f"image tokens' update in the last layers {span(jump, 2)} times that in the middle")
        if (flat := one(own, quantity="flatness of the middle")) is not None:
            found.append(f"largest over smallest update within the middle {span(flat, 2)}")
        if found:
            yield f"{model}: {'; '.join(found)}."


def _pair(height: float = 3.4) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two plots over depth side by side."""
    figure = Figure(figsize=(7.4, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        _style(axes)
    return figure, (left, right)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(xlim=(-0.04, 1.04), xlabel=_DEPTH)


def _curves(axes: Axes, rows: pd.DataFrame, models: Sequence[str]) -> None:
    """A line for each model over relative depth."""
    for number, (model, colour) in enumerate(colours(models).items()):
        own = where(rows, model=model)
        layers = own["layer"].astype(float)
        deepest = max(1.0, float(layers.max())) if len(own) else 1.0
        line(axes, own.assign(layer=layers / deepest), colour, model, MARKERS[number % len(MARKERS)])


def _by_depth(scored: pd.DataFrame, models: Sequence[str]) -> Panel:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    reference(axes, 0, "no lead", vertical=False)
    _curves(axes, scored, models)
    axes.set_ylabel("truth margin (logits)")
    return Panel("margin", _MARGIN, finish(figure, axes))


def _by_part(whole: pd.DataFrame, models: Sequence[str]) -> Panel:
    figure, both = _pair()
    for axes, (part, words) in zip(both, PARTS.items(), strict=True):
        reference(axes, 0, "no part in it", vertical=False)
        _curves(axes, where(whole, quantity="contribution", part=part), models)
        axes.set_title(words, fontsize=10)
    both[1].sharey(both[0])
    both[0].autoscale(axis="y")
    both[0].set_ylabel("part of the margin (logits)")
    return Panel("margin-parts", _PARTS, finish(figure, both[0]))


def _by_update(whole: pd.DataFrame, models: Sequence[str]) -> Panel:
    figure, both = _pair()
    for axes, (quantity, words) in zip(both, _UPDATES.items(), strict=True):
        _curves(axes, where(whole, quantity=quantity), models)
        axes.set_ylabel(words)
    both[0].set_ylim(bottom=0)
    both[1].set_yscale("log")
    both[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    both[1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    both[1].yaxis.set_minor_formatter(NullFormatter())
    return Panel("margin-updates", _UPDATE, finish(figure, both[0]))


def _table(whole: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    kept = whole[whole["quantity"] != "peak layer"]
    leads = kept[["quantity", "unit", "part", "layer"]].drop_duplicates().itertuples(index=False, name=None)
    keys: dict[tuple[str, str, str], tuple[str, str, int]] = {}
    for quantity, unit, part, layer in leads:
        name = f"{quantity} ({unit})" if unit else quantity
        keys[name, part, "" if layer < 0 else f"layer {layer}"] = quantity, part, layer

    def cell(lead: tuple[str, ...], model: str) -> str:
        quantity, part, layer = keys[lead[0], lead[1], lead[2]]
        row = one(whole, model=model, quantity=quantity, part=part, layer=layer)
        return "" if row is None else span(row, 2)

    return grid(list(keys), models, cell, ("quantity", "part", "at"))
