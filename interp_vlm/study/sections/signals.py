"""Attention's shape and correctness, in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import blank, colours, dots, finish, layers_axis, line, reference
from interp_vlm.study.sections.words import bracket, excludes, grid, interval_fact, listed, one, sizes, span, text
from interp_vlm.study.signals import MEAN_LAYER, MEASURES

__all__ = ["section"]

_SHAPE = ("entropy_normalised", "clusters", "max_attention")
_SHORT = {"entropy_normalised": "H_s", "clusters": "C_k", "max_attention": "the largest attention"}


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on signals of correctness."""
    kind = table["kind"].iloc[0]
    scope = table[table["kind"] == kind]
    auroc = scope[(scope["quantity"] == "AUROC") & (scope["layer"] == MEAN_LAYER) & (scope["sinks"] != "without")]
    within = f"within {kind} questions" if kind != "all" else "over all questions"
    return Section(
        title="Does the shape of attention tell right answers from wrong ones?",
        question=f"Do spread (H_s), clusters (C_k) and peak of the attention on the picture predict correctness, {within}?",
        answer=_answer(auroc, models),
        points=tuple(_points(scope, models)),
        facts=(
            ("n", f"{sizes(auroc)} ({auroc['condition'].iloc[0]}), {within}"),
            ("interval", interval_fact(auroc) + "; not corrected for the number of measures"),
            ("compared with", "AUROC 0.5 and correlation 0: no information; and with the model's own confidence"),
            ("sinks", _sinks(scope)),
        ),
        method="Attention of the last prompt token on the image tokens, averaged over heads and layers. H_s: entropy of that "
        "distribution, divided by ln n so that grids of different size compare. C_k: DBSCAN clusters (eps 1.5, at least 3) of the "
        "10 % most attended tokens. Measures as in arXiv 2605.08200 and 2606.17389. One kind of question at a time, because kinds "
        "differ in difficulty and in attention, which alone makes a correlation.",
        panels=(_forest(auroc, models), _by_layer(scope, models), *_levels(scope, models)),
        table=_table(table, models),
        summary=_summary(auroc, models),
    )


def _informative(auroc: pd.DataFrame) -> pd.DataFrame:
    shape = auroc[auroc["measure"].isin(_SHAPE)]
    return shape[[excludes(row, 0.5) for _, row in shape.iterrows()]]


def _answer(auroc: pd.DataFrame, models: Sequence[str]) -> str:
    found, total = _informative(auroc), int(auroc["measure"].isin(_SHAPE).sum())
    known = auroc[auroc["measure"].isin(_SHAPE) & auroc["low"].notna()]
    if not len(known):
        return "This cannot be said: there are too few wrong answers (or too few pictures) for an interval."
    if not len(found):
        return f"There is no evidence that it does: all {total} intervals include chance. {_confidence(auroc, models)}"
    named = [f"{_SHORT[row['measure']]} in {row['model']} ({span(row, 2)})" for _, row in found.iterrows()]
    rest = "" if len(found) == total else f" For the other {total - len(found)} of {total} there is no evidence."
    return f"In part: the AUROC differs from chance for {listed(named)}.{rest} {_confidence(auroc, models)}"


def _confidence(auroc: pd.DataFrame, models: Sequence[str]) -> str:
    rows = auroc[(auroc["measure"] == "confidence") & auroc["value"].notna()]
    if not len(rows):
        return ""
    each = [f"{text(row['value'], 2)} ({row['model']})" for _, row in rows.iterrows()]
    return f"The model's confidence in its answer, for comparison, reaches {listed(each)}."


def _summary(auroc: pd.DataFrame, models: Sequence[str]) -> str:
    known = auroc[auroc["measure"].isin(_SHAPE) & auroc["low"].notna()]
    if not len(known):
        return ""
    found, confidence = _informative(auroc), auroc.loc[auroc["measure"] == "confidence", "value"].dropna()
    farthest = float((known["value"] - 0.5).abs().max()) + 0.5
    surest = f", against {text(confidence.min(), 2)} or more for confidence" if len(confidence) else ""
    if not len(found):
        return "Nothing suggests that the shape of attention tells right answers from wrong ones."
    return (
        f"The shape of attention says little about correctness: {len(found)} of {len(known)} measures differ from chance, the "
        f"farthest with an AUROC of {text(farthest, 2)} (in its better direction){surest}."
    )


