"""Attention's shape and correctness, in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import MARKERS, blank, colours, dots, finish, layers_axis, line, reference
from interp_vlm.study.sections.words import (
    counted,
    each,
    excludes,
    grid,
    interval_fact,
    listed,
    one,
    sinks_fact,
    sizes,
    span,
    text,
)  # fmt: skip
from interp_vlm.study.signals import CORRECTED, LAST, MEAN_LAYER, MEASURES, QUARTER, SHAPE

__all__ = ["section"]

_SHAPE = dict(zip(SHAPE, ("Hₛ", "Cₖ", "the largest attention"), strict=True))
_METHOD = """Attention of the last prompt token on the image tokens, averaged over heads and layers. Hₛ: entropy of
that distribution, in nats, and divided by ln n so that grids of different size compare. Cₖ: DBSCAN clusters (eps 1.5,
at least 3) of the 10 % most attended tokens. Measures as in arXiv 2605.08200 and 2606.17389; sinks as in arXiv
2503.03321. The answer is read within one kind of question, because kinds differ both in difficulty and in attention,
which alone makes a correlation."""
_FOREST = """How well each measure separates right from wrong answers, with 95 % intervals. Above 0.5, higher values
go with right answers; below 0.5, with wrong ones."""


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on signals of correctness."""
    kind = table["kind"].iloc[0]
    scope = table[table["kind"] == kind]
    overall = scope[(scope["layer"] == MEAN_LAYER) & (scope["sinks"] != "without")]
    auroc = overall[overall["quantity"] == "AUROC"]
    over = "over all questions" if kind == "all" else f"within {kind} questions"
    condition = auroc["condition"].iloc[0]
    return Section(
        title="Does the shape of attention tell right answers from wrong ones?",
        question=f"Do spread (Hₛ), clusters (Cₖ) and peak of the attention on the picture predict correctness, {over}?",
        answer=_answer(overall),
        points=(*_points(scope, models), *_depth(table, models)),
        facts=(
            (
                "n",
                f"{sizes(auroc)}, {over} ({condition}{', with more noise and clutter' if condition == 'hard' else ''})",
            ),
            ("wrong answers", _errors(scope)),
            (
                "interval",
                f"{interval_fact(auroc)}; the answer uses wider ones, corrected for three measures (Bonferroni)",
            ),
            ("compared with", "no information (AUROC 0.5, correlation 0), and the model's own confidence"),
            ("attention sinks", sinks_fact(scope)),
        ),
        method=_METHOD,
        panels=(_forest(auroc, models), _by_layer(scope, models), *_levels(scope, models)),
        table=_table(table, models),
        summary=_summary(overall),
    )


