"""Signals of right answers, side by side, in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from interp_vlm.study.reliability_tables import ALL_AGREE, CURVES, SIGNALS
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import (
    MARKERS,
    PARTS,
    blank,
    colours,
    dots,
    finish,
    layers_axis,
    line,
    reference,
)  # fmt: skip
from interp_vlm.study.sections.words import (
    bracket,
    counted,
    each,
    excludes,
    grid,
    interval_fact,
    listed,
    one,
    percent,
    sizes,
    span,
    text,
)  # fmt: skip
from interp_vlm.study.tables import where

__all__ = ["section"]

_ATTENTION = ("attention_entropy", "attention_clusters", "attention_peak")
_BASELINES = ("answer_only", "question_only", "answer_length", "shuffled_labels")
_SHORT = {
    "confidence": "confidence",
    "agreement": "agreement of samples",
    "probe": "the probe",
    "attention_peak": "largest attention",
}
_METHOD = """Every signal is read from the same answers, a higher value being meant to go with right ones. Confidence:
probability of the answer, all its spellings together. Agreement: share of the sampled answers that equal the most
common one (self-consistency, arXiv 2203.11171), for whether the greedy answer is right. Probe: L2 logistic regression
on the residual stream at the last token of the prompt, under nested cross-validation by picture; inner folds choose
strength and layer, and only scores of unseen pictures count, compared within one fold; fitted on all kinds of question
together, it is read within each. Once more one token later, where
the model has read its own answer; with an L1 penalty; and with the studied work's two layers. Attention: of the last
prompt token on the picture, mean over heads and layers (arXiv 2605.08200). The baselines know the answer's or the
question's text alone. The control task gives random labels to questions: a probe that learns it can memorise (Hewitt
and Liang 2019). Risk and coverage: El-Yaniv and Wiener 2010."""
_FOREST = """How well each signal separates right from wrong answers, with 95 % intervals: at 0.5 it says nothing, at 1
everything. Below 0.5, it points the other way."""
_LAYERS = """The probe read after one layer at a time; bands: 95 % intervals. Ring: onset, the first layer that is 90 %
of the way from chance to the peak; star: the peak, which as the best of all layers flatters."""


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on signals of right answers."""
    whole = table[table["kind"] == "all"]
    auroc = _headlines(whole)
    against = where(whole, quantity="probe minus confidence")
    accuracy = where(whole, quantity="accuracy", signal="")
    return Section(
        title="Which signals tell right answers from wrong ones?",
        question="Do confidence, agreement of sampled answers, hidden states or attention say whether an answer is "
        "right, and which of them says most?",
        answer=_answer(auroc, against, _headlines(table[~table["kind"].isin(["all", "open"])])),
        points=tuple(_points(whole, models)),
        facts=(
            ("n", f"{sizes(accuracy)} ({accuracy['condition'].iloc[0]})"),
            ("right answers", each((row for _, row in accuracy.iterrows()), lambda row: percent(row["value"], 1))),
            ("interval", interval_fact(auroc)),
            ("compared with", _baselines(auroc)),
            ("samples", where(whole, quantity=ALL_AGREE)["note"].iloc[0]),
            ("control task", _controls(auroc)),
        ),
        method=_METHOD,
        panels=(_forest(auroc, models), *_by_layer(whole, models), *_withheld(whole, models)),
        table=_table(table, models),
        summary=_summary(auroc),
    )


def _headlines(table: pd.DataFrame) -> pd.DataFrame:
    """One AUROC a signal: not of single layers, agreement judged by the greedy answer."""
    return table[(table["quantity"] == "AUROC") & (table["layer"] == -1) & (table["judged"] != "majority")]


