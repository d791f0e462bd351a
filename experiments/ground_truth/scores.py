"""What a method named against what was planted: precision and recall, and how faithful the heads it ranks first are.

Faithfulness, CPR and CMD are those of the Mechanistic Interpretability Benchmark (Mueller et al. 2025, arXiv
2504.13151), with heads as the components: the heads of a circuit keep the values of the clean picture, all others get
those of the corrupt one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import interp_vlm as iv
from experiments.ground_truth.bench import FLOOR, WHAT, Bench, Found

__all__ = ["SIZES", "area", "circuits", "faithfulness", "integrated", "precision_recall", "score"]

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""MIB's circuit sizes, as shares of all components."""
Head = tuple[int, int]


def precision_recall(found: frozenset[Hashable], true: frozenset[Hashable]) -> tuple[float, float]:
    """Share of what was named that is true, and share of what is true that was named; NaN where there is none.

    Example:
        >>> precision_recall(frozenset({1, 2}), frozenset({2, 3, 4, 5}))
        (0.5, 0.25)
    """
    hits = len(found & true)
    return hits / len(found) if found else float("nan"), hits / len(true) if true else float("nan")


def score(
    found: Found,
    truth: Found,
    decoys: Iterable[Head] = (),
    *,
    whole: Found | None = None,
    route: Found | None = None,
) -> list[dict[str, Any]]:
    """One row for each thing that the method speaks of.

    Args:
        found: what the method named.
        truth: what it should have named.
        decoys: heads that attend sharply to the right patch and carry nothing.
        whole: the route with its backups, where it has any: naming those is no mistake.
        route: where nothing should have been named, the route that the model has.
    """
    rows = []
    for what, fields in WHAT.items():
        for name in fields:
            named, true = getattr(found, name), getattr(truth, name)
            if named is None:
                continue
            allowed = true if whole is None else getattr(whole, name)
            row = {
                "what": what, "named": len(named), "true": len(true), "precision": precision_recall(named, allowed)[0],
                "recall": precision_recall(named, true)[1], "exact": named == allowed,
            }  # fmt: skip
            if name == "heads" and (fooling := frozenset(decoys)):
                row["decoys"] = precision_recall(named, fooling)[1]
            if spare := allowed - true:
                row["backups"] = precision_recall(named, spare)[1]
            if route is not None:
                row["on_route"] = precision_recall(named, getattr(route, name))[0]
            rows.append(row)
    return rows


def circuits(ranking: dict[Head, float], signed: bool = True) -> list[frozenset[Head]]:
    """The heads that are kept at each of MIB's sizes, the best first.

    Scores are told apart by hundredths of a nat, below which no effect counts; ties go to the earlier head.

    Args:
        ranking: a score of every head.
        signed: rank by the score itself (for CPR), or by its size (for CMD).

    Example:
        >>> [len(kept) for kept in circuits({(0, head): float(head) for head in range(16)})]
        [0, 0, 0, 0, 0, 0, 1, 3, 8, 16]
    """
    size_of = {head: value if signed else abs(value) for head, value in ranking.items()}
    order = sorted(ranking, key=lambda head: (-round(size_of[head] / FLOOR), head))
    return [frozenset(order[: int(size * len(order))]) for size in SIZES]


def faithfulness(bench: Bench, kept: Sequence[frozenset[Head]]) -> list[float]:
    """f = (m(circuit) - m(nothing)) / (m(model) - m(nothing)), m being the mean difference of the answers' scores."""
    nothing = frozenset()
    cache = bench.vlm.capture(bench.corrupt, "z")
    edits = {circuit: _without(bench, cache, circuit) for circuit in dict.fromkeys([nothing, *kept])}
    edited = [circuit for circuit, patches in edits.items() if patches]
    lost = dict(zip(edited, bench.removed([edits[circuit] for circuit in edited]).mean(axis=1), strict=True))
    return [1.0 - float(lost.get(circuit, 0.0) / lost[nothing]) for circuit in kept]


def _without(bench: Bench, cache: Any, circuit: frozenset[Head]) -> list[Any]:
    """Patches of every head outside the circuit."""
    heads = range(bench.vlm.anatomy.n_heads)
    outside = {layer: [head for head in heads if (layer, head) not in circuit] for layer in bench.layers}
    return [
        iv.ActivationPatch("z", [layer], heads=rest, source=cache, allow_empty=True)
        for layer, rest in outside.items()
        if rest
    ]


def area(curve: Sequence[float]) -> float:
    """Area under a curve over MIB's sizes, by the trapezoidal rule.

    Example:
        >>> area([1.0] * 10).__round__(6)
        0.999
    """
    steps = zip(pairwise(SIZES), pairwise(curve), strict=True)
    return sum((right - left) * (low + high) / 2.0 for (left, right), (low, high) in steps)


def integrated(bench: Bench, rankings: dict[str, dict[Head, float]]) -> dict[str, tuple[float, float]]:
    """CPR (higher is better) and CMD (0 is best) of every ranking."""
    sizes = {(name, signed): circuits(rankings[name], signed) for name in rankings for signed in (True, False)}
    flat = [circuit for each in sizes.values() for circuit in each]
    known = dict(zip(flat, faithfulness(bench, flat), strict=True))
    curves = {key: [known[circuit] for circuit in each] for key, each in sizes.items()}
    return {name: (area(curves[name, True]), area([abs(1.0 - f) for f in curves[name, False]])) for name in rankings}
