"""Verdicts: whether the interval of an effect lies inside the region in which a claim is true.

The rule is one for all claims and was fixed before any result: *supported* where the 95 % interval lies inside the
region, *contradicted* where it lies outside, *underpowered* where it crosses an edge. A claim that is false, or true by
no margin, is then called supported in 2.5 % of studies at most, as far as intervals cover 95 %; for a region around 0
this is the equivalence test by two one-sided tests at 2.5 % each (Schuirmann 1987). Parts of a claim must all hold,
which keeps that bound (intersection-union, Berger 1982).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import pandas as pd

from interp_vlm.study.claim import Claim, Part
from interp_vlm.study.tables import where

__all__ = ["COLUMNS", "VERDICTS", "decide", "judge_claims", "needed_factor", "region_text"]

VERDICTS = ("supported", "contradicted", "underpowered", "not applicable")

COLUMNS = (
    *("id", "statement", "model", "parameter", "setting", "verdict", "part", "value", "low", "high", "unit", "n"),
    *("groups", "n_needed", "groups_needed", "region_low", "region_high", "region", "rule", "published", "baseline"),
    *("chosen", "row", "parts", "reason", "note"),
)
"""Columns of the table of claims; `parameter`, `setting` and `chosen` (the claim's own setting of that parameter) are
empty for the claim as it stands."""

LEVEL, POWER = 0.95, 0.8
_NORMAL = NormalDist()
_Z = _NORMAL.inv_cdf((1 + LEVEL) / 2)
_MOST = 1e9  # examples; beyond this no n is worth naming


def decide(low: float, high: float, region: tuple[float, float]) -> str:
    """The verdict on an interval.

    Example:
        >>> decide(0.7, 0.8, (0.6, float("inf"))), decide(0.4, 0.5, (0.6, 1.0)), decide(-0.2, 0.05, (-0.1, 0.1))
        ('supported', 'contradicted', 'underpowered')
    """
    if math.isnan(low) or math.isnan(high):
        return "not applicable"
    if region[0] <= low and high <= region[1]:
        return "supported"
    return "contradicted" if high < region[0] or low > region[1] else "underpowered"


def needed_factor(value: float, low: float, high: float, region: tuple[float, float], power: float = POWER) -> float:
    """How many times the data the verdict would need to come with this power, if the estimate were the truth.

    The interval's half towards an edge is taken as 1.96 standard errors, which shrink with the root of n. With one edge
    in reach this is ((z.975 + z.8) * se / distance to the edge)^2; between two edges both must be cleared at once.

    Returns:
        The factor; infinity for an estimate on the edge itself.

    Example:
        >>> round(needed_factor(1.0, 0.0, 2.0, (0.0, float("inf"))), 3)  # on the verge: p = .05 has a power of one half
        2.043
    """
    half = (high - low) / 2
    below, above = half if value <= low else value - low, half if value >= high else high - value
    if region[0] <= value <= region[1]:
        reach = (_times(value - region[0], below), _times(region[1] - value, above))
    else:  # the other side is cleared by clearing the nearer edge
        outside = (value - region[1], below) if value > region[1] else (region[0] - value, above)
        reach = (_times(*outside), math.inf)
    if min(reach) <= 0.0:
        return math.inf
    # `shrink`: interval widths then over interval widths now; power falls as it grows.
    low_end, high_end = (min(reach) * _Z / (_Z + _NORMAL.inv_cdf(1 - (1 - power) / k)) for k in (2, 1))
    for _ in range(60):
        shrink = (low_end + high_end) / 2
        chance = sum(_NORMAL.cdf(_Z * (edge / shrink - 1)) for edge in reach) - 1
        low_end, high_end = (shrink, high_end) if chance >= power else (low_end, shrink)
    return low_end**-2


def _times(distance: float, half: float) -> float:
    return math.inf if half <= 0.0 else distance / half


def region_text(region: tuple[float, float], unit: str) -> str:
    """A region in words.

    Example:
        >>> region_text((0.6, float("inf")), ""), region_text((-5, 5), "points")
        ('at least 0.6', '-5 to 5 points')
    """
    low, high = (f"{edge:g}" for edge in region)
    words = f"at most {high}" if low == "-inf" else f"at least {low}" if high == "inf" else f"{low} to {high}"
    return f"{words} {unit}".strip()


@dataclass(frozen=True)
class _Finding:
    """The verdict on one row, or on what stands in its place."""

    part: Part
    verdict: str
    numbers: Mapping[str, Any]
    row: str = ""
    reason: str = ""
    n_needed: float = math.nan
    groups_needed: float = math.nan

    @property
    def slack(self) -> float:
        """How far the interval's ends are from crossing an edge, in the part's unit: the least decides."""
        low, high = self.numbers["low"], self.numbers["high"]
        return min(low - self.part.region[0], self.part.region[1] - high)


def judge_claims(
    claims: Sequence[Claim], tables: Mapping[str, pd.DataFrame], facts: Mapping[str, Mapping[str, Any]]
) -> pd.DataFrame:
    """The verdict on every claim, for every model, with every alternative of what the published text leaves open.

    Args:
        claims: what is judged.
        tables: tidy tables by experiment, with a column `model`; what is absent makes claims not applicable.
        facts: by model as the tables name it: its "family", "fusion" and "layers".

    Returns:
        `COLUMNS`, one row for each claim, model and setting. Numbers are those of the part that decides: the one that
        contradicts, the one without numbers, the one that needs most examples, else the one nearest to an edge.
        `n_needed` and `groups_needed` (examples and pictures for a power of 80 %) where underpowered.
    """
    rows = [
        _row(claim, model, known, parameter, setting, [_part(part, model, tables, known) for part in own])
        for claim in claims
        for parameter, setting, parts in claim.variants()
        for model, known in facts.items()
        for own in [[part for part in parts if _speaks(part.families, known)]]
    ]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    numbers = ["value", "low", "high", "region_low", "region_high", "baseline"]
    frame[numbers] = frame[numbers].astype("float64")
    whole = ["n", "groups", "n_needed", "groups_needed"]
    frame[whole] = frame[whole].astype("Int64")
    texts = [name for name in COLUMNS if name not in (*numbers, *whole)]
    frame[texts] = frame[texts].astype("string")
    return frame


def _row(
    claim: Claim, model: str, known: Mapping[str, Any], parameter: str, setting: str, findings: Sequence[_Finding]
) -> dict[str, Any]:
    found = _joint(findings) if findings else None
    verdict, reason = (found.verdict, found.reason) if found else ("not applicable", "")
    fusion_fits = not claim.fusion or known.get("fusion") == claim.fusion
    if not found or not _speaks(claim.families, known) or not fusion_fits:
        verdict, reason = "not applicable", f"the claim speaks of {_spoken(claim)}"
    part = found.part if found else claim.parts[0]
    needed = (found.n_needed, found.groups_needed) if found and verdict == "underpowered" else (math.inf, math.inf)
    return {
        **{"id": claim.id, "statement": claim.statement, "model": model, "parameter": parameter, "setting": setting},
        **{"verdict": verdict, "part": part.name if found else "", **(found.numbers if found else _no_numbers(part))},
        **dict(zip(("n_needed", "groups_needed"), map(_ceiling, needed), strict=True)),
        **{"region_low": part.region[0], "region_high": part.region[1], "region": region_text(part.region, part.unit)},
        **{"rule": part.reason, "published": _published(claim, part, str(known.get("family", "")))},
        **{"chosen": claim.chosen.get(parameter, ""), "row": found.row if found else ""},
        "parts": "; ".join(map(_told, findings)) if len(findings) > 1 else "",
        **{"reason": reason, "note": claim.note},
    }


def _joint(findings: Sequence[_Finding]) -> _Finding:
    """The finding that decides where all must hold."""
    for verdict in ("contradicted", "not applicable", "underpowered"):
        own = [finding for finding in findings if finding.verdict == verdict]
        if verdict == "underpowered" and own:
            most = max(own, key=lambda finding: finding.n_needed)
            return replace(most, groups_needed=max(finding.groups_needed for finding in own))
        if own:
            return own[0]
    return min(findings, key=lambda finding: finding.slack)


def _part(part: Part, model: str, tables: Mapping[str, pd.DataFrame], known: Mapping[str, Any]) -> _Finding:
    if part.table not in tables:
        return _without(part, f"the experiment {part.table} was not done")
    rows, reason, aside = _picked(part, where(tables[part.table], model=model), known, _kinds(tables, model))
    if reason:
        return _without(part, reason)
    findings = [_finding(part, row, aside) for _, row in rows.iterrows()]
    return _joint(findings)


def _picked(
    part: Part, rows: pd.DataFrame, known: Mapping[str, Any], kinds: set[str]
) -> tuple[pd.DataFrame, str, list[str]]:
    """The rows that a part picks, why there are none, and where another value had to stand in."""
    aside = []
    # Single values first: which of several is there depends on them.
    for column, wanted in sorted(part.pick.items(), key=lambda pair: isinstance(pair[1], list)):
        if column not in rows:
            return rows, f"the table {part.table} has no column {column!r}", []
        listed = wanted if isinstance(wanted, list) else [wanted]
        present = [value for value in listed if (rows[column] == value).any()]
        if not present:
            return rows, f"the table {part.table} has no row with {column} {' or '.join(map(repr, listed))}", []
        rows = where(rows, **{column: present[0]})
        if present[0] != listed[0]:
            if column == "kind" and kinds == {"existence"}:
                return rows, "the data hold questions about existence alone", []
            aside.append(f"{column} {present[0]!r}, as there is no {listed[0]!r} apart")
    if part.each == "layer" and part.depth != (0.0, 1.0):
        depth = rows["layer"].astype(float) / max(1, int(known.get("layers", 1)) - 1)
        rows = rows[(depth >= part.depth[0] - 1e-9) & (depth <= part.depth[1] + 1e-9)]
    if not len(rows):
        return rows, f"the table {part.table} has no row at the depth asked for", []
    if not part.each and len(rows) > 1:
        differ = [name for name in rows.columns if rows[name].astype(str).nunique() > 1]
        return rows, f"{len(rows)} rows of the table {part.table} fit, which differ in {', '.join(differ)}", []
    return rows, "", aside


def _finding(part: Part, row: pd.Series, aside: Sequence[str]) -> _Finding:
    numbers = {name: row[name] for name in ("value", "low", "high", "unit", "n", "groups", "baseline")}
    picked = {**part.pick, **({part.each: row[part.each]} if part.each else {})}
    what = ", ".join(f"{name} {row[name]}" for name in picked if str(row[name]) not in ("", "-1"))
    finding = _Finding(part, "not applicable", numbers, f"{part.table}: {what}")
    if row["unit"] != part.unit:
        return replace(finding, reason=f"the row is in {row['unit'] or 'no unit'}, the claim in {part.unit or 'none'}")
    if not math.isclose(row["level"], LEVEL):
        return replace(finding, reason=f"the row's interval is at {100 * row['level']:g} %, the rule at 95 %")
    told, unchanged = list(aside), row["unit"] == "points" and row["value"] == 0.0 and row["groups"] > 1
    low, high = row["low"], row["high"]
    if unchanged and math.isnan(low):
        low, high = _bound(int(row["groups"]))
        told.append("no picture changed: exact binomial bound, pictures as trials")
    if math.isnan(row["value"]) or math.isnan(low):
        return replace(finding, reason=str(row["note"]) or "no interval")
    verdict, needed = decide(low, high, part.region), {}
    if verdict == "underpowered":
        exact = unchanged and "exact binomial" in (row["method"] if math.isfinite(row["low"]) else told[-1])
        factor = _exact_factor(high, part.region) if exact else needed_factor(row["value"], low, high, part.region)
        needed = {"n_needed": factor * float(row["n"]), "groups_needed": factor * float(row["groups"])}
        told += ["more examples than can be named: the estimate is on the edge"] if factor > _MOST else []
    numbers = {**numbers, "low": low, "high": high}
    return replace(finding, verdict=verdict, numbers=numbers, reason="; ".join(told), **needed)


def _bound(groups: int) -> tuple[float, float]:
    """The exact bound, in points, where no picture's accuracy changed, so that resampling gives no interval.

    Were a share q of pictures to change, none of them would in `groups` with chance (1 - q)^groups; the largest q for
    which that is 2.5 % bounds the change, 100 q points either way (Clopper-Pearson; at worst all of a picture changes).
    """
    reach = 100 * (1 - ((1 - LEVEL) / 2) ** (1 / groups))
    return -reach, reach


def _exact_factor(reach: float, region: tuple[float, float]) -> float:
    """How many times the data bring such a bound to the nearest edge; (1 - q)^trials is the same before and after."""
    edge = min(map(abs, region)) / 100  # one end may be infinite: the other is then the nearer
    return math.log1p(-reach / 100) / math.log1p(-edge) if 0 < edge < 1 else math.inf


def _without(part: Part, reason: str) -> _Finding:
    return _Finding(part, "not applicable", _no_numbers(part), reason=reason)


def _no_numbers(part: Part) -> dict[str, Any]:
    return {
        **dict.fromkeys(("value", "low", "high", "baseline"), math.nan),
        **{"unit": part.unit, "n": pd.NA, "groups": pd.NA},
    }


def _kinds(tables: Mapping[str, pd.DataFrame], model: str) -> set[str]:
    """The kinds of questions that the data hold, where the table of accuracy tells."""
    table = tables.get("accuracy")
    return set() if table is None else set(where(table, model=model)["kind"]) - {"all"}


def _speaks(families: Sequence[str], known: Mapping[str, Any]) -> bool:
    return not families or known.get("family") in families


def _spoken(claim: Claim) -> str:
    if claim.fusion and not claim.families:
        return f"models of {claim.fusion} fusion"
    families = claim.families or tuple(dict.fromkeys(name for part in claim.parts for name in part.families))
    return f"{' and '.join(families)} alone"


def _published(claim: Claim, part: Part, family: str) -> str:
    """The figure of this family, else the pooled one, else those of the families that have one."""
    figures = part.published or {}
    for name in (family, "pooled"):
        if name in figures:
            return figures[name] + (" (pooled)" if name == "pooled" else "")
    return ", ".join(f"{figure} ({name})" for name, figure in figures.items())


def _told(finding: _Finding) -> str:
    """A part with its numbers and verdict."""
    value, low, high = (finding.numbers[name] for name in ("value", "low", "high"))
    shown = "" if math.isnan(value) else f" {value:.3g}" + ("" if math.isnan(low) else f" [{low:.3g}, {high:.3g}]")
    region = region_text(finding.part.region, finding.part.unit)
    return f"{finding.part.name}:{shown}, true where {region}: {finding.verdict}"


def _ceiling(number: float) -> Any:
    return math.ceil(number - 1e-6) if number <= _MOST else pd.NA
