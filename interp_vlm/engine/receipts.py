"""Receipts: for every intervention, proof that it did what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_vlm.engine.access import Access, AttentionInputs
from interp_vlm.engine.attention import mix, rebuild
from interp_vlm.engine.full import Program, Recording
from interp_vlm.engine.place import ResolvedPlace, padded_positions
from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import indices
from interp_vlm.interventions.knockout import AttentionKnockout
from interp_vlm.models.anatomy import Anatomy

__all__ = ["Receipt", "issue", "program", "refuse_sliding", "refuse_without_effect"]

_BESIDES = (
    "this model also adds vision features between its first decoder layers, which this edit does not reach "
    "(an edit of 'vision_post' in the tower's first layers reaches both)"
)


@dataclass(frozen=True)
class Receipt:
    """What one intervention changed in one run.

    Attributes:
        intervention: its text.
        site, layers: where it acted.
        changed: attention edges removed (counted per head and layer), or values that are different now.
        unit: "edges" or "values".
        mass_left: attention weight left on blocked edges, the largest over rows, heads and layers; must be 0. None
            where no attention was blocked.
        unexplained: how far the heads' output at the blocked rows is from what the rebuilt weights make of the values,
            relative to its largest entry: evidence that attention really used the edited mask. None where not measured.
        logit_change: largest change of a logit at the answer position, of all interventions of the run together.
        plan: the engine's plan.
        dtype: the model's dtype.
        note: what the intervention does not reach, in words; mostly empty.
    """

    intervention: str
    site: str
    layers: tuple[int, ...]
    changed: int
    unit: str
    mass_left: float | None
    unexplained: float | None
    logit_change: float
    plan: str
    dtype: str
    note: str = ""

    def _repr_html_(self) -> str:
        from html import escape

        facts = {key: value for key, value in asdict(self).items() if value not in (None, "")}
        texts = {key: f"{value:.3g}" if isinstance(value, float) else str(value) for key, value in facts.items()}
        rows = "".join(
            f"<tr><th style='text-align:left'>{key}</th><td style='text-align:left'>{escape(text)}</td></tr>"
            for key, text in texts.items()
        )
        return f"<table>{rows}</table>"

    def __str__(self) -> str:
        proof = "" if self.mass_left is None else f", {self.mass_left:.1e} attention left on them"
        return (
            f"{self.intervention}: {self.changed} {self.unit} changed in layers {list(self.layers)}{proof}, "
            f"logits moved by up to {self.logit_change:.3g} ({self.plan}, {self.dtype})"
            + (f"; {self.note}" if self.note else "")
        )


def refuse_without_effect(edits: Sequence[ResolvedPlace]) -> None:
    """Refuse a knockout that found every edge blocked already (the future, in a causal model), and an edit of the
    vision tower at tokens that no row of it feeds (newlines).

    Raises:
        InterventionError: unless the intervention allows it.
    """
    for edit in edits:
        if edit.intervention.allow_empty or edit.intervention.during != "prompt":
            continue
        if edit.site.part == "vision" and edit.rows is not None and not any(edit.counts):
            raise InterventionError(
                f"{edit.intervention!r} selects image tokens that no row of the vision tower feeds",
                expected="tokens with a place in the picture",
                remedy="edit 'projector_out' instead, or pass allow_empty=True",
            )
        if isinstance(edit.intervention, AttentionKnockout) and edit.changed == 0:
            raise InterventionError(
                f"{edit.intervention!r} blocks no edge: the model attends none of them anyway",
                expected="queries after their keys where attention is causal, and within its window where it slides",
                remedy="swap queries and keys, choose other layers, or pass allow_empty=True",
            )


def refuse_sliding(edits: Sequence[ResolvedPlace], anatomy: Anatomy, length: int) -> None:
    """Refuse knockouts on generated tokens in layers whose key-value cache drops the first positions of the prompt.

    Raises:
        InterventionError: when a sliding window of such a layer is shorter than the generated text may get.
    """
    for edit in edits:
        sliding = [layer for layer in edit.layers if anatomy.layer_kinds[layer] == "sliding_attention"]
        acts = isinstance(edit.intervention, AttentionKnockout) and edit.intervention.during != "prompt"
        if acts and sliding and anatomy.sliding_window is not None and length > anatomy.sliding_window:
            raise InterventionError(
                f"layers {sliding} forget positions beyond {anatomy.sliding_window} while {length} are generated",
                expected="layers with full attention for a knockout on generated tokens",
                remedy="restrict layers=, generate fewer tokens, or use during='prompt'",
            )


def program(edits: Sequence[ResolvedPlace]) -> Program:
    """The forward pass that makes the edits and records what their receipts need."""
    blocked = {layer for edit in edits if isinstance(edit.intervention, AttentionKnockout) for layer in edit.layers}
    edited = {layer for edit in edits if edit.site.name == "z" for layer in edit.layers}
    return Program(edits=edits, captures={"z": blocked - edited}, attention=frozenset(blocked))


def issue(
    edits: Sequence[ResolvedPlace],
    recording: Recording,
    access: Access,
    logit_change: float,
    plan: str,
) -> tuple[Receipt, ...]:
    """Write the receipts of one run, in the order of its interventions."""
    assert recording.logits is not None
    receipts = []
    for edit in edits:
        mass, unexplained = None, None
        if isinstance(edit.intervention, AttentionKnockout):
            found = [_blocked_mass(edit, layer, recording, access) for layer in edit.layers]
            mass = max(mass for mass, _ in found)
            unexplained = max((gap for _, gap in found if gap is not None), default=None)
        receipts.append(
            Receipt(
                intervention=repr(edit.intervention),
                site=edit.site.name,
                layers=edit.layers,
                changed=edit.changed,
                unit="edges" if mass is not None else "values",
                mass_left=mass,
                unexplained=unexplained,
                logit_change=logit_change,
                plan=plan,
                dtype=str(recording.logits.dtype).removeprefix("torch."),
                note=_BESIDES if edit.site.part == "projector" and access.anatomy.between_layers else "",
            )
        )
    return tuple(receipts)


def _blocked_mass(edit: ResolvedPlace, layer: int, recording: Recording, access: Access) -> tuple[float, float | None]:
    knockout, inputs = edit.intervention, recording.attention[layer]
    assert isinstance(knockout, AttentionKnockout)
    assert edit.keys is not None
    rows, real = padded_positions(edit.selected)
    if rows.shape[1] == 0:
        return 0.0, None
    rows = rows.clamp(min=0)
    module: nn.Module = access.inside(layer, access.anatomy.attn)._module
    weights: Float[Tensor, "batch head row key"] = rebuild(module, access.anatomy, inputs, rows)
    weights = weights.masked_fill(~real[:, None, :, None], 0)
    heads = torch.ones(access.anatomy.n_heads, dtype=torch.bool, device=weights.device)
    if knockout.heads is not None:
        heads[:] = False
        heads[list(indices(knockout.heads, access.anatomy.n_heads, "head"))] = True
    blocked = edit.keys[:, None, None, :] & heads[None, :, None, None]
    mass = float((weights * blocked).sum(-1).max())
    return mass, _unexplained(weights, inputs, recording.values.get(("z", layer)), rows, real, access)


def _unexplained(
    weights: Tensor, inputs: AttentionInputs, z: Tensor | None, rows: Tensor, real: Tensor, access: Access
) -> float | None:
    if z is None:  # another intervention edits z here, so that it is no longer what attention made
        return None
    example = torch.arange(len(rows), device=rows.device)[:, None]
    seen = z[example, rows]
    gap = (mix(weights, inputs.v, access.anatomy) - seen).abs().masked_fill(~real[:, :, None, None], 0)
    return float(gap.max() / seen.abs().max().clamp(min=1e-30))