def _shape(overall: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The measures of shape that have an interval, and those of them whose interval excludes chance."""
    known = overall[(overall["quantity"] == CORRECTED) & overall["low"].notna()]
    return known, known[[excludes(row, 0.5) for _, row in known.iterrows()]]


def _answer(overall: pd.DataFrame) -> str:
    known, found = _shape(overall)
    if not len(known):
        return "This cannot be said: there are too few wrong answers, or too few pictures, for an interval."
    rest = f"for the other {len(known) - len(found)} of {len(known)} measures there is no evidence"
    if not len(found):
        verdict = f"There is no evidence that it does: all {len(known)} intervals include chance."
    else:
        named = listed(f"{_SHAPE[row['measure']]} in {row['model']} ({span(row, 2)})" for _, row in found.iterrows())
        verdict = f"In part: the AUROC differs from chance for {named}{'; ' + rest if len(found) < len(known) else ''}."
    confidence = overall[(overall["quantity"] == "AUROC") & (overall["measure"] == "confidence")]
    shown = each((row for _, row in confidence.iterrows()), lambda row: text(row["value"], 2))
    return f"{verdict} For comparison, the model's confidence in its answer reaches {shown}."


def _summary(overall: pd.DataFrame) -> str:
    known, found = _shape(overall)
    if not len(known):
        return ""
    sure = overall[(overall["quantity"] == "AUROC") & (overall["measure"] == "confidence")]
    confidence = sure["value"].dropna()
    against = f", while confidence reaches {text(confidence.min(), 2)} or more" if len(confidence) else ""
    if not len(found):
        return f"There is no evidence that the shape of attention tells right answers from wrong ones{against}."
    farthest = _farthest(found)
    number = f"Of {counted(len(known), 'measure')} of attention's shape, {len(found)}"
    return (
        f"{number} {'tells' if len(found) == 1 else 'tell'} right answers from wrong ones better than chance ("
        f"farthest: {_SHAPE[farthest['measure']]} in {farthest['model']}, AUROC {text(farthest['value'], 2)}){against}."
    )


def _farthest(rows: pd.DataFrame) -> pd.Series:
    """The row whose AUROC is farthest from chance."""
    return rows.iloc[int((rows["value"] - 0.5).abs().to_numpy().argmax())]


def _points(scope: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    """The layer whose entropy says most."""
    layers = scope[(scope["quantity"] == "AUROC") & (scope["layer"] >= 0) & (scope["measure"] == "entropy_normalised")]
    for model in models:
        own = layers[(layers["model"] == model) & layers["low"].notna()]
        if len(own):
            row = _farthest(own)
            doubt = f"the best of {len(own)} layers, so partly luck" if excludes(row, 0.5) else "no evidence"
            yield f"{model}: taken alone, layer {row['layer']} has the most telling Hₛ, AUROC {span(row, 2)} ({doubt})."


def _depth(table: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    """How the spread of attention changes with depth, over all questions."""
    for model in models:
        rows = [one(table, model=model, kind="all", quantity=quantity) for quantity in (QUARTER, LAST)]
        if all(row is not None for row in rows):
            early, late = (
                span(row, 2, "nats") + ("" if excludes(row, 0) else " (no evidence of a change)")
                for row in rows
                if row is not None
            )
            yield f"{model}: over the first quarter of the layers Hₛ changes by {early}, at the last layer by {late}."


def _errors(scope: pd.DataFrame) -> str:
    wrong = scope[scope["quantity"] == "mean where wrong"].drop_duplicates("model")
    return each((row for _, row in wrong.iterrows()), lambda row: str(row["n"]))


def _forest(auroc: pd.DataFrame, models: Sequence[str]) -> Panel:
    names = {
        "entropy_normalised": "spatial entropy\n$H_s$ / ln n",
        "clusters": "clusters $C_k$",
        "max_attention": "largest attention\non a patch",
        "confidence": "confidence in the\nanswer (baseline)",
    }
    rows = auroc[auroc["measure"].isin(names)]
    figure, axes = blank(1.2 + 0.55 * len(names))
    reference(axes, 0.5, "chance")
    dots(axes, rows.assign(label=rows["measure"].map(names)), list(names.values()), models, by="label")
    axes.set(xlim=(0, 1), xlabel="AUROC for a right answer")
    return Panel("signals-auroc", _FOREST, finish(figure, axes))


def _by_layer(scope: pd.DataFrame, models: Sequence[str]) -> Panel:
    rows = scope[(scope["quantity"] == "AUROC") & (scope["layer"] >= 0) & (scope["measure"] == "entropy_normalised")]
    figure, axes = blank(3.4)
    reference(axes, 0.5, "chance", vertical=False)
    for number, (model, colour) in enumerate(colours(models).items()):
        line(axes, rows[rows["model"] == model], colour, model, MARKERS[number % len(MARKERS)])
    layers_axis(axes, int(rows["layer"].max()) + 1, "decoder layer")
    axes.set(ylim=(0, 1), ylabel="AUROC of $H_s$ / ln n")
    caption = "The same for the entropy of one layer's attention at a time; bands: 95 % intervals."
    return Panel("signals-layers", caption, finish(figure, axes))


def _levels(scope: pd.DataFrame, models: Sequence[str]) -> Iterator[Panel]:
    for model in models:
        own = scope[scope["model"] == model]
        figure, axes = blank(3.0)
        for answers, colour, style in (("right", "0.25", "-"), ("wrong", "#b2182b", "--")):
            rows = own[own["quantity"] == f"mean where {answers}"]
            line(axes, rows, colour, f"{answers} answers", style=style)
        layers_axis(axes, int(own["layer"].max()) + 1, "decoder layer")
        axes.set(ylim=(0, 1), ylabel="$H_s$ / ln n")
        caption = f"{model}: spread of attention, layer by layer (0: one patch, 1: even); bands: 95 % intervals."
        yield Panel(f"signals-entropy-{model}", caption, finish(figure, axes))


def _table(table: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    shown = table[(table["layer"] == MEAN_LAYER) & table["quantity"].isin(["AUROC", "point-biserial correlation"])]
    leads = shown[["kind", "measure", "sinks", "quantity"]].drop_duplicates().itertuples(index=False, name=None)
    keys = {(k, MEASURES[m] + (", sinks left out" if s == "without" else ""), q): (k, m, s, q) for k, m, s, q in leads}

    def cell(lead: tuple[str, ...], model: str) -> str:
        kind, measure, sinks, quantity = keys[lead[0], lead[1], lead[2]]
        row = one(shown, model=model, kind=kind, measure=measure, sinks=sinks, quantity=quantity)
        return "" if row is None else span(row, 2)

    return grid(list(keys), models, cell, ("questions", "measure", "statistic"))
