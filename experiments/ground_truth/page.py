"""The page and the figure of the scores: every number on them is made from the rows, none is written by hand."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

import interp_vlm as iv
from experiments.ground_truth.bench import WHAT
from experiments.ground_truth.methods import CUTS, METHODS, PAIRS

__all__ = ["BLOCKS", "exact", "figure", "filled", "share", "write"]

PAGE, ROWS, FIGURE = "validation.md", "validation.parquet", "validation.png"
TEMPLATE = Path(__file__).parents[2] / "docs" / PAGE
ORDER = [*METHODS, PAIRS, "the truth", "random"]
CAUSAL = ("knockout", "patching, clean into corrupt", "patching, corrupt into clean")
EMPTY = ("null model", "same answer")
HARD = ("question detour", "prefix detour", "backup")
COLOURS = {"llava": "#1b4f72", "paligemma": "#d9541e", "qwen2_vl": "#5b8c3a"}


def share(hits: int, n: int) -> tuple[float, float, float]:
    """A share of models with its exact 95 % interval (Clopper and Pearson 1934).

    Example:
        >>> [round(number, 3) for number in share(25, 25)]
        [1.0, 0.863, 1.0]
    """
    low, high = np.asarray(proportion_confint(hits, n, method="beta"), dtype=np.float64).tolist()
    return hits / n, low, high


def exact(hits: int, n: int) -> str:
    """A share of models in words.

    Example:
        >>> exact(25, 25)
        '25 of 25 (86 to 100 %)'
    """
    _, low, high = share(hits, n)
    return f"{hits} of {n} ({100 * low:.0f} to {100 * high:.0f} %)"


def averaged(values: pd.Series) -> str:
    """A mean over models with the 95 % interval of a bootstrap over them."""
    kept = values.dropna()
    if not len(kept):
        return "none named"
    if len(kept) == 1:
        return _number(kept.iloc[0])
    estimate = iv.stats.mean(kept.to_numpy())
    spread = "" if np.isnan(estimate.low) else f" ({_number(estimate.low)} to {_number(estimate.high)})"
    return f"{_number(estimate.value)}{spread}"


def _number(value: float) -> str:
    """Two digits, and no minus before a zero."""
    return f"{round(float(value), 2) + 0.0:.2f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ordered(rows: pd.DataFrame) -> list[str]:
    present = set(rows["method"])
    return [name for name in ORDER if name in present]


def _families(rows: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(rows["family"]))


def _count(part: pd.DataFrame) -> str:
    return exact(int(part["exact"].astype(bool).sum()), len(part)) if len(part) else ""


def verdict(rows: pd.DataFrame) -> str:
    """What was needed, and what was found."""
    scored = rows[rows["what"].isin(WHAT)]
    lines = []
    for method in CAUSAL:
        own = scored[(scored["method"] == method) & (scored["case"] == "straight")]
        whole = own.groupby(["family", "seed"])["exact"].all()
        by_family = [f"{exact(int(part.sum()), len(part))} of {name}" for name, part in whole.groupby(level=0)]
        names = ", ".join(dict.fromkeys(own["what"]))
        lines.append(f"- *{method}* names the straight route exactly ({names}) in {'; '.join(by_family)}.")
    empty = scored[(scored["case"] == "null model") & scored["method"].isin(CAUSAL)]
    named = empty.groupby(["family", "seed"])["named"].sum() > 0
    lines.append(f"- At least one of these names something in {exact(int(named.sum()), len(named))} null models.")
    sharp = scored[(scored["method"] == "attention sharpness") & (scored["case"] == "straight")]
    decoys = averaged(sharp.loc[sharp["what"] == "heads", "decoys"])
    lines.append(f"- *attention sharpness* names this share of the decoys: {decoys}.")
    return "\n".join(lines)


def straight(rows: pd.DataFrame) -> str:
    """Straight routes: who names them exactly, and precision and recall of all."""
    rows, families = rows[(rows["case"] == "straight") & rows["what"].isin(WHAT)], _families(rows)
    lines = []
    for method in _ordered(rows):
        for what in WHAT:
            part = rows[(rows["method"] == method) & (rows["what"] == what)]
            if len(part):
                by_family = [_count(part[part["family"] == family]) for family in families]
                lines.append([method, what, *by_family, averaged(part["precision"]), averaged(part["recall"])])
    return _table(["method", "names", *(f"exact, {name}" for name in families), "precision", "recall"], lines)


def fooled(rows: pd.DataFrame) -> str:
    """Which methods name the decoys."""
    rows = rows[(rows["case"] == "straight") & (rows["what"] == "heads")]
    lines = []
    for method in _ordered(rows):
        part = rows[rows["method"] == method]
        by_family = [averaged(part.loc[part["family"] == family, "decoys"]) for family in _families(rows)]
        lines.append([method, *by_family, averaged(part["recall"])])
    header = ["method", *(f"decoys named, {name}" for name in _families(rows)), "true heads named"]
    return _table(header, lines)


def null(rows: pd.DataFrame) -> str:
    """How often a method names anything at all where there is nothing, or next to nothing, to name."""
    lines = []
    for method in _ordered(rows[rows["case"].isin(EMPTY)]):
        cells = []
        for case in EMPTY:
            own = rows[(rows["method"] == method) & (rows["case"] == case)]
            named = own.groupby(["family", "seed"])["named"].sum()
            cells.append(exact(int((named > 0).sum()), len(named)) if len(own) else "")
        same = rows[(rows["method"] == method) & (rows["case"] == "same answer")]
        cells.append(averaged(same.groupby(["family", "seed"])["on_route"].mean()) if len(same) else "")
        lines.append([method, *cells])
    header = ["method", *(f"names something, {case}" for case in EMPTY), "share of it that is on the planted route"]
    return _table(header, lines)


def hard(rows: pd.DataFrame) -> str:
    """Detours and backups: whether the heads are named exactly, and what of the route and of the backup is named."""
    rows = rows[(rows["what"] == "heads") & rows["case"].isin(HARD)]
    lines = []
    for method in _ordered(rows):
        own = rows[rows["method"] == method]
        by_case = {case: own[own["case"] == case] for case in HARD}
        detours = [_count(part) for case, part in by_case.items() if case != "backup"]
        spare = by_case["backup"]
        lines.append([method, *detours, averaged(spare["recall"]), averaged(spare["backups"])])
    detours = [f"heads exact, {case}" for case in HARD if case != "backup"]
    return _table(["method", *detours, "backup: route named", "backup: backup named"], lines)


def cut(rows: pd.DataFrame) -> str:
    """What of the pictures' effect is gone when the answer's way is cut."""
    rows = rows[rows["what"] == "cut"]
    cases = [case for case in ("straight", *HARD) if case in set(rows["case"])]
    lines = []
    for method in CUTS:
        own = rows[rows["method"] == method]
        lines.append([method, *(averaged(own.loc[own["case"] == case, "effect"].round(6)) for case in cases)])
    return _table(["cut", *cases], lines)


def faithful(rows: pd.DataFrame) -> str:
    """CPR and CMD of the rankings of heads."""
    rows = rows[(rows["what"] == "faithfulness") & (rows["case"] == "straight")]
    lines = []
    for method in _ordered(rows):
        part = rows[rows["method"] == method]
        lines.append([method, averaged(part["cpr"]), averaged(part["cmd"])])
    return _table(["heads ranked by", "CPR", "CMD"], lines)


BLOCKS: dict[str, Callable[[pd.DataFrame], str]] = {
    "verdict": verdict, "straight": straight, "fooled": fooled, "null": null, "hard": hard, "cut": cut,
    "faithful": faithful,
}  # fmt: skip


def filled(text: str, rows: pd.DataFrame) -> str:
    """The page with every marked block made anew.

    Raises:
        ValueError: for a page that lacks a block's markers.
    """
    for name, block in BLOCKS.items():
        start, end = f"<!-- {name}: made by python -m experiments.ground_truth -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the page has no block {name!r} between {start!r} and {end!r}")
        made = f"{start}\n{block(rows)}\n{end}"
        text = pattern.sub(lambda _, made=made: made, text)
    return text


def figure(rows: pd.DataFrame) -> Any:
    """Who names straight routes exactly; who names decoys; who names something where there is nothing."""
    from matplotlib.figure import Figure

    scored = rows[rows["what"].isin(WHAT)]
    straight_rows = scored[scored["case"] == "straight"]
    methods = _ordered(straight_rows)
    made = Figure(figsize=(10.6, 0.36 * len(methods) + 1.7), layout="constrained")
    grid, decoys, nothing = made.subplots(1, 3, sharey=True, width_ratios=(1.5, 1.0, 1.0))
    _grid(grid, straight_rows, methods)
    named = {
        (method, family): part["decoys"]
        for (method, family), part in straight_rows[straight_rows["what"] == "heads"].groupby(["method", "family"])
    }
    _dots(decoys, {key: iv.stats.mean(values.to_numpy()) for key, values in named.items()}, methods)
    decoys.set_title("decoy heads named", fontsize="medium")
    anything = scored[scored["case"] == "null model"].groupby(["method", "family", "seed"])["named"].sum() > 0
    _dots(nothing, {key: iv.stats.mean(part.to_numpy()) for key, part in anything.groupby(level=[0, 1])}, methods)
    nothing.set_title("null models: anything named", fontsize="medium")
    handles, labels = decoys.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    made.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique), frameon=False)
    return made


def _grid(axes: Any, rows: pd.DataFrame, methods: list[str]) -> None:
    shares = np.full((len(methods), len(WHAT)), np.nan)
    for y, method in enumerate(methods):
        for x, what in enumerate(WHAT):
            part = rows.loc[(rows["method"] == method) & (rows["what"] == what), "exact"].astype(bool)
            if len(part):
                shares[y, x] = part.mean()
                dark = shares[y, x] > 0.5
                axes.text(x, y, f"{100 * shares[y, x]:.0f} %", ha="center", va="center", fontsize=9,
                          color="white" if dark else "black")  # fmt: skip
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_facecolor("0.93")
    axes.set_xticks(range(len(WHAT)), WHAT)
    axes.set_yticks(range(len(methods)), methods)
    models = rows.groupby(["family", "seed"]).ngroups
    axes.set_title(f"named exactly, share of {models} models\n(grey: does not speak of it)", fontsize="medium")


def _dots(axes: Any, estimates: dict[Any, Any], methods: list[str]) -> None:
    for (method, family), estimate in estimates.items():
        y = methods.index(method) + 0.22 * (list(COLOURS).index(family) - 1)
        spread = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
        axes.errorbar(
            100 * estimate.value, y, xerr=100 * np.nan_to_num(np.array(spread)), fmt="o", markersize=4, linewidth=1,
            color=COLOURS[family], label=family,
        )  # fmt: skip
    axes.set(xlim=(-4, 104), xlabel="% (95 % interval over models)")
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def write(rows: pd.DataFrame, out: Path) -> list[Path]:
    """Write the rows, the page and the figure, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    page = out / PAGE if (out / PAGE).exists() else TEMPLATE
    text = filled(page.read_text(), rows)
    return [
        _whole(out / ROWS, lambda path: rows.to_parquet(path, index=False)),
        _whole(out / PAGE, lambda path: path.write_text(text)),
        _whole(
            out / FIGURE, lambda path: figure(rows).savefig(path, format="png", dpi=110, metadata={"Software": None})
        ),
    ]


def _whole(path: Path, save: Callable[[Path], object]) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}")
    os.close(handle)
    save(Path(name))
    Path(name).chmod(0o644)
    Path(name).replace(path)
    return path