def _points(scope: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    """The layer at which a single layer's entropy says most."""
    layers = scope[(scope["quantity"] == "AUROC") & (scope["layer"] >= 0) & (scope["measure"] == "entropy_normalised")]
    for model in models:
        own = layers[(layers["model"] == model) & layers["low"].notna()]
        if not len(own):
            continue
        row = own.loc[(own["value"] - 0.5).abs().idxmax()]
        verdict = "" if excludes(row, 0.5) else ", which includes chance"
        yield (
            f"{model}: of {len(own)} single layers, the entropy of layer {row['layer']} says most: AUROC "
            f"{text(row['value'], 2)} {bracket(row, 2)}{verdict} (the best of {len(own)}, so partly luck)."
        )


def _sinks(scope: pd.DataFrame) -> str:
    counts = scope[scope["quantity"] == "attention sinks on the picture"]
    if float(counts["value"].max()) == 0.0:
        return "no image token reaches the threshold for an attention sink, so that with and without sinks are the same"
    return listed(f"{text(row['value'], 1)} tokens a picture in {row['model']}" for _, row in counts.iterrows())


def _forest(auroc: pd.DataFrame, models: Sequence[str]) -> Panel:
    names = {name: words.replace(" (baseline)", "\n(baseline)") for name, words in MEASURES.items() if name != "entropy"}
    names["max_attention"] = "largest attention\non a patch"
    names["entropy_normalised"], names["clusters"] = "spatial entropy\nH_s / ln n", "clusters C_k"
    rows = auroc[auroc["measure"].isin(names)].assign(label=lambda rows: rows["measure"].map(names))
    figure, axes = blank(1.2 + 0.55 * len(names))
    reference(axes, 0.5, "chance")
    dots(axes, rows, list(names.values()), models, by="label")
    axes.set(xlim=(0, 1), xlabel="AUROC for a right answer")
    caption = (
        "How well each measure separates right from wrong answers, with 95 % intervals. Above 0.5: higher values go with right "
        "answers; below 0.5: with wrong ones."
    )
    return Panel("signals-auroc", caption, finish(figure, axes))


def _by_layer(scope: pd.DataFrame, models: Sequence[str]) -> Panel:
    rows = scope[(scope["quantity"] == "AUROC") & (scope["layer"] >= 0) & (scope["measure"] == "entropy_normalised")]
    figure, axes = blank(3.4)
    reference(axes, 0.5, "chance", vertical=False)
    for (model, colour), marker in zip(colours(models).items(), "os^DvPX" * len(models), strict=False):
        line(axes, rows[rows["model"] == model], colour, model, marker)
    layers_axis(axes, int(rows["layer"].max()) + 1, "decoder layer")
    axes.set(ylim=(0, 1), ylabel="AUROC of H_s / ln n")
    return Panel("signals-layers", "The same for the entropy of one layer at a time; bands: 95 % intervals.", finish(figure, axes))


def _levels(scope: pd.DataFrame, models: Sequence[str]) -> Iterator[Panel]:
    for model in models:
        own = scope[scope["model"] == model]
        figure, axes = blank(3.0)
        for words, colour, style in (("mean where right", "#0072b2", "-"), ("mean where wrong", "#d55e00", "--")):
            rows = own[own["quantity"] == words]
            line(axes, rows, colour, words.removeprefix("mean where ") + " answers", style=style)
        layers_axis(axes, int(own["layer"].max()) + 1, "decoder layer")
        axes.set(ylim=(0, 1), ylabel="H_s / ln n")
        caption = f"{model}: how concentrated attention is, layer by layer (0: one patch, 1: spread evenly); bands: 95 % intervals."
        yield Panel(f"signals-entropy-{model}", caption, finish(figure, axes))


def _table(table: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    shown = table[(table["layer"] == MEAN_LAYER) & table["quantity"].isin(["AUROC", "point-biserial correlation"])]
    leads = list(shown[["kind", "measure", "sinks", "quantity"]].drop_duplicates().itertuples(index=False, name=None))

    def cell(lead: tuple[str, ...], model: str) -> str:
        kind, measure, quantity = lead
        name, _, sinks = measure.partition(", ")
        key = next(key for key, words in MEASURES.items() if words == name)
        wanted = "without" if sinks else "" if key == "confidence" else "with"
        row = one(shown, model=model, kind=kind, measure=key, sinks=wanted, quantity=quantity)
        return "" if row is None else span(row, 2)

    named = [(k, MEASURES[m] + (", sinks left out" if s == "without" else ""), q) for k, m, s, q in leads]
    return grid(named, models, cell, ("questions", "measure", "statistic"))