def _ranked(auroc: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The compared signals that have a value, the one that tells most first (by its mean over models)."""
    rows = {name: auroc[(auroc["signal"] == name) & auroc["value"].notna()] for name in CURVES}
    known = [(name, found) for name, found in rows.items() if len(found)]
    return sorted(known, key=lambda item: -float(item[1]["value"].mean()))


def _answer(auroc: pd.DataFrame, against: pd.DataFrame, within: pd.DataFrame) -> str:
    ranked = _ranked(auroc)
    if not ranked:
        return "This cannot be said: there are no wrong answers, or no right ones."
    parts = [f"{_SHORT[name]} {_range(rows)}" for name, rows in ranked]
    order = f"By AUROC over all questions, {parts[0]} tells most" if len(parts) > 1 else f"AUROC of {parts[0]}"
    rest = f", before {listed(parts[1:])}" if len(parts) > 1 else ""
    return f"{order}{rest}. {_duel(against)} {_about_attention(auroc, within)}".strip()


def _duel(against: pd.DataFrame) -> str:
    """Whether the probe says more than the model's own confidence."""
    said: dict[str, list[str]] = {"more": [], "less": [], "unsure": []}
    for _, row in against[against["low"].notna()].iterrows():
        verdict = "unsure" if not excludes(row, 0) else "more" if row["value"] > 0 else "less"
        said[verdict].append(f"{row['model']} ({span(row, 2)})")
    parts = [f"{word} than confidence in {listed(said[word])}" for word in ("more", "less") if said[word]]
    sentences = [f"A linear probe of hidden states says {listed(parts)}."] if parts else []
    if said["unsure"]:
        sentences.append(f"There is no evidence that the probe says more or less in {listed(said['unsure'])}.")
    return " ".join(sentences)


def _about_attention(auroc: pd.DataFrame, within: pd.DataFrame) -> str:
    rows = auroc[auroc["signal"].isin(_ATTENTION) & auroc["low"].notna()]
    if not len(rows):
        return ""
    found = sum(excludes(row, 0.5) for _, row in rows.iterrows())
    differ = "differs" if found == 1 else "differ"
    sizes = f"{rows['signal'].nunique()} measures, {counted(rows['model'].nunique(), 'model')}"
    sentence = f"Of {len(rows)} AUROCs of attention's shape ({sizes}), {found} {differ} from chance"
    sentence += f", the farthest at {_farthest(rows)}"
    inside = within[within["signal"].isin(_ATTENTION) & within["low"].notna()]
    if len(inside):
        far = sum(excludes(row, 0.5) for _, row in inside.iterrows())
        sentence += f"; within one kind of question {far} of {len(inside)}, the farthest at {_farthest(inside, True)}"
    return f"{sentence} (intervals not corrected for their number)."


def _farthest(rows: pd.DataFrame, name_kind: bool = False) -> str:
    """The AUROC farthest from chance, and whose it is."""
    row = rows.iloc[int((rows["value"] - 0.5).abs().to_numpy().argmax())]
    kind = f", {row['kind']} questions" if name_kind else ""
    return f"{span(row, 2)} for {SIGNALS[row['signal']]} in {row['model']}{kind}"


def _range(rows: pd.DataFrame) -> str:
    low, high = text(rows["value"].min(), 2), text(rows["value"].max(), 2)
    return f"({low})" if low == high else f"({low} to {high})"


def _summary(auroc: pd.DataFrame) -> str:
    ranked = _ranked(auroc)
    if len(ranked) < 2:
        return ""
    parts = [f"{_SHORT[name]} {_range(rows)}" for name, rows in ranked]
    return f"Right answers are told from wrong ones best by {parts[0]}, then by {listed(parts[1:])}, by AUROC."


def _points(whole: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    """The numbers of each model."""
    for model in models:
        own = whole[whole["model"] == model]
        auroc = _headlines(own)
        shown = [f"{_SHORT[name]} {span(row, 2)}" for name in CURVES if (row := one(auroc, signal=name)) is not None]
        yield f"{model}, AUROC: {listed(shown)}.{_place(own)}{_agreeing(own)}{_gain(own)}"


def _place(own: pd.DataFrame) -> str:
    peak, onset = (one(own, quantity=name) for name in ("peak layer", "onset layer"))
    if peak is None or onset is None or pd.isna(peak["value"]):
        return ""
    start = "" if pd.isna(onset["value"]) else f", its onset at layer {text(onset['value'], 0)} {bracket(onset, 0)}"
    return f" The probe peaks at layer {text(peak['value'], 0)} {bracket(peak, 0)}{start}."


def _agreeing(own: pd.DataFrame) -> str:
    share = one(own, quantity=ALL_AGREE)
    right = one(own, quantity="precision where all samples agree", judged="greedy")
    if share is None or right is None or pd.isna(right["value"]):
        return ""
    return (
        f" Where all samples agree ({percent(share['value'])} of the questions), {span(right, unit='%')} of the "
        f"answers are right, against {percent(right['baseline'], 1)} of all."
    )


def _gain(own: pd.DataFrame) -> str:
    half = {name: one(own, quantity="risk", signal=name, coverage="0.5") for name in CURVES}
    parts = [f"{text(row['value'])} ({_SHORT[name]})" for name, row in half.items() if row is not None]
    if not parts:
        return ""
    every = percent(next(row["baseline"] for row in half.values() if row is not None), 1)
    return f" If the less sure half is withheld, the error rate of {every} becomes, in %: {listed(parts)}."


def _baselines(auroc: pd.DataFrame) -> str:
    """What knows neither the picture nor the hidden states."""
    rows = {name: auroc[(auroc["signal"] == name) & auroc["value"].notna()] for name in _BASELINES}
    shown = [f"{SIGNALS[name]} {_range(found)}" for name, found in rows.items() if len(found)]
    return f"no information (AUROC 0.5){'; ' if shown else ''}{listed(shown) if shown else ''}"


def _controls(auroc: pd.DataFrame) -> str:
    rows = auroc[(auroc["signal"] == "control_task") & auroc["value"].notna()]
    if not len(rows):
        return "none: no question occurs twice"
    return f"AUROC {_range(rows)}: how well the probe memorises random labels of questions"


def _forest(auroc: pd.DataFrame, models: Sequence[str]) -> Panel:
    names = [name for name in SIGNALS if name in set(auroc["signal"]) and name != "control_task"]
    figure, axes = blank(1.2 + 0.45 * len(names), width=6.2)
    reference(axes, 0.5, "chance")
    dots(axes, auroc.assign(label=auroc["signal"].map(SIGNALS)), [SIGNALS[name] for name in names], models, by="label")
    lowest = float(auroc[["value", "low"]].min().min())
    axes.set(xlim=(np.fmin(0.3, lowest - 0.02), 1.01), xlabel="AUROC for a right answer")
    return Panel("reliability-auroc", _FOREST, finish(figure, axes))


def _by_layer(whole: pd.DataFrame, models: Sequence[str]) -> Iterator[Panel]:
    rows = whole[(whole["quantity"] == "AUROC") & (whole["signal"] == "probe") & (whole["layer"] >= 0)]
    if not len(rows):
        return
    figure, axes = blank(3.4)
    reference(axes, 0.5, "chance", vertical=False)
    for number, (model, colour) in enumerate(colours(models).items()):
        own = rows[rows["model"] == model]
        line(axes, own, colour, model, MARKERS[number % len(MARKERS)])
        by_layer = dict(zip(own["layer"], own["value"], strict=True))
        for what, mark, size in (("onset layer", "o", 13), ("peak layer", "*", 13)):
            place = one(whole, model=model, quantity=what)
            if place is not None and place["value"] in by_layer:
                fill = colour if mark == "*" else "none"
                axes.plot(place["value"], by_layer[place["value"]], mark, markersize=size, mfc=fill, mec=colour)
    layers_axis(axes, int(rows["layer"].max()) + 1, "decoder layer")
    lowest = float(rows[["value", "low"]].min().min())
    axes.set(ylim=(np.fmin(0.4, lowest), 1.01), ylabel="AUROC of the probe")
    yield Panel("reliability-layers", _LAYERS, finish(figure, axes))


def _withheld(whole: pd.DataFrame, models: Sequence[str]) -> Iterator[Panel]:
    """Error rates when only the surest answers are given."""
    risk = whole[whole["quantity"] == "risk"]
    top = float(risk["high"].fillna(risk["value"]).max()) or 1.0
    for model in models:
        rows = risk[risk["model"] == model]
        if not len(rows):
            continue
        figure, axes = blank(3.4)
        reference(axes, float(rows["baseline"].iloc[0]), "all answers", vertical=False)
        for name, colour, marker in zip(CURVES, PARTS, MARKERS, strict=False):
            own = rows[rows["signal"] == name]
            line(axes, own.assign(layer=100 * own["coverage"].astype(float)), colour, _SHORT[name], marker)
        axes.set(xlim=(5, 103), ylim=(0, 1.05 * top), xlabel="answers given, the surest first (%)")
        axes.set_ylabel("wrong answers among them (%)")
        area = [
            f"{_SHORT[name]} {text(row['value'])}"
            for name in CURVES
            if (row := one(whole, model=model, quantity="area under risk-coverage", signal=name)) is not None
        ]
        caption = (
            f"{model}: error rate when the least sure answers are withheld, by what counts as sure; bands: 95 % "
            f"intervals. Area under the curve (%): {listed(area)}."
        )
        yield Panel(f"reliability-risk-{model}", caption, finish(figure, axes, columns=3))


def _table(table: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    wanted = ("AUROC", "point-biserial correlation", "probe minus confidence")
    shown = table[table["quantity"].isin(wanted) & (table["layer"] == -1)]
    shown = shown[(shown["kind"] == "all") | shown["signal"].isin(CURVES)]
    columns = ["kind", "signal", "judged", "quantity"]
    leads = shown[columns].drop_duplicates().itertuples(index=False, name=None)
    keys = {(k, SIGNALS[s] + (", of the majority" if j == "majority" else ""), q): (k, s, j, q) for k, s, j, q in leads}

    def cell(lead: tuple[str, ...], model: str) -> str:
        kind, signal, judged, quantity = keys[lead[0], lead[1], lead[2]]
        row = one(shown, model=model, kind=kind, signal=signal, judged=judged, quantity=quantity)
        return "" if row is None else span(row, 2)

    return grid(list(keys), models, cell, ("questions", "signal", "statistic"))
