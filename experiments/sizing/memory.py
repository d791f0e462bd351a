"""How much memory the plans take on the published models, by `vlm.plan`, and how much a run really takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import interp_vlm as iv
from experiments.benchmarks.engine import peak
from experiments.sizing.shapes import MODELS, Zeros, asked, weightless
from interp_vlm.engine.memory import DEFAULT
from interp_vlm.study.knockout import EDGES

__all__ = ["CARDS", "INTERVENTIONS", "Needed", "needed", "table"]

CARDS = (24, 40, 80)
"""Memory of accelerators, in GB."""

SPARE = 2**30
"""Bytes left to the driver, and to what an allocator cannot hand out again."""

GIB, GB = 2**30, 10**9


ROUTES = ("image to last", "image to question", "image to all text")


@dataclass(frozen=True)
class Needed:
    """Bytes that one question takes; all but the weights grow with the batch.

    Attributes:
        model: its name.
        what: the intervention, in words.
        plan: the engine's.
        tokens: of the question with its picture.
        weights: of the whole model.
        kept: of the run without interventions, where cones start from one layer.
        working: of a pass, as the plan estimates it.
        clean: of the run without interventions, besides what is kept of it.
        measured: of a pass as it runs, or 0.
    """

    model: str
    what: str
    plan: str
    tokens: int
    weights: int
    kept: int
    working: int
    clean: int
    measured: int = 0

    def batch(self, card: int) -> int:
        """The largest batch on a card of so many GB.

        The engine keeps at most a share of the memory that is free, and what it holds already is not.
        """
        room = card * GB - SPARE - self.weights
        held = self.kept + max(self.working, self.clean)
        kept = 0 if self.plan == "full" else self.kept
        return max(0, int(room // (held + kept / DEFAULT)))


INTERVENTIONS: dict[str, Any] = {
    "none": (),
    **{f"knockout, {route}": iv.AttentionKnockout(*EDGES[route]) for route in ROUTES},
    "one layer's MLP bypassed": iv.Ablation("mlp_out", layers=[0], to="zero"),
    "image tokens masked": iv.Ablation("projector_out", positions="image", to="zero"),
}
"""Kinds of interventions that the study makes, each as it takes most: knockouts in all layers, cones from the first."""


def needed(family: str, *, measure: bool = False) -> Iterator[Needed]:
    """What each intervention takes on a published model."""
    published = MODELS[family]
    with Zeros():
        vlm = weightless(published)
        batch = asked(vlm, published)
        a, itemsize, tokens = vlm.anatomy, vlm.dtype.itemsize, batch.inputs["input_ids"].shape[1]
        weights = sum(weight.numel() for weight in vlm.model.parameters()) * itemsize
        cache = 2 * a.n_layers * a.n_kv_heads * a.d_head * tokens * itemsize
        whole = vlm.plan(batch, ()).working
        plans = {what: vlm.plan(batch, some) for what, some in INTERVENTIONS.items()}
        took = _measured(vlm, asked(vlm, published)) if measure else dict.fromkeys(plans, 0)
    for what, plan in plans.items():
        # a trunk's keys and values are the cache of the run that left them
        clean = whole if plan.name == "full" else whole - cache
        yield Needed(published.name, what, plan.name, tokens, weights, plan.memory, plan.working, clean, took[what])


def _measured(vlm: iv.VLM, batch: iv.Batch) -> dict[str, int]:
    """The most bytes that a pass of each intervention holds, on a run without interventions that is there already."""
    found = {"none": peak(lambda: vlm.run(batch))}
    vlm.run(batch, INTERVENTIONS["one layer's MLP bypassed"])  # what cones start from
    edits = {what: some for what, some in INTERVENTIONS.items() if what not in found}
    return found | {what: peak(lambda some=some: vlm.run(batch, some)) for what, some in edits.items()}


def table(rows: Sequence[Needed]) -> str:
    """The rows as Markdown."""
    lines = [
        ["model, weights, tokens", "intervention", "plan", "kept", "a pass", "measured"]
        + [f"batch on {card} GB" for card in CARDS]
    ]
    lines.append(["---"] * 3 + ["---:"] * (3 + len(CARDS)))
    for number, row in enumerate(rows):
        first = number == 0 or rows[number - 1].model != row.model
        facts = f"{row.model}, {row.weights / GIB:.1f} GiB, {row.tokens}" if first else ""
        sizes = [f"{size / 2**20:,.0f}" for size in (row.kept, row.working, row.measured)]
        lines.append([facts, row.what, row.plan, *sizes, *(str(row.batch(card)) for card in CARDS)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
