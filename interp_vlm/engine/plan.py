"""Plans: how much of the model an intervention makes the engine recompute, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import Intervention
from interp_vlm.tokens.batch import Batch

__all__ = ["ENGINES", "Plan", "plan"]

ENGINES = ("auto", "full")


@dataclass(frozen=True)
class Plan:
    """The engine's choice for a list of interventions on a batch.

    Attributes:
        name: "full" runs the whole model once for the list.
        rows: token rows computed per layer.
        layers: decoder layers computed.
        reason: why this plan, in words.
    """

    name: str
    rows: int
    layers: int
    reason: str

    def explain(self) -> str:
        """The plan in a sentence."""
        return f"{self.name}: {self.rows} token rows through {self.layers} layers, because {self.reason}"


def plan(batch: Batch, interventions: Sequence[Intervention], n_layers: int, engine: str = "auto") -> Plan:
    """Choose the plan for a list of interventions.

    Raises:
        InterventionError: for an engine that does not exist.
    """
    if engine not in ENGINES:
        raise InterventionError(f"engine={engine!r}", expected=" or ".join(map(repr, ENGINES)))
    rows = batch.inputs["input_ids"].numel()
    reason = "it was asked for" if engine == "full" else "every intervention runs through the whole model so far"
    return Plan("full", rows, n_layers, reason)
