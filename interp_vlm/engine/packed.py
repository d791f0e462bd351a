"""The `last_row` plan: many interventions on the answer's position as rows of one pass over shared keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from nnsight import NNsight
from torch import Tensor

from interp_vlm.engine import receipts
from interp_vlm.engine.access import Access
from interp_vlm.engine.cone import run_cone
from interp_vlm.engine.place import ResolvedPlace
from interp_vlm.engine.plan import Plan
from interp_vlm.engine.receipts import Receipt
from interp_vlm.engine.trunk import Trunk
from interp_vlm.tokens.batch import Batch

__all__ = ["Packed", "run_packed"]


@dataclass(frozen=True, eq=False)
class Packed:
    """The last row of each example as often as there are interventions, all over the trunk's keys: `last_row`.

    A row joins at its intervention's first layer. Every row attends the trunk's positions as the last row does, but for
    the last position itself: there it attends its own key instead, which lies behind the trunk's.

    Attributes:
        trunk: the clean run.
        starts: the first layer of each row, ascending.
        last: each example's answer position.
    """

    trunk: Trunk
    starts: tuple[int, ...]
    last: Int[Tensor, " batch"]

    @property
    def layer(self) -> int:
        return self.starts[0]

    def width(self, layer: int) -> int:
        """Rows computed in a layer."""
        return sum(start <= layer for start in self.starts)

    def entering(self, layer: int, hidden: Tensor | None) -> Float[Tensor, "batch row d"]:
        joining = self.starts.count(layer)
        if not joining:
            assert hidden is not None
            return hidden
        example = torch.arange(len(self.last), device=self.last.device)
        new = self.trunk.residuals[layer][example, self.last][:, None].expand(-1, joining, -1)
        return new.clone() if hidden is None else torch.cat([hidden, new], dim=1)

    def call(self, layer: int) -> dict[str, Any]:
        rows = self.last[:, None].expand(-1, self.width(layer))
        own = {"attention_mask": self._mask(layer), "past_key_values": self.trunk.prefix(self.trunk.length)}
        return {**self.trunk.call(layer, rows), **own}

    def _mask(self, layer: int) -> Shaped[Tensor, "batch _ row key"]:
        """The last row's mask once for each row, in the kind that the model uses, with a key for each row behind."""
        width, example = self.width(layer), torch.arange(len(self.last), device=self.last.device)
        mask = self.trunk.calls[layer]["attention_mask"]
        mask = self.trunk.keep(layer) if mask is None else mask
        blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        row = mask.expand(len(self.last), -1, -1, -1)[example, :, self.last]
        itself = row[example, :, self.last]
        trunk = row[:, :, None].repeat(1, 1, width, 1)
        trunk[example, :, :, self.last] = blocked
        own = torch.full((*trunk.shape[:3], width), blocked, dtype=mask.dtype, device=mask.device)
        own.diagonal(dim1=-2, dim2=-1).copy_(itself[..., None])
        return torch.cat([trunk, own], dim=-1)

    def answers(self, hidden: Float[Tensor, "batch row d"]) -> Float[Tensor, "batch row d"]:
        return hidden

    def placed(self, edit: ResolvedPlace, row: int) -> Column:
        """An edit of the last position on one of the rows."""
        facts = {name: getattr(edit, name) for name in ("intervention", "batch", "selected", "keys", "layers")}
        return Column(**facts, n_heads=edit.n_heads, clean_values=edit.clean_values, column=row, last=self.last)


@dataclass(eq=False, kw_only=True)
class Column(ResolvedPlace):
    """The place of an intervention on one of the packed rows.

    Attributes:
        column: which row.
        last: each example's answer position.
    """

    column: int
    last: Int[Tensor, " batch"]

    def prepared(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        if self.site.name == "attn_mask":
            value = value.expand(-1, self.n_heads, -1, -1)
        return value.clone(memory_format=torch.contiguous_format)

    def edit(self, value: Shaped[Tensor, "..."], layer: int) -> Shaped[Tensor, "..."]:
        """The edit, made in the value itself: of many rows this changes one."""
        example = torch.arange(len(self.last), device=self.last.device)
        self.here = self.selected[example, self.last][:, None]
        if self.site.name == "attn_mask":
            part = value[:, :, self.column : self.column + 1]
        else:
            part = value[:, self.column : self.column + 1]
        part.copy_(super().edit(part, layer))
        return value

    def query_rows(self) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
        assert self.here is not None
        return torch.full_like(self.here, self.column, dtype=torch.long), self.here

    def key_mask(self, width: int) -> Bool[Tensor, "batch key"]:
        """Of the rows' own keys, behind the trunk's, only this row's can be meant."""
        assert self.keys is not None
        example = torch.arange(len(self.last), device=self.last.device)
        found = super().key_mask(width)
        found[:, self.keys.shape[1] + self.column] = self.keys[example, self.last]
        return found


def run_packed(
    root: NNsight,
    access: Access,
    trunk: Trunk | None,
    clean: Float[Tensor, "batch vocab"],
    batch: Batch,
    groups: Sequence[tuple[int, Sequence[ResolvedPlace], Plan]],
    memory: int,
) -> Iterator[tuple[int, Float[Tensor, "batch vocab"], tuple[Receipt, ...]]]:
    """Run groups of edits of the answer's position, a row each, in as few passes as memory allows.

    Args:
        root: the wrapped model.
        access: its sites.
        trunk: the clean run; needed when there are groups.
        clean: its answer logits.
        batch: the encoded examples.
        groups: the number of each group, its edits and its plan.
        memory: bytes that the rows of one pass may take; halved when the device has less.

    Yields:
        Of each group its number, logits and receipts.
    """
    ordered = sorted(groups, key=lambda group: group[2].layer)
    if not ordered:
        return
    assert trunk is not None
    size = max(1, memory // _row_bytes(access, trunk, len(batch), len(ordered)))
    start = 0
    while start < len(ordered):
        part = ordered[start : start + size]
        try:
            found = _pass(root, access, trunk, clean, batch, part)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = min(size, len(part)) // 2 or 1
            continue
        yield from found
        start += size


def _row_bytes(access: Access, trunk: Trunk, batch: int, rows: int) -> int:
    """What one more row takes: its mask, its scores and weights in receipts, and the widest activations."""
    a, weight = access.anatomy, trunk.keys[0].element_size()
    keys = trunk.length + rows
    return batch * (a.n_heads * keys * (4 + 2 * weight) + weight * (8 * a.d_model + 3 * a.d_mlp + a.d_vocab))


def _pass(
    root: NNsight,
    access: Access,
    trunk: Trunk,
    clean: Float[Tensor, "batch vocab"],
    batch: Batch,
    groups: Sequence[tuple[int, Sequence[ResolvedPlace], Plan]],
) -> list[tuple[int, Float[Tensor, "batch vocab"], tuple[Receipt, ...]]]:
    """One pass for all groups, which come in the order of their first layers."""
    cone = Packed(trunk, tuple(plan.layer for _, _, plan in groups), batch.last.to(clean.device))
    placed = [[cone.placed(edit, row) for edit in edits] for row, (_, edits, _) in enumerate(groups)]
    everything = [edit for edits in placed for edit in edits]
    recording = run_cone(root, access, cone, receipts.program(everything))
    receipts.refuse_without_effect(everything)
    logits = recording.logits
    assert logits is not None
    changes = (logits - clean[:, None]).abs().amax(dim=(0, 2)).tolist()
    issued = receipts.issue(placed, recording, access, changes, "last_row")
    return [(number, logits[:, row], issued[row]) for row, (number, _, _) in enumerate(groups)]
