"""The neurons that a probe of correctness reads, in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from interp_vlm.study.changes import CHANGE, SMALLEST
from interp_vlm.study.neurons import BEYOND, HEADLINE, NORM, SIZES, verdict
from interp_vlm.study.sections.multiples import multiples
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import MARKERS, PARTS, blank, dots, finish, reference
from interp_vlm.study.sections.words import grid, interval_fact, listed, one, p_text, sizes, span, text
from interp_vlm.study.tables import where

__all__ = ["curves", "section"]

_RANDOM = "random of equal norm"
_WHICH = {"5": "five neurons", "50 %": "half of the neurons"}
_METHOD = """A neuron is a dimension of the residual stream after a layer, at the last prompt position: what the probe
of correctness reads. On hard questions about other pictures, set aside for this, logistic regression is fitted at every
layer (cross-validated by picture); the best layer is the peak. Its neurons come in order of importance: those that
stability selection is sure of (L1, the studied work's penalty), then by absolute weight of the L2 probe on standardised
activations. The first of them are set to their mean there, or to zero, or to the values of one of the examples set
aside, or to their largest value (clamp). Random neurons of equal norm are drawn within strata of eight neurons of
neighbouring mean absolute activation. Families are compared at two thirds of the depth, each by a probe of that layer.
Robust: two one-sided t tests, clustered by picture, place the change within 5 points either way. Fragile: the probe's
neurons cost more than random ones of equal norm. The published ablations: arXiv 2605.08200, which sets the probe's
first neurons in one family against random ones in the others."""
_CURVES = """Change of accuracy against how many neurons are ablated at the peak layer (a number, or a share of the
width), with 95 % intervals; dotted: 5 points either way, within which an ablation may be called without effect."""
_FAIR = """The fair comparison, at two thirds of each model's depth: change of accuracy when neurons are set to their
mean, with 95 % intervals; dotted: 5 points either way."""


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on the probe's neurons."""
    models = [model for model in models if model in set(table["model"])]
    own = {model: table[table["model"] == model] for model in models}
    known = [model for model in models if own[model]["value"].notna().any()]
    changes = table[(table["quantity"] == CHANGE) & table["model"].isin(known)]
    some = changes if len(changes) else table
    return Section(
        title="Does the answer rest on the neurons that the probe reads?",
        question="The probe tells right answers from wrong ones by some neurons. What does ablating them cost, against "
        "random neurons of the same norm?",
        answer=_answer(own, known),
        points=tuple(_points(own, known)),
        facts=(
            ("n", f"{sizes(some)} ({some['condition'].iloc[0]})"),
            ("interval", f"{interval_fact(some)}; where no answer changed, the exact binomial bound"),
            ("compared with", "no ablation, and random neurons of the same number and norm"),
            *_chosen(own, known),
            ("test", _TEST),
        ),
        method=_METHOD,
        panels=(curves(table, known), _fair(table, known)) if known else (),
        table=_table(table, models),
        summary=_summary(own, known),
    )


def _chosen(own: dict[str, pd.DataFrame], known: Sequence[str]) -> Iterator[tuple[str, str]]:
    facts = {"layers": _layers, "random sets": _norms, "smallest detectable effect": _smallest}
    for name, said in facts.items():
        if known:
            yield name, listed(said(own[model], model) for model in known)


_TEST = """sign flips of pictures; exact McNemar beside them, which takes questions as independent; two one-sided t
tests; each Holm-corrected over all ablations of a model"""


def _verdicts(own: dict[str, pd.DataFrame], known: Sequence[str], size: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for model in known:
        found.setdefault(verdict(own[model], size), []).append(model)
    return found


def _answer(own: dict[str, pd.DataFrame], known: Sequence[str]) -> str:
    missing = [f"{model}: {_reason(rows)}" for model, rows in own.items() if model not in known]
    tail = f"Not measured: {listed(missing)}." if missing else ""
    said = {
        "robust": "changes accuracy by less than 5 points in {} (robust)",
        "fragile": "costs more than ablating random neurons of equal norm in {} (fragile)",
        "not resolved": "has an effect too uncertain to name in {}",
    }
    lines = []
    for size in HEADLINE if known else ():
        found = _verdicts(own, known, size)
        parts = [said[word].format(listed(found[word])) for word in said if word in found]
        lines.append(f"Ablating the {_WHICH[size]} that the probe weighs most {listed(parts)}.")
    return " ".join(filter(None, [*lines, tail]))


def _reason(rows: pd.DataFrame) -> str:
    return str(rows["note"].iloc[0]).rstrip(".")


def _summary(own: dict[str, pd.DataFrame], known: Sequence[str]) -> str:
    if not known:
        return ""
    found = _verdicts(own, known, "5")
    if set(found) == {"robust"}:
        return "The five neurons that the probe weighs most can be ablated without a change of 5 points."
    if "fragile" in found:
        return f"The answers rest on the five neurons that the probe weighs most in {listed(found['fragile'])}."
    return "There is no evidence that the answers rest on the five neurons that the probe weighs most."


def _points(own: dict[str, pd.DataFrame], known: Sequence[str]) -> Iterator[str]:
    for model in known:
        rows = where(own[model], fill="mean", at="depth")
        parts = []
        for size in HEADLINE:
            top = one(rows, set="top", size=size, quantity=CHANGE)
            random = one(rows, set=_RANDOM, size=size, quantity=CHANGE)
            beyond = one(rows, set="top", size=size, quantity=BEYOND[_RANDOM])
            exact = one(rows, set="top", size=size, quantity=f"{CHANGE}, exact McNemar")
            if top is None or random is None or beyond is None or exact is None:
                continue
            parts.append(
                f"{_WHICH[size]} {span(top)} (exact McNemar {p_text(exact['p_holm'])}), random ones {span(random)}, "
                f"the difference {span(beyond)}, {p_text(beyond['p_holm'])}"
            )
        yield f"{model}, points of accuracy at two thirds of the depth: {'; '.join(parts)}."


def _layers(rows: pd.DataFrame, model: str) -> str:
    peak, depth = (int(where(rows, at=at)["layer"].iloc[0]) for at in ("peak", "depth"))
    auroc = one(rows, at="fitting", layer=peak)
    best = "" if auroc is None else f", AUROC {span(auroc, 2)}"
    return f"{model}: peak {peak}{best}, two thirds {depth}"


def _norms(rows: pd.DataFrame, model: str) -> str:
    """How many random sets there are, and how well those of equal norm match."""
    row = one(rows, quantity=NORM, set=_RANDOM, size="5", fill="mean", at="peak")
    if row is None:
        return f"none ({model})"
    many, spread = row["note"].split(" sets, ")
    return (
        f"{many} of five neurons, a question meets one; norm {text(row['value'], 2)} of the probe's, {spread} ({model})"
    )


def _smallest(rows: pd.DataFrame, model: str) -> str:
    found = (one(rows, quantity=SMALLEST, set="top", size=size, fill="mean", at="depth") for size in HEADLINE)
    values = [text(row["value"]) for row in found if row is not None]
    return f"{' and '.join(values)} points for {' and '.join(_WHICH.values())} ({model})"


def curves(table: pd.DataFrame, models: Sequence[str]) -> Panel:
    """Fragility curves: what ablating more and more neurons costs, a model at a time."""
    figure, each = multiples(models)
    lines = (
        ({"set": ["single", "top"], "fill": "mean"}, "probe's neurons to the mean", "-"),
        ({"set": ["single", "top"], "fill": "zero"}, "to zero", "--"),
        ({"set": [_RANDOM], "fill": "mean"}, "random ones of equal norm to the mean", "-"),
    )
    for model, axes in each.items():
        own = table[(table["model"] == model) & (table["quantity"] == CHANGE) & (table["at"] == "peak")]
        _margin(axes, vertical=False)
        for number, (wanted, label, style) in enumerate(lines):
            rows = own[own["set"].isin(wanted["set"]) & (own["fill"] == wanted["fill"])]
            rows = rows.set_index("size").reindex(SIZES)
            at = np.flatnonzero(rows["value"].notna())
            value, low, high = (rows[name].to_numpy(dtype=float)[at] for name in ("value", "low", "high"))
            axes.plot(
                at, value, style, color=PARTS[number], marker=MARKERS[number], markersize=4, linewidth=1.6, label=label
            )
            axes.fill_between(at, low, high, color=PARTS[number], alpha=0.14, linewidth=0)
        axes.set_xticks(range(len(SIZES)), [size.replace(" ", "\u2009") for size in SIZES], fontsize=8)
    figure.supxlabel("neurons ablated at the peak layer", fontsize=10)
    figure.supylabel("change of accuracy (points)", fontsize=10)
    return Panel("neurons-curves", _CURVES, finish(figure, next(iter(each.values())), columns=3))


def _fair(table: pd.DataFrame, models: Sequence[str]) -> Panel:
    rows = where(table, quantity=CHANGE, fill="mean", at="depth")
    rows = rows[rows["set"].isin(["top", "random", _RANDOM])]
    names = {"top": "probe's first", "random": "random", _RANDOM: "random,\nequal norm"}
    labels = [f"{names[kind]} {size}" for size in HEADLINE for kind in names]
    keyed = rows.assign(label=[f"{names[kind]} {size}" for kind, size in zip(rows["set"], rows["size"], strict=True)])
    figure, axes = blank(1.2 + 0.5 * len(labels))
    reference(axes, 0, "no ablation")
    _margin(axes)
    dots(axes, keyed, labels, models, by="label")
    axes.set_xlabel("change of accuracy (points)")
    return Panel("neurons", _FAIR, finish(figure, axes))


def _margin(axes, vertical: bool = True) -> None:
    for edge in (-5, 5):
        (axes.axvline if vertical else axes.axhline)(edge, color="0.6", linestyle=":", linewidth=1, zorder=1)


def _table(table: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    names = {"top": "probe's", "single": "probe's", "random": "random", _RANDOM: "random of equal norm"}
    places = {"depth": "two thirds of the depth", "peak": "peak layer", "each": "layer {}"}
    shown = table[table["quantity"] == CHANGE]
    keys: dict[tuple[str, ...], dict[str, object]] = {}
    for at in ("depth", "peak", "peak, all positions", "each"):
        part = where(shown, at=at).sort_values("layer", kind="stable") if at == "each" else where(shown, at=at)
        for name, size, fill, layer in part[["set", "size", "fill", "layer"]].itertuples(index=False, name=None):
            where_at = places.get(at, at).format(layer)
            wanted = {"set": name, "size": size, "fill": fill, "at": at}
            keys.setdefault(
                (where_at, f"{names[name]} {size}", fill), wanted | ({"layer": layer} if at == "each" else {})
            )

    def cell(lead: tuple[str, ...], model: str) -> str:
        row = one(shown, model=model, **keys[lead[0], lead[1], lead[2]])
        return "" if row is None else span(row)

    verdicts = tuple(
        ("two thirds of the depth", f"verdict on the probe's {size}", "mean",
         *(verdict(table[table["model"] == model], size) for model in models))
        for size in HEADLINE
    )  # fmt: skip
    heads, lines = grid(list(keys), models, cell, ("where", "neurons", "set to"))
    return heads, verdicts + lines
