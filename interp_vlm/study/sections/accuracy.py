"""Accuracy in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import blank, dots, finish
from interp_vlm.study.sections.words import counted, grid, interval_fact, listed, one, span, text

__all__ = ["section"]


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on accuracy."""
    found = table[table["quantity"] == "accuracy"]
    conditions = list(dict.fromkeys(found["condition"]))
    whole = found[(found["kind"] == "all")]
    first = whole[whole["condition"] == conditions[0]]
    leads = [(c, k, s) for c, k, s in found[["condition", "kind", "category"]].drop_duplicates().itertuples(index=False)]
    return Section(
        title="How often are the models right?",
        question="How many questions about pictures that no model was trained on are answered correctly?",
        answer=" ".join(_sentence(whole[whole["condition"] == condition], models) for condition in conditions),
        points=tuple(_other_rules(table, models)),
        facts=(
            ("n", listed(_counts(whole, conditions))),
            ("interval", interval_fact(found)),
            ("compared with", f"always giving a kind's most common answer ({text(first['baseline'].iloc[0])} % right)"),
            ("test", "sign flips of pictures against that constant answer, Holm-corrected for each model"),
        ),
        method="The answer is the most probable token after the prompt, in any spelling. A right answer that is longer than "
        "one token counts as met when its first token is. Several questions share a picture, so whole pictures are resampled.",
        panels=tuple(_panel(found[found["condition"] == c], c, models) for c in conditions),
        table=grid(
            [(c, f"{k}, {s} negatives" if s else k) for c, k, s in leads],
            models,
            lambda lead, model: _cell(found, lead, model),
            ("scenes", "questions"),
        ),
        summary=_summary(first, models),
    )


def _sentence(rows: pd.DataFrame, models: Sequence[str]) -> str:
    shown = [f"{model} {span(row, unit=' %')}" for model in models if (row := one(rows, model=model)) is not None]
    condition = rows["condition"].iloc[0]
    start = "Right answers" if condition == "as given" else f"Right answers on {condition} scenes"
    return f"{start}: {listed(shown)}."


def _summary(rows: pd.DataFrame, models: Sequence[str]) -> str:
    values = [float(row["value"]) for model in models if (row := one(rows, model=model)) is not None]
    low, high = text(min(values), 0), text(max(values), 0)
    share = f"{low} %" if low == high else f"{low} to {high} %"
    base = text(rows["baseline"].iloc[0], 0)
    many = "The models answer" if len(models) > 1 else f"{models[0]} answers"
    return f"{many} {share} of the questions correctly, where constant answers would reach {base} %."


def _counts(whole: pd.DataFrame, conditions: Sequence[str]) -> Iterator[str]:
    for condition in conditions:
        row = whole[whole["condition"] == condition].iloc[0]
        which = "" if condition == "as given" else f" ({condition})"
        yield f"{counted(row['n'], 'question')} about {counted(row['groups'], 'picture')}{which}"


def _other_rules(table: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    """Where published scoring rules see other accuracies."""
    other = table[table["quantity"].str.startswith("accuracy by the rule") & (table["kind"] == "all")]
    for model in models:
        rows = other[other["model"] == model]
        if len(rows):
            each = [f"{row['quantity'].split()[-1]} {text(row['value'])} %" for _, row in rows.iterrows()]
            yield f"{model}: other scoring rules see {listed(each)}."


def _cell(found: pd.DataFrame, lead: tuple[str, ...], model: str) -> str:
    condition, questions = lead
    kind, _, category = questions.partition(", ")
    row = one(found, model=model, condition=condition, kind=kind, category=category.removesuffix(" negatives"))
    return "" if row is None else f"{span(row)} (n={row['n']})"


def _panel(rows: pd.DataFrame, condition: str, models: Sequence[str]) -> Panel:
    rows = rows[rows["category"] == ""]
    labels = ["all", *[kind for kind in dict.fromkeys(rows["kind"]) if kind != "all"]]
    figure, axes = blank(1.2 + 0.5 * len(labels))
    dots(axes, rows, labels, models, by="kind")
    baseline = rows.drop_duplicates("kind").set_index("kind")["baseline"].reindex(labels)
    axes.scatter(baseline, range(len(labels)), marker="|", s=300, color="0.35", linewidths=1.4, label="constant answer", zorder=1)
    axes.set(xlim=(-2, 102), xlabel="right answers (%)")
    which = "" if condition == "as given" else f"{condition.capitalize()} scenes. "
    caption = f"{which}Dots: share of right answers by kind of question; bars: 95 % intervals; tick: the best constant answer."
    return Panel(f"accuracy-{condition.replace(' ', '-')}", caption, finish(figure, axes))
