"""The strongest attempt for attention in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from interp_vlm.study.attention_classifiers import CLASSIFIERS
from interp_vlm.study.sections.multiples import multiples
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import blank, dots, finish, reference
from interp_vlm.study.sections.words import (
    each,
    excludes,
    grid,
    interval_fact,
    listed,
    one,
    p_text,
    percent,
    sizes,
    span,
    text,
)  # fmt: skip

__all__ = ["section"]

_LARGEST = "largest R2 of attention with correctness"
_SINGLE = "R2 of attention with correctness"
_LESS = "AUROC minus confidence's"
_METHOD = """All attention is that of the last prompt token. Contribution of a head: direct logit attribution to the
margin of the model's answer over the best other one, at the frozen scale of the norms (Elhage et al. 2021). R²: squared
correlation of a head's attention on the picture with correctness. The largest R² is that of a head chosen, among the
5 strongest by contribution, on half of the pictures, and is read on the other half; both ways, averaged. Its test
repeats the choice with labels exchanged between pictures. Gradient boosting and random forest: 16 features of
attention, as means over layers and in the last layer, and the change of Hₛ (the studied work, arXiv 2605.08200, has 11
features and XGBoost; here scikit-learn's histogram gradient boosting); a score counts as "right" above the training
part's share of right answers, which weighs both classes alike. Perceptron: square roots of the attention of every
layer, head and image token, pictures of differing or large grids pooled to 8 × 8 cells; three layers of weights.
Classifiers are fitted to all kinds of question at once, tested on other pictures (5 folds) and read within each kind as
well. Their settings were fixed on other scenes."""
_FOREST = """How well each use of attention separates right from wrong answers, on pictures that it was not fitted to,
with 95 % intervals."""
_MAP = """R² of each head's attention on the picture with correctness, all questions; ringed: the strongest heads by
their contribution to the answer."""
_NAMES = {
    "gradient boosting": "gradient boosting,\nattention features",
    "random forest": "random forest,\nattention features",
    "MLP on all attention maps": "perceptron, all\nattention maps",
    "confidence": "confidence in the\nanswer (baseline)",
}


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on heads, features and maps of attention."""
    whole = table[table["kind"] == "all"]
    auroc = whole[whole["quantity"] == "AUROC"]
    condition = auroc["condition"].iloc[0]
    return Section(
        title="Could any use of attention do better?",
        question="Do the strongest heads, features of attention or whole attention maps tell right answers from wrong?",
        answer=_answer(whole),
        points=tuple(_points(whole, models)),
        facts=(
            ("n", f"{sizes(auroc)} ({condition}{', with more noise and clutter' if condition == 'hard' else ''})"),
            ("interval", interval_fact(auroc)),
            ("compared with", "chance (AUROC 0.5, R² 0), and the model's confidence on the same questions (paired)"),
            ("test", "of the largest R²: labels exchanged between pictures, Holm-corrected for each model"),
            ("all kinds together", "include what attention tells of the kind of question; the table has each kind"),
        ),
        method=_METHOD,
        panels=(_forest(auroc, models), _heads(whole, models)),
        table=_table(table, models),
        summary=_summary(whole),
    )


def _fitted(whole: pd.DataFrame, quantity: str = "AUROC") -> pd.DataFrame:
    """The classifiers' rows that have an interval."""
    rows = whole[(whole["quantity"] == quantity) & whole["what"].isin(CLASSIFIERS)]
    return rows[rows["low"].notna()]


def _range(values: pd.Series) -> str:
    low, high = text(values.min(), 2), text(values.max(), 2)
    return low if low == high else f"{low} to {high}"


def _answer(whole: pd.DataFrame) -> str:
    fitted = _fitted(whole)
    if not len(fitted):
        return "This cannot be said: there are too few wrong answers, or too few pictures, to fit a classifier."
    found = [row for _, row in fitted.iterrows() if excludes(row, 0.5) and row["value"] > 0.5]
    if not found:
        verdict = f"There is no evidence for it: none of {len(fitted)} classifiers does better than chance"
    else:
        some = f"all {len(fitted)}" if len(found) == len(fitted) else f"{len(found)} of {len(fitted)}"
        verdict = f"Somewhat: {some} classifiers do better than chance"
    return f"{verdict} (AUROC {_range(fitted['value'])}).{_against(whole)} {_explained(whole)}".strip()


def _against(whole: pd.DataFrame) -> str:
    less = _fitted(whole, _LESS)
    sure = whole[(whole["what"] == "confidence") & (whole["quantity"] == "AUROC")]["value"].dropna()
    if not len(less) or not len(sure):
        return ""
    worse = sum(excludes(row, 0) and row["value"] < 0 for _, row in less.iterrows())
    better = sum(excludes(row, 0) and row["value"] > 0 for _, row in less.iterrows())
    rest = f", {better} better" if better else ""
    some = f"all {len(less)}" if worse == len(less) else f"{worse} of {len(less)}"
    return f" Confidence alone reaches {_range(sure)}: {some} classifiers do worse than it{rest}."


def _explained(whole: pd.DataFrame) -> str:
    largest = whole[(whole["quantity"] == _LARGEST) & whole["value"].notna()]
    if not len(largest):
        return ""
    found = largest[largest["p_holm"] < 0.05]
    shown = each((row for _, row in largest.iterrows()), lambda row: percent(100 * row["value"], 1))
    known = f"evidence for {listed(found['model'])}" if len(found) else "no evidence for any"
    return f"R² of a strong head's attention with correctness is {shown}: {known}."


def _summary(whole: pd.DataFrame) -> str:
    fitted = _fitted(whole)
    if not len(fitted):
        return ""
    sure = whole[(whole["what"] == "confidence") & (whole["quantity"] == "AUROC")]["value"].dropna()
    against = f", confidence {_range(sure)}" if len(sure) else ""
    return f"Classifiers of all of the attention reach an AUROC of {_range(fitted['value'])}{against}."


def _points(whole: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        own = whole[whole["model"] == model]
        top = one(own, quantity=_LARGEST)
        parts = []
        if top is not None and not np.isnan(top["value"]):
            chosen = str(top["note"]).split("chosen: ")[-1].split(";")[0]
            parts.append(f"largest R² {span(top, 3)}, {p_text(top['p_holm'])} ({chosen})")
        for what in CLASSIFIERS[:2]:
            row = one(own, quantity="balanced accuracy", what=what)
            if row is not None and not np.isnan(row["value"]):
                parts.append(f"balanced accuracy of {what} {span(row, 1, '%')}")
        if parts:
            yield f"{model}: {listed(parts)}."


def _forest(auroc: pd.DataFrame, models: Sequence[str]) -> Panel:
    figure, axes = blank(1.2 + 0.55 * len(_NAMES))
    reference(axes, 0.5, "chance")
    rows = auroc[auroc["what"].isin(_NAMES)]
    dots(axes, rows.assign(label=rows["what"].map(_NAMES)), list(_NAMES.values()), models, by="label")
    axes.set(xlim=(0, 1), xlabel="AUROC for a right answer")
    return Panel("heads-auroc", _FOREST, finish(figure, axes))


def _heads(whole: pd.DataFrame, models: Sequence[str]) -> Panel:
    rows = whole[(whole["what"] == "all heads") & (whole["quantity"] == _SINGLE)]
    strong = whole[(whole["what"] == "top heads") & (whole["layer"] >= 0)]
    top = max(0.05, float(rows["value"].max()))
    figure, panels = multiples(models)
    drawn = None
    for model, axes in panels.items():
        own = rows[rows["model"] == model].pivot_table(index="layer", columns="head", values="value", dropna=False)
        axes.grid(visible=False)
        drawn = axes.imshow(
            own.to_numpy(dtype=float), cmap="Greys", vmin=0, vmax=top, origin="lower", aspect="auto",
            extent=(-0.5, own.shape[1] - 0.5, -0.5, own.shape[0] - 0.5),
        )  # fmt: skip
        rings = strong[strong["model"] == model]
        axes.plot(
            rings["head"].to_numpy(dtype=float), rings["layer"].to_numpy(dtype=float), "o", markersize=11,
            markerfacecolor="none", markeredgecolor="#d55e00", markeredgewidth=1.6,
        )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("head")
    first = panels[models[0]]
    # The axes are shared, so that a model of more layers or heads sets their length for all.
    first.set(xlim=(-0.5, int(rows["head"].max()) + 0.5), ylim=(-0.5, int(rows["layer"].max()) + 0.5))
    first.set_ylabel("decoder layer")
    if drawn is not None:
        figure.colorbar(drawn, ax=list(panels.values()), label="R² with correctness", shrink=0.9)
    return Panel("heads-r2", _MAP, figure)


def _table(table: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    shown = table[(table["layer"] == -1) & (table["head"] == -1)]
    words = {_LARGEST: "largest R²", "AUROC": "AUROC", "balanced accuracy": "balanced accuracy (%)", _LESS: _LESS}
    digits = {_LARGEST: 3, "balanced accuracy": 1}
    leads = shown[["kind", "what", "quantity"]].drop_duplicates().itertuples(index=False, name=None)
    keys = {(k, w, words[q]): (k, w, q) for k, w, q in leads if q in words}

    def cell(lead: tuple[str, ...], model: str) -> str:
        kind, what, quantity = keys[lead[0], lead[1], lead[2]]
        row = one(shown, model=model, kind=kind, what=what, quantity=quantity)
        return "" if row is None else span(row, digits.get(quantity, 2))

    return grid(list(keys), models, cell, ("questions", "from", "quantity"))
