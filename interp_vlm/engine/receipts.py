"""Receipts: for every intervention, proof that it did what it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_vlm.engine.access import Access
from interp_vlm.engine.attention import mix, rebuild
from interp_vlm.engine.full import Program, Recording
from interp_vlm.engine.place import ResolvedPlace
from interp_vlm.errors import InterventionError
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
            where no attention was blocked. That it is 0 does not mean that the information is gone: see `iv.leaks`.
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
    return Program(edits=edits, captures={"z": blocked}, attention=frozenset(blocked))


def issue(
    runs: Sequence[Sequence[ResolvedPlace]],
    recording: Recording,
    access: Access,
    logit_changes: Sequence[float],
    plan: str,
) -> list[tuple[Receipt, ...]]:
    """Write the receipts of runs that were computed in one pass, in the order of their interventions."""
    assert recording.logits is not None
    found = _weighed(runs, recording, access)
    dtype = str(recording.logits.dtype).removeprefix("torch.")
    issued = []
    for edits, change in zip(runs, logit_changes, strict=True):
        receipts = []
        for edit in edits:
            blocking = isinstance(edit.intervention, AttentionKnockout)
            masses, gaps = zip(*found[id(edit)], strict=True) if blocking else ((), ())
            receipts.append(
                Receipt(
                    intervention=repr(edit.intervention),
                    site=edit.site.name,
                    layers=edit.layers,
                    changed=edit.changed,
                    unit="edges" if blocking else "values",
                    mass_left=max(masses, default=None),
                    unexplained=max((gap for gap in gaps if gap is not None), default=None),
                    logit_change=change,
                    plan=plan,
                    dtype=dtype,
                    note=_BESIDES if edit.site.part == "projector" and access.anatomy.between_layers else "",
                )
            )
        issued.append(tuple(receipts))
    return issued


def _weighed(
    runs: Sequence[Sequence[ResolvedPlace]], recording: Recording, access: Access
) -> dict[int, list[tuple[float, float | None]]]:
    """For each knockout, layer by layer, the attention left on its edges and what its weights do not explain."""
    found: dict[int, list[tuple[float, float | None]]] = {}
    blocking = [edit for edits in runs for edit in edits if isinstance(edit.intervention, AttentionKnockout)]
    # Where the same run edits z, that is no longer what attention made.
    remade = {(id(edit), layer) for edits in runs for edit in edits for other in edits if other.site.name == "z"
              for layer in other.layers}  # fmt: skip
    for layer in sorted({layer for edit in blocking for layer in edit.layers}):
        acting = [edit for edit in blocking if layer in edit.layers]
        for edit, (mass, gap) in zip(acting, _weigh(acting, layer, recording, access), strict=True):
            known = None if (id(edit), layer) in remade else gap
            found.setdefault(id(edit), []).append((mass, known))
    return found


def _weigh(
    edits: Sequence[ResolvedPlace], layer: int, recording: Recording, access: Access
) -> Iterator[tuple[float, float | None]]:
    """The same for knockouts of one layer, whose attention weights are rebuilt in one go."""
    inputs, anatomy = recording.attention[layer], access.anatomy
    places = [edit.query_rows() for edit in edits]
    seen = recording.values["z", layer]
    rows = torch.cat([rows for rows, _ in places], dim=1).clamp(min=0).to(seen.device)
    real = torch.cat([own for _, own in places], dim=1).to(seen.device)
    module: nn.Module = access.inside(layer, anatomy.attn)._module
    weights: Float[Tensor, "batch head row key"] = rebuild(module, anatomy, inputs, rows)
    example = torch.arange(len(rows), device=rows.device)[:, None]
    seen = seen[example, rows]
    counts = [own.shape[1] for _, own in places]
    masks = [edit.key_mask(weights.shape[-1], weights.device) for edit in edits]
    keys = torch.cat([mask[:, None].expand(-1, n, -1) for mask, n in zip(masks, counts, strict=True)], dim=1)
    knockouts = [edit.intervention for edit in edits if isinstance(edit.intervention, AttentionKnockout)]
    heads = torch.stack([knockout.head_mask(anatomy.n_heads) for knockout in knockouts]).to(rows.device)
    heads = heads.repeat_interleave(torch.tensor(counts, device=rows.device), dim=0).T
    left = (weights * keys[:, None]).sum(-1).masked_fill(~(real[:, None] & heads), 0).amax(dim=(0, 1)).tolist()
    gaps = (mix(weights, inputs, anatomy) - seen).abs().amax(dim=(2, 3)).masked_fill(~real, 0).amax(dim=0).tolist()
    sizes = seen.abs().amax(dim=(0, 2, 3)).tolist()
    found, start = real.any(dim=0).tolist(), 0
    for count in counts:
        part = slice(start, start := start + count)
        if any(found[part]):
            yield max(left[part]), max(gaps[part]) / max(*sizes[part], 1e-30)
        else:
            yield 0.0, None
