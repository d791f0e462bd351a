"""Plans: how much of the model an intervention makes the engine recompute, and why.

What an intervention can change is read from the masks that attention received, not from a family's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp_vlm.engine.place import ResolvedPlace
from interp_vlm.engine.trunk import Trunk
from interp_vlm.errors import InterventionError
from interp_vlm.interventions.knockout import AttentionKnockout
from interp_vlm.models.anatomy import Anatomy
from interp_vlm.tokens.batch import Batch

__all__ = ["ENGINES", "Plan", "check_engine", "choose", "working"]

ENGINES = ("auto", "last_row", "suffix", "resume", "full")
"""What `engine=` may be: "auto" takes the smallest plan that is exact."""


@dataclass(frozen=True)
class Plan:
    """The engine's choice for interventions that run together on a batch.

    Attributes:
        name: "last_row", "suffix", "resume" or "full".
        rows: token rows computed in each layer, of all examples.
        layers: decoder layers computed.
        layer: the first of them.
        start: the first position computed.
        reason: why this plan, in words.
        memory: bytes that are kept of the run without interventions.
        tower: whether the vision tower runs; where nothing in it is edited, its output is taken from that run.
        idle: whether nothing reads what is changed, so that the answers are those of that run.
        working: bytes that a pass takes besides weights and what is kept, by estimate; only `vlm.plan` works it out.
    """

    name: str
    rows: int
    layers: int
    layer: int
    start: int
    reason: str
    memory: int = 0
    tower: bool = False
    idle: bool = False
    working: int = 0

    def explain(self) -> str:
        """The plan in a sentence."""
        kept = f", {self.memory / 2**20:.1f} MiB kept of the run without interventions" if self.memory else ""
        tower = ", the vision tower taken from it" if self.name == "full" and not self.tower else ""
        working = f", about {self.working / 2**20:.1f} MiB in a pass" if self.working else ""
        computed = f"{self.rows} token rows through {self.layers} layers"
        return f"{self.name}: {computed}{kept}{working}{tower}, because {self.reason}"


def check_engine(engine: str) -> None:
    """Refuse an engine that does not exist."""
    if engine not in ENGINES:
        raise InterventionError(f"engine={engine!r}", expected=" or ".join(map(repr, ENGINES)))


def choose(
    edits: Sequence[ResolvedPlace],
    batch: Batch,
    n_layers: int,
    trunk: Trunk | None,
    engine: str = "auto",
    why: str = "",
    decoder: Mapping[str, Any] | None = None,
) -> Plan:
    """Choose the smallest exact plan for edits that run together, or check the one that was asked for.

    Args:
        edits: interventions resolved in the batch.
        batch: the encoded examples.
        n_layers: decoder layers of the model.
        trunk: the clean run; None where no cone can start from one.
        engine: one of `ENGINES`.
        why: why there is no trunk, in words.
        decoder: how the clean run called the decoder; None where it is not known.

    Raises:
        InterventionError: for an engine that does not exist, or a plan that would not be exact.
    """
    exact = _exact(edits, batch, n_layers, trunk, why)
    if engine == "auto":
        whole = any(edit.site.part == "vision" for edit in edits)
        if exact[0].name == "full" and edits and decoder is not None and not whole:
            kept = sum(value.nbytes for value in decoder.values() if isinstance(value, Tensor))
            return replace(exact[0], tower=False, memory=kept)
        return exact[0]
    named = {plan.name: plan for plan in exact}
    if engine not in named:
        raise InterventionError(
            f"engine={engine!r} would not be exact here",
            expected=" or ".join(map(repr, ("auto", *named))),
            remedy=f"the smallest exact plan is {exact[0].explain()}",
        )
    return named[engine] if engine != "full" else _full(batch, n_layers, "it was asked for")


def working(plan: Plan, edits: Sequence[ResolvedPlace], batch: Batch, anatomy: Anatomy, itemsize: int) -> int:
    """Bytes that one pass of a plan takes at its height besides the weights and what is kept, by estimate.

    The height is the widest of an MLP, the scores of blocked edges in receipts, and the logits; until its end a pass
    also holds what receipts need of the layers with blocked edges, and the model's own key-value cache where it runs
    as a whole. Attention is taken to be sdpa, and the image side to be smaller than the decoder. docs/scale.md says how
    near this comes to what is measured.

    Args:
        plan: the choice for these interventions.
        edits: they, resolved in the batch; all in a pass of their own.
        batch: the encoded examples.
        anatomy: the model's sizes.
        itemsize: bytes of one of its numbers.
    """
    a, keys = anatomy, batch.inputs["input_ids"].shape[1]
    packed = plan.name in ("last_row", "suffix")
    heads, shared = a.n_heads * a.d_head, a.n_kv_heads * a.d_head
    knockouts = [edit for edit in edits if isinstance(edit.intervention, AttentionKnockout)]
    blocked = len({layer for edit in knockouts for layer in edit.layers})
    by_head = packed or any(edit.intervention.heads is not None for edit in knockouts)  # type: ignore[attr-defined]
    layer = plan.rows * (3 * a.d_mlp + 3 * a.d_model)
    scores = 0
    if packed:  # attention reads kept and own keys and values as one tensor, for several rows once for every head
        each_head = heads if plan.rows > len(batch) and heads > shared else 0
        layer += len(batch) * 2 * (shared + each_head) * keys
    if knockouts:
        queries = max(int(edit.selected.sum(dim=1).max()) for edit in knockouts)
        # weights are rebuilt in the model's type and in four bytes, each before and after its mask
        scores = len(batch) * (queries * a.n_heads * keys * (2 + 8 // itemsize) + (heads + shared) * keys)
    logits = (plan.rows if plan.tower else len(batch)) * a.d_vocab
    held = itemsize * blocked * plan.rows * 2 * (heads + shared)
    held += blocked * plan.rows * keys * (a.n_heads if by_head else 1)  # masks, a byte for each edge
    if plan.name == "full":  # what enters the first layer; before that, words and pictures by themselves
        held += itemsize * plan.rows * a.d_model * (3 if plan.tower else 1)
    if plan.tower:
        held += itemsize * plan.rows * a.n_layers * 2 * shared
    answers = len(batch) * a.d_vocab * (itemsize + 24)  # read in double precision, when all else is done
    return max(held + itemsize * max(layer, scores, logits), answers)


def _exact(edits: Sequence[ResolvedPlace], batch: Batch, n_layers: int, trunk: Trunk | None, why: str) -> list[Plan]:
    """The plans that are exact, the smallest first."""
    beside = any(edit.site.part != "decoder" for edit in edits)
    if not edits or beside or trunk is None:
        what = "nothing is edited" if not edits else "the image side is edited" if beside else why
        return [_full(batch, n_layers, what)]
    layer = min(layer for edit in edits for layer in edit.layers)
    rows = [_touched(edit, trunk) for edit in edits]
    touched = rows[0] if len(rows) == 1 else torch.stack(rows).any(dim=0)
    # What a layer's attention reads has been decided before it: an edit behind that point spreads from the next layer.
    spreads = range(min(_spread_from(edit) for edit in edits), n_layers)
    key = layer, spreads, touched.cpu().numpy().tobytes(), tuple(trunk.residuals)
    if key not in trunk.plans:
        trunk.plans[key] = _cones(layer, touched, spreads, batch, n_layers, trunk)
    return trunk.plans[key]


def _cones(
    layer: int, touched: Bool[Tensor, "batch pos"], spreads: range, batch: Batch, n_layers: int, trunk: Trunk
) -> list[Plan]:
    """The same for edits of these positions from this layer on."""
    length, kept, depth = trunk.length, trunk.nbytes, n_layers - layer
    last = batch.last.to(touched.device)
    seen = trunk.attended(spreads) if spreads else None
    key = id(seen), touched.cpu().numpy().tobytes()
    if key not in trunk.spreads:  # most models have one mask for all layers
        trunk.spreads[key] = _spread(touched, seen, batch)
    start, alone, idle = trunk.spreads[key]
    plans = []
    above = f"nothing changes before layer {layer}"
    if alone and not trunk.unknown:
        reason = f"{above}, and from there on only the answer's own row, which no other row attends"
        plans.append(Plan("last_row", len(batch), depth, layer, int(last.min()), reason, kept, idle=idle))
    if start > 0 and not trunk.unknown:
        reason = f"{above} nor before position {start}, since no row before it attends a later one that does"
        plans.append(Plan("suffix", len(batch) * (length - start), depth, layer, start, reason, kept, idle=idle))
    plans.append(Plan("resume", len(batch) * length, depth, layer, 0, above, kept, idle=idle))
    return [*plans, _full(batch, n_layers, "it was asked for")]


def _spread(
    touched: Bool[Tensor, "batch pos"], attended: Bool[Tensor, "#batch query key"] | None, batch: Batch
) -> tuple[int, bool, bool]:
    """The first position that edits of these rows can change when other rows read them through these masks, whether
    they can change the answers' own rows alone, and whether no answer can change."""
    real = batch.inputs["attention_mask"].to(touched.device).bool()
    last = torch.zeros_like(touched)
    last[torch.arange(len(batch), device=touched.device), batch.last.to(touched.device)] = True
    start = int(touched.any(dim=0).float().argmax()) if bool(touched.any()) else int(batch.last.min())
    idle = not bool(touched.any()) or (attended is None and not bool((touched & last).any()))
    alone = not bool((touched & ~last).any())
    if attended is None:
        return start, alone, idle
    seen = attended.to(touched.device) & real[:, :, None]
    alone = alone and not bool((seen & last[:, None, :] & ~last[:, :, None]).any())
    while start > 0:
        earlier = seen[:, :start, start:].any(dim=2).any(dim=0)
        if not bool(earlier.any()):
            break
        start = int(earlier.float().argmax())
    return start, alone, idle


def _touched(edit: ResolvedPlace, trunk: Trunk) -> Bool[Tensor, "batch pos"]:
    """The rows in which an edit changes anything: of a knockout's, those that attend one of its keys at all."""
    if not isinstance(edit.intervention, AttentionKnockout):
        return edit.selected
    attended = trunk.attended(edit.layers)
    key = id(attended), edit.intervention.selectors
    if key not in trunk.touched:
        assert edit.keys is not None
        example, row = edit.selected.nonzero(as_tuple=True)
        edges = attended.to(row.device).expand(len(edit.batch), -1, -1)[example, row] & edit.keys[example]
        trunk.touched[key] = edit.selected.index_put((example, row), edges.any(dim=1))
    return trunk.touched[key]


def _spread_from(edit: ResolvedPlace) -> int:
    """The first layer in which other rows can read what the edit changed."""
    return min(edit.layers) + (edit.site.name != "resid_pre")


def _full(batch: Batch, n_layers: int, reason: str) -> Plan:
    return Plan("full", batch.inputs["input_ids"].numel(), n_layers, 0, 0, reason, tower=True)
